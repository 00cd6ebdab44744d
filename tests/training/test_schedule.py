"""Step size and beta are functions of the step with the right ends, for any length of the run."""

import itertools

import pytest

from training.config import OptimizerConfig
from training.schedule import NUM_STAGES, Schedule

STAGES = OptimizerConfig(schedule="stages", learning_rate=1e-3, final_learning_rate=1e-4)
PUBLISHED_RATES = [1e-4 * round(10 ** (1 - stage / 7), 1) for stage in range(8)]
"""As they stand in the code of the IWAE paper, github.com/yburda/iwae."""


def test_cosine_starts_and_ends_where_it_should() -> None:
    """Half a cosine for the step size; a line, then a constant for beta."""
    schedule = Schedule(OptimizerConfig(warm_up_fraction=0.1), num_steps=100)
    assert schedule.learning_rate(0) == pytest.approx(1e-3)
    assert schedule.learning_rate(50) == pytest.approx((1e-3 + 1e-5) / 2)
    assert schedule.learning_rate(100) == pytest.approx(1e-5)
    assert [schedule.beta(step) for step in (0, 4, 9, 99)] == pytest.approx([0.1, 0.5, 1, 1])


def test_without_warm_up_beta_has_its_full_weight_at_once() -> None:
    """No division by a warm-up of zero steps."""
    assert Schedule(OptimizerConfig(warm_up_fraction=0), num_steps=100).beta(0) == 1


def test_stages_are_those_of_the_paper() -> None:
    """With one step an epoch: 3^i epochs with the published step size, 3280 in all."""
    schedule = Schedule(STAGES, num_steps=3280)
    rates = [schedule.learning_rate(step) for step in range(3280)]
    runs = [(rate, len(list(group))) for rate, group in itertools.groupby(rates)]
    assert [rate for rate, _ in runs] == pytest.approx(PUBLISHED_RATES)
    assert [length for _, length in runs] == [3**stage for stage in range(NUM_STAGES)]


@pytest.mark.parametrize("num_steps", [8, 1000, 328_000])
def test_a_shortened_run_has_the_same_shares(num_steps: int) -> None:
    """Each stage has its share of the steps, to within a step; two thirds belong to the last."""
    schedule = Schedule(STAGES, num_steps=num_steps)
    stages = [schedule.stage(step) for step in range(num_steps)]
    assert stages == sorted(stages)
    for stage in range(NUM_STAGES):
        assert stages.count(stage) == pytest.approx(num_steps * 3**stage / 3280, abs=1)
    assert schedule.learning_rate(num_steps) == pytest.approx(1e-4)
