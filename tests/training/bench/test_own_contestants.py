"""Ours run what the commands run; the loop of the tutorials does the same work."""

import numpy as np
import pytest
import torch

from training.bench.own_contestants import SampleBySample, evaluate_ours, train_like_tutorial, train_ours
from training.bench.tasks import EvaluationTask, TrainingTask, weights_of
from training.evaluate import evaluate


@pytest.mark.parametrize("train", [train_ours, train_like_tutorial])
def test_round_ends_after_every_epoch(training_task: TrainingTask, train: object) -> None:
    """As often as there are epochs, whoever counts them."""
    assert callable(train)
    ended: list[int] = []
    vae = train(training_task, lambda: ended.append(1))
    assert len(ended) == training_task.num_rounds == 3
    began = weights_of(training_task.start())
    assert any((weight != began[name]).any() for name, weight in weights_of(vae).items())


def test_evaluation_of_ours_is_that_of_the_command(evaluation_task: EvaluationTask) -> None:
    """The values of single images that are compared with others have the mean that is reported."""
    ended: list[int] = []
    nll = evaluate_ours(evaluation_task, lambda: ended.append(1))
    assert len(ended) == evaluation_task.num_rounds
    reported = evaluate(
        evaluation_task.vae(), evaluation_task.pixels, evaluation_task.config, split="test", checkpoint_sha256=""
    )
    # Float32 values of some hundred nats: half a unit in the last place is 1.5e-5.
    assert nll.mean() == pytest.approx(reported.nll_iwae.value, abs=1e-4)
    assert nll.shape == (16,)


def test_samples_one_by_one_are_the_same_images(training_task: TrainingTask) -> None:
    """The way over PIL changes nothing but the time it takes."""
    samples = SampleBySample(training_task.pixels)
    assert len(samples) == len(training_task.pixels)
    gathered = torch.stack([samples[index][0] for index in range(5)])
    np.testing.assert_array_equal(gathered.numpy(), training_task.grey()[:5].numpy())
