"""Shapes, ranges and starting points of the networks."""

import pytest
import torch

from training.config import ModelConfig
from training.errors import ShapeUnsuitable
from training.likelihoods import Categorical, Gaussian
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


@pytest.mark.parametrize("channels", [(), (3,)])
@pytest.mark.parametrize("data_shape", [(1, 4, 6), (3, 4, 5)])
def test_a_categorical_decoder_has_logits_for_each_level(
    channels: tuple[int, ...], data_shape: tuple[int, ...]
) -> None:
    """Levels come before channels, rows and columns, with and without convolutions."""
    config = ModelConfig(latent_dim=2, hidden_dims=(4,), channels=channels, likelihood="categorical", num_levels=5)
    decoder = Decoder(config, data_shape, generator(0, TrainingStream.INIT))
    answer = decoder(torch.zeros(6, 2))
    assert answer.shape == (6, 5, *data_shape)
    likelihood = decoder.distribution(answer)
    assert isinstance(likelihood, Categorical)
    assert likelihood.num_levels == 5
    assert likelihood.mean.shape == (6, *data_shape)
    assert likelihood.log_prob(torch.zeros(6, *data_shape)).shape == (6,)


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_categorical_decoder_starts_at_the_given_frequencies(channels: tuple[int, ...]) -> None:
    """Levels start as frequent as they are; what no row showed starts with a thousandth of all at most."""
    config = ModelConfig(latent_dim=2, hidden_dims=(4,), channels=channels, likelihood="categorical", num_levels=4)
    decoder = Decoder(config, (1, 2, 2), generator(0, TrainingStream.INIT))
    frequencies = torch.tensor([[0.1, 0.2, 0.3, 0.4], [1.0, 0.0, 0.0, 0.0], [0.0, 0.5, 0.5, 0.0], [0.25] * 4])
    frequencies = frequencies.T.reshape(4, 1, 2, 2)
    before = decoder(torch.zeros(1, 2))
    decoder.start_at(frequencies)
    started = (decoder(torch.zeros(1, 2)) - before)[0].softmax(dim=0)
    torch.testing.assert_close(started, frequencies, rtol=0, atol=1e-3)
    assert bool((started > 0).all())


@pytest.mark.parametrize("channels", [(), (3,)])
def test_a_gaussian_decoder_starts_at_the_given_mean_and_variance(channels: tuple[int, ...]) -> None:
    """One variance for all pixels and rows, and the mean image, as far as the layers' own answer is zero."""
    config = ModelConfig(latent_dim=2, hidden_dims=(4,), channels=channels, likelihood="gaussian")
    decoder = Decoder(config, (1, 2, 2), generator(0, TrainingStream.INIT))
    mean = torch.tensor([[[0.1, 0.2], [0.6, 0.9]]])
    before = decoder(torch.zeros(3, 2))
    decoder.start_at(mean, log_var=-3.0)
    likelihood = decoder.distribution(decoder(torch.zeros(3, 2)) - before)
    assert isinstance(likelihood, Gaussian)
    torch.testing.assert_close(likelihood.mean, mean.expand(3, 1, 2, 2))
    torch.testing.assert_close(likelihood.log_var, torch.full((3, 1, 1, 1), -3.0))


def test_a_gaussian_variance_has_a_bound_and_a_way_back() -> None:
    """Data without variance start just above the bound; below it nothing goes, and the gradient never vanishes."""
    config = ModelConfig(latent_dim=2, hidden_dims=(4,), likelihood="gaussian", noise_log_var_min=-6)
    decoder = Decoder(config, (1, 2, 2), generator(0, TrainingStream.INIT))
    decoder.start_at(torch.full((1, 2, 2), 0.5), log_var=-700.0)
    assert decoder.excess_log_var is not None
    for excess in (decoder.excess_log_var.item(), -20.0, 3.0):
        with torch.no_grad():
            decoder.excess_log_var.fill_(excess)
        likelihood = decoder.distribution(torch.zeros(1, 1, 2, 2))
        assert isinstance(likelihood, Gaussian)
        assert likelihood.log_var.item() >= -6
        (gradient,) = torch.autograd.grad(likelihood.log_var.sum(), decoder.excess_log_var)
        assert gradient > 0


def test_a_gaussian_mean_is_an_intensity() -> None:
    """Whatever the layers answer, what is served as the mean needs no clipping."""
    config = ModelConfig(latent_dim=2, hidden_dims=(4,), likelihood="gaussian")
    decoder = Decoder(config, (1, 2, 2), generator(0, TrainingStream.INIT))
    mean = decoder.distribution(torch.tensor([-1e4, -3.0, 3.0, 1e4]).view(1, 1, 2, 2)).mean
    assert bool(((mean >= 0) & (mean <= 1)).all())


def test_the_posterior_of_levels_does_not_see_what_lies_between_them() -> None:
    """For a categorical likelihood the encoder meets the data that the likelihood meets."""
    config = ModelConfig(latent_dim=2, hidden_dims=(4,), likelihood="categorical", num_levels=3)
    encoder = Encoder(config, (1, 2, 2), generator(0, TrainingStream.INIT))
    grey = torch.tensor([0.2, 0.3, 0.7, 0.8]).view(1, 1, 2, 2)
    levels = torch.tensor([0.0, 0.5, 0.5, 1.0]).view(1, 1, 2, 2)
    assert torch.equal(encoder(grey)[0], encoder(levels)[0])
    assert not torch.equal(encoder(grey)[0], encoder(1 - levels)[0])


def test_the_likelihood_leaves_the_other_weights_as_they_were() -> None:
    """A Gaussian decoder starts with the weights of a Bernoulli one: only what is new differs."""
    weights = [
        Decoder(
            ModelConfig(latent_dim=2, hidden_dims=(4,), likelihood=likelihood),
            (1, 2, 2),
            generator(0, TrainingStream.INIT),
        ).state_dict()
        for likelihood in ("bernoulli", "gaussian")
    ]
    assert weights[1].keys() - weights[0].keys() == {"excess_log_var"}
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


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
