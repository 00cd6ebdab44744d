"""Laws of p(x | z)."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli as TorchBernoulli
from torch.distributions import Categorical as TorchCategorical
from torch.distributions import Normal

from training.likelihoods import Bernoulli, Categorical, Gaussian, level_of, quantised


def test_probabilities_of_all_images_sum_to_one(source: torch.Generator) -> None:
    """It is a distribution over binary images."""
    logits = torch.randn((1, 4), generator=source, dtype=torch.float64)
    images = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)
    assert Bernoulli(logits).log_prob(images).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_log_prob_equals_that_of_torch_distributions(source: torch.Generator) -> None:
    """An independent implementation agrees, summed over all dimensions of one image."""
    logits = 5 * torch.randn((3, 1, 2, 2), generator=source, dtype=torch.float64)
    data = (torch.rand(logits.shape, generator=source) < 0.5).double()
    expected = TorchBernoulli(logits=logits).log_prob(data).sum(dim=(1, 2, 3))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(Bernoulli(logits, event_dims=3).log_prob(data), expected, rtol=1e-12, atol=1e-12)


def test_extreme_logits_stay_finite() -> None:
    """A certain decoder that errs is punished by its logit, not by infinity."""
    certain = Bernoulli(torch.tensor([[200.0, -200.0]]))
    assert certain.log_prob(torch.tensor([[0.0, 1.0]])).item() == -400
    assert certain.log_prob(torch.tensor([[1.0, 0.0]])).item() == 0


def test_samples_have_the_mean(source: torch.Generator) -> None:
    """Ones come with probability sigmoid(logits); four standard errors at 20,000 draws."""
    likelihood = Bernoulli(torch.tensor([-2.0, 0.0, 1.5]))
    samples = likelihood.sample(torch.rand((20_000, 3), generator=source))
    assert set(samples.flatten().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(samples.mean(dim=0), likelihood.mean, rtol=0, atol=4 * 0.5 / 20_000**0.5)


NUM_DRAWS = 20_000
FIVE_SIGMA = 5 / math.sqrt(NUM_DRAWS)
"""Five standard errors of a mean over the draws, in standard deviations."""


def test_gaussian_log_prob_equals_that_of_torch_distributions(source: torch.Generator) -> None:
    """An independent implementation agrees, with one variance for all pixels and with one for each."""
    mean, data = torch.rand((2, 3, 1, 2, 2), generator=source, dtype=torch.float64)
    for log_var in (torch.full((3, 1, 1, 1), -3.0).double(), torch.randn(mean.shape, generator=source).double()):
        normal = Normal(mean, (0.5 * log_var).exp().expand(mean.shape))
        expected = normal.log_prob(data).sum(dim=(1, 2, 3))  # type: ignore[no-untyped-call]
        actual = Gaussian(mean, log_var, event_dims=3).log_prob(data)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_gaussian_density_integrates_to_one() -> None:
    """It is a density over all real values of a pixel, of which [0, 1] holds the most."""
    axis = torch.linspace(-3, 4, 70_001, dtype=torch.float64)[:, None]
    density = Gaussian(torch.tensor([0.3]).double(), torch.tensor(-2.0).double()).log_prob(axis).exp()
    assert torch.trapezoid(density, axis[:, 0]).item() == pytest.approx(1, abs=1e-9)
    assert density.max() > 1  # so its logarithm is positive there


def test_gaussian_samples_have_its_moments(source: torch.Generator) -> None:
    """Mean and variance are those of the parameters, within five standard errors; nothing is clipped."""
    mean, log_var = torch.tensor([0.0, 0.5, 1.0]), torch.tensor(-2.0)
    draws = Gaussian(mean, log_var).sample(torch.randn((NUM_DRAWS, 3), generator=source))
    scale = math.exp(-1.0)
    torch.testing.assert_close(draws.mean(dim=0), mean, rtol=0, atol=FIVE_SIGMA * scale)
    # The standard error of a variance is sqrt(2 / n) of it.
    torch.testing.assert_close(
        draws.var(dim=0), torch.full((3,), scale**2), rtol=FIVE_SIGMA * math.sqrt(2), atol=0
    )
    assert draws.min() < 0
    assert draws.max() > 1


@pytest.mark.parametrize("num_levels", [2, 3, 5])
def test_probabilities_of_all_levels_sum_to_one(num_levels: int, source: torch.Generator) -> None:
    """It is a distribution over images whose pixels are on levels."""
    logits = 2 * torch.randn((num_levels, 3), generator=source, dtype=torch.float64)
    axis = [level / (num_levels - 1) for level in range(num_levels)]
    images = torch.tensor(list(itertools.product(axis, repeat=3)), dtype=torch.float64)
    assert Categorical(logits).log_prob(images).exp().sum().item() == pytest.approx(1, abs=1e-12)


def test_categorical_log_prob_equals_that_of_torch_distributions(source: torch.Generator) -> None:
    """An independent implementation agrees, with the levels before channels, rows and columns."""
    logits = 3 * torch.randn((4, 7, 2, 3, 5), generator=source, dtype=torch.float64)
    levels = torch.randint(7, (4, 2, 3, 5), generator=source)
    ours = Categorical(logits, event_dims=3)
    expected = TorchCategorical(logits=logits.movedim(1, -1)).log_prob(levels).sum(dim=(1, 2, 3))  # type: ignore[no-untyped-call]
    torch.testing.assert_close(ours.log_prob(levels.double() / 6), expected, rtol=1e-12, atol=1e-12)
    probabilities = logits.softmax(dim=1).movedim(1, -1)
    torch.testing.assert_close(
        ours.mean, probabilities @ torch.linspace(0, 1, 7, dtype=torch.float64), rtol=1e-12, atol=1e-12
    )


def test_two_levels_are_a_bernoulli(source: torch.Generator) -> None:
    """Zeros and ones have the probabilities of a Bernoulli with the difference of the logits."""
    logits = torch.randn((6, 2, 4), generator=source, dtype=torch.float64)
    data = (torch.rand((6, 4), generator=source) < 0.5).double()
    bernoulli = Bernoulli(logits[:, 1] - logits[:, 0])
    torch.testing.assert_close(
        Categorical(logits).log_prob(data), bernoulli.log_prob(data), rtol=1e-12, atol=1e-12
    )
    torch.testing.assert_close(Categorical(logits).mean, bernoulli.mean, rtol=1e-12, atol=1e-12)


def test_categorical_samples_have_its_probabilities(source: torch.Generator) -> None:
    """Levels come as often as they should, five standard errors at most; a level of no probability never comes."""
    logits = torch.tensor([[0.0, 1.0, -1.0, -200.0], [-200.0, 0.0, 0.0, 2.0]]).T
    draws = Categorical(logits).sample(torch.rand((NUM_DRAWS, 2), generator=source))
    levels = level_of(draws, 4)
    torch.testing.assert_close(draws, levels / 3)
    for pixel, probabilities in enumerate(logits.softmax(dim=0).T):
        shares = torch.bincount(levels[:, pixel], minlength=4) / NUM_DRAWS
        torch.testing.assert_close(shares, probabilities, rtol=0, atol=0.5 * FIVE_SIGMA)
        assert set(levels[:, pixel].tolist()) == set(probabilities.gt(1e-6).nonzero()[:, 0].tolist())


def test_the_ends_of_the_noise_are_the_first_and_the_last_level() -> None:
    """No noise falls between levels or beyond them, however the sums of probabilities round."""
    likelihood = Categorical(torch.zeros(255, 1))
    ends = torch.tensor([[0.0], [1 - 2.0**-24]])
    assert likelihood.sample(ends).tolist() == [[0.0], [1.0]]


@pytest.mark.parametrize(
    ("one", "many"),
    [
        (Bernoulli(torch.linspace(-2, 2, 12).view(3, 1, 4)), Bernoulli(torch.linspace(-2, 2, 12).view(3, 1, 4))),
        (
            Gaussian(torch.linspace(0, 1, 12).view(3, 1, 4), torch.tensor(-1.0)),
            Gaussian(torch.linspace(0, 1, 12).view(3, 1, 4).expand(3, 5, 4), torch.full((3, 5, 1), -1.0)),
        ),
        (
            Categorical(torch.linspace(-2, 2, 24).view(3, 1, 2, 4)),
            Categorical(torch.linspace(-2, 2, 24).view(3, 1, 2, 4).expand(3, 5, 2, 4)),
        ),
    ],
    ids=["bernoulli", "gaussian", "categorical"],
)
def test_shapes_are_broadcast(
    one: Bernoulli | Gaussian | Categorical, many: Bernoulli | Gaussian | Categorical
) -> None:
    """Rows beside samples, and samples beside rows: one log-likelihood for each pair."""
    data = torch.tensor([0.0, 1.0, 1.0, 0.0]).expand(5, 4)
    assert one.log_prob(data).shape == (3, 5)
    torch.testing.assert_close(one.log_prob(data), many.log_prob(data[:1]).expand(3, 5))


def test_quantisation_keeps_what_is_on_a_level() -> None:
    """Every level is its own nearest one, in float32, for any number of levels; 255ths are 256 levels."""
    for num_levels in range(2, 257):
        grid = torch.arange(num_levels) / (num_levels - 1)
        assert torch.equal(quantised(grid, num_levels), grid)
        assert torch.equal(level_of(grid, num_levels), torch.arange(num_levels))
    pixels = torch.arange(256).float() / 255
    assert torch.equal(quantised(pixels, 256), pixels)


@pytest.mark.parametrize("num_levels", [2, 17, 100])
def test_quantisation_moves_by_half_a_step_at_most(num_levels: int) -> None:
    """No pixel is farther from its level than from any other."""
    pixels = torch.arange(256).double() / 255
    grid = torch.linspace(0, 1, num_levels, dtype=torch.float64)
    nearest = (pixels[:, None] - grid).abs().amin(dim=1)
    torch.testing.assert_close((quantised(pixels, num_levels) - pixels).abs(), nearest, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("likelihood", "data"),
    [
        (Categorical(torch.tensor([[500.0, -500.0], [-500.0, 500.0]])), torch.tensor([0.0, 1.0])),
        (Gaussian(torch.zeros(2), torch.tensor(-13.5)), torch.zeros(2)),
    ],
    ids=["categorical", "gaussian"],
)
def test_sure_answers_stay_finite(likelihood: Gaussian | Categorical, data: Tensor) -> None:
    """A model that is as sure as it may be gives finite numbers where it is right and where it is wrong."""
    right, wrong = likelihood.log_prob(data), likelihood.log_prob(1 - data)
    assert bool(right.isfinite() & wrong.isfinite())
    assert right > wrong
