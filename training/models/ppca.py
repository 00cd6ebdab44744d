r"""Probabilistic PCA: the latent variable model whose likelihood, posterior and maximum are known exactly.

.. math:: z \sim N(0, I), \quad x \mid z \sim N(W z + b, s^2 I), \quad x \sim N(b, W W^T + s^2 I)

It is the oracle of the linear VAE: no ELBO of that model exceeds the maximum of log p(x) that stands here.
Symbols: d features, q latent dimensions, n rows, l_1 >= ... >= l_d eigenvalues of the (1/n) covariance. Nats.

References:
    Tipping and Bishop, Probabilistic Principal Component Analysis, 1999.
    https://doi.org/10.1111/1467-9868.00196
"""

import math
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple, Self

import torch
from torch import Tensor

_LOG_TWO_PI: Final = math.log(2 * math.pi)
_MATRIX: Final = 2


class GaussianPosterior(NamedTuple):
    """A Gaussian over latents for each row: means (n, q), covariances (n, q, q) or one for all, (q, q)."""

    mean: Tensor
    covariance: Tensor


class AscentStep(NamedTuple):
    """One line of a trace: means over the rows, nats; log_prob = elbo + kl."""

    moved: Literal["start", "q", "p"]
    elbo: float
    log_prob: float
    kl: float


class Ascent(NamedTuple):
    """Where an alternating fit ended, and how it got there."""

    model: "ProbabilisticPCA"
    trace: tuple[AscentStep, ...]


@dataclass(frozen=True, eq=False)
class ProbabilisticPCA:
    """A Gaussian whose covariance is low rank plus isotropic noise.

    Args:
        weight: W, shape (d, q).
        mean: b, shape (d,).
        variance: s^2, the noise variance, a positive scalar tensor in units of data squared.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite, or the variance is not positive.

    Example:
        >>> model = ProbabilisticPCA(torch.ones(1, 1), torch.zeros(1), torch.tensor(1.0))
        >>> model.log_prob(torch.ones(1, 1))
        tensor([-1.5155])
    """

    weight: Tensor
    mean: Tensor
    variance: Tensor

    def __post_init__(self) -> None:
        if self.weight.ndim != _MATRIX or self.mean.shape != self.weight.shape[:1] or self.variance.ndim:
            raise ValueError(
                f"pPCA: weight {tuple(self.weight.shape)}, mean {tuple(self.mean.shape)}, variance "
                f"{tuple(self.variance.shape)} do not fit; give shapes (d, q), (d,), ()"
            )
        if not all(bool(value.isfinite().all()) for value in (self.weight, self.mean, self.variance)):
            raise ValueError("pPCA: a parameter is not finite; check the data that it was fitted to")
        if self.variance <= 0:
            raise ValueError(f"pPCA: noise variance {self.variance.item():.3g} must be positive")

    @classmethod
    def fit(cls, data: Tensor, latent_dim: int) -> Self:
        r"""Return the maximum likelihood model in closed form.

        .. math:: s^2 = \frac{1}{d - q} \sum_{i > q} l_i, \quad W = U_q (\Lambda_q - s^2 I)^{1/2}

        W is unique up to a rotation of the latents; this one has orthogonal columns, by falling length, each
        with its largest entry positive.

        Args:
            data: Shape (n, d); float64 keeps the digits of small eigenvalues.
            latent_dim: q, in [1, d).

        Raises:
            ValueError: If the data are not finite, constant, of too few rows, or lie in a plane of q dimensions
                (then the likelihood has no maximum).

        References:
            Tipping and Bishop, 1999, equations 7 and 8.
        """
        spectrum = _spectrum(data, latent_dim)
        variance = spectrum.values[latent_dim:].mean()
        # Rounding may put an eigenvalue a little below the mean of smaller ones when all are equal.
        scale = (spectrum.values[:latent_dim] - variance).clamp_min(0).sqrt()
        weight = spectrum.vectors[:, :latent_dim] * scale
        largest = weight.gather(0, weight.abs().argmax(dim=0, keepdim=True))
        return cls(torch.where(largest < 0, -weight, weight), spectrum.mean, variance)

    @property
    def latent_dim(self) -> int:
        """Number of latent dimensions q."""
        return self.weight.shape[1]

    def log_prob(self, data: Tensor) -> Tensor:
        r"""Return log p(x), exactly, shape (n,).

        .. math:: -\tfrac12 \left( d \log 2\pi + (d - q) \log s^2 + \log |G| + \|x - b - W m\|^2 / s^2
            + \|m\|^2 \right), \quad G = W^T W + s^2 I

        m is the posterior mean. Written so, the quadratic form is a sum of squares: nothing cancels, and only a
        q x q matrix is factorised.

        Args:
            data: Shape (n, d).

        Raises:
            ValueError: If the data have another number of features or are not finite.
        """
        posterior = self.posterior(data)
        num_features, latent_dim = self.weight.shape
        log_det = (num_features - latent_dim) * self.variance.log() + torch.logdet(self._gram)
        residual = data - self.mean - posterior.mean @ self.weight.T
        squares = residual.square().sum(dim=1) / self.variance + posterior.mean.square().sum(dim=1)
        return -0.5 * (num_features * _LOG_TWO_PI + log_det + squares)

    def posterior(self, data: Tensor) -> GaussianPosterior:
        r"""Return p(z | x), exactly; its covariance is the same for all rows, shape (q, q).

        .. math:: N(G^{-1} W^T (x - b), s^2 G^{-1}), \quad G = W^T W + s^2 I

        Args:
            data: Shape (n, d).

        Raises:
            ValueError: If the data have another number of features or are not finite.

        References:
            Tipping and Bishop, 1999, equation 6.
        """
        checked_rows(data, num_features=len(self.mean))
        cholesky = torch.linalg.cholesky(self._gram)
        mean = torch.cholesky_solve(self.weight.T @ (data - self.mean).T, cholesky).T
        return GaussianPosterior(mean, self.variance * torch.cholesky_inverse(cholesky))

    def best_diagonal_posterior(self, data: Tensor) -> GaussianPosterior:
        r"""Return the Gaussian with independent dimensions that maximises the ELBO.

        .. math:: \mu = G^{-1} W^T (x - b), \quad \sigma_j^2 = s^2 / G_{jj}

        It is the exact posterior where W^T W is diagonal. With one latent dimension, W = w, b = 0, d = 1, its
        variance is s^2 / (w^2 + s^2).
        """
        mean, _ = self.posterior(data)
        return GaussianPosterior(mean, torch.diag(self.variance / self._gram.diagonal()))

    def expected_log_joint(self, data: Tensor, q: GaussianPosterior) -> Tensor:
        """Return E_q[log p(x, z)], exactly, shape (n,); without the entropy it is largest for a q of no width."""
        checked_rows(data, num_features=len(self.mean))
        num_features, latent_dim = self.weight.shape
        residual = data - self.mean - q.mean @ self.weight.T
        second_moment = _trace(q.covariance) + q.mean.square().sum(dim=1)
        squares = residual.square().sum(dim=1) + _trace(self.weight.T @ self.weight @ q.covariance)
        log_likelihood = -0.5 * (num_features * (_LOG_TWO_PI + self.variance.log()) + squares / self.variance)
        return log_likelihood - 0.5 * (latent_dim * _LOG_TWO_PI + second_moment)

    def elbo(self, data: Tensor, q: GaussianPosterior) -> Tensor:
        """Return E_q[log p(x, z)] + H(q), exactly, shape (n,).

        Args:
            data: Shape (n, d).
            q: Any Gaussian over the latents; diagonal ones are given as diagonal matrices.
        """
        entropy = 0.5 * (self.latent_dim * (_LOG_TWO_PI + 1) + torch.logdet(q.covariance))
        return self.expected_log_joint(data, q) + entropy

    def kl_to_posterior(self, data: Tensor, q: GaussianPosterior) -> Tensor:
        r"""Return KL(q || p(z | x)), exactly, shape (n,): the gap log p(x) - ELBO, computed on its own.

        .. math:: \tfrac12 \left( tr(S^{-1} V) + (\mu - m)^T S^{-1} (\mu - m) - q + \log |S| - \log |V| \right)
        """
        exact = self.posterior(data)
        precision = self._gram / self.variance
        shift = q.mean - exact.mean
        squares = ((shift @ precision) * shift).sum(dim=1)
        log_ratio = -torch.logdet(precision) - torch.logdet(q.covariance)
        return 0.5 * (_trace(precision @ q.covariance) + squares - self.latent_dim + log_ratio)

    def maximised(self, data: Tensor, q: GaussianPosterior) -> "ProbabilisticPCA":
        """Return the model with the largest mean ELBO for a fixed q: least squares on the expected latents.

        References:
            Tipping and Bishop, 1999, appendix B, with b fitted jointly.
        """
        num_rows, num_features = data.shape
        covariance = q.covariance.expand(num_rows, -1, -1).sum(dim=0)
        ones = torch.ones((num_rows, 1), dtype=data.dtype, device=data.device)
        regressors = torch.cat((q.mean, ones), dim=1)
        moments = regressors.T @ regressors
        moments[:-1, :-1] += covariance
        solution = torch.linalg.solve(moments, regressors.T @ data).T
        weight, mean = solution[:, :-1], solution[:, -1]
        squares = (data - regressors @ solution.T).square().sum() + _trace(weight.T @ weight @ covariance)
        return ProbabilisticPCA(weight, mean, squares / (num_rows * num_features))

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Return draws from p(x), shape (num, d).

        Args:
            num: How many, at least 1.
            generator: Source of latents and noise, on the device of the parameters.
        """
        num_features, latent_dim = self.weight.shape
        noise = torch.randn(
            (num, latent_dim + num_features),
            generator=generator,
            dtype=self.weight.dtype,
            device=self.weight.device,
        )
        latents, residual = noise[:, :latent_dim], noise[:, latent_dim:]
        return self.mean + latents @ self.weight.mT + self.variance.sqrt() * residual

    @property
    def _gram(self) -> Tensor:
        identity = torch.eye(self.latent_dim, dtype=self.weight.dtype, device=self.weight.device)
        return self.weight.T @ self.weight + self.variance * identity


def elbo_maximum(data: Tensor, latent_dim: int) -> float:
    r"""Return the largest mean ELBO per row that a linear VAE can have: the maximum of mean log p(x).

    .. math:: -\tfrac12 \left( d \log 2\pi + \sum_{i \le q} \log l_i + (d - q) \log s^2 + d \right)

    The exact posterior at the maximum is linear in x with a constant diagonal covariance (once W^T W is
    diagonal), so that the bound of a linear VAE is tight there.

    Args:
        data: Shape (n, d).
        latent_dim: q, in [1, d).

    Raises:
        ValueError: As for `ProbabilisticPCA.fit`.

    References:
        Tipping and Bishop, 1999, equation 4 at the maximum. Lucas et al., Don't Blame the ELBO!, 2019.
        https://arxiv.org/abs/1911.02469
    """
    values = _spectrum(data, latent_dim).values
    num_features = len(values)
    discarded = (num_features - latent_dim) * values[latent_dim:].mean().log()
    total = num_features * (_LOG_TWO_PI + 1) + values[:latent_dim].log().sum() + discarded
    return -0.5 * total.item()


def alternate(model: ProbabilisticPCA, data: Tensor, *, num_rounds: int, is_diagonal: bool = False) -> Ascent:
    """Maximise the ELBO over q and over the model in turn, exactly, and record every step.

    A step on q leaves log p(x) alone and lifts the bound; a step on the model lifts the bound, and log p(x) with
    it. With the full q this is the EM algorithm, and log p(x) never falls.

    Args:
        model: Where to begin.
        data: Shape (n, d).
        num_rounds: Pairs of steps, at least 1.
        is_diagonal: Whether q is restricted to independent dimensions, as in a VAE.

    Returns:
        The last model, and 2 num_rounds + 1 lines: the start with q at the prior, then q and p in turn.
    """
    latent_dim = model.latent_dim
    q = GaussianPosterior(data.new_zeros((len(data), latent_dim)), torch.eye(latent_dim).to(data))
    trace = [_measure("start", model, data, q)]
    for _ in range(num_rounds):
        q = model.best_diagonal_posterior(data) if is_diagonal else model.posterior(data)
        trace.append(_measure("q", model, data, q))
        model = model.maximised(data, q)
        trace.append(_measure("p", model, data, q))
    return Ascent(model, tuple(trace))


def checked_rows(
    data: Tensor, *, num_features: int | None = None, min_rows: int = 1, name: str = "data"
) -> Tensor:
    """Return the data if they are finite floating-point rows of the right shape.

    Args:
        data: To be checked; should have shape (n, d).
        num_features: d, if it is given.
        min_rows: Smallest n.
        name: What the message calls them.

    Raises:
        ValueError: If they are not; names what is wrong and what to do.
    """
    if data.ndim != _MATRIX or data.shape[1] == 0:
        raise ValueError(f"{name}: shape {tuple(data.shape)}, expected (rows, features); flatten each row")
    if not data.is_floating_point():
        raise ValueError(f"{name}: {data.dtype} is not floating point; convert it, .double() for exact models")
    if num_features is not None and data.shape[1] != num_features:
        raise ValueError(
            f"{name}: {data.shape[1]} features, the model has {num_features}; give rows of that width"
        )
    if len(data) < min_rows:
        raise ValueError(
            f"{name}: {len(data)} rows, at least {min_rows} are needed; give more, or a smaller model"
        )
    is_bad = ~data.isfinite().all(dim=1)
    if bool(is_bad.any()):
        first = int(is_bad.nonzero()[0].item())
        raise ValueError(
            f"{name}: {int(is_bad.sum())} rows hold NaN or infinity, the first is row {first}; remove or repair "
            "them"
        )
    return data


class _Spectrum(NamedTuple):
    mean: Tensor
    values: Tensor
    vectors: Tensor


def _spectrum(data: Tensor, latent_dim: int) -> _Spectrum:
    """Return mean, eigenvalues of the (1/n) covariance, largest first, and their vectors as columns."""
    checked_rows(data, min_rows=2)
    num_rows, num_features = data.shape
    if not 1 <= latent_dim < num_features:
        raise ValueError(
            f"latent_dim: {latent_dim} is not in [1, {num_features}); fewer dimensions than features are needed"
        )
    mean = data.mean(dim=0)
    centred = data - mean
    total = centred.square().mean(dim=0).sum()
    rounding = torch.finfo(data.dtype).eps * num_features
    if total <= (rounding * data.abs().max()).square():
        raise ValueError("data: all rows are equal, the likelihood has no maximum; give data that vary")
    values, vectors = torch.linalg.eigh(centred.T @ centred / num_rows)
    values, vectors = values.flip(0), vectors.flip(1)
    if values[latent_dim:].mean() <= rounding * total:
        raise ValueError(
            f"data: {num_rows} rows lie in a plane of at most {latent_dim} dimensions, the likelihood has no "
            "maximum; lower latent_dim or give more rows"
        )
    return _Spectrum(mean, values, vectors)


def _measure(
    moved: Literal["start", "q", "p"], model: ProbabilisticPCA, data: Tensor, q: GaussianPosterior
) -> AscentStep:
    return AscentStep(
        moved,
        elbo=model.elbo(data, q).mean().item(),
        log_prob=model.log_prob(data).mean().item(),
        kl=model.kl_to_posterior(data, q).mean().item(),
    )


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
