"""Laws of Gaussian mixtures: exact inference, EM as coordinate ascent, and the known optimum of three clusters."""

import itertools
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from training.models.gaussian_mixture import (
    Draw,
    GaussianMixture,
    MixtureFit,
    initial,
    three_clusters,
    variance_floor,
)

EXACT = 1e-9
"""Float64 rounding of sums over a few components of numbers up to a thousand."""

NUM_ROWS = 10_000

OPTIMUM = -3.911664
"""Expected log p(x) of the three clusters under themselves, nats, by quadrature."""

SINGLE_GAUSSIAN = -4.569006
"""The same for the single Gaussian with their mean and covariance."""

NUM_PARAMETERS = 3 * (2 + 3) + 2
"""Means, covariances and free weights of three clusters in the plane."""


@pytest.fixture(scope="module")
def train() -> Draw:
    """Return rows of the three clusters with their clusters."""
    return three_clusters().sample(NUM_ROWS, torch.Generator().manual_seed(1312))


@pytest.fixture(scope="module")
def fitted(train: Draw) -> MixtureFit:
    """Return EM's best of four starts."""
    return GaussianMixture.fit(train.data, 3, torch.Generator().manual_seed(0))


def _random_mixture(source: torch.Generator, *, num_components: int = 3, num_features: int = 2) -> GaussianMixture:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    factors = drawn(num_components, num_features, num_features)
    ridge = 0.3 * torch.eye(num_features, dtype=torch.float64)
    return GaussianMixture(
        drawn(num_components).softmax(dim=0), drawn(num_components, num_features), factors @ factors.mT + ridge
    )


def _random_q(source: torch.Generator, num_rows: int, num_components: int = 3) -> Tensor:
    return (3 * torch.randn((num_rows, num_components), generator=source, dtype=torch.float64)).softmax(dim=1)


def _in_order_of(reference: Tensor, means: Tensor) -> list[int]:
    """Return which component stands where the reference has its first, second, ...; labels are arbitrary."""
    orders = itertools.permutations(range(len(reference)))
    return list(min(orders, key=lambda order: (means[list(order)] - reference).square().sum().item()))


def test_expected_log_prob_of_three_clusters_is_the_known_optimum() -> None:
    """Quadrature of our density gives its integral, its entropy, and that of the best single Gaussian."""
    mixture = three_clusters()
    axis = torch.linspace(-12, 12, 481, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_prob = mixture.log_prob(grid)
    mass = log_prob.exp() * float(axis[1] - axis[0]) ** 2
    mean = mass @ grid
    covariance = (mass.unsqueeze(1) * (grid - mean)).T @ (grid - mean)
    single = GaussianMixture(torch.ones(1, dtype=torch.float64), mean.unsqueeze(0), covariance.unsqueeze(0))
    assert mass.sum().item() == pytest.approx(1, abs=1e-9)
    assert (mass @ log_prob).item() == pytest.approx(OPTIMUM, abs=5.1e-7)
    assert (mass @ single.log_prob(grid)).item() == pytest.approx(SINGLE_GAUSSIAN, abs=5.1e-7)


def test_fit_reaches_the_optimum_on_new_rows(fitted: MixtureFit) -> None:
    r"""Held-out log p is at the true mixture's on the same rows, within what 10,000 training rows can tell.

    The loss is chi-squared with 17 degrees of freedom over 2n: at most (17 + 5 sqrt(34)) / 2n. On n test rows it
    shows with a deviation of sqrt(2 loss / n).
    """
    test = three_clusters().sample(NUM_ROWS, torch.Generator().manual_seed(99)).data
    loss = (NUM_PARAMETERS + 5 * math.sqrt(2 * NUM_PARAMETERS)) / (2 * NUM_ROWS)
    tolerance = loss + 5 * math.sqrt(2 * loss / NUM_ROWS)
    ours, truth = fitted.model.log_prob(test).mean().item(), three_clusters().log_prob(test).mean().item()
    assert ours == pytest.approx(truth, abs=tolerance)
    assert ours >= -3.93
    assert fitted.is_converged
    assert fitted.floored == ()


def test_three_clusters_are_recovered(fitted: MixtureFit, train: Draw) -> None:
    """Means are found within 0.1, weights and covariances within five standard errors, rows their clusters.

    A standard error is that of a cluster of its own, n/3 rows: 0.017 for a mean, 0.025 for a variance; the overlap
    costs less than half as much again. About 97 % of the rows are what a classifier that knows the truth gets.
    """
    truth = three_clusters()
    order = _in_order_of(truth.means, fitted.model.means)
    model = GaussianMixture(
        *(values[order] for values in (fitted.model.weights, fitted.model.means, fitted.model.covariances))
    )
    assert (model.means - truth.means).abs().max() < 0.1
    assert (model.weights - truth.weights).abs().max() < 5 * 0.007
    assert (model.covariances - truth.covariances).abs().max() < 5 * 0.036
    shares = [
        mixture.posterior(train.data).argmax(dim=1).eq(train.clusters).double().mean().item()
        for mixture in (model, truth)
    ]
    assert shares[0] == pytest.approx(shares[1], abs=0.003)
    assert shares[1] > 0.95


def test_likelihood_never_falls(train: Draw) -> None:
    """Every EM step gains or stays, from poor starts and with more components than clusters."""
    data = train.data[:1000]
    for start in range(3):
        fit = initial(data, 5, torch.Generator().manual_seed(start)).refined(data, floor=0.5, max_steps=60)
        # A mean of 1000 numbers near -4 keeps 1e-14; the floor of 0.5 is above some eigenvalues.
        assert all(after >= before - 1e-13 for before, after in pairwise(fit.log_likelihoods))
        assert fit.log_likelihoods[-1] > fit.log_likelihoods[0]


def test_gradient_ascent_agrees_with_em(train: Draw) -> None:
    """Both reach the same maximum from the same start.

    EM stops at a gain of 1e-9; with a ratio of gains below 0.9 it lies 1e-8 below the maximum at most, where a
    mean of a third of the rows is off by sqrt(6e-8) = 2.5e-4 deviations at most.
    """
    data = train.data[:2000]
    start = initial(data, 3, torch.Generator().manual_seed(0))
    by_em = start.refined(data, floor=variance_floor(data, 3, 1e-4))
    by_gradient = start.refined_by_gradient(data)
    assert by_em.is_converged
    assert by_gradient.is_converged
    assert by_gradient.log_likelihoods[0] == pytest.approx(by_em.log_likelihoods[0], abs=EXACT)
    assert by_gradient.log_likelihoods[-1] == pytest.approx(by_em.log_likelihoods[-1], abs=1e-8)
    assert by_gradient.model.log_prob(data).mean().item() == pytest.approx(
        by_gradient.log_likelihoods[-1], abs=EXACT
    )
    # Labels are those of the common start.
    torch.testing.assert_close(by_gradient.model.means, by_em.model.means, rtol=0, atol=2.5e-4)
    torch.testing.assert_close(by_gradient.model.weights, by_em.model.weights, rtol=0, atol=2.5e-4)


def test_log_prob_is_that_of_an_independent_implementation(source: torch.Generator) -> None:
    """Density and posterior agree with torch.distributions."""
    mixture = _random_mixture(source)
    data = 2 * torch.randn((20, 2), generator=source, dtype=torch.float64)
    components = MultivariateNormal(mixture.means, mixture.covariances)
    oracle = MixtureSameFamily(Categorical(mixture.weights), components)
    expected = oracle.log_prob(data)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mixture.log_prob(data), expected, rtol=0, atol=EXACT)
    joint = components.log_prob(data.unsqueeze(1)).exp() * mixture.weights  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mixture.posterior(data), joint / joint.sum(dim=1, keepdim=True), rtol=0, atol=EXACT)


@given(seed=st.integers(0, 2**32))
def test_evidence_is_bound_plus_gap_for_any_q(seed: int) -> None:
    """Log p(x) = ELBO + KL(q, posterior), row by row, each computed on its own; the gap is never negative."""
    source = torch.Generator().manual_seed(seed)
    mixture, q = _random_mixture(source), _random_q(source, 4)
    data = 2 * torch.randn((4, 2), generator=source, dtype=torch.float64)
    gap = mixture.kl_to_posterior(data, q)
    torch.testing.assert_close(mixture.elbo(data, q) + gap, mixture.log_prob(data), rtol=1e-11, atol=EXACT)
    assert bool((gap >= -1e-12).all())


def test_certain_q_has_a_finite_bound(source: torch.Generator) -> None:
    """A q that chooses one component has no entropy: the bound is log p(x, z), and 0 log 0 is 0."""
    mixture = _random_mixture(source)
    data = torch.randn((3, 2), generator=source, dtype=torch.float64)
    q = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(mixture.elbo(data, q), mixture.log_joint(data).diagonal(), rtol=0, atol=EXACT)
    torch.testing.assert_close(
        mixture.kl_to_posterior(data, q), mixture.log_prob(data) - mixture.elbo(data, q), rtol=0, atol=EXACT
    )


@given(seed=st.integers(0, 2**32))
def test_em_is_coordinate_ascent_of_the_bound(seed: int) -> None:
    """The step on q closes the gap; the step on p lifts the bound of any q, not only of that."""
    source = torch.Generator().manual_seed(seed)
    data = 2 * torch.randn((30, 2), generator=source, dtype=torch.float64)
    mixture, q = _random_mixture(source), _random_q(source, 30)
    exact = mixture.posterior(data)
    assert mixture.kl_to_posterior(data, exact).abs().max() < EXACT
    assert mixture.elbo(data, exact).mean() >= mixture.elbo(data, q).mean()
    # The random mixture may stand below the floor, where it competes unfairly: a floor of 1e-6 it cannot reach.
    for any_q in (q, exact):
        better = mixture.maximised(data, any_q, floor=1e-6)
        assert better.elbo(data, any_q).mean() >= mixture.elbo(data, any_q).mean()
        assert better.log_prob(data).mean() >= better.elbo(data, any_q).mean()


def test_floored_step_is_the_best_above_the_floor(source: torch.Generator) -> None:
    """With the floor active, no other covariance above it has a larger bound."""
    data = torch.randn((40, 2), generator=source, dtype=torch.float64) * torch.tensor([1.0, 0.1])
    q, floor = torch.ones((40, 1), dtype=torch.float64), 0.25
    best = _random_mixture(source, num_components=1).maximised(data, q, floor=floor)
    top = best.elbo(data, q).mean()
    assert torch.linalg.eigvalsh(best.covariances).min().item() == pytest.approx(floor)
    for _ in range(50):
        step = 0.1 * torch.randn((2, 2), generator=source, dtype=torch.float64)
        values, vectors = torch.linalg.eigh(best.covariances[0] + step + step.T)
        other = (vectors * values.clamp_min(floor)) @ vectors.T
        assert GaussianMixture(best.weights, best.means, other.unsqueeze(0)).elbo(data, q).mean() <= top


def test_component_on_a_single_row_stops_at_the_floor() -> None:
    """A collapsing component keeps a finite likelihood and is named."""
    data = torch.cat(
        (torch.randn((200, 2), generator=torch.Generator().manual_seed(1)).double(), torch.full((1, 2), 60.0))
    )
    fit = GaussianMixture.fit(data, 2, torch.Generator().manual_seed(0), relative_floor=1e-3)
    alone = int(fit.model.means.norm(dim=1).argmax())
    assert fit.floored == (alone,)
    assert math.isfinite(fit.log_likelihoods[-1])
    expected = 1e-3 * data.var(dim=0, correction=0).mean().item()
    torch.testing.assert_close(fit.model.covariances[alone], expected * torch.eye(2, dtype=torch.float64))
    assert fit.model.weights[alone].item() == pytest.approx(1 / 201, abs=1e-6)


def test_best_of_several_starts_is_kept() -> None:
    """One of six starts ends in a local maximum; the fit is the best of them."""
    means = torch.tensor([[0, 0], [4, 0], [0, 8], [9, 9], [-7, 3], [-7, -3]], dtype=torch.float64)
    weights = torch.full((6,), 1 / 6, dtype=torch.float64)
    truth = GaussianMixture(weights, means, 0.3 * torch.eye(2, dtype=torch.float64).repeat(6, 1, 1))
    data = truth.sample(600, torch.Generator().manual_seed(0)).data
    source = torch.Generator().manual_seed(0)
    singles = [GaussianMixture.fit(data, 6, source, num_starts=1).log_likelihoods[-1] for _ in range(6)]
    best = GaussianMixture.fit(data, 6, torch.Generator().manual_seed(0), num_starts=6)
    assert best.log_likelihoods[-1] == max(singles)
    assert min(singles) < max(singles) - 0.1


def test_collapse_under_gradient_ascent_is_refused() -> None:
    """Without a floor the likelihood of a component on one row has no maximum, and the error says so."""
    rows = torch.randn((50, 2), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    data = torch.cat((rows, torch.full((1, 2), 60.0, dtype=torch.float64)))
    start = GaussianMixture(
        torch.full((2,), 0.5, dtype=torch.float64),
        data[[0, 50]],
        torch.eye(2, dtype=torch.float64).repeat(2, 1, 1),
    )
    with pytest.raises(ValueError, match=r"has no bound, a component collapsed at step .*fit by EM"):
        start.refined_by_gradient(data, max_steps=300)


def test_samples_have_the_moments_of_the_mixture(source: torch.Generator) -> None:
    """Shares of the clusters, and mean and covariance inside one, are right within five standard errors."""
    mixture, num = _random_mixture(source), 100_000
    data, clusters = mixture.sample(num, source)
    shares = clusters.bincount(minlength=3).double() / num
    assert bool(
        ((shares - mixture.weights).abs() < 5 * (mixture.weights * (1 - mixture.weights) / num).sqrt()).all()
    )
    for k in range(3):
        rows, covariance = data[clusters == k], mixture.covariances[k]
        variances = covariance.diagonal()
        assert bool(((rows.mean(dim=0) - mixture.means[k]).abs() < 5 * (variances / len(rows)).sqrt()).all())
        standard_errors = ((torch.outer(variances, variances) + covariance.square()) / len(rows)).sqrt()
        assert bool(((rows.T.cov() - covariance).abs() < 5 * standard_errors).all())


def test_samples_and_starts_depend_on_the_generator_alone(train: Draw, seed: int) -> None:
    """The same seed gives the same draws and the same start, another one others."""
    sources = [torch.Generator().manual_seed(value) for value in (seed, seed, seed + 1)]
    draws = [three_clusters().sample(5, source).data for source in sources]
    starts = [initial(train.data, 3, source).means for source in sources]
    for first, second, third in (draws, starts):
        assert torch.equal(first, second)
        assert not torch.equal(first, third)


def test_starts_lie_apart() -> None:
    """k-means++ never takes a row twice while distinct ones are left."""
    data = torch.tensor([[0.0], [0.0], [0.0], [0.0], [1.0], [5.0]], dtype=torch.float64)
    for start in range(20):
        means = initial(data, 3, torch.Generator().manual_seed(start)).means
        assert sorted(means.flatten().tolist()) == [0, 1, 5]


def _with_nan() -> Tensor:
    data = torch.eye(5, dtype=torch.float64)
    data[3, 1] = math.nan
    return data


@pytest.mark.parametrize(
    ("data", "num_components", "relative_floor", "message"),
    [
        (_with_nan(), 2, 1e-4, "1 rows hold NaN or infinity, the first is row 3; remove"),
        (torch.zeros(5), 2, 1e-4, "flatten each row"),
        (
            torch.eye(4),
            5,
            1e-4,
            "4 rows, at least 5 are needed; give more, or a smaller model",
        ),
        (torch.eye(2).repeat(4, 1), 3, 1e-4, "2 distinct rows for 3 components; give more, or use fewer"),
        (torch.ones((9, 2)), 2, 1e-4, "all rows are equal, the likelihood has no maximum; give data that vary"),
        (torch.eye(4), 0, 1e-4, "num_components: 0; give at least 1"),
        (torch.eye(4), 2, 0.0, r"relative_floor: 0.0 is not in \(0, 1\)"),
    ],
)
def test_data_that_cannot_be_fitted_are_refused(
    data: Tensor, num_components: int, relative_floor: float, message: str
) -> None:
    """What has no maximum is an error that says what is wrong and what to do."""
    with pytest.raises(ValueError, match=message):
        GaussianMixture.fit(data, num_components, torch.Generator(), relative_floor=relative_floor)


@pytest.mark.parametrize(
    ("weights", "means", "covariances", "message"),
    [
        (torch.ones(2) / 2, torch.zeros(3, 1), torch.ones(3, 1, 1), "do not fit; give shapes"),
        (torch.ones(3) / 3, torch.zeros(3), torch.ones(3, 1, 1), "do not fit; give shapes"),
        (torch.ones(3) / 3, torch.zeros(3, 2), torch.ones(3, 2, 1), "do not fit; give shapes"),
        (torch.ones(3), torch.zeros(3, 1), torch.ones(3, 1, 1), "must be positive with sum one"),
        (torch.tensor([1.5, -0.5]), torch.zeros(2, 1), torch.ones(2, 1, 1), "must be positive with sum one"),
        (
            torch.ones(2) / 2,
            torch.zeros(2, 1),
            torch.tensor([[[1.0]], [[-1.0]]]),
            "component 1 has no finite mean",
        ),
    ],
)
def test_parameters_that_are_no_mixture_are_refused(
    weights: Tensor, means: Tensor, covariances: Tensor, message: str
) -> None:
    """A mixture exists only with parameters that fit."""
    with pytest.raises(ValueError, match=message):
        GaussianMixture(weights, means, covariances)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (torch.ones(4, 2) / 2, r"shape \(4, 2\), expected \(4, 3\)"),
        (torch.ones(4, 3), "a row is no distribution"),
        (torch.tensor([[1.5, -0.5, 0.0]]).expand(4, 3), "a row is no distribution"),
    ],
)
def test_q_that_is_no_distribution_is_refused(q: Tensor, message: str) -> None:
    """Bound, gap and step on p take probabilities."""
    data = torch.zeros((4, 2), dtype=torch.float64)
    mixture = three_clusters()
    for call in (mixture.elbo, mixture.kl_to_posterior, lambda rows, r: mixture.maximised(rows, r, floor=1.0)):
        with pytest.raises(ValueError, match=message):
            call(data, q.double())


def test_component_without_rows_is_refused() -> None:
    """Mean and covariance of no rows do not exist."""
    q = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.0, 1.0]], dtype=torch.float64)
    with pytest.raises(ValueError, match="no rows belong to component 1 any more; use fewer components"):
        three_clusters().maximised(torch.eye(2, dtype=torch.float64), q, floor=1e-3)
