"""Shapes, ranges and starting points of the networks."""

import pytest
import torch

from training.config import ModelConfig
from training.models.networks import Decoder, Encoder
from training.noise import TrainingStream, generator


@pytest.mark.parametrize("hidden_dims", [(7,), (9, 5)])
def test_networks_have_the_shapes_of_their_configuration(hidden_dims: tuple[int, ...]) -> None:
    """Data go to a mean and a log variance per latent dimension, latents to a logit per pixel."""
    config = ModelConfig(latent_dim=3, hidden_dims=hidden_dims)
    source = generator(0, TrainingStream.INIT)
    mean, log_var = Encoder(config, (1, 4, 2), source)(torch.zeros(6, 1, 4, 2))
    logits = Decoder(config, (1, 4, 2), source)(torch.zeros(6, 3))
    assert (mean.shape, log_var.shape, logits.shape) == ((6, 3), (6, 3), (6, 1, 4, 2))


def test_log_variance_is_clamped() -> None:
    """Whatever the data, the variance stays in its range."""
    config = ModelConfig(latent_dim=2, hidden_dims=(4,), log_var_min=-1, log_var_max=1)
    encoder = Encoder(config, (1, 2, 2), generator(0, TrainingStream.INIT))
    _, log_var = encoder(1e6 * torch.randn((50, 1, 2, 2), generator=torch.Generator().manual_seed(0)))
    assert (log_var.min().item(), log_var.max().item()) == (-1, 1)


def test_decoder_starts_at_the_given_pixels() -> None:
    """At the zero latents of a bias-free start the decoder answers the mean image, black pixels included."""
    decoder = Decoder(ModelConfig(latent_dim=2, hidden_dims=(4,)), (1, 1, 3), generator(0, TrainingStream.INIT))
    decoder.start_at(torch.tensor([[[0.0, 0.3, 1.0]]]))
    actual = torch.sigmoid(decoder(torch.zeros(1, 2))).flatten().tolist()
    assert actual == pytest.approx([0.001, 0.3, 0.999], abs=1e-6)


def test_initial_weights_depend_on_the_seed_alone() -> None:
    """The same seed gives the same weights whatever the global generator did; another seed gives others."""
    networks = [
        Encoder(ModelConfig(hidden_dims=(4,)), (1, 2, 2), generator(seed, TrainingStream.INIT)).state_dict()
        for seed in (0, 0, 1)
    ]
    first = [weights["head.weight"] for weights in networks]
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[0], first[2])


def test_gradients_do_not_vanish_at_the_start() -> None:
    """Both heads of the encoder depend on the data at initialisation."""
    encoder = Encoder(ModelConfig(latent_dim=2, hidden_dims=(8, 8)), (1, 2, 2), generator(0, TrainingStream.INIT))
    data = torch.rand((1, 1, 2, 2), generator=torch.Generator().manual_seed(0)).requires_grad_()
    mean, log_var = encoder(data)
    for output in (mean, log_var):
        (gradient,) = torch.autograd.grad(output.sum(), data, retain_graph=True)
        assert gradient.abs().max() > 1e-3
