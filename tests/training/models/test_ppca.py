"""Laws of probabilistic PCA, with quadrature, torch.distributions and the published closed forms as oracles."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.datasets import load_digits
from torch import Tensor
from torch.distributions import MultivariateNormal

from training.models.ppca import GaussianPosterior, ProbabilisticPCA, alternate, checked_rows, elbo_maximum

EXACT = 1e-9
"""Float64 rounding of matrix products on numbers up to a thousand."""

LOG_EVIDENCE = -1.5155121235
"""log p(x = 1) of z ~ N(0, 1), x | z ~ N(z, 1): log N(1; 0, 2)."""

DIGITS_MAXIMA = {
    1: (-3.748464, 0.06340349),
    2: (0.005707, 0.05411698),
    4: (6.830337, 0.04011661),
    8: (14.209788, 0.02732943),
    16: (23.929443, 0.01472491),
    32: (35.247022, 0.00493466),
}
"""Mean log p per row and noise variance at the maximum, all 1797 digits / 16, by number of latent dimensions."""


@pytest.fixture(scope="module")
def grey_digits() -> Tensor:
    """Return all digits, float64 in [0, 1], shape (1797, 64)."""
    return torch.from_numpy(load_digits().data) / 16


def _random_model(source: torch.Generator, *, num_features: int = 5, latent_dim: int = 2) -> ProbabilisticPCA:
    return ProbabilisticPCA(
        torch.randn((num_features, latent_dim), generator=source, dtype=torch.float64),
        torch.randn(num_features, generator=source, dtype=torch.float64),
        0.1 + torch.rand((), generator=source, dtype=torch.float64),
    )


def _random_q(source: torch.Generator, num_rows: int, latent_dim: int = 2) -> GaussianPosterior:
    factors = torch.randn((num_rows, latent_dim, latent_dim), generator=source, dtype=torch.float64)
    ridge = 0.1 * torch.eye(latent_dim, dtype=torch.float64)
    mean = torch.randn((num_rows, latent_dim), generator=source, dtype=torch.float64)
    return GaussianPosterior(mean, factors @ factors.mT + ridge)


@pytest.mark.parametrize("latent_dim", DIGITS_MAXIMA)
def test_closed_form_reaches_the_known_maxima(latent_dim: int, grey_digits: Tensor) -> None:
    """Log-likelihood and noise variance on the digits are those of the table, to its last digit."""
    model = ProbabilisticPCA.fit(grey_digits, latent_dim)
    log_prob, variance = DIGITS_MAXIMA[latent_dim]
    assert model.log_prob(grey_digits).mean().item() == pytest.approx(log_prob, abs=5.1e-7)
    assert elbo_maximum(grey_digits, latent_dim) == pytest.approx(log_prob, abs=5.1e-7)
    assert model.variance.item() == pytest.approx(variance, abs=5.1e-9)


def test_maximum_is_a_maximum(grey_digits: Tensor, source: torch.Generator) -> None:
    """Every small change of a parameter loses likelihood, and its first order vanishes."""
    best = ProbabilisticPCA.fit(grey_digits, 4)
    weight, mean, variance = (value.clone().requires_grad_() for value in (best.weight, best.mean, best.variance))
    top = ProbabilisticPCA(weight, mean, variance).log_prob(grey_digits).mean()
    torch.autograd.backward(top)
    for parameter in (weight, mean, variance):
        assert parameter.grad is not None
        assert parameter.grad.abs().max().item() < 1e-8
    for _ in range(5):
        step = 1e-2 * torch.randn(best.weight.shape, generator=source, dtype=torch.float64)
        changed = ProbabilisticPCA(best.weight + step, best.mean, best.variance)
        assert changed.log_prob(grey_digits).mean() < top


def test_weights_are_principal_axes_with_a_fixed_sign(grey_digits: Tensor) -> None:
    """Columns are orthogonal, fall in length, and the largest entry of each is positive."""
    weight = ProbabilisticPCA.fit(grey_digits, 8).weight
    gram = weight.T @ weight
    lengths = gram.diagonal()
    assert (gram - torch.diag(lengths)).abs().max() < EXACT
    assert bool((lengths[:-1] > lengths[1:]).all())
    assert bool((weight.amax(dim=0) == weight.abs().amax(dim=0)).all())


def test_log_prob_is_that_of_the_marginal_gaussian(source: torch.Generator) -> None:
    """Log p(x) agrees with torch.distributions on N(b, W W^T + s^2 I), built in full."""
    model = _random_model(source)
    data = torch.randn((50, 5), generator=source, dtype=torch.float64)
    covariance = model.weight @ model.weight.T + model.variance * torch.eye(5, dtype=torch.float64)
    oracle = MultivariateNormal(model.mean, covariance)
    expected = oracle.log_prob(data)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(model.log_prob(data), expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("latent_dim", [1, 2])
def test_log_prob_is_the_integral_over_the_latents(latent_dim: int, source: torch.Generator) -> None:
    """A complicated density is a mixture of simple ones: the sum of p(x, z) over a fine grid of z is p(x)."""
    model = _random_model(source, num_features=3, latent_dim=latent_dim)
    data = torch.randn((4, 3), generator=source, dtype=torch.float64)
    axis = torch.linspace(-9, 9, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(*[axis] * latent_dim).view(-1, latent_dim)
    residual = data.unsqueeze(1) - model.mean - grid @ model.weight.T
    log_likelihood = -0.5 * (residual.square() / model.variance + (2 * math.pi * model.variance).log()).sum(dim=2)
    log_prior = -0.5 * (grid.square() + math.log(2 * math.pi)).sum(dim=1)
    spacing = math.log(float(axis[1] - axis[0]))
    actual = (log_likelihood + log_prior).logsumexp(dim=1) + latent_dim * spacing
    # The trapezoid rule converges faster than any power on a Gaussian that is wider than the spacing.
    torch.testing.assert_close(actual, model.log_prob(data), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("mean", "variance", "elbo", "gap"),
    [(0.0, 1.0, -1.9189385332, 0.4034264097), (0.5, 0.5, LOG_EVIDENCE, 0.0)],
    ids=["q is the prior", "q is the posterior"],
)
def test_identity_has_its_exact_values(mean: float, variance: float, elbo: float, gap: float) -> None:
    """The unit model at x = 1: bound, gap and evidence are the known numbers, and bound + gap is the evidence."""
    one = torch.ones((1, 1), dtype=torch.float64)
    model = ProbabilisticPCA(one, torch.zeros(1, dtype=torch.float64), torch.ones((), dtype=torch.float64))
    q = GaussianPosterior(mean * one, variance * one)
    assert model.elbo(one, q).item() == pytest.approx(elbo, abs=1e-10)
    assert model.kl_to_posterior(one, q).item() == pytest.approx(gap, abs=1e-10)
    assert model.log_prob(one).item() == pytest.approx(LOG_EVIDENCE, abs=1e-10)
    total = model.elbo(one, q) + model.kl_to_posterior(one, q)
    assert total.item() == pytest.approx(-0.5 * math.log(4 * math.pi) - 0.25, abs=1e-12)


@given(seed=st.integers(0, 2**32))
def test_evidence_is_bound_plus_gap_for_any_model_and_q(seed: int) -> None:
    """Log p(x) = ELBO + KL(q, posterior), row by row, each computed on its own; the gap is never negative."""
    source = torch.Generator().manual_seed(seed)
    model, q = _random_model(source), _random_q(source, 3)
    data = torch.randn((3, 5), generator=source, dtype=torch.float64)
    gap = model.kl_to_posterior(data, q)
    # Squares over a variance of 0.1: the terms reach 1e4, of which float64 keeps twelve digits and more.
    torch.testing.assert_close(model.elbo(data, q) + gap, model.log_prob(data), rtol=1e-11, atol=EXACT)
    assert bool((gap >= 0).all())
    assert model.kl_to_posterior(data, model.posterior(data)).abs().max() < EXACT


def test_posterior_of_one_latent_is_the_formula() -> None:
    """With x = w z + s noise the posterior has mean w x / (w^2 + s^2) and variance s^2 / (w^2 + s^2)."""
    weight, scale = 1.7, 0.6
    model = ProbabilisticPCA(
        torch.tensor([[weight]], dtype=torch.float64),
        torch.zeros(1, dtype=torch.float64),
        torch.tensor(scale**2, dtype=torch.float64),
    )
    data = torch.tensor([[2.0]], dtype=torch.float64)
    for q in (model.posterior(data), model.best_diagonal_posterior(data)):
        assert q.covariance.item() == pytest.approx(scale**2 / (weight**2 + scale**2), abs=1e-12)
        assert q.mean.item() == pytest.approx(weight * 2 / (weight**2 + scale**2), abs=1e-12)


def test_without_the_entropy_the_best_q_has_no_width(source: torch.Generator) -> None:
    """E_q[log p(x, z)] alone rises as q narrows; with the entropy the best width is that of the posterior."""
    model = _random_model(source, latent_dim=1)
    data = torch.randn((1, 5), generator=source, dtype=torch.float64)
    exact = model.posterior(data)
    widths = [GaussianPosterior(exact.mean, factor * exact.covariance) for factor in (2.0, 1.0, 0.5, 0.1, 1e-6)]
    joints = [model.expected_log_joint(data, q).item() for q in widths]
    bounds = [model.elbo(data, q).item() for q in widths]
    assert all(wide < narrow for wide, narrow in pairwise(joints))
    assert max(bounds) == bounds[1]


def test_best_diagonal_posterior_is_the_best(source: torch.Generator) -> None:
    """The gradient of the bound with respect to mean and variances of a diagonal q is zero there."""
    model = _random_model(source)
    data = torch.randn((3, 5), generator=source, dtype=torch.float64)
    best = model.best_diagonal_posterior(data)
    mean = best.mean.clone().requires_grad_()
    variances = best.covariance.diagonal().clone().requires_grad_()
    torch.autograd.backward(model.elbo(data, GaussianPosterior(mean, torch.diag(variances))).sum())
    assert mean.grad is not None
    assert variances.grad is not None
    assert max(mean.grad.abs().max().item(), variances.grad.abs().max().item()) < EXACT
    assert bool((model.kl_to_posterior(data, best) > 1e3 * EXACT).all())


@pytest.mark.parametrize("is_diagonal", [False, True], ids=["full q", "diagonal q"])
def test_steps_on_q_tighten_and_steps_on_p_improve(
    *, is_diagonal: bool, source: torch.Generator, grey_digits: Tensor
) -> None:
    """Log p(x) is constant in steps on q, the bound never falls, and the identity holds on every line."""
    start = _random_model(source, num_features=64, latent_dim=3)
    model, trace = alternate(start, grey_digits[:300], num_rounds=30, is_diagonal=is_diagonal)
    assert [step.moved for step in trace] == ["start", *["q", "p"] * 30]
    for before, after in pairwise(trace):
        # Relative rounding: the start lies some 1e4 nats below the maximum.
        slack = 1e-12 * abs(before.elbo)
        assert after.elbo >= before.elbo - slack
        assert after.elbo + after.kl == pytest.approx(after.log_prob, rel=1e-11, abs=EXACT)
        if after.moved == "q":
            assert after.log_prob == before.log_prob
        elif not is_diagonal:
            assert after.log_prob >= before.log_prob - slack
    assert trace[-1].log_prob == model.log_prob(grey_digits[:300]).mean().item()


def test_alternating_steps_end_at_the_closed_form(grey_digits: Tensor, source: torch.Generator) -> None:
    """EM finds the maximum that the eigenvalues give, from a random start."""
    data = grey_digits[:, 18:46:3]
    expected = elbo_maximum(data, 2)
    model, trace = alternate(_random_model(source, num_features=10), data, num_rounds=150)
    # The last step gained less than 1e-12, and EM converges geometrically, here with a ratio of gains of 0.67.
    assert trace[-1].elbo - trace[-3].elbo < 1e-12
    assert model.log_prob(data).mean().item() == pytest.approx(expected, abs=1e-9)
    assert trace[-1].elbo <= expected + 1e-12


def test_samples_have_the_moments_of_the_model(source: torch.Generator) -> None:
    """Mean and covariance of draws are those of p(x), within five standard errors."""
    model, num = _random_model(source), 200_000
    draws = model.sample(num, source)
    covariance = model.weight @ model.weight.T + model.variance * torch.eye(5, dtype=torch.float64)
    variances = covariance.diagonal()
    assert bool(((draws.mean(dim=0) - model.mean).abs() < 5 * (variances / num).sqrt()).all())
    # Var of an entry of a sample covariance: (C_ii C_jj + C_ij^2) / n.
    standard_errors = ((torch.outer(variances, variances) + covariance.square()) / num).sqrt()
    assert bool(((draws.T.cov() - covariance).abs() < 5 * standard_errors).all())


def test_samples_depend_on_the_generator_alone(source: torch.Generator, seed: int) -> None:
    """The same seed gives the same draws, another one others."""
    model = _random_model(source)
    draws = [model.sample(3, torch.Generator().manual_seed(value)) for value in (seed, seed, seed + 1)]
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def _with_nan() -> Tensor:
    data = torch.eye(5, dtype=torch.float64)
    data[3, 1] = math.nan
    return data


@pytest.mark.parametrize(
    ("data", "latent_dim", "message"),
    [
        (_with_nan(), 2, "1 rows hold NaN or infinity, the first is row 3; remove"),
        (torch.zeros(5), 2, r"shape \(5,\), expected \(rows, features\); flatten"),
        (torch.zeros((5, 4), dtype=torch.int64), 2, "torch.int64 is not floating point; convert"),
        (torch.eye(4)[:1], 2, "1 rows, at least 2 are needed; give more"),
        (torch.full((50, 4), 0.1), 2, "all rows are equal, the likelihood has no maximum; give data that vary"),
        (torch.eye(5)[:3], 2, "3 rows lie in a plane of at most 2 dimensions.*lower latent_dim"),
        (torch.eye(5), 5, r"latent_dim: 5 is not in \[1, 5\)"),
        (torch.eye(5), 0, r"latent_dim: 0 is not in \[1, 5\)"),
    ],
)
def test_data_that_have_no_maximum_are_refused(data: Tensor, latent_dim: int, message: str) -> None:
    """What cannot be fitted is an error that says what is wrong and what to do."""
    with pytest.raises(ValueError, match=message):
        ProbabilisticPCA.fit(data, latent_dim)


@pytest.mark.parametrize(
    ("weight", "mean", "variance", "message"),
    [
        (torch.ones(3, 2), torch.zeros(2), torch.tensor(1.0), "do not fit; give shapes"),
        (torch.ones(3), torch.zeros(3), torch.tensor(1.0), "do not fit; give shapes"),
        (torch.ones(3, 2), torch.zeros(3), torch.ones(1), "do not fit; give shapes"),
        (torch.ones(3, 2), torch.zeros(3), torch.tensor(0.0), "noise variance 0 must be positive"),
        (torch.ones(3, 2) / 0, torch.zeros(3), torch.tensor(1.0), "a parameter is not finite"),
    ],
)
def test_parameters_that_are_no_model_are_refused(
    weight: Tensor, mean: Tensor, variance: Tensor, message: str
) -> None:
    """A model exists only with parameters that fit."""
    with pytest.raises(ValueError, match=message):
        ProbabilisticPCA(weight, mean, variance)


def test_rows_of_another_width_are_refused(source: torch.Generator) -> None:
    """Density and posterior name both widths."""
    model = _random_model(source)
    with pytest.raises(ValueError, match="4 features, the model has 5"):
        model.log_prob(torch.zeros((2, 4), dtype=torch.float64))


def test_good_rows_pass_through() -> None:
    """The check answers what it was given."""
    data = torch.ones(2, 3)
    assert checked_rows(data, num_features=3, min_rows=2) is data
