"""Noise of figures equals that of the service; training's generators are functions of their arguments."""

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from serving import noise as service_noise
from training.noise import Stream, TrainingStream, generator, normal, normal_per_row, uniform


def test_tensors_equal_what_the_service_draws(seed: int) -> None:
    """A picture shows the latents that the service samples for the same seed."""
    expected = service_noise.normal(seed, 5, 7, first_row=3)
    np.testing.assert_array_equal(normal(seed, 5, 7, first_row=3, stream=Stream.PRIOR).numpy(), expected)
    expected = service_noise.uniform(seed, 5, 7, stream=Stream.OBSERVATION)
    np.testing.assert_array_equal(uniform(seed, 5, 7, stream=Stream.OBSERVATION).numpy(), expected)


@pytest.mark.parametrize("seed", [0, 7, 2**32, 2**64 - 1])
@pytest.mark.parametrize(("first_row", "first_sample"), [(0, 0), (5000, 2), (2**30, 2**20 - 3)])
@pytest.mark.parametrize("dim", [1, 3, 32, 33])
def test_posterior_noise_is_that_of_the_service(seed: int, first_row: int, first_sample: int, dim: int) -> None:
    """Made by other means, and on any device, it has the same bits: signs, carries and long rows included."""
    drawn = normal_per_row(seed, 2, 3, dim, first_row=first_row, first_sample=first_sample)
    for row, values in enumerate(drawn, start=first_row):
        expected = service_noise.normal(
            seed, 3, dim, first_row=row * 2**20 + first_sample, stream=Stream.POSTERIOR
        )
        np.testing.assert_array_equal(values.numpy(), expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_posterior_noise_on_a_gpu_is_the_same(seed: int) -> None:
    """Logarithm and cosine of another library may round the last digit of float32 otherwise, no more."""
    there = normal_per_row(seed, 20, 500, 32, device=torch.device("cuda")).cpu()
    torch.testing.assert_close(there, normal_per_row(seed, 20, 500, 32), rtol=2e-7, atol=1e-9)


def test_posterior_noise_does_not_depend_on_chunks(seed: int) -> None:
    """Noise of image i, sample j is the same however images and samples are grouped."""
    whole = normal_per_row(seed, 4, 6, 3)
    pieces = [
        torch.cat([normal_per_row(seed, 1, 2, 3, first_row=row, first_sample=first) for first in (0, 2, 4)], dim=1)
        for row in range(4)
    ]
    assert torch.equal(torch.cat(pieces), whole)


def test_posterior_noise_is_standard_normal(seed: int) -> None:
    """A Kolmogorov-Smirnov test of 30,000 values does not refuse it at 0.1 per cent; images differ."""
    drawn = normal_per_row(seed, 10, 1000, 3)
    assert stats.kstest(drawn.flatten().numpy(), "norm").pvalue > 1e-3
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(TrainingStream, 2)))
def test_streams_are_different(first: TrainingStream, second: TrainingStream, seed: int) -> None:
    """Shuffles, binarisation and posterior noise of one seed share nothing."""
    draws = [torch.rand(8, generator=generator(seed, stream)) for stream in (first, second)]
    assert not torch.equal(*draws)


def test_streams_are_disjoint_from_those_of_the_service() -> None:
    """No generator of the training loop can meet the noise of an evaluation."""
    assert not {int(stream) for stream in TrainingStream} & {int(stream) for stream in Stream}


def test_generator_is_a_function_of_its_arguments(seed: int) -> None:
    """The same arguments give the same draws at any time; another seed or counter gives others."""
    arguments = [(seed, 5), (seed, 5), (seed, 6), (seed + 1, 5), (seed, 5 + 2**32), (seed + 2**32, 5)]
    draws = [torch.rand(8, generator=generator(s, TrainingStream.BINARISE, n)) for s, n in arguments]
    assert torch.equal(draws[0], draws[1])
    assert all(not torch.equal(draws[0], other) for other in draws[2:])


def test_global_generator_is_left_alone(seed: int) -> None:
    """Nobody else's random numbers change because we draw ours."""
    before = torch.get_rng_state()
    torch.rand(8, generator=generator(seed, TrainingStream.INIT))
    assert torch.equal(torch.get_rng_state(), before)
