"""What every experiment is given: how large to be, where randomness comes from, which trained models there are."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from training import checkpoint, data
from training.checkpoint import RunFolder, averaged_model, write_atomically
from training.config import TrainingConfig
from training.data import Dataset
from training.environment import environment_json
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.trainer import Metrics, fit, load_for_resume

T = TypeVar("T")


class Trained(NamedTuple):
    """A finished run."""

    config: TrainingConfig
    vae: VAE
    """The averaged weights of the best checkpoint, on the study's device, frozen."""
    dataset: Dataset
    run: RunFolder
    metrics: tuple[Metrics, ...]
    """Every validation, in order."""


@dataclass(frozen=True)
class Study:
    """The setting of a study."""

    folder: Path
    """Where the report goes; trained models are kept in `runs/` below it and used again."""

    is_full: bool = False
    """All sizes as the literature has them, on MNIST and Fashion-MNIST; else some minutes, on digits."""

    data_dir: Path | None = None
    """Folder of the IDX files."""

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where networks are trained."""

    seed: int = 0
    """Seed of everything."""

    say: Callable[[str], None] = lambda _: None
    """Told what is going on, a line at a time."""

    def size(self, *, quick: T, full: T) -> T:
        """Return the one that fits the study."""
        return full if self.is_full else quick

    def source(self, experiment: int, *, device: torch.device | None = None) -> torch.Generator:
        """Return a fresh generator, a function of the seed and the number of the experiment.

        Args:
            experiment: The experiment's first row of the checklist times 100, plus a count of the caller's own.
            device: Where it draws; the CPU unless given.
        """
        return generator(self.seed, TrainingStream.STUDY, experiment, device=device)

    def dataset(self, config: TrainingConfig) -> Dataset:
        """Return the images of a configuration."""
        return data.load(config.data, data_dir=self.data_dir)

    def run_folder(self, config: TrainingConfig) -> RunFolder:
        """Return where the run of a configuration is kept."""
        return RunFolder(self.folder / "runs" / config.name)

    def trained(self, config: TrainingConfig, *, listener: Callable[[Metrics], None] = lambda _: None) -> Trained:
        """Return the model of a configuration, fitted now or in an earlier study with the same folder.

        A run that was cut short goes on where it was.

        Args:
            config: What to fit.
            listener: Told about every validation that is done now, after its checkpoint is written.
        """
        dataset = self.dataset(config)
        run = self.run_folder(config)
        start = load_for_resume(config, run.last) if run.last.exists() else None
        write_atomically(run.config, config.to_json().encode())
        write_atomically(run.environment, environment_json(seed=config.seed, device=self.device).encode())
        fit(
            config,
            dataset,
            run,
            device=self.device,
            resume_from=start,
            listener=self._listener(config, listener),
        )
        best = checkpoint.load(run.best)
        lines = run.metrics.read_text().splitlines()
        return Trained(
            config=config,
            vae=averaged_model(best, dataset.data_shape, self.device),
            dataset=dataset,
            run=run,
            metrics=tuple(Metrics.parse(json.loads(line)) for line in lines),
        )

    def _listener(self, config: TrainingConfig, also: Callable[[Metrics], None]) -> Callable[[Metrics], None]:
        def listener(metrics: Metrics) -> None:
            also(metrics)
            self.say(
                f"  {config.name}: epoch {metrics.epoch}/{config.optimizer.epochs}, "
                f"validation ELBO {metrics.validation.elbo:.2f}, {metrics.seconds:.0f} s"
            )

        return listener
