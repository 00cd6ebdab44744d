"""Laws of p(x | z)."""

import itertools

import pytest
import torch
from torch.distributions import Bernoulli as TorchBernoulli

from training.likelihoods import Bernoulli


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
