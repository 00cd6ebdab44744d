"""Rows 9, 10, 13 and 14: the bound in both forms, its gap, its ladder and its climb; and that errors are seen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.study.sections import assert_shown
from training import gaussians, objectives
from training.models.ppca import AscentStep, GaussianPosterior, ProbabilisticPCA, alternate
from training.study import bound
from training.study.claims import Check
from training.study.setup import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a quick study."""
    return Study(tmp_path)


def _failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def _plus(function: Callable[..., Tensor], amount: float) -> Callable[..., Tensor]:
    def shifted(*arguments: Any) -> Tensor:  # noqa: ANN401  whatever the function takes
        return function(*arguments) + amount

    return shifted


def test_two_forms(study: Study) -> None:
    """Never above log p(x), equal in both forms, equal to an integral."""
    assert_shown(bound.two_forms(study), 9, 10)


def test_a_wrong_entropy_breaks_the_equality_of_the_forms(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """An entropy without its constant makes form A differ from form B, and only that is seen in the forms."""
    monkeypatch.setattr(gaussians, "entropy", _plus(gaussians.entropy, -0.5))
    assert _failed(bound.form_checks(study)) == ["form A - form B, the four q of the table"]


def test_a_wrong_divergence_breaks_form_b(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KL term that is a millionth off shows in every comparison of the forms."""
    monkeypatch.setattr(gaussians, "kl_to_standard_normal", _plus(gaussians.kl_to_standard_normal, 1e-6))
    assert len(_failed(bound.form_checks(study))) == 3


def test_a_bound_that_is_too_high_breaks_jensen(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound that a thousandth of a nat lifts over log p(x) is seen where q is near the posterior."""
    monkeypatch.setattr(ProbabilisticPCA, "elbo", _plus(ProbabilisticPCA.elbo, 1e-3))
    assert len(_failed(bound.jensen_checks(study))) == 2


def test_evidence_identity(study: Study) -> None:
    """Ten known digits, zero at the posterior, the identity for random models, the sign of the entropy."""
    assert_shown(bound.evidence_identity(study), 13)


@pytest.mark.parametrize("method", ["log_prob", "elbo", "kl_to_posterior"])
def test_each_part_of_the_identity_is_held_to_account(
    method: str, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever of the three is a billionth off, known digits and the identity fail."""
    monkeypatch.setattr(ProbabilisticPCA, method, _plus(getattr(ProbabilisticPCA, method), 2e-9))
    assert any("largest error of the identity" in name for name in _failed(bound.random_identity_checks(study)))
    assert len(_failed(bound.known_identity_checks())) >= 3


def test_the_best_q_is_not_found_where_the_bound_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bound that leaves out the prior the best q is the likelihood as a function of z, N(1, 1)."""

    def broken(_model: ProbabilisticPCA, data: Tensor, q: GaussianPosterior) -> Tensor:
        variance = q.covariance.squeeze(2).squeeze(1)
        return -0.5 * ((data - q.mean).square().squeeze(1) + variance - variance.log())

    monkeypatch.setattr(ProbabilisticPCA, "elbo", broken)
    mean, variance = bound.best_q_checks()
    assert (round(mean.value, 6), round(variance.value, 6)) == (1.0, 1.0)
    assert not mean.passed
    assert not variance.passed


def test_importance_weighting(study: Study) -> None:
    """Eleven bounds to six decimals, their order, the law of large k, and sampling within three errors."""
    section = bound.importance_weighting(study)
    assert_shown(section, 13)
    assert sum(name.endswith("exact") for name in (check.name for check in section.checks)) == 11


def test_a_mean_of_logarithms_is_not_the_bound(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Averaging logarithms instead of weights gives the ELBO for every k, far from all bounds but the first."""
    monkeypatch.setattr(objectives, "importance_weighted_bound", lambda log_weights: log_weights.mean(dim=1))
    exact = bound.exact_importance_bounds(tuple(bound.IMPORTANCE_BOUNDS))
    source = study.source(0)
    drawn = {k: bound.sampled_importance_bound(k, source, num_weights=200_000) for k in exact}
    assert _failed(bound.importance_checks(exact, drawn)) == ["largest error of a sampled bound"]
    assert all(abs(found.value - exact[1]) < 5 * found.standard_error for found in drawn.values())


def test_bounds_out_of_order_are_found() -> None:
    """A wrong exact value fails its own check, and the order."""
    exact = bound.exact_importance_bounds(tuple(bound.IMPORTANCE_BOUNDS))
    drawn = {1: bound.Sampled(exact[1] + 0.003, 0.001)}
    assert not _failed(bound.importance_checks(exact, drawn))
    spoilt = {**exact, 10: -1.7}
    assert _failed(bound.importance_checks(spoilt, drawn)) == [
        "$L_{10}$, exact",
        "more samples, a larger bound, below log p(x)",
    ]


def test_alternation(study: Study) -> None:
    """The log evidence stands still in steps on q, rises in steps on p, and falls where q is restricted."""
    assert_shown(bound.alternation(study), 14)


def test_a_step_on_the_wrong_side_is_found(source: torch.Generator) -> None:
    """A step on q that moves log p, one that leaves a gap, and a bound that falls: each fails."""
    data = torch.randn((40, 4), generator=source, dtype=torch.float64)
    weight = torch.randn((4, 2), generator=source, dtype=torch.float64)
    start = ProbabilisticPCA(weight, torch.zeros(4, dtype=torch.float64), torch.tensor(1.0, dtype=torch.float64))
    ascent = alternate(start, data, num_rounds=300)
    maximum = ascent.trace[-1].log_prob
    assert not _failed(bound.alternation_checks(ascent, maximum))

    def changed(place: int, **values: float) -> list[str]:
        trace = list(ascent.trace)
        step = trace[place]
        trace[place] = AscentStep(
            step.moved,
            elbo=values.get("elbo", step.elbo),
            log_prob=values.get("log_prob", step.log_prob),
            kl=values.get("kl", step.kl),
        )
        return _failed(bound.alternation_checks(ascent._replace(trace=tuple(trace)), maximum))

    third = ascent.trace[3]
    assert third.moved == "q"
    assert "largest change of log p in a step on $q$" in changed(3, log_prob=third.log_prob + 1e-6)
    assert "largest gap after a step on $q$" in changed(3, kl=1e-6)
    assert "smallest gain of the bound in a step" in changed(3, elbo=ascent.trace[2].elbo - 1e-6)
    assert "largest error of log p = ELBO + KL along the way" in changed(4, kl=ascent.trace[4].kl + 1e-6)


def test_a_free_q_does_not_harm_the_model(source: torch.Generator) -> None:
    """The fall of log p needs the restriction: with the full posterior the checks of the restricted climb fail."""
    data = torch.randn((60, 6), generator=source, dtype=torch.float64) * torch.arange(1, 7)
    best = ProbabilisticPCA.fit(data, 3)
    turned = bound.rotated(best, source)
    torch.testing.assert_close(turned.log_prob(data), best.log_prob(data), rtol=0, atol=1e-9)
    maximum = best.log_prob(data).mean().item()
    restricted = alternate(turned, data, num_rounds=30, is_diagonal=True)
    assert not _failed(bound.restricted_checks(restricted, maximum))
    free = alternate(turned, data, num_rounds=30)
    assert _failed(bound.restricted_checks(free, maximum)) == [
        "smallest gap after each of three steps on $q$",
        "lowest log p - log p at the start",
    ]
