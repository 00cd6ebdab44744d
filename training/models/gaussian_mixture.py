r"""Mixtures of Gaussians: the latent variable model with a discrete z, fitted by EM or by gradient.

.. math:: z \sim Categorical(\pi), \quad x \mid z = k \sim N(m_k, S_k), \quad p(x) = \sum_k \pi_k N(x; m_k, S_k)

The sum over z is finite, so that log p(x), the posterior, the ELBO of any q and its gap are exact. EM is
coordinate ascent of that ELBO: `posterior` is the step on q, `maximised` the step on p. All in nats.
Symbols: n rows, d features, K components, r_ik = q(z_i = k).

References:
    Dempster, Laird and Rubin, Maximum Likelihood from Incomplete Data via the EM Algorithm, 1977.
    https://doi.org/10.1111/j.2517-6161.1977.tb01600.x
    Neal and Hinton, A View of the EM Algorithm that Justifies Incremental, Sparse, and Other Variants, 1998.
    https://doi.org/10.1007/978-94-011-5014-9_12
"""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

from training.models.ppca import checked_rows

_LOG_TWO_PI: Final = math.log(2 * math.pi)
_MATRIX: Final = 2
_SIMPLEX_TOLERANCE: Final = 1e-4
"""How far sums of probabilities may be from one: rounding of a float32 softmax over thousands of terms."""
_HISTORY: Final = 20
"""Pairs of steps and gradients that L-BFGS keeps."""
_LINE_SEARCH_EVALUATIONS: Final = 25


class Draw(NamedTuple):
    """Samples with the latent that made them: data (num, d), clusters (num,) in [0, K)."""

    data: Tensor
    clusters: Tensor


class MixtureFit(NamedTuple):
    """A fitted mixture.

    Attributes:
        model: The mixture of the last step.
        log_likelihoods: Mean log p(x) per row before the first step and after each one, nats.
        is_converged: Whether the fit stopped by itself, not at its limit.
        floored: Components with a direction whose variance is at the floor: they sit on few rows, or on a plane.
    """

    model: "GaussianMixture"
    log_likelihoods: tuple[float, ...]
    is_converged: bool
    floored: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """A mixture of Gaussians with full covariances.

    Args:
        weights: pi, positive, sum one, shape (K,).
        means: Shape (K, d).
        covariances: Symmetric, positive definite, shape (K, d, d).

    Raises:
        ValueError: If the shapes do not fit, the weights are no probabilities, or a covariance is not positive
            definite.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor

    def __post_init__(self) -> None:
        shapes = self.weights.shape, self.covariances.shape
        if self.means.ndim != _MATRIX or shapes != (
            self.means.shape[:1],
            (*self.means.shape, self.means.shape[1]),
        ):
            raise ValueError(
                f"mixture: weights {tuple(self.weights.shape)}, means {tuple(self.means.shape)}, covariances "
                f"{tuple(self.covariances.shape)} do not fit; give shapes (K,), (K, d), (K, d, d)"
            )
        if not bool((self.weights > 0).all()) or abs(self.weights.sum().item() - 1) > _SIMPLEX_TOLERANCE:
            raise ValueError(f"mixture: weights {self.weights.tolist()} must be positive with sum one")
        _, status = torch.linalg.cholesky_ex(self.covariances)
        if bool(status.any()) or not bool(self.means.isfinite().all()):
            bad = int(status.argmax().item())
            raise ValueError(
                f"mixture: component {bad} has no finite mean or no positive definite covariance; raise the "
                "variance floor or use fewer components"
            )

    @property
    def num_components(self) -> int:
        """K."""
        return len(self.weights)

    def log_joint(self, data: Tensor) -> Tensor:
        r"""Return log p(x, z = k) for every k, shape (n, K).

        .. math:: \log \pi_k - \tfrac12 \left( d \log 2\pi + \log |S_k| + (x - m_k)^T S_k^{-1} (x - m_k) \right)

        Args:
            data: Shape (n, d).

        Raises:
            ValueError: If the data have another number of features or are not finite.
        """
        checked_rows(data, num_features=self.means.shape[1])
        return _log_joint(data, self.weights.log(), self.means, torch.linalg.cholesky(self.covariances))

    def log_prob(self, data: Tensor) -> Tensor:
        """Return log p(x), exactly, shape (n,).

        Example:
            >>> mixture = GaussianMixture(torch.tensor([0.5, 0.5]), torch.zeros(2, 1), torch.ones(2, 1, 1))
            >>> mixture.log_prob(torch.zeros(1, 1))
            tensor([-0.9189])
        """
        return self.log_joint(data).logsumexp(dim=1)

    def posterior(self, data: Tensor) -> Tensor:
        """Return p(z = k | x), the responsibilities, shape (n, K): the q with the largest ELBO."""
        return self.log_joint(data).softmax(dim=1)

    def elbo(self, data: Tensor, responsibilities: Tensor) -> Tensor:
        r"""Return the bound of any q, exactly, shape (n,).

        .. math:: \sum_k r_k (\log p(x, z = k) - \log r_k), \quad 0 \log 0 = 0

        Args:
            data: Shape (n, d).
            responsibilities: q(z = k) of each row, shape (n, K).

        Raises:
            ValueError: If the responsibilities are no probabilities.
        """
        _check_probabilities(responsibilities, (len(data), self.num_components))
        terms = responsibilities * self.log_joint(data) - torch.xlogy(responsibilities, responsibilities)
        return terms.sum(dim=1)

    def kl_to_posterior(self, data: Tensor, responsibilities: Tensor) -> Tensor:
        r"""Return KL(q || p(z | x)), exactly, shape (n,): the gap log p(x) - ELBO, computed on its own.

        .. math:: \sum_k r_k (\log r_k - \log p(z = k \mid x))
        """
        _check_probabilities(responsibilities, (len(data), self.num_components))
        log_posterior = self.log_joint(data).log_softmax(dim=1)
        terms = torch.xlogy(responsibilities, responsibilities) - responsibilities * log_posterior
        return terms.sum(dim=1)

    def sample(self, num: int, generator: torch.Generator) -> Draw:
        """Return draws from p(x, z): first the cluster, then the point.

        Args:
            num: How many, at least 1.
            generator: Source of both, on the device of the parameters.
        """
        clusters = torch.multinomial(self.weights, num, replacement=True, generator=generator)
        noise = torch.randn(
            (num, self.means.shape[1]), generator=generator, dtype=self.means.dtype, device=self.means.device
        )
        factors = torch.linalg.cholesky(self.covariances)[clusters]
        return Draw(self.means[clusters] + (factors @ noise.unsqueeze(2)).squeeze(2), clusters)

    @classmethod
    def fit(
        cls,
        data: Tensor,
        num_components: int,
        generator: torch.Generator,
        *,
        num_starts: int = 4,
        max_steps: int = 1000,
        tolerance: float = 1e-9,
        relative_floor: float = 1e-4,
    ) -> MixtureFit:
        """Fit by EM from several starts and return the best.

        Args:
            data: Shape (n, d); float64 keeps the last digits of the likelihood.
            num_components: K, at least 1.
            generator: Source of the starts.
            num_starts: Starts by `initial`, each followed to its end.
            max_steps: Most EM steps of one start.
            tolerance: Stop when a step gains less, nats per row.
            relative_floor: Smallest variance in any direction, as a share of the mean variance of a feature.
                Without a floor the likelihood has no maximum: a component on a single row gains for ever.

        Raises:
            ValueError: If the data are not finite, constant, or have fewer distinct rows than components.
        """
        floor = variance_floor(data, num_components, relative_floor)
        fits = [
            _expectation_maximisation(
                initial(data, num_components, generator),
                data,
                floor=floor,
                max_steps=max_steps,
                tolerance=tolerance,
            )
            for _ in range(num_starts)
        ]
        return max(fits, key=lambda fit: fit.log_likelihoods[-1])

    def refined(self, data: Tensor, *, floor: float, max_steps: int = 1000, tolerance: float = 1e-9) -> MixtureFit:
        """Return what EM makes of this mixture.

        Args:
            data: Shape (n, d).
            floor: Smallest variance in any direction, in units of data squared; `variance_floor` gives one.
            max_steps: Most steps.
            tolerance: Stop when a step gains less, nats per row.
        """
        return _expectation_maximisation(self, data, floor=floor, max_steps=max_steps, tolerance=tolerance)

    def refined_by_gradient(self, data: Tensor, *, max_steps: int = 200, tolerance: float = 1e-7) -> MixtureFit:
        """Return the mixture that gradient ascent of the same likelihood reaches from this one.

        L-BFGS on unconstrained parameters: logits of the weights, means, and Cholesky factors of the covariances
        with the logarithm of their diagonal. No floor: a collapsing component ends as an error.

        Args:
            data: Shape (n, d).
            max_steps: Most steps, each with one line search.
            tolerance: Stop when no entry of the gradient of the mean log-likelihood is larger.

        Raises:
            ValueError: If a component collapses, on a single row for example.
        """
        checked_rows(data, num_features=self.means.shape[1])
        return _gradient_ascent(self, data, max_steps=max_steps, tolerance=tolerance)

    def maximised(self, data: Tensor, responsibilities: Tensor, *, floor: float) -> "GaussianMixture":
        r"""Return the mixture with the largest ELBO for a fixed q, among those with variances above the floor.

        .. math:: \pi_k = N_k / n, \quad m_k = \tfrac{1}{N_k} \sum_i r_{ik} x_i, \quad
            S_k = \tfrac{1}{N_k} \sum_i r_{ik} (x_i - m_k)(x_i - m_k)^T, \quad N_k = \sum_i r_{ik}

        Eigenvalues of S_k below the floor are raised to it. That is the exact maximum under the constraint, so EM
        never loses likelihood, as it may with a ridge added to the diagonal.

        Args:
            data: Shape (n, d).
            responsibilities: q, shape (n, K).
            floor: Smallest variance in any direction, in units of data squared.

        Raises:
            ValueError: If no row belongs to a component any more.
        """
        _check_probabilities(responsibilities, (len(data), self.num_components))
        counts = responsibilities.sum(dim=0)
        if not bool((counts > torch.finfo(data.dtype).eps).all()):
            raise ValueError(
                f"mixture: no rows belong to component {int(counts.argmin())} any more; use fewer components or "
                "another start"
            )
        means = responsibilities.T @ data / counts.unsqueeze(1)
        centred = data.unsqueeze(0) - means.unsqueeze(1)
        scatter = (centred * responsibilities.T.unsqueeze(2)).mT @ centred / counts.view(-1, 1, 1)
        values, vectors = torch.linalg.eigh(scatter)
        covariances = (vectors * values.clamp_min(floor).unsqueeze(1)) @ vectors.mT
        return GaussianMixture(counts / counts.sum(), means, 0.5 * (covariances + covariances.mT))


def initial(data: Tensor, num_components: int, generator: torch.Generator) -> GaussianMixture:
    """Return a start for EM: equal weights, the data's variance, means on rows that lie apart (k-means++).

    Args:
        data: Shape (n, d).
        num_components: K.
        generator: Source of the rows, on the device of the data.

    References:
        Arthur and Vassilvitskii, k-means++: The Advantages of Careful Seeding, 2007.
        https://dl.acm.org/doi/10.5555/1283383.1283494
    """
    first = torch.randint(len(data), (1,), generator=generator, device=data.device)
    means = data[first]
    while len(means) < num_components:
        distances = (data.unsqueeze(1) - means).square().sum(dim=2).amin(dim=1)
        means = torch.cat((means, data[torch.multinomial(distances, 1, generator=generator)]))
    identity = torch.eye(data.shape[1], dtype=data.dtype, device=data.device)
    variance = data.var(dim=0, correction=0).mean()
    return GaussianMixture(
        torch.full((num_components,), 1 / num_components, dtype=data.dtype, device=data.device),
        means,
        (variance * identity).expand(num_components, -1, -1).clone(),
    )


def variance_floor(data: Tensor, num_components: int, relative_floor: float) -> float:
    """Return the smallest variance that a fit may use, in units of data squared.

    Args:
        data: Shape (n, d).
        num_components: K.
        relative_floor: Share of the mean variance of a feature, in (0, 1).

    Raises:
        ValueError: If the data cannot be fitted: not finite, constant, fewer distinct rows than components.
    """
    if num_components < 1:
        raise ValueError(f"num_components: {num_components}; give at least 1")
    if not 0 < relative_floor < 1:
        raise ValueError(f"relative_floor: {relative_floor} is not in (0, 1); without a floor there is no maximum")
    checked_rows(data, min_rows=max(2, num_components))
    num_distinct = len(torch.unique(data, dim=0))
    if num_distinct == 1:
        raise ValueError("data: all rows are equal, the likelihood has no maximum; give data that vary")
    if num_distinct < num_components:
        raise ValueError(
            f"data: {num_distinct} distinct rows for {num_components} components; give more, or use fewer "
            "components"
        )
    return relative_floor * data.var(dim=0, correction=0).mean().item()


def three_clusters(*, dtype: torch.dtype = torch.float64) -> GaussianMixture:
    """Return the mixture of the figure: equal weights, unit covariances, means (-3, 0), (3, 0), (0, 4).

    Its expected log p(x) is -3.911664 nats; the best single Gaussian reaches -4.569006.
    """
    return GaussianMixture(
        torch.full((3,), 1 / 3, dtype=dtype),
        torch.tensor([[-3.0, 0.0], [3.0, 0.0], [0.0, 4.0]], dtype=dtype),
        torch.eye(2, dtype=dtype).repeat(3, 1, 1),
    )


def _log_joint(data: Tensor, log_weights: Tensor, means: Tensor, factors: Tensor) -> Tensor:
    centred = data.unsqueeze(0) - means.unsqueeze(1)
    whitened = torch.linalg.solve_triangular(factors, centred.mT, upper=False)
    log_det = 2 * factors.diagonal(dim1=1, dim2=2).log().sum(dim=1)
    constants = log_weights - 0.5 * (data.shape[1] * _LOG_TWO_PI + log_det)
    log_joint: Tensor = constants - 0.5 * whitened.square().sum(dim=1).T
    return log_joint


def _expectation_maximisation(
    model: GaussianMixture, data: Tensor, *, floor: float, max_steps: int, tolerance: float
) -> MixtureFit:
    log_likelihoods = [model.log_prob(data).mean().item()]
    is_converged = False
    while not is_converged and len(log_likelihoods) <= max_steps:
        model = model.maximised(data, model.posterior(data), floor=floor)
        log_likelihoods.append(model.log_prob(data).mean().item())
        is_converged = log_likelihoods[-1] - log_likelihoods[-2] < tolerance
    smallest = torch.linalg.eigvalsh(model.covariances).amin(dim=1)
    # A thousandth above the floor: eigenvalues that were raised to it come back with rounding.
    floored = tuple(int(k) for k in (smallest <= 1.001 * floor).nonzero().flatten())
    return MixtureFit(model, tuple(log_likelihoods), is_converged, floored)


def _gradient_ascent(model: GaussianMixture, data: Tensor, *, max_steps: int, tolerance: float) -> MixtureFit:
    factors = torch.linalg.cholesky(model.covariances)
    logits = model.weights.log().requires_grad_()
    means = model.means.clone().requires_grad_()
    lower = factors.tril(-1).requires_grad_()
    log_diagonal = factors.diagonal(dim1=1, dim2=2).log().clone().requires_grad_()
    parameters = [logits, means, lower, log_diagonal]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=1,
        max_eval=_LINE_SEARCH_EVALUATIONS,  # PyTorch's default for one step leaves none to the line search
        tolerance_grad=0,
        tolerance_change=0,
        history_size=_HISTORY,
        line_search_fn="strong_wolfe",
    )

    def mean_log_prob() -> Tensor:
        triangular = lower.tril(-1) + torch.diag_embed(log_diagonal.exp())
        return _log_joint(data, logits.log_softmax(dim=0), means, triangular).logsumexp(dim=1).mean()

    def closure() -> float:
        optimizer.zero_grad()
        loss = -mean_log_prob()
        torch.autograd.backward(loss)
        return loss.item()

    log_likelihoods = [model.log_prob(data).mean().item()]
    is_converged = False
    while not is_converged and len(log_likelihoods) <= max_steps:
        optimizer.step(closure)  # type: ignore[no-untyped-call]
        closure()  # Where the step ended, not where its line search looked last.
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        is_converged = max(gradient.abs().max().item() for gradient in gradients) < tolerance
        with torch.no_grad():
            log_likelihoods.append(mean_log_prob().item())
        if not math.isfinite(log_likelihoods[-1]):
            raise ValueError(
                f"mixture: the likelihood has no bound, a component collapsed at step {len(log_likelihoods) - 1}; "
                "fit by EM, which has a variance floor, or use fewer components"
            )
    with torch.no_grad():
        triangular = lower.tril(-1) + torch.diag_embed(log_diagonal.exp())
        fitted = GaussianMixture(logits.softmax(dim=0), means.detach().clone(), triangular @ triangular.mT)
    return MixtureFit(fitted, tuple(log_likelihoods), is_converged, ())


def _check_probabilities(responsibilities: Tensor, shape: tuple[int, int]) -> None:
    if responsibilities.shape != shape:
        raise ValueError(f"responsibilities: shape {tuple(responsibilities.shape)}, expected {shape}")
    sums = responsibilities.sum(dim=1)
    is_simplex = bool((responsibilities >= 0).all()) and bool(((sums - 1).abs() < _SIMPLEX_TOLERANCE).all())
    if not is_simplex:
        raise ValueError("responsibilities: a row is no distribution; give numbers >= 0 with sum one in each row")
