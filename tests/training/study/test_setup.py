"""What experiments are given: sizes, sources of randomness, models that are trained once."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from training import presets
from training.errors import ResumeMismatch
from training.study.setup import Study


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a quick study in an empty folder."""
    return Study(tmp_path)


def test_sizes_follow_the_study(study: Study) -> None:
    """Quick by default."""
    assert study.size(quick=3, full=500) == 3
    assert replace(study, is_full=True).size(quick=3, full=500) == 500


def test_each_experiment_draws_its_own_numbers(study: Study) -> None:
    """The same number gives the same draws, another number or seed gives others; no order matters."""

    def draw(of: Study, number: int) -> list[float]:
        return torch.rand(4, generator=of.source(number)).tolist()

    assert draw(study, 100) == draw(study, 100)
    assert draw(study, 100) != draw(study, 200)
    assert draw(study, 100) != draw(replace(study, seed=1), 100)


def test_a_model_is_trained_once(study: Study) -> None:
    """The second asking, in this study or a later one in the folder, fits nothing and returns the same weights."""
    config = presets.smoke()
    said: list[str] = []
    first = replace(study, say=said.append).trained(config)
    assert len(said) == config.optimizer.epochs
    assert [metrics.epoch for metrics in first.metrics] == [1, 2]
    again = replace(study, say=lambda line: pytest.fail(f"fitted again: {line}")).trained(config)
    for name, weight in first.vae.state_dict().items():
        assert torch.equal(weight, again.vae.state_dict()[name])
    assert again.metrics == first.metrics


def test_a_run_of_another_configuration_is_not_taken(study: Study) -> None:
    """Figures of one model never stand under the name of another."""
    study.trained(presets.smoke())
    with pytest.raises(ResumeMismatch, match="latent_dim=3"):
        study.trained(presets.smoke().override(["model.latent_dim=3"]))
