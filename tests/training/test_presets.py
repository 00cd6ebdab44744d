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
