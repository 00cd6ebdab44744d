"""Binary latents, with the sum over all states as oracle."""

import math

import pytest
import torch
from torch import Tensor

from training import estimators
from training.data import Dataset
from training.discrete_vae import DiscreteVae
from training.estimators import Baseline


@pytest.fixture
def tiny(source: torch.Generator) -> DiscreteVae:
    """Return a model of five pixels and three latents in float64."""
    return DiscreteVae(5, 3, 8, source).double()


@pytest.fixture
def data(source: torch.Generator) -> Tensor:
    """Return one row."""
    return (torch.rand((1, 5), generator=source) < 0.5).double()


def test_probabilities_sum_to_one(tiny: DiscreteVae) -> None:
    """Over all 32 rows of five pixels p(x) sums to one."""
    every = torch.cartesian_prod(*5 * [torch.tensor([0.0, 1.0], dtype=torch.float64)])
    assert tiny.log_prob(every).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_evidence_is_bound_plus_gap(tiny: DiscreteVae, data: Tensor) -> None:
    """Log p(x) = ELBO + KL(q, posterior), with the divergence summed over the eight states."""
    states = torch.cartesian_prod(*3 * [torch.tensor([0.0, 1.0], dtype=torch.float64)]).unsqueeze(0)
    log_posterior = tiny.log_joint(data, states) - tiny.log_prob(data).unsqueeze(1)
    log_q = tiny.posterior(data).log_prob(states)
    divergence = (log_q.exp() * (log_q - log_posterior)).sum(dim=1)
    assert divergence.item() > 1e-3
    torch.testing.assert_close(tiny.exact_elbo(data) + divergence, tiny.log_prob(data), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["none", "mean", "leave one out"])
def test_gradient_of_every_baseline_is_the_enumerated_one(
    name: str, tiny: DiscreteVae, data: Tensor, source: torch.Generator
) -> None:
    """Over 40,000 draws, each weight's gradient is that of the exact bound within five standard errors."""
    expected_joint = (tiny.exact_elbo(data) - tiny.posterior(data).entropy()).item()
    baseline: Baseline = {
        "none": estimators.no_baseline,
        "mean": estimators.constant(expected_joint),
        "leave one out": estimators.leave_one_out,
    }[name]
    parameters = list(tiny.parameters())
    exact = torch.autograd.grad(tiny.exact_elbo(data).sum(), parameters)
    # A hundred means of 400 draws: their spread gives the standard error of the whole mean.
    batches = []
    for _ in range(100):
        noise = torch.rand((400, 2, 3), generator=source, dtype=torch.float64)
        bound = tiny.elbo(data.expand(400, -1), noise, baseline=baseline)
        batches.append(torch.autograd.grad(bound.mean(), parameters))
    for draws, expected in zip(zip(*batches, strict=True), exact, strict=True):
        stacked = torch.stack(draws)
        error = (stacked.mean(dim=0) - expected).abs()
        # Weights of an input that is zero have no gradient at all, so nothing but rounding is left for them.
        assert bool((error <= 5 * stacked.std(dim=0) / 10 + 1e-12).all())


def test_baselines_lower_the_variance(tiny: DiscreteVae, data: Tensor, source: torch.Generator) -> None:
    """On common noise both baselines leave less than half of the variance of the plain score function."""
    expected_joint = (tiny.exact_elbo(data) - tiny.posterior(data).entropy()).item()
    variances = []
    bias = dict(tiny.named_parameters())["encoder.2.bias"]
    noise = torch.rand((500, 4, 3), generator=source, dtype=torch.float64)
    baselines: list[Baseline] = [
        estimators.no_baseline,
        estimators.constant(expected_joint),
        estimators.leave_one_out,
    ]
    for baseline in baselines:
        draws = [
            torch.autograd.grad(tiny.elbo(data, row.unsqueeze(0), baseline=baseline), bias)[0] for row in noise
        ]
        variances.append(torch.stack(draws).var(dim=0).sum().item())
    plain, mean, leave_one_out = variances
    assert mean < 0.5 * plain
    assert leave_one_out < 0.5 * plain


def test_training_raises_the_exact_bound(digits: Dataset, source: torch.Generator) -> None:
    """Three hundred steps by the score function lift the exact ELBO beyond what independent pixels can reach."""
    rows = torch.from_numpy(digits.train[:500] > 127).flatten(start_dim=1).float()
    model = DiscreteVae(rows.shape[1], 6, 64, source)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    before = _mean_exact_elbo(model, rows)
    for _ in range(300):
        batch = rows[torch.randint(len(rows), (100,), generator=source)]
        loss = -model.elbo(batch, torch.rand((100, 4, 6), generator=source)).mean()
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
    after = _mean_exact_elbo(model, rows)
    ones = rows.mean(dim=0).clamp(1e-6, 1 - 1e-6)
    independent = (ones * ones.log() + (1 - ones) * (1 - ones).log()).sum().item()
    assert after > before + 10
    assert after > independent + 2
    with torch.no_grad():
        assert model.log_prob(rows).mean().item() >= after


def test_samples_follow_the_model(tiny: DiscreteVae, source: torch.Generator) -> None:
    """The share of ones of each pixel is its probability, a sum over all rows, within five standard errors."""
    every = torch.cartesian_prod(*5 * [torch.tensor([0.0, 1.0], dtype=torch.float64)])
    with torch.no_grad():
        expected = tiny.log_prob(every).exp() @ every
        found = tiny.sample(20_000, source).mean(dim=0)
    assert bool(((found - expected).abs() < 5 * 0.5 / math.sqrt(20_000)).all())


def test_too_many_latents_are_not_enumerated(source: torch.Generator) -> None:
    """Enumeration of 2^20 states is refused, and the message offers the sampled bound."""
    with pytest.raises(ValueError, match="use elbo"):
        DiscreteVae(5, 20, 8, source).exact_elbo(torch.ones(1, 5))


def _mean_exact_elbo(model: DiscreteVae, rows: Tensor) -> float:
    with torch.no_grad():
        return model.exact_elbo(rows).mean().item()
