"""Row 22: discrete latents and other families: every check passes, and fails where something is broken."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.study.sections import assert_shown
from training import estimators
from training.data import Dataset
from training.discrete_vae import DiscreteVae
from training.estimators import BernoulliLatents, CategoricalLatent, GaussianLatents
from training.study import latent_kinds
from training.study.gradients import LEAVE_ONE_OUT, MEAN_BASELINE, SCORE
from training.study.latent_kinds import ENUMERATED, LOGITS, NUM_BITS, VALUES, BinaryRun
from training.study.learning_curves import LearningCurve
from training.study.setup import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a quick study."""
    return Study(tmp_path)


@pytest.fixture
def zero() -> Tensor:
    """Return parameters of any kind of latents."""
    return torch.zeros(2, dtype=torch.float64)


def test_categorical(study: Study) -> None:
    """Unbiased on eight states, reparametrisation refused, the relaxation biased."""
    section = latent_kinds.categorical(study)
    assert_shown(section, 22)
    assert any("use score_function" in block for block in section.blocks if isinstance(block, str))


@pytest.mark.slow
def test_binary_vae(study: Study) -> None:
    """Trained by the score function beyond independent pixels, and near what exact gradients reach."""
    assert_shown(latent_kinds.binary_vae(study), 19, 22)


def test_other_families(study: Study) -> None:
    """Logistic and Gamma latents have the pathwise gradient of their closed forms."""
    assert_shown(latent_kinds.other_families(study), 22)


def test_the_exact_gradient_is_that_of_the_expectation() -> None:
    """By autograd through the sum over all states."""
    logits, values = torch.tensor(LOGITS, requires_grad=True), torch.tensor(VALUES)
    (expected,) = torch.autograd.grad(logits.softmax(dim=0) @ values, logits)
    torch.testing.assert_close(latent_kinds.exact_gradient(logits.detach(), values), expected)


def test_a_wrong_gradient_of_the_states_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mean of f, the formula is that of unnormalised probabilities."""

    def wrong(logits: Tensor, values: Tensor) -> Tensor:
        return logits.softmax(dim=0) * values

    monkeypatch.setattr(latent_kinds, "exact_gradient", wrong)
    failed = [check for check in latent_kinds.categorical(study).checks if not check.passed]
    assert len([check for check in failed if check.name.startswith("largest error of the mean gradient")]) == 3


def test_an_estimator_that_takes_everything_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling is not differentiable because nobody complained."""
    monkeypatch.setattr(estimators, "reparametrised", lambda function, latents, noise: torch.zeros(()))  # noqa: ARG005 - the signature of an estimator
    failed = [check.name for check in latent_kinds.other_families(study).checks if not check.passed]
    assert failed == ["reparametrised: takes Gaussian, refuses Bernoulli and categorical"]


def test_who_is_refused(zero: Tensor) -> None:
    """Discrete latents, with a message that names them and the way out."""
    assert not latent_kinds.refusal(GaussianLatents(zero, zero))
    for latents in (BernoulliLatents(zero), CategoricalLatent(zero)):
        assert type(latents).__name__ in latent_kinds.refusal(latents)
        assert "use score_function" in latent_kinds.refusal(latents)


@pytest.mark.parametrize("family", [latent_kinds.logistic(), latent_kinds.gamma()], ids=lambda each: each.name)
def test_a_family_with_a_wrong_closed_form_is_found(
    family: latent_kinds.Family, study: Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One percent is more than four standard errors of 200,000 draws."""
    wrong = family._replace(exact=1.01 * family.exact)
    monkeypatch.setattr(latent_kinds, "logistic" if family.name == "logistic" else "gamma", lambda: wrong)
    failed = [check.name for check in latent_kinds.other_families(study).checks if not check.passed]
    assert failed == [f"largest error of the mean pathwise gradient, {family.name}"]


def test_the_gamma_family_leaves_the_global_generator_alone(source: torch.Generator) -> None:
    """It draws from its source: equal draws for equal sources, and whoever uses the global one notices nothing."""
    before = torch.get_rng_state()
    state = source.get_state()
    first = latent_kinds.gamma().gradient(10, source)
    source.set_state(state)
    assert torch.equal(first, latent_kinds.gamma().gradient(10, source))
    assert torch.equal(before, torch.get_rng_state())


def test_relaxation_that_is_unbiased_or_calm_is_found() -> None:
    """Draws around the exact gradient have no bias to show, and the same scatter at each temperature."""
    exact = torch.zeros(8, dtype=torch.float64)
    draws = torch.randn((1000, 8), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    checks = latent_kinds.relaxed_checks({0.1: 0.9 * draws, 1.0: draws}, exact)
    assert [check.passed for check in checks] == [False, False, False]


@pytest.mark.parametrize(
    ("broken", "name"),
    [
        ({SCORE: (-28.0, -24.0)}, "no baseline < leave-one-out"),
        ({LEAVE_ONE_OUT: (-28.0, -27.5), SCORE: (-28.0, -27.8)}, "leave-one-out above independent pixels"),
        ({LEAVE_ONE_OUT: (-28.0, -26.0), SCORE: (-28.0, -27.8)}, "exact gradients above leave-one-out"),
    ],
)
def test_runs_that_do_not_learn_are_found(broken: dict[str, tuple[float, float]], name: str) -> None:
    """In another order, below a model without latents, or far from exact gradients."""
    ends = {SCORE: (-28.0, -26.0), MEAN_BASELINE: (-28.0, -25.0), LEAVE_ONE_OUT: (-28.0, -24.5)}
    ends[ENUMERATED] = (-28.0, -24.0)
    assert all(check.passed for check in latent_kinds.binary_checks(_runs(ends), -27.0))
    failed = [check.name for check in latent_kinds.binary_checks(_runs(ends | broken), -27.0) if not check.passed]
    assert any(each.startswith(name) for each in failed)


def test_a_bound_above_the_evidence_is_found() -> None:
    """In a single row of a single run."""
    ends = {SCORE: (-28.0, -26.0), LEAVE_ONE_OUT: (-28.0, -24.5), ENUMERATED: (-28.0, -24.0)}
    runs = _runs(ends)
    run = runs[SCORE]
    runs[SCORE] = run._replace(elbo=run.elbo + torch.tensor([0.0, 1.1]))
    failed = [check.name for check in latent_kinds.binary_checks(runs, -27.0) if not check.passed]
    assert failed == ["smallest gap of log p(x) and the bound, any row and run"]


def test_independent_pixels_are_what_counting_gives(digits: Dataset) -> None:
    """Log odds of the training means; about the entropy of the pixels."""
    found = latent_kinds.independent_pixels(digits, seed=0)
    means = torch.from_numpy(digits.train.mean(axis=0) / 255).clamp(1e-3, 1 - 1e-3)
    entropy = -(means * means.log() + (1 - means) * (1 - means).log()).sum()
    # 250 rows whose log probability has a standard deviation of about four nats.
    assert found == pytest.approx(-float(entropy), abs=4 * 4 / 250**0.5)


def test_runs_share_their_start(study: Study) -> None:
    """What is compared is the gradient alone: the bound before the first step is the same number."""
    starts = {
        latent_kinds.binary_run(study, "", baseline, num_steps=1).curve.elbo[0]
        for baseline in (estimators.no_baseline, estimators.leave_one_out, None)
    }
    assert len(starts) == 1


def _runs(ends: dict[str, tuple[float, float]]) -> dict[str, BinaryRun]:
    """Return runs with given first and last bounds, and a gap of one nat."""
    model = DiscreteVae(4, NUM_BITS, 2, torch.Generator().manual_seed(0))
    return {
        name: BinaryRun(
            LearningCurve(name, (0, 1), end), model, torch.tensor([-20.0, -21.0]), -torch.arange(19.0, 21.0)
        )
        for name, end in ends.items()
    }
