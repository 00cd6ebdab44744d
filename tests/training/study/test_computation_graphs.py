"""Row 23: what autograd records of a sample; the checks fail where sampling is something else."""

from pathlib import Path

import pytest
import torch

from tests.training.study.sections import assert_shown
from training import gaussians
from training.data import Dataset
from training.study import computation_graphs
from training.study.computation_graphs import Outcome
from training.study.setup import Study

NOISE = torch.tensor([[0.3, -1.2]], dtype=torch.float64)


@pytest.fixture
def parameters() -> torch.Tensor:
    """Return phi: two means and two log variances."""
    return torch.tensor([0.1, 0.2, -0.3, 0.4], dtype=torch.float64, requires_grad=True)


def test_two_graphs(tmp_path: Path) -> None:
    """Absent through the plain sample, present through the reparametrised one, equal values."""
    assert_shown(computation_graphs.two_graphs(Study(tmp_path)), 23)


def test_what_is_recorded(parameters: torch.Tensor) -> None:
    """Nothing of a constant; the exponential of the scale and the sum of a square of a reparametrised sample."""
    latents = computation_graphs.latents_of(parameters)
    plain = Outcome.of(parameters, latents.sample(NOISE))
    path = Outcome.of(parameters, latents.rsample(NOISE))
    assert plain.operations == ()
    assert not plain.is_reached
    assert {"Exp", "Pow", "Sum"} <= set(path.operations)
    assert path.is_reached
    assert plain.value == path.value


def test_reached_means_that_leaf(parameters: torch.Tensor) -> None:
    """A graph that ends at other parameters does not count."""
    other = torch.ones(4, dtype=torch.float64, requires_grad=True)
    assert computation_graphs.reaches((2 * parameters).sum(), parameters)
    assert not computation_graphs.reaches((2 * other).sum(), parameters)
    assert not computation_graphs.reaches(torch.ones(()), parameters)


def test_a_sample_that_is_no_constant_is_found(parameters: torch.Tensor) -> None:
    """Two reparametrised samples are not the two graphs."""
    path = Outcome.of(parameters, computation_graphs.latents_of(parameters).rsample(NOISE))
    plain = Outcome.of(parameters, computation_graphs.latents_of(parameters).sample(NOISE))
    assert [check.passed for check in computation_graphs.graph_checks(plain, path)] == [True, True, True]
    assert [check.passed for check in computation_graphs.graph_checks(path, path)] == [False, True, True]
    assert [check.passed for check in computation_graphs.graph_checks(plain, plain)] == [True, False, True]


def test_other_values_are_found(parameters: torch.Tensor) -> None:
    """Equal noise must give equal latents."""
    latents = computation_graphs.latents_of(parameters)
    plain, path = Outcome.of(parameters, latents.sample(NOISE)), Outcome.of(parameters, latents.rsample(-NOISE))
    assert [check.passed for check in computation_graphs.graph_checks(plain, path)] == [True, True, False]


def test_an_encoder_without_gradient_is_found(digits: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when somebody writes sample for rsample."""
    right = computation_graphs.vae_checks(digits, torch.Generator().manual_seed(0))
    rsample = gaussians.rsample
    monkeypatch.setattr(gaussians, "rsample", lambda *values: rsample(*values).detach())
    wrong = computation_graphs.vae_checks(digits, torch.Generator().manual_seed(0))
    assert [check.passed for check in right] == [True, True]
    assert [check.passed for check in wrong] == [True, False]
