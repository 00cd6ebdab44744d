r"""Two exact numbers beside every NLL of binarised images: what is useless, and what is impossible.

A pixel of intensity p becomes one with probability p, so the mean over all binarisations has closed forms.

Independent pixels, each with its own probability q_j, know nothing but the mean image. That is what a VAE becomes
whose posterior has collapsed:

.. math:: \frac1n \sum_i \sum_j -\left( p_{ij} \log q_j + (1 - p_{ij}) \log(1 - q_j) \right)

The entropy of the binarisation is what no model can undercut, for it is the cross-entropy of one that knows the
grey image (Gibbs' inequality, image by image):

.. math:: \frac1n \sum_i \sum_j -\left( p_{ij} \log p_{ij} + (1 - p_{ij}) \log(1 - p_{ij}) \right)
"""

from typing import Final, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.data import MAX_PIXEL, Pixels

_PSEUDO_COUNT: Final = 0.5
"""Of ones and of zeros, added to each pixel's counts (Krichevsky and Trofimov, 1981): a pixel that is black in all
training images may be lit in another, which must not cost infinitely much."""

_ROWS_AT_ONCE: Final = 1000


class Summary(NamedTuple):
    """A mean over images, nats per image, and its standard error as an estimate for other images of the kind."""

    value: float
    standard_error: float


def independent_pixels_nll(train: Pixels, pixels: Pixels) -> Summary:
    """Return the expected NLL of binarised images under the mean image of the training split.

    Args:
        train: Images that give the probabilities, uint8, shape (n, *data_shape).
        pixels: Images that are measured, the same row shape.
    """
    ones = np.zeros(train.shape[1:], np.float64)
    for first in range(0, len(train), _ROWS_AT_ONCE):
        ones += train[first : first + _ROWS_AT_ONCE].sum(axis=0, dtype=np.int64) / MAX_PIXEL
    probability = torch.from_numpy((ones + _PSEUDO_COUNT) / (len(train) + 2 * _PSEUDO_COUNT)).flatten()
    return _summary(_cross_entropies(pixels, probability))


def binarisation_entropy(pixels: Pixels) -> Summary:
    """Return the entropy of the binarisation of images: no model has a lower expected NLL.

    Example:
        >>> import numpy as np
        >>> round(binarisation_entropy(np.array([[0, 255], [51, 255]], np.uint8)).value, 4)  # half of H(1/5)
        0.2502
    """
    return _summary(binarisation_entropies(pixels))


def binarisation_entropies(pixels: Pixels) -> Tensor:
    """Return the entropy of the binarisation of each image, nats, float64, shape (n,)."""
    return _cross_entropies(pixels, None)


def _summary(each: Tensor) -> Summary:
    return Summary(float(each.mean()), float(each.std() / len(each) ** 0.5))


def _cross_entropies(pixels: Pixels, probability: Tensor | None) -> Tensor:
    """Return H(p, q) of each image, with q = p if none is given."""
    pieces = []
    for first in range(0, len(pixels), _ROWS_AT_ONCE):
        rows = torch.from_numpy(pixels[first : first + _ROWS_AT_ONCE].astype(np.float64) / MAX_PIXEL)
        p = rows.flatten(start_dim=1)
        q = p if probability is None else probability
        pieces.append(-(torch.special.xlogy(p, q) + torch.special.xlog1py(1 - p, -q)).sum(dim=1))
    return torch.cat(pieces)
