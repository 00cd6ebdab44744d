"""The folder of a training run, and checkpoints in it: written whole or not at all, verified when read."""

import hashlib
import io
import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from serving.typed_config import ConfigError
from training.config import TrainingConfig
from training.errors import CheckpointDamaged, NotARun, RunNotFound
from training.models.vae import VAE
from training.noise import TrainingStream, generator

FORMAT_VERSION: Final = 2


@dataclass(frozen=True)
class RunFolder:
    """The files of one run."""

    path: Path

    @property
    def config(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.json"

    @property
    def environment(self) -> Path:
        """Versions, git commit, seed, device."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """One JSON object per validation."""
        return self.path / "metrics.jsonl"

    @property
    def last(self) -> Path:
        """The newest checkpoint; resuming begins here."""
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        """The checkpoint that is the result: of the highest validation bound, or the last validated one."""
        return self.path / "best.pt"

    @property
    def evaluation(self) -> Path:
        """Figures of the best checkpoint."""
        return self.path / "evaluation.json"

    def adopt(self, other: "RunFolder") -> None:
        """Begin where another run is: with its best checkpoint and its metrics, in place of what is here."""
        self.clear()
        for source, target in ((other.best, self.best), (other.metrics, self.metrics)):
            if source.exists():
                write_atomically(target, source.read_bytes())

    @property
    def tensorboard(self) -> Path:
        """Folder of TensorBoard's event files, where they were asked for."""
        return self.path / "tensorboard"

    def clear(self) -> None:
        """Remove what an earlier run left.

        Raises:
            NotARun: If the folder holds files and none says that they are of a run.
        """
        self.sweep()
        is_run = self.environment.exists() or self.last.exists()
        if self.path.is_dir() and any(self.path.iterdir()) and not is_run:
            raise NotARun(location=str(self.path))
        for file in self._files:
            file.unlink(missing_ok=True)
        shutil.rmtree(self.tensorboard, ignore_errors=True)

    def sweep(self) -> None:
        """Remove half-written files, which a process leaves that was killed while it wrote."""
        for file in self._files:
            for partial in self.path.glob(_partial(file.name, "*")):
                partial.unlink(missing_ok=True)

    @property
    def _files(self) -> tuple[Path, ...]:
        return (self.config, self.environment, self.metrics, self.last, self.best, self.evaluation)


@dataclass(frozen=True)
class Checkpoint:
    """The complete state of a run after a number of steps.

    Randomness needs no state: it is a function of the seed and the step.
    """

    config: TrainingConfig
    """What is being fitted, and how."""

    step: int
    """Steps done."""

    weights: dict[str, Tensor]
    """Raw weights."""

    averaged_weights: dict[str, Tensor]
    """Exponential moving average of the weights; what is evaluated and exported."""

    optimizer: dict[str, Any]
    """State of Adam."""

    sums: Tensor
    """Log-likelihood, KL and bound summed over the steps since the last validation, shape (3,)."""

    num_summed: int
    """Steps in `sums`."""

    best_bound: float
    """Highest validation value so far of the bound that is climbed, nats per row; minus infinity before the first
    validation."""

    validation_bound: float
    """Validation bound of the averaged weights at the last validation, nats per row."""

    has_collapsed: bool
    """The KL term was below one nat after the warm-up."""

    saved: str
    """When, ISO 8601, UTC."""

    def sha256(self) -> str:
        """Return a digest of everything in it."""
        return _digest(self._content())

    def weights_sha256(self) -> str:
        """Return a digest of the raw weights alone: equal for runs that are equal."""
        return _digest(self.weights)

    def _content(self) -> dict[str, Any]:
        return {**vars(self), "config": self.config.to_json(), "format_version": FORMAT_VERSION}


def save(checkpoint: Checkpoint, *paths: Path) -> None:
    """Write a checkpoint to each path; a crash at any moment leaves the old file or the new one of each."""
    buffer = io.BytesIO()
    torch.save({"content": checkpoint._content(), "sha256": checkpoint.sha256()}, buffer)  # noqa: SLF001
    for path in paths:
        write_atomically(path, buffer.getvalue())


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. No code in the file is run.

    Raises:
        RunNotFound: If there is no such file.
        CheckpointDamaged: If it cannot be read, or its content does not have the digest it states.
    """
    if not path.is_file():
        raise RunNotFound(location=str(path.parent), missing=path.name)
    try:
        read = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001  # Damaged bytes make the unpickler raise almost anything.
        problem = f"it cannot be read ({type(error).__name__})"
        raise CheckpointDamaged(location=str(path), problem=problem) from None
    try:
        return _verified(read["content"], stated=read["sha256"])
    except (ConfigError, TypeError, KeyError, ValueError) as error:
        raise CheckpointDamaged(location=str(path), problem=str(error)) from None


def averaged_model(saved: Checkpoint, data_shape: tuple[int, ...], device: torch.device) -> VAE:
    """Return the model of a checkpoint with its averaged weights, ready to be asked."""
    vae = VAE(saved.config.model, data_shape, generator(saved.config.seed, TrainingStream.INIT))
    vae.load_state_dict(saved.averaged_weights)
    return vae.requires_grad_(requires_grad=False).eval().to(device)


def _verified(content: Mapping[str, Any], *, stated: str) -> Checkpoint:
    if _digest(content) != stated:
        raise ValueError("its content does not have the digest that it states")
    fields = dict(content)
    if (version := fields.pop("format_version")) != FORMAT_VERSION:
        raise ValueError(f"its format is version {version}, this program reads {FORMAT_VERSION}")
    fields["config"] = TrainingConfig.parse(json.loads(fields["config"]))
    return Checkpoint(**fields)


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step, on disk before it has its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(_partial(path.name, os.getpid()))
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _partial(name: str, process: int | str) -> str:
    """Return what a file is called while a process writes it."""
    return f".{name}.{process}.partial"


def _digest(value: object) -> str:
    digest = hashlib.sha256()
    for part in _parts(value):
        digest.update(struct.pack(">Q", len(part)))
        digest.update(part)
    return digest.hexdigest()


def _parts(value: object) -> Iterator[bytes]:
    """Yield bytes that determine a nested value; dictionaries in the order of their keys' text."""
    if isinstance(value, Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.detach().cpu().contiguous().numpy().tobytes()
    elif isinstance(value, Mapping):
        yield f"mapping {len(value)}".encode()
        for key in sorted(value, key=str):
            yield repr(key).encode()
            yield from _parts(value[key])
    elif isinstance(value, list | tuple):
        yield f"sequence {len(value)}".encode()
        for item in value:
            yield from _parts(item)
    else:
        yield repr(value).encode()
