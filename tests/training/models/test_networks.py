"""Shapes, ranges and starting points of the networks."""

import pytest
import torch

from training.config import ModelConfig
from training.errors import ShapeUnsuitable
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


@pytest.mark.parametrize("data_shape", [(1, 28, 28), (3, 8, 8), (1, 7, 9), (1, 5, 4)])
@pytest.mark.parametrize("channels", [(4,), (4, 6)])
def test_convolutions_halve_and_double_any_image(data_shape: tuple[int, ...], channels: tuple[int, ...]) -> None:
    """The decoder gives back the shape that the encoder took, odd sides too."""
    config = ModelConfig(latent_dim=3, hidden_dims=(5,), channels=channels)
    source = generator(0, TrainingStream.INIT)
    encoder, decoder = Encoder(config, data_shape, source), Decoder(config, data_shape, source)
    mean, log_var = encoder(torch.zeros(6, *data_shape))
    assert (mean.shape, log_var.shape) == ((6, 3), (6, 3))
    assert decoder(mean).shape == (6, *data_shape)
    assert decoder.top_shape == (channels[-1], *(side >> len(channels) for side in data_shape[1:]))


def test_a_convolution_sees_neighbours_alone() -> None:
    """A changed pixel changes the features near it and no others."""
    config = ModelConfig(latent_dim=2, hidden_dims=(5,), channels=(4,))
    encoder = Encoder(config, (1, 16, 16), generator(0, TrainingStream.INIT))
    before = torch.zeros(1, 1, 16, 16)
    after = before.clone()
    after[0, 0, 0, 0] = 1
    changed = (encoder.convolutions(after) - encoder.convolutions(before)).abs().sum(1)[0] > 0
    assert changed[0, 0]
    assert changed.nonzero().max() <= 1


@pytest.mark.parametrize(
    ("data_shape", "channels", "problem"),
    [
        ((30,), (4,), "need"),
        ((1, 4, 4), (4, 4, 4), "cannot be halved 3 times"),
        ((1, 1, 9), (4,), "halved 1 times"),
    ],
)
def test_data_that_cannot_be_halved_are_refused(
    data_shape: tuple[int, ...], channels: tuple[int, ...], problem: str
) -> None:
    """The error says what the architecture needs and what to change."""
    config = ModelConfig(latent_dim=2, hidden_dims=(5,), channels=channels)
    with pytest.raises(ShapeUnsuitable, match=rf"{problem}.*choose another model\.channels"):
        Encoder(config, data_shape, generator(0, TrainingStream.INIT))


def test_a_convolutional_decoder_starts_at_the_given_pixels_too() -> None:
    """An offset takes the place of the bias of the last layer, whose channels share one number."""
    config = ModelConfig(latent_dim=2, hidden_dims=(4,), channels=(3,))
    decoder = Decoder(config, (1, 2, 4), generator(0, TrainingStream.INIT))
    probabilities = torch.linspace(0.1, 0.9, 8).view(1, 2, 4)
    features = decoder(torch.zeros(1, 2))
    decoder.start_at(probabilities)
    moved = decoder(torch.zeros(1, 2)) - features
    torch.testing.assert_close(torch.sigmoid(moved[0]), probabilities)


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
