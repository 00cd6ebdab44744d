"""Presets are complete, and keep their names."""

import pytest

from training import presets
from training.errors import UnknownName


@pytest.mark.parametrize("name", presets.PRESETS)
def test_name_of_a_preset_is_the_name_of_its_model(name: str) -> None:
    """A run folder called after the model says which preset made it."""
    assert presets.named(name).name == name


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_maximise_a_true_bound(name: str) -> None:
    """No preset hides a weight on the KL term."""
    assert presets.named(name).optimizer.beta == 1


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    """The error lists what exists."""
    with pytest.raises(UnknownName, match="preset 'nope' does not exist; known: digits, mnist-mlp"):
        presets.named("nope")


def test_shortened_run_is_short() -> None:
    """A smoke run of any preset ends after a few steps and keeps its networks."""
    short = presets.shortened(presets.mnist_mlp())
    assert (short.optimizer.epochs, short.data.max_train_rows) == (2, 512)
    assert short.model == presets.mnist_mlp().model


def test_the_paper_s_recipe_is_what_the_paper_says() -> None:
    """Architecture, batch, length and step sizes of the IWAE experiment; nothing is averaged or chosen."""
    config = presets.iwae_paper()
    settings = config.optimizer
    assert (config.model.hidden_dims, config.model.latent_dim, config.model.activation) == ((200, 200), 50, "tanh")
    assert (settings.batch_size, settings.epochs, settings.schedule) == (20, 3280, "stages")
    assert (settings.bound, settings.gradient) == ("importance-weighted", "reparametrised")
    assert (settings.ema_decay, settings.selection) == (0, "last")
    # Theirs is added to the root of a sum over the batch, ours to that of a mean.
    assert settings.adam_epsilon * settings.batch_size == pytest.approx(1e-4)


@pytest.mark.parametrize("num_samples", [1, 50])
def test_the_paper_s_k_is_a_setting(num_samples: int) -> None:
    """Its table has 1, 5 and 50."""
    config = presets.iwae_paper().override([f"optimizer.num_samples={num_samples}"])
    assert config.optimizer.num_samples == num_samples
