"""What can go wrong in training, grouped by who must act. Each group has its exit code.

TrainingError
├── InvalidSetup (2)        the person who typed the command must change it, or the data
│   ├── UnknownName
│   ├── DeviceUnavailable
│   ├── DataMissing
│   ├── DataCorrupt
│   ├── LabelsMissing
│   ├── ShapeUnsuitable
│   ├── RowsConstant
│   ├── BatchTooLarge
│   ├── BatchUneven
│   ├── ExtraMissing
│   ├── DownloadFailed
│   ├── RunNotFound
│   ├── NotARun
│   ├── CheckpointDamaged
│   └── ResumeMismatch
└── GateFailed (3)          the result is not what it must be; nothing was published
    ├── ContestantFailed
    ├── ChecksFailed
    ├── Diverged
    ├── EntropyUndercut
    ├── GraphRejected
    ├── ParityFailed
    └── BatchDependence
"""

from collections.abc import Sequence
from functools import partial
from typing import ClassVar, Self


class TrainingError(Exception):
    """Base of every error that this package raises on purpose. Survives the way from one process to another."""

    exit_code: ClassVar[int] = 1
    """Exit code of `vae-train` when this ends a command."""

    def __reduce__(self) -> tuple[partial[Self], tuple[()]]:
        """Return how to make it anew: pickle itself would lose keyword-only arguments."""
        return partial(type(self), **vars(self)), ()


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


class LabelsMissing(InvalidSetup):
    """What was asked for needs the class of each row, and the data set says none."""

    def __init__(self, title: str) -> None:
        super().__init__(f"{title}: it has no labels; leave out what needs classes, or take a labelled data set")
        self.title = title


class ShapeUnsuitable(InvalidSetup):
    """The architecture that was asked for does not take data of this shape."""

    def __init__(self, data_shape: Sequence[int], *, problem: str) -> None:
        shape = tuple(data_shape)
        super().__init__(f"data of shape {shape}: {problem}; choose another model.channels or other data")
        self.data_shape, self.problem = shape, problem


class RowsConstant(InvalidSetup):
    """Every row of the training split is the same, or there is none."""

    def __init__(self, name: str, *, num_rows: int) -> None:
        super().__init__(
            f"{name}: all {num_rows} training rows are the same; there is nothing to learn, look at the data with "
            "vae-train data"
        )
        self.name, self.num_rows = name, num_rows


class BatchTooLarge(InvalidSetup):
    """A step should take more rows than the training split has."""

    def __init__(self, *, batch_size: int, num_rows: int) -> None:
        super().__init__(
            f"optimizer.batch_size is {batch_size} and there are {num_rows} training rows; set it to at most "
            f"{num_rows}, with --batch-size"
        )
        self.batch_size, self.num_rows = batch_size, num_rows


class BatchUneven(InvalidSetup):
    """The rows of a batch cannot be divided equally over the processes."""

    def __init__(self, *, batch_size: int, num_processes: int) -> None:
        super().__init__(
            f"optimizer.batch_size is {batch_size}, which {num_processes} processes cannot share equally; "
            "take a multiple of their number, with --batch-size"
        )
        self.batch_size, self.num_processes = batch_size, num_processes


class ExtraMissing(InvalidSetup):
    """An option needs packages that the installation left out."""

    def __init__(self, option: str, *, extra: str, problem: str) -> None:
        super().__init__(f"{option}: {problem}; install it with pip install 'vae-serving[{extra}]'")
        self.option, self.extra, self.problem = option, extra, problem


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


class ContestantFailed(GateFailed):
    """A contestant of the benchmark did not come to the end of its task."""

    def __init__(self, contestant: str, *, problem: str) -> None:
        super().__init__(f"contestant {contestant!r} failed; nothing was recorded: {problem}")
        self.contestant, self.problem = contestant, problem


class Diverged(GateFailed):
    """The objective is not a finite number any more."""

    def __init__(self, *, epoch: int, step: int, kept_step: int | None) -> None:
        kept = "none was saved before" if kept_step is None else f"that of step {kept_step} is kept"
        super().__init__(
            f"epoch {epoch}: the ELBO is not finite; lower optimizer.learning_rate (first in step {step}; of the "
            f"checkpoints {kept})"
        )
        self.epoch, self.step, self.kept_step = epoch, step, kept_step


class ChecksFailed(GateFailed):
    """A number of the study is not what it must be."""

    def __init__(self, names: Sequence[str], *, page: str) -> None:
        super().__init__(f"{len(names)} checks of the study fail: {'; '.join(names)}; see {page}")
        self.names, self.page = tuple(names), page


class EntropyUndercut(GateFailed):
    """A negative log-likelihood is lower than that of any model can be: what was computed is not one."""

    def __init__(self, *, nll: float, entropy: float, standard_error: float) -> None:
        super().__init__(
            f"the NLL of {nll:.2f} nats lies below {entropy:.2f}, the entropy of the binarisation, which no model "
            f"undercuts (standard error of the difference {standard_error:.2f}): an error in the program, please "
            "report it; nothing was recorded"
        )
        self.nll, self.entropy, self.standard_error = nll, entropy, standard_error


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
