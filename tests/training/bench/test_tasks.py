"""All contestants begin alike and are measured alike."""

import numpy as np
import torch

from training.bench.own_contestants import train_ours
from training.bench.tasks import (
    EvaluationTask,
    TrainingTask,
    fitted,
    held_out_elbo,
    shuffled_batches,
    weights_of,
    with_weights,
)


def test_every_start_is_the_start_of_our_trainer(training_task: TrainingTask) -> None:
    """With a step size of nothing our trainer ends where all the contestants begin."""
    tiny = {"learning_rate": 1e-30, "final_learning_rate": 1e-30}
    still = training_task._replace(config=training_task.config.merge({"optimizer": tiny}))
    ended, began = weights_of(train_ours(still, lambda: None)), weights_of(training_task.start())
    assert ended.keys() == began.keys()
    for name, weight in began.items():
        # Nine steps of Adam, each of about the step size.
        np.testing.assert_allclose(ended[name], weight, rtol=0, atol=1e-28)


def test_weights_survive_the_way_to_another_process(training_task: TrainingTask) -> None:
    """with_weights(weights_of(x)) answers as x does."""
    vae = training_task.start()
    again = with_weights(training_task.config.model, vae.data_shape, weights_of(vae))
    data = training_task.grey()[:2]
    torch.testing.assert_close(again.posterior(data), vae.posterior(data), rtol=0, atol=0)


def test_yardstick_is_the_same_for_equal_models_and_rises_with_training(training_task: TrainingTask) -> None:
    """The same draws whatever the model; a fitted one is better than the one it began as."""
    start = held_out_elbo(training_task.start(), training_task.held_out, seed=3)
    assert held_out_elbo(training_task.start(), training_task.held_out, seed=3) == start
    longer = {"epochs": 40, "validation_interval_epochs": 40}
    long = training_task._replace(config=training_task.config.merge({"optimizer": longer}))
    # The start knows the mean image alone; 120 steps find where the spots are. Noise of the mean: below 2 nats.
    assert held_out_elbo(train_ours(long, lambda: None), training_task.held_out, seed=3) > start + 2


def test_outcome_counts_parameters(training_task: TrainingTask) -> None:
    """784-32-(4+4) and back: weights and biases of four layers."""
    expected = (784 * 32 + 32) + (32 * 8 + 8) + (4 * 32 + 32) + (32 * 784 + 784)
    assert fitted(training_task.start(), training_task).num_parameters == expected


def test_shuffled_batches_are_the_rows_in_another_order() -> None:
    """Each row once, a rest that fills no batch left out, and the next epoch differs."""
    data, source = torch.arange(10.0).unsqueeze(1), torch.Generator().manual_seed(0)
    first = torch.cat(list(shuffled_batches(data, 5, source))).flatten()
    second = torch.cat(list(shuffled_batches(data, 5, source))).flatten()
    assert sorted(first.tolist()) == sorted(second.tolist()) == data.flatten().tolist()
    assert first.tolist() != second.tolist()
    assert [len(batch) for batch in shuffled_batches(data, 4, source)] == [4, 4]


def test_grey_data_are_pixels_scaled_to_one(training_task: TrainingTask) -> None:
    """As the peers' examples scale them."""
    grey = training_task.grey()
    np.testing.assert_array_equal((grey * 255).round().byte().numpy(), training_task.pixels)
    assert (float(grey.min()), float(grey.max())) == (0.0, float(training_task.pixels.max()) / 255)


def test_binary_images_of_an_evaluation_are_those_that_ours_measures(evaluation_task: EvaluationTask) -> None:
    """Zeros and ones, the same at every call."""
    binary = evaluation_task.binary()
    assert set(binary.flatten().tolist()) == {0.0, 1.0}
    assert bool((binary == evaluation_task.binary()).all())
