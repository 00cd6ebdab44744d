"""Writes a run for TensorBoard: curves of the bound and its terms, samples, reconstructions. An extra."""

import io
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from training import checkpoint, pictures
from training.checkpoint import RunFolder, averaged_model
from training.data import Dataset
from training.errors import ExtraMissing
from training.trainer import Metrics

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

NUM_SAMPLES: Final = 64
NUM_RECONSTRUCTIONS: Final = 8

_SEED: Final = 0
"""The same latents at every validation, so that one sees how they change."""


class TensorBoard:
    """A listener of the trainer; a context manager.

    Pictures are of the averaged weights of the checkpoint that the validation has saved.

    Args:
        run: Where the run is; the event files go into a folder of their own there.
        dataset: The images; validation rows are reconstructed.
        first_step: Step at which the run begins or goes on; what is later in older event files is not shown.

    Raises:
        ExtraMissing: If TensorBoard is not installed.
    """

    def __init__(self, run: RunFolder, dataset: Dataset, *, first_step: int = 0) -> None:
        self._run, self._rows = run, dataset.validation[:NUM_RECONSTRUCTIONS]
        # The next event file begins behind the checkpoint; what an older one has there is not shown.
        purged_from = first_step + 1 if first_step else None
        self._writer = self._writer_class()(str(run.tensorboard), purge_step=purged_from)

    @classmethod
    def check_installed(cls) -> None:
        """Refuse to begin without the packages that are needed."""
        cls._writer_class()

    @staticmethod
    def _writer_class() -> "type[SummaryWriter]":
        try:
            from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415  # an extra, and slow to import
        except ImportError as error:
            raise ExtraMissing("--tensorboard", extra="tensorboard", problem=str(error)) from None
        return SummaryWriter

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()

    def __call__(self, metrics: Metrics) -> None:
        """Write one validation."""
        for split, terms in (("train", metrics.train), ("validation", metrics.validation)):
            for name, value in terms.model_dump(exclude_none=True).items():
                self._scalar(f"{split}/{name}", value, metrics.step)
        self._scalar("optimizer/learning_rate", metrics.learning_rate, metrics.step)
        self._scalar("optimizer/beta", metrics.beta, metrics.step)
        self._pictures(metrics.step)
        self._writer.flush()

    def _pictures(self, step: int) -> None:
        vae = averaged_model(checkpoint.load(self._run.last), self._rows.shape[1:], torch.device("cpu"))
        samples = pictures.prior_samples(vae, NUM_SAMPLES, seed=_SEED)
        pairs = pictures.reconstructions(vae, self._rows)
        self._grid("samples", samples, step)
        # Each image, its reconstruction to the right of it.
        self._grid("reconstructions", pairs.transpose(0, 1).flatten(end_dim=1), step, num_columns=2)

    def _scalar(self, name: str, value: float, step: int) -> None:
        self._writer.add_scalar(name, value, step)

    def _grid(self, name: str, images: Tensor, step: int, *, num_columns: int | None = None) -> None:
        with Image.open(io.BytesIO(pictures.png(images, num_columns=num_columns))) as picture:
            grid = np.atleast_3d(np.asarray(picture))
        self._writer.add_image(name, grid, step, dataformats="HWC")
