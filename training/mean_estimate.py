"""A mean over images and how far it may be off."""

import math
from typing import Self

from torch import Tensor

from serving.typed_config import Config


class Estimate(Config):
    """A mean over images with its standard error, nats per image."""

    value: float
    """Mean over the images."""

    standard_error: float
    """Standard deviation over the images, divided by the square root of their number."""

    @classmethod
    def of(cls, values: Tensor) -> Self:
        """Return the mean of figures of single images, shape (n,) with n at least 2; summed in float64.

        Example:
            >>> Estimate.of(Tensor([1.0, 3.0]))
            Estimate(value=2.0, standard_error=1.0)
        """
        exact = values.double()
        return cls(value=float(exact.mean()), standard_error=float(exact.std() / math.sqrt(len(exact))))
