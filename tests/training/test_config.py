"""A configuration that is accepted is complete and in range; everything else is refused with its name."""

import pytest

from serving.typed_config import ConfigError
from training import presets
from training.config import TrainingConfig


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("optimiser.epochs=3", "optimiser.epochs.*no such key"),
        ("optimizer.epoch=3", "no such key; known here: .*epochs"),
        ("optimizer.learning_rate=.nan", "optimizer.learning_rate: Input should be a finite number"),
        ("optimizer.learning_rate=0", "optimizer.learning_rate: .*greater than 0"),
        ("optimizer.epochs=0", "optimizer.epochs: .*greater than or equal to 1"),
        ("optimizer.ema_decay=1", "optimizer.ema_decay: .*less than 1"),
        ("model.hidden_dims=[]", "model.hidden_dims"),
        ("model.hidden_dims=[0]", "every width must be at least 1"),
        ("model.log_var_min=9", "log_var_min must be below log_var_max"),
        ("model.likelihood=laplace", "model.likelihood: .*'bernoulli', 'gaussian' or 'categorical'"),
        ("model.num_levels=1", "model.num_levels: .*greater than or equal to 2"),
        ("model.num_levels=257", "model.num_levels: .*less than or equal to 256"),
        ("model.num_levels=16", "num_levels is for likelihood=categorical, this is bernoulli"),
        ("model.noise_log_var_min=-4", "noise_log_var_min is for likelihood=gaussian, this is bernoulli"),
        ("data.name=cifar", "data.name: .*'digits', 'mnist', 'fashion-mnist' or 'own'"),
        ("seed=-1", "seed: .*greater than or equal to 0"),
        ("name=a/b", "name: .*pattern"),
        ("seed", "write key=value"),
    ],
)
def test_bad_values_are_refused_by_name(assignment: str, message: str) -> None:
    """The error names the key and says what is allowed."""
    with pytest.raises(ConfigError, match=message):
        TrainingConfig().override([assignment])


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["model.likelihood=gaussian", "model.num_levels=16"], "num_levels is for likelihood=categorical"),
        (["model.likelihood=categorical", "model.noise_log_var_min=-4"], "is for likelihood=gaussian"),
    ],
)
def test_settings_of_another_likelihood_are_refused(assignments: list[str], message: str) -> None:
    """A value that nothing would read is a mistake that is named."""
    with pytest.raises(ConfigError, match=message):
        TrainingConfig().override(assignments)


def test_each_likelihood_takes_its_own_settings() -> None:
    """The settings of a likelihood are accepted with it, in any order."""
    changes = ["model.num_levels=16", "model.likelihood=categorical"]
    assert TrainingConfig().override(changes).model.num_levels == 16
    changes = ["model.likelihood=gaussian", "model.noise_log_var_min=-4"]
    assert TrainingConfig().override(changes).model.noise_log_var_min == -4


@pytest.mark.parametrize("name", presets.PRESETS)
def test_configuration_survives_its_file(name: str) -> None:
    """What a run folder records is the whole configuration."""
    config = presets.named(name)
    assert TrainingConfig.model_validate_json(config.to_json()) == config


def test_digest_tells_configurations_apart() -> None:
    """Any changed value changes the digest, and nothing else does."""
    config = TrainingConfig()
    assert config.sha256() == TrainingConfig().sha256()
    assert config.sha256() != config.override(["optimizer.beta=2"]).sha256()


def test_changes_turn_one_configuration_into_another() -> None:
    """Applied as overrides, the changes between two configurations lead from one to the other."""
    other = presets.mnist_mlp().override(["model.hidden_dims=[5, 6]", "data.max_train_rows=10"])
    assert presets.digits().override(other.changes_from(presets.digits())) == other
    assert presets.digits().changes_from(presets.digits()) == []
