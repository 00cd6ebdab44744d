"""What can go wrong in training, grouped by who must act. Each group has its exit code.

TrainingError
├── InvalidSetup (2)        the person who typed the command must change it, or the data
│   ├── UnknownName
│   ├── DeviceUnavailable
│   ├── DataMissing
│   ├── DataCorrupt
│   ├── ShapeUnsuitable
│   ├── DownloadFailed
│   ├── RunNotFound
│   ├── NotARun
│   ├── CheckpointDamaged
│   └── ResumeMismatch
└── GateFailed (3)          the result is not what it must be; nothing was published
    ├── Diverged
    ├── GraphRejected
    ├── ParityFailed
    └── BatchDependence
"""

from collections.abc import Sequence
from typing import ClassVar


class TrainingError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code: ClassVar[int] = 1
    """Exit code of `vae-train` when this ends a command."""


class InvalidSetup(TrainingError):
    """The command cannot work as it was given. Abstract: raise one of its leaves."""

    exit_code: ClassVar[int] = 2


class UnknownName(InvalidSetup):
    """A preset or a data set of that name does not exist."""

    def __init__(self, kind: str, name: str, *, known: Sequence[str]) -> None:
        super().__init__(f"{kind} {name!r} does not exist; known: {', '.join(known)}")
        self.kind, self.name, self.known = kind, name, tuple(known)


class DeviceUnavailable(InvalidSetup):
    """The device that was asked for is not usable here."""

    def __init__(self, device: str) -> None:
        super().__init__(f"device {device!r}: PyTorch finds no usable one here; use --device cpu")
        self.device = device


class DataMissing(InvalidSetup):
    """A file of a data set is not where it must be, and cannot be put there."""

    def __init__(self, *, file: str, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file, self.problem = file, problem


class DataCorrupt(InvalidSetup):
    """A file is not the official one: its unpacked bytes have another digest."""

    def __init__(self, *, file: str, expected: str, actual: str) -> None:
        super().__init__(
            f"{file}: the unpacked bytes have SHA-256 {actual}, expected {expected}; "
            "remove the file and fetch it again with vae-train data"
        )
        self.file, self.expected, self.actual = file, expected, actual


class ShapeUnsuitable(InvalidSetup):
    """The architecture that was asked for does not take data of this shape."""

    def __init__(self, data_shape: Sequence[int], *, problem: str) -> None:
        shape = tuple(data_shape)
        super().__init__(f"data of shape {shape}: {problem}; choose another model.channels or other data")
        self.data_shape, self.problem = shape, problem


class DownloadFailed(InvalidSetup):
    """No mirror gave the file."""

    def __init__(self, *, file: str, reasons: Sequence[str]) -> None:
        super().__init__(
            f"{file}: no mirror gave it ({'; '.join(reasons)}); get the official file yourself and name its "
            "folder with --data-dir"
        )
        self.file, self.reasons = file, tuple(reasons)


class RunNotFound(InvalidSetup):
    """The folder does not hold what a training run leaves there."""

    def __init__(self, *, location: str, missing: str) -> None:
        super().__init__(f"{location}: there is no {missing}; give the folder that vae-train fit wrote")
        self.location, self.missing = location, missing


class NotARun(InvalidSetup):
    """The folder that a run should be written to holds something else."""

    def __init__(self, *, location: str) -> None:
        super().__init__(f"{location} is not empty and not a run folder; name another with --output-dir")
        self.location = location


class CheckpointDamaged(InvalidSetup):
    """A checkpoint cannot be read, or its content does not have the digest that it states."""

    def __init__(self, *, location: str, problem: str) -> None:
        super().__init__(f"{location}: {problem}; remove it, or begin again with --resume never")
        self.location, self.problem = location, problem


class ResumeMismatch(InvalidSetup):
    """The checkpoint belongs to another configuration."""

    def __init__(self, *, location: str, differences: Sequence[str]) -> None:
        super().__init__(
            f"{location}: the checkpoint was made with another configuration, now {', '.join(differences)}; "
            "use another --output-dir, or begin again with --resume never"
        )
        self.location, self.differences = location, tuple(differences)


class GateFailed(TrainingError):
    """A result did not pass its gate. Abstract: raise one of its leaves."""

    exit_code: ClassVar[int] = 3


class Diverged(GateFailed):
    """The objective is not a finite number any more."""

    def __init__(self, *, epoch: int) -> None:
        super().__init__(
            f"epoch {epoch}: the ELBO is not finite; lower optimizer.learning_rate "
            "(the last checkpoint is from before)"
        )
        self.epoch = epoch


class GraphRejected(GateFailed):
    """An exported graph holds what it must not hold, or lacks what it must have."""

    def __init__(self, *, graph: str, problem: str) -> None:
        super().__init__(f"{graph}.onnx: {problem}; no bundle was written")
        self.graph, self.problem = graph, problem


class ParityFailed(GateFailed):
    """PyTorch and ONNX Runtime disagree on an output."""

    def __init__(self, *, output: str, batch: int, difference: float, tolerance: float) -> None:
        super().__init__(
            f"{output}: PyTorch and ONNX Runtime differ by {difference:.3g} on a batch of {batch}, "
            f"allowed is {tolerance:.1g} absolute plus relative; no bundle was written"
        )
        self.output, self.batch, self.difference, self.tolerance = output, batch, difference, tolerance


class BatchDependence(GateFailed):
    """The answer for a row depends on the other rows of its batch."""

    def __init__(self, *, output: str, batch: int, row: int) -> None:
        super().__init__(
            f"{output}: row {row} of a batch of {batch} is not bit-equal to the same row alone; "
            "no bundle was written"
        )
        self.output, self.batch, self.row = output, batch, row
