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


WEIGHTED = ["bound=importance-weighted", "warm_up_fraction=0", "num_samples=5"]


@pytest.mark.parametrize(
    ("assignments", "message"),
    [
        (["bound=importance-weighted"], "no KL term to weight or to spare; set warm_up_fraction=0"),
        ([*WEIGHTED, "beta=2", "free_nats=0.1"], "set beta=1, free_nats=0"),
        ([*WEIGHTED, "gradient=score-function"], "gradient=score-function is of bound=elbo"),
        (["gradient=doubly-reparametrised"], "for the ELBO it is the same as gradient=sticking-the-landing"),
        (["gradient=sticking-the-landing", "free_nats=1"], "a floor under the closed-form KL"),
        (["gradient=score-function", "free_nats=1"], "set free_nats=0 or gradient=reparametrised"),
        (["baseline=leave-one-out", "num_samples=2"], "belongs to gradient=score-function, not to reparametrised"),
        (["gradient=score-function", "baseline=leave-one-out"], "set num_samples to at least 2"),
        (["schedule=stages", "final_learning_rate=0.1"], "set final_learning_rate to at most learning_rate"),
        (["gradient=pathwise"], "optimizer.gradient: .*'reparametrised', 'sticking-the-landing'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_objectives_that_make_no_sense_are_refused(assignments: list[str], message: str) -> None:
    """The error says what does not go together, and the way out."""
    with pytest.raises(ConfigError, match=message):
        TrainingConfig().override([f"optimizer.{assignment}" for assignment in assignments])


@pytest.mark.parametrize(
    "assignments",
    [
        WEIGHTED,
        [*WEIGHTED, "gradient=sticking-the-landing"],
        [*WEIGHTED, "gradient=doubly-reparametrised"],
        ["gradient=sticking-the-landing", "beta=2"],
        ["gradient=score-function", "num_samples=2", "baseline=leave-one-out"],
        ["free_nats=0.5", "beta=2", "num_samples=4"],
    ],
    ids=" ".join,
)
def test_objectives_that_make_sense_are_taken(assignments: list[str]) -> None:
    """Each is a run."""
    changed = TrainingConfig().override([f"optimizer.{assignment}" for assignment in assignments])
    assert changed != TrainingConfig()


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
