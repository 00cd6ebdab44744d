"""Laws of conditional mixtures, and Bishop's inverse problem with its exact entropy."""

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, Independent, MixtureSameFamily, Normal

from training.models.mixture_density import ConditionalMixture, MixtureDensityNetwork, Pairs, inverse_problem

CONDITIONAL_ENTROPY = -1.282348
"""H(t | x) of the inverse problem, nats: no model has a smaller expected negative log-likelihood."""

SINGLE_GAUSSIAN = -0.655320
"""The smallest expected negative log-likelihood of a regression with one Gaussian."""

NUM_TEST_ROWS = 10_000


class Nll(NamedTuple):
    """Mean negative log-likelihood on rows that no fit has seen, with its standard error, nats."""

    value: float
    standard_error: float


@pytest.fixture(scope="module")
def fitted() -> MixtureDensityNetwork:
    """Return the mixture of eight, fitted to 4000 rows of the inverse problem."""
    return _fit(num_components=8, num_steps=600)


@pytest.fixture
def mixture(source: torch.Generator) -> ConditionalMixture:
    """Return a mixture of three in two dimensions for four rows."""
    return _random_mixture(source)


def _fit(*, num_components: int, num_steps: int) -> MixtureDensityNetwork:
    source = torch.Generator().manual_seed(0)
    network = MixtureDensityNetwork(1, 1, num_components, (32,), source)
    losses = network.fit(inverse_problem(4000, source), source, num_steps=num_steps, learning_rate=2e-2)
    assert losses[-1] < losses[0]
    return network


def _random_mixture(source: torch.Generator) -> ConditionalMixture:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=source, dtype=torch.float64)

    return ConditionalMixture(drawn(4, 3).log_softmax(dim=1), 2 * drawn(4, 3, 2), 0.3 * drawn(4, 3, 2) - 1)


@torch.no_grad()
def _nll(network: MixtureDensityNetwork) -> Nll:
    test = inverse_problem(NUM_TEST_ROWS, torch.Generator().manual_seed(99))
    values = -network.log_prob(test.targets, test.inputs).double()
    return Nll(values.mean().item(), values.std().item() / math.sqrt(NUM_TEST_ROWS))


def test_entropies_of_the_inverse_problem_are_the_known_ones() -> None:
    """Quadrature over x of p(t | x), uniform on where |x - g(t)| < 0.1, gives both figures."""
    targets = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    curve = targets + 0.3 * (2 * math.pi * targets).sin()
    entropy = gaussian = mass = 0.0
    width = 1.6 / 3000
    for x in -0.3 + width * (torch.arange(3000, dtype=torch.float64) + 0.5):
        near = targets[(x - curve).abs() < 0.1]
        if len(near) < 2:
            continue
        share = len(near) / len(targets)
        density = share / 0.2 * width
        mass += density
        entropy += density * math.log(share)
        gaussian += density * 0.5 * (math.log(2 * math.pi * near.var(correction=0).item()) + 1)
    # Sums of the midpoint rule over curves with corners.
    assert mass == pytest.approx(1, abs=1e-4)
    assert entropy == pytest.approx(CONDITIONAL_ENTROPY, abs=1e-3)
    assert gaussian == pytest.approx(SINGLE_GAUSSIAN, abs=1e-3)


def test_rows_of_the_inverse_problem_lie_on_its_curve(source: torch.Generator) -> None:
    """The noise is uniform on (-0.1, 0.1) and t on (0, 1): moments within five standard errors."""
    inputs, targets = inverse_problem(50_000, source, dtype=torch.float64)
    noise = inputs - targets - 0.3 * (2 * math.pi * targets).sin()
    assert inputs.shape == targets.shape == (50_000, 1)
    assert 0.0999 < noise.abs().max().item() <= 0.1
    assert noise.mean().item() == pytest.approx(0, abs=5 * 0.1 / math.sqrt(3 * 50_000))
    assert targets.mean().item() == pytest.approx(0.5, abs=5 / math.sqrt(12 * 50_000))


def test_mixture_beats_every_single_gaussian(fitted: MixtureDensityNetwork) -> None:
    """New rows cost at most -1.10 nats, 0.44 below the best Gaussian there is, and not less than the entropy."""
    nll = _nll(fitted)
    assert CONDITIONAL_ENTROPY - 3 * nll.standard_error <= nll.value <= -1.10
    assert nll.value < SINGLE_GAUSSIAN - 0.44


def test_single_gaussian_stays_above_its_limit(fitted: MixtureDensityNetwork) -> None:
    """The same network with one component is a proper regression, and cannot pass the known limit."""
    nll = _nll(_fit(num_components=1, num_steps=600))
    assert SINGLE_GAUSSIAN - 0.005 - 3 * nll.standard_error <= nll.value <= -0.4
    assert nll.value > _nll(fitted).value + 0.4


@pytest.mark.parametrize("x", [0.4, 0.6])
def test_modes_of_the_inverse_problem_are_its_branches(x: float, fitted: MixtureDensityNetwork) -> None:
    """Where two intervals of t explain one x, each holds a mode, and the highest mode is in one of them."""
    targets = (torch.arange(20_000) + 0.5) / 20_000
    near = targets[(x - targets - 0.3 * (2 * math.pi * targets).sin()).abs() < 0.1]
    gap = int(near.diff().argmax())
    intervals = [(near[0], near[gap]), (near[gap + 1], near[-1])]
    assert near[gap + 1] - near[gap] > 0.2
    with torch.no_grad():
        modes = fitted(torch.tensor([[x]])).modes()
    found = modes.values[0, modes.is_distinct[0], 0]
    inside = torch.stack([(found > low) & (found < high) for low, high in intervals])
    assert bool(inside.any(dim=1).all())
    assert bool(inside[:, 0].any())


def test_samples_of_the_network_fall_on_the_curve(fitted: MixtureDensityNetwork, source: torch.Generator) -> None:
    """Draws of t at an x explain that x: nearly all of them within the noise and half as much again."""
    inputs = torch.linspace(0.1, 0.9, 9).unsqueeze(1)
    draws = fitted.sample(inputs, 500, source).squeeze(2)
    distance = (draws + 0.3 * (2 * math.pi * draws).sin() - inputs).abs()
    assert draws.shape == (9, 500)
    assert (distance < 0.15).double().mean().item() > 0.85


def test_log_prob_is_that_of_an_independent_implementation(
    mixture: ConditionalMixture, source: torch.Generator
) -> None:
    """Density and mean agree with torch.distributions."""
    normals = Normal(mixture.means, mixture.log_scales.exp())
    components = Independent(normals, 1)
    weights = Categorical(logits=mixture.log_weights)
    oracle = MixtureSameFamily(weights, components)
    targets = torch.randn((4, 2), generator=source, dtype=torch.float64)
    expected = oracle.log_prob(targets)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(mixture.log_prob(targets), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(mixture.mean, oracle.mean, rtol=0, atol=1e-9)


def test_bound_of_any_component_shares_is_tight_at_the_posterior(
    mixture: ConditionalMixture, source: torch.Generator
) -> None:
    """The bound stays below log p(y | x) by KL(q, posterior), which is zero at the posterior alone."""
    targets = torch.randn((4, 2), generator=source, dtype=torch.float64)
    log_prob, posterior = mixture.log_prob(targets), mixture.posterior(targets)
    torch.testing.assert_close(mixture.elbo(targets, posterior), log_prob, rtol=0, atol=1e-9)
    q = torch.randn((4, 3), generator=source, dtype=torch.float64).softmax(dim=1)
    gap = (q * (q.log() - posterior.log())).sum(dim=1)
    assert bool((gap > 0).all())
    torch.testing.assert_close(mixture.elbo(targets, q), log_prob - gap, rtol=0, atol=1e-9)
    certain = torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).expand(4, 3)
    assert bool(mixture.elbo(targets, certain).isfinite().all())


def test_log_prob_far_away_is_finite(mixture: ConditionalMixture) -> None:
    """A target at a thousand deviations, where every density underflows, has a finite logarithm."""
    assert bool((mixture.log_prob(torch.full((4, 2), 1e3, dtype=torch.float64)) < -1e5).all())
    assert bool(mixture.log_prob(torch.full((4, 2), 1e3, dtype=torch.float64)).isfinite().all())


def test_samples_have_the_moments_of_the_mixture(mixture: ConditionalMixture, source: torch.Generator) -> None:
    """Mean and second moment of every row are right within five standard errors."""
    draws = mixture.sample(100_000, source)
    assert draws.shape == (4, 100_000, 2)
    weights = mixture.log_weights.exp().unsqueeze(2)
    second = (weights * (mixture.means.square() + (2 * mixture.log_scales).exp())).sum(dim=1)
    for values, expected in ((draws, mixture.mean), (draws.square(), second)):
        standard_error = values.std(dim=1) / math.sqrt(100_000)
        assert bool(((values.mean(dim=1) - expected).abs() < 5 * standard_error).all())


def test_modes_are_maxima(mixture: ConditionalMixture) -> None:
    """The density has no slope at a mode, falls off beside it, and modes stand in the order of their density."""
    modes = mixture.modes()
    values = modes.values.clone().requires_grad_()
    (slope,) = torch.autograd.grad(mixture.log_joint(values).logsumexp(dim=2).sum(), values)
    assert slope.abs().max() < 1e-6
    for step in torch.tensor([[0.05, 0.0], [-0.05, 0.0], [0.0, 0.05], [0.0, -0.05]], dtype=torch.float64):
        beside = mixture.log_joint(modes.values + step).logsumexp(dim=2)
        assert bool((beside < modes.log_density).all())
    assert bool((modes.log_density.diff(dim=1) <= 0).all())
    assert bool(modes.is_distinct[:, 0].all())


def test_two_components_in_one_place_have_one_mode() -> None:
    """Modes are counted once: components closer than two deviations merge, far ones do not."""
    means = torch.tensor([[[0.0], [0.5]], [[0.0], [6.0]]], dtype=torch.float64)
    both = torch.full((2, 2), math.log(0.5), dtype=torch.float64)
    modes = ConditionalMixture(both, means, torch.zeros((2, 2, 1), dtype=torch.float64)).modes()
    assert modes.is_distinct.tolist() == [[True, False], [True, True]]
    assert modes.values[0, 0, 0].item() == pytest.approx(0.25, abs=1e-6)


def test_density_in_the_users_units_integrates_to_one(source: torch.Generator) -> None:
    """Scaling inside is undone outside: targets of a thousand have a density of their own unit."""
    inputs = torch.randn((200, 1), generator=source, dtype=torch.float64)
    targets = 3000 + 500 * torch.randn((200, 1), generator=source, dtype=torch.float64)
    network = MixtureDensityNetwork(1, 1, 2, (4,), source).double()
    network.fit(Pairs(inputs, targets), source, num_steps=200)
    grid = torch.linspace(-3000, 9000, 4001, dtype=torch.float64).unsqueeze(1)
    with torch.no_grad():
        log_prob = network.log_prob(grid, torch.zeros_like(grid))
        nll = -network.log_prob(targets, inputs).mean().item()
    assert log_prob.exp().sum().item() * 3 == pytest.approx(1, abs=1e-6)
    # Independent of x: the entropy of N(3000, 500^2) is 7.63; 17 weights more can gain 17 / 400 on average.
    expected = 0.5 * math.log(2 * math.pi * math.e * targets.var(correction=0).item())
    assert expected - 0.15 < nll < expected + 0.01


def test_scales_stay_above_their_floor(source: torch.Generator) -> None:
    """Where targets are a function of inputs, the likelihood is bounded by the smallest scale."""
    inputs = torch.linspace(-1, 1, 64, dtype=torch.float64).unsqueeze(1)
    network = MixtureDensityNetwork(1, 1, 2, (8,), source, min_log_scale=-2).double()
    losses = network.fit(Pairs(inputs, inputs), source, num_steps=300)
    with torch.no_grad():
        smallest = (network(inputs).log_scales - inputs.std().log()).min().item()
    assert smallest >= -2
    assert losses[-1] >= 0.5 * math.log(2 * math.pi) - 2 + inputs.std().log().item()


def test_same_seed_gives_the_same_network(source: torch.Generator, seed: int) -> None:
    """Weights, fit and samples depend on the generators alone."""
    rows = inverse_problem(50, source)
    draws = []
    for value in (seed, seed, seed + 1):
        own = torch.Generator().manual_seed(value)
        network = MixtureDensityNetwork(1, 1, 3, (4,), own)
        network.fit(rows, own, num_steps=3)
        draws.append(network.sample(rows.inputs, 2, own))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


ROWS = torch.arange(5.0).unsqueeze(1)


@pytest.mark.parametrize(
    ("inputs", "targets", "message"),
    [
        (ROWS, ROWS / 0, "targets: 5 rows hold NaN or infinity, the first is row 0; remove"),
        (ROWS * math.nan, ROWS, "inputs: 5 rows hold NaN or infinity"),
        (ROWS, torch.ones(5, 1), "targets: column 0 is constant; remove it"),
        (torch.ones(5, 1), ROWS, "inputs: column 0 is constant; remove it"),
        (ROWS.expand(5, 2), ROWS, "inputs: 2 features, the model has 1"),
        (ROWS, ROWS.flatten(), r"targets: shape \(5,\), expected \(rows, features\)"),
        (ROWS[:2], ROWS[:2], "inputs: 2 rows, at least 3 are needed; give more"),
        (ROWS, ROWS[:4], "targets: 4 rows for 5 inputs; give one target per input"),
    ],
)
def test_rows_that_cannot_be_fitted_are_refused(
    inputs: Tensor, targets: Tensor, message: str, source: torch.Generator
) -> None:
    """What cannot be fitted is an error that says which argument is wrong and what to do."""
    network = MixtureDensityNetwork(1, 1, 3, (4,), source)
    with pytest.raises(ValueError, match=message):
        network.fit(Pairs(inputs, targets), source, num_steps=1)


def test_sizes_below_one_are_refused(source: torch.Generator) -> None:
    """A mixture of nothing is no model."""
    with pytest.raises(ValueError, match="1 inputs, 1 outputs, 0 components; give at least 1 of each"):
        MixtureDensityNetwork(1, 1, 0, (4,), source)
