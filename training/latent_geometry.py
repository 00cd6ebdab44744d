r"""What lies between and around codes: interpolation, smoothness, neighbours.

Smoothness is measured without a scale of the latents, so that models with wide and narrow codes compare:

.. math:: P\left[ c(D(\mu + \tau s \epsilon)) = c(D(\mu)) \right], \quad \epsilon \sim N(0, I)

with s the deviations of all codes, one per dimension, D the decoder and c a classifier.

That neighbouring codes are of one class says nothing of the kind: codes may lie in clean clusters with nothing
between them. `neighbour_accuracy` is therefore reported as what it is.

References:
    Shoemake, Animating Rotation with Quaternion Curves, 1985. https://doi.org/10.1145/325165.325242
"""

from collections.abc import Callable, Sequence
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from training.coders import Coder
from training.noise import Stream, normal

Path = Literal["linear", "spherical"]

TAUS: Final = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
"""Distances at which smoothness is measured, in deviations of the codes."""

_PARALLEL: Final = 1e-4
"""Sine of the angle below which an arc is computed as a line, as the service does: its quotient loses digits."""

_CODES_AT_ONCE: Final = 500

_MIN_STEPS: Final = 2


class Smoothness(NamedTuple):
    """Share of moved codes that keep their class, at one distance."""

    tau: float
    """Distance, in deviations of the codes."""
    share: float
    """Mean over the images and seeds, in [0, 1]."""
    standard_error: float
    """Over the images; seeds of one image are averaged first."""


class Interpolation(NamedTuple):
    """Decoded paths between pairs of rows."""

    codes: Tensor
    """Shape (n, num_steps, latent_dim)."""
    images: Tensor
    """In [0, 1], shape (n, num_steps, *data_shape); first and last are the reconstructions, bit for bit."""


def interpolate_codes(start: Tensor, end: Tensor, num_steps: int, path: Path) -> Tensor:
    r"""Return points between codes, shape (n, num_steps, latent_dim); the ends are exact.

    The same points, to the last digit of float32, as `serving.gateway.operations.interpolate_latents` answers.

    .. math:: (1 - t) a + t b \quad \textrm{or} \quad
        \frac{\sin((1 - t) \omega)}{\sin \omega} a + \frac{\sin(t \omega)}{\sin \omega} b

    Args:
        start: a, shape (n, latent_dim).
        end: b, the same shape.
        num_steps: Points on each path, both ends included; at least 2.
        path: A line, or an arc with omega the angle between a and b. The arc is a line where the ends are (nearly)
            parallel or opposite.

    Raises:
        ValueError: If the shapes differ or there are fewer than two points.

    Example:
        >>> interpolate_codes(torch.zeros(1, 1), torch.ones(1, 1), 3, "linear").flatten()
        tensor([0.0000, 0.5000, 1.0000])
    """
    if start.shape != end.shape:
        raise ValueError(f"ends of shapes {tuple(start.shape)} and {tuple(end.shape)}; give pairs of codes")
    if num_steps < _MIN_STEPS:
        raise ValueError(f"num_steps must be at least 2, got {num_steps}: a path has two ends")
    a, b = (ends.double().unsqueeze(1) for ends in (start, end))
    weight_b = torch.linspace(0, 1, num_steps, dtype=torch.float64).view(1, -1, 1)
    weight_a = 1 - weight_b
    if path == "spherical":
        norms = a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)
        cosine = (a * b).sum(dim=-1, keepdim=True) / norms.clamp_min(torch.finfo(torch.float64).tiny)
        cosine = cosine.clamp(-1, 1)
        angle, sine = torch.arccos(cosine), (1 - cosine.square()).sqrt()
        is_arc = sine > _PARALLEL
        divisor = torch.where(is_arc, sine, 1.0)
        weight_a = torch.where(is_arc, (weight_a * angle).sin() / divisor, weight_a)
        weight_b = torch.where(is_arc, (weight_b * angle).sin() / divisor, weight_b)
    points: Tensor = (weight_a * a + weight_b * b).to(start.dtype)
    points[:, 0], points[:, -1] = start, end
    return points


def interpolate(coder: Coder, start: Tensor, end: Tensor, *, num_steps: int, path: Path) -> Interpolation:
    """Return decoded paths between the codes of pairs of rows.

    Args:
        coder: The model.
        start: Data in [0, 1], shape (n, *data_shape).
        end: The same shape.
        num_steps: Points on each path, both ends included; at least 2.
        path: Shape of the path.
    """
    codes = interpolate_codes(coder.encode(start), coder.encode(end), num_steps, path)
    # The ends are decoded as reconstructions are: a matrix product rounds otherwise in a batch of other rows.
    columns = [coder.decode(codes[:, step]) for step in range(num_steps)]
    return Interpolation(codes, torch.stack(columns, dim=1))


def largest_steps(images: Tensor) -> Tensor:
    """Return the largest step of each path relative to the distance of its ends, shape (n,); NaN if they coincide.

    A path of constant speed along a straight line has 1 / (num_steps - 1), a jump 1, a detour possibly more.

    Args:
        images: Shape (n, num_steps, *data_shape).

    Example:
        >>> largest_steps(torch.tensor([[[0.0], [0.1], [0.9], [1.0]]]))
        tensor([0.8000])
    """
    points = images.flatten(start_dim=2)
    steps = (points[:, 1:] - points[:, :-1]).norm(dim=-1)
    largest: Tensor = steps.amax(dim=1) / (points[:, -1] - points[:, 0]).norm(dim=-1)
    return largest


def smoothness(
    coder: Coder,
    classify: Callable[[Tensor], Tensor],
    codes: Tensor,
    deviations: Tensor,
    *,
    taus: Sequence[float] = TAUS,
    seeds: Sequence[int] = (0, 1, 2),
) -> tuple[Smoothness, ...]:
    """Return how often an image keeps its class when its code is moved, for each distance.

    Args:
        coder: The model.
        classify: Images (n, *data_shape) to classes (n,).
        codes: mu, shape (n, latent_dim).
        deviations: s: standard deviation of the codes of all data in each dimension, shape (latent_dim,).
        taus: Distances in deviations.
        seeds: Of the directions; the same for every distance and every model of this latent dimension.
    """
    before = classify(coder.decode(codes))
    noises = [deviations * normal(seed, *codes.shape, stream=Stream.POSTERIOR) for seed in seeds]
    measured = []
    for tau in taus:
        kept = torch.stack([classify(coder.decode(codes + tau * noise)) == before for noise in noises])
        of_image = kept.double().mean(dim=0)
        error = float(of_image.std() / len(codes) ** 0.5)
        measured.append(Smoothness(tau, float(of_image.mean()), error))
    return tuple(measured)


def neighbour_accuracy(
    codes: Tensor, labels: Tensor, held_out_codes: Tensor, held_out_labels: Tensor, *, num_neighbours: int = 5
) -> float:
    """Return how often the nearest codes vote for the right class: how well classes are apart, not smoothness.

    Args:
        codes: Those that vote, shape (n, latent_dim).
        labels: Their classes, shape (n,).
        held_out_codes: Those that are voted on, shape (m, latent_dim).
        held_out_labels: Their classes, shape (m,).
        num_neighbours: Votes; of classes with as many votes the lower one wins.
    """
    winners = []
    for piece in torch.split(held_out_codes, _CODES_AT_ONCE):
        nearest = torch.cdist(piece, codes).topk(num_neighbours, largest=False).indices
        winners.append(labels[nearest].mode(dim=1).values)
    return float((torch.cat(winners) == held_out_labels).double().mean())


class CodeGaussian:
    """A Gaussian with full covariance, fitted to codes: it makes a sampler of any decoder.

    For a VAE these are posterior means, which spread less than posterior samples do.

    Args:
        codes: Shape (n, latent_dim).

    Raises:
        ValueError: If there are fewer than two codes.
    """

    def __init__(self, codes: Tensor) -> None:
        if len(codes) < _MIN_STEPS:
            raise ValueError(f"{len(codes)} codes have no covariance; give at least two")
        exact = codes.double()
        self.mean = exact.mean(dim=0)
        values, vectors = torch.linalg.eigh(exact.T.cov())
        # By eigenvalues, not Cholesky: dimensions that a model does not use have no variance.
        self._root = vectors * values.clamp_min(0).sqrt()

    def sample(self, num_samples: int, seed: int) -> Tensor:
        """Return codes, float32, shape (num_samples, latent_dim), made of the noise of the service's Sample."""
        noise = normal(seed, num_samples, len(self.mean), stream=Stream.PRIOR)
        codes: Tensor = self.mean + noise.double() @ self._root.T
        return codes.float()
