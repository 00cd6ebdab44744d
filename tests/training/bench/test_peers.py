"""The peers' own code around our networks computes what ours computes."""

import math

import numpy as np
import pytest
import torch

from training import objectives
from training.bench import peers
from training.bench.own_contestants import evaluate_ours
from training.bench.tasks import EvaluationTask, TrainingTask, weights_of

pytestmark = pytest.mark.usefixtures("_peers")


@pytest.mark.parametrize("train", [peers.train_pythae, peers.train_pyro, peers.train_pyro_tensors])
def test_round_ends_after_every_epoch_and_our_networks_are_what_is_fitted(
    training_task: TrainingTask, train: object
) -> None:
    """As many rounds as epochs, every weight moved: nothing of the networks was left outside."""
    assert callable(train)
    ended: list[int] = []
    vae = train(training_task, lambda: ended.append(1))
    assert len(ended) == training_task.num_rounds
    began, now = weights_of(training_task.start()), weights_of(vae)
    assert now.keys() == began.keys()
    assert all((now[name] != began[name]).any() for name in began)


def test_loss_of_pythae_is_our_bound(training_task: TrainingTask) -> None:
    """Same weights, data and noise: its loss is minus our mean ELBO, so the same thing is climbed."""
    vae, data = training_task.start(), (training_task.grey()[:8] > 0.5).float()
    torch.manual_seed(5)
    loss = peers.pythae_model(vae)({"data": data}).loss
    torch.manual_seed(5)
    noise = torch.randn(8, vae.latent_dim)
    expected = -objectives.elbo(vae, data, noise).value.mean()
    # Sums over 784 pixels in float32, once from logits and once from probabilities.
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)


def test_loss_of_pyro_is_our_bound_in_expectation(training_task: TrainingTask) -> None:
    """Summed over the batch, and with a sampled KL term: means over many samples agree within their errors."""
    import pyro  # noqa: PLC0415
    from pyro.infer import Trace_ELBO  # noqa: PLC0415

    pyro.clear_param_store()
    vae, data = training_task.start(), (training_task.grey()[:8] > 0.5).float()
    both = peers.PyroVae(vae)
    torch.manual_seed(5)
    with torch.no_grad():
        theirs = torch.tensor([-Trace_ELBO().loss(both.model, both.guide, data) / 8 for _ in range(400)])
        noise = torch.randn(8, 400, vae.latent_dim)
        ours = objectives.elbo(vae, data, noise).value.mean()
    # Their error alone: ours has no noise in the KL term and as many samples.
    error = float(theirs.std()) / math.sqrt(len(theirs))
    assert float(theirs.mean()) == pytest.approx(float(ours), abs=5 * error)


@pytest.mark.parametrize("chunk", [50, 100])
def test_get_nll_agrees_with_our_bound_image_by_image(evaluation_task: EvaluationTask, chunk: int) -> None:
    """Same weights, images and number of samples: the estimates differ by Monte Carlo noise alone."""
    ended: list[int] = []
    theirs = peers.evaluate_pythae(evaluation_task, lambda: ended.append(1), chunk=chunk)
    ours = evaluate_ours(evaluation_task, lambda: None)
    assert len(ended) == evaluation_task.num_rounds
    difference = theirs - ours
    error = difference.std(ddof=1) / math.sqrt(len(difference))
    assert abs(difference.mean()) <= 5 * error
    assert not np.array_equal(theirs, ours)
