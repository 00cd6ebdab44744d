"""Numbers of the benchmark become runs that our trainer and evaluation take."""

import os

import pytest

from serving.typed_config import ConfigError
from training.bench import plan
from training.bench.plan import BenchPlan, Setting


def test_settings_are_every_combination_once() -> None:
    """Two networks, two batches, two numbers of threads: eight contests, no two alike."""
    settings = BenchPlan().settings()
    assert len(settings) == len({str(setting) for setting in settings}) == 8
    assert {setting.latent_dim for setting in settings} == {20, 32}


def test_training_run_has_one_more_epoch_than_rounds_and_a_constant_step_size() -> None:
    """The first epoch warms up; peers know no schedule, so ours has none; beta is one from the first step."""
    chosen = BenchPlan(num_rounds=3)
    config = chosen.training(Setting(latent_dim=20, batch_size=256, num_threads=1))
    optimizer = config.optimizer
    assert (optimizer.epochs, optimizer.batch_size, optimizer.warm_up_fraction) == (4, 256, 0)
    assert optimizer.learning_rate == optimizer.final_learning_rate == 1e-3
    assert optimizer.validation_interval_epochs == optimizer.epochs
    assert (config.model.hidden_dims, config.model.latent_dim, config.model.activation) == ((400,), 20, "relu")


def test_full_plan_asks_for_no_more_threads_than_cores() -> None:
    """Threads that wait for each other say nothing about anybody's code."""
    assert max(plan.full().threads) <= (os.cpu_count() or 1)


def test_both_plans_time_as_many_rounds_as_they_say() -> None:
    """The recorded one has at least five, so that a median means something."""
    assert plan.full().num_rounds >= 5
    assert plan.quick().num_rounds < plan.full().num_rounds


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"num_rows": 100}, "at least one step of the largest batch"),
        ({"max_images": 2000}, "there are not so many"),
        ({"num_importance_samples": 150}, "multiple of 100"),
        ({"rounds": 3}, "rounds"),
    ],
)
def test_plan_that_cannot_be_carried_out_is_refused(values: dict[str, int], reason: str) -> None:
    """Before minutes are spent on it."""
    with pytest.raises(ConfigError, match=reason):
        BenchPlan.parse(values)
