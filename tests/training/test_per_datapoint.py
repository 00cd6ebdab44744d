"""Laws of inference without amortisation, with linear models as oracles."""

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from tests.training.test_objectives import IsotropicGaussian, LinearGaussian
from training import objectives, per_datapoint, presets
from training.estimators import GaussianLatents
from training.models.networks import Encoder
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.per_datapoint import Alternation, Ascent, PosteriorTable

NOISE_NATS = 0.01
"""What the noise of the last gradients leaves, for steps of 0.02 to 0.05.

Adam's last tens of steps leave an error of about 0.03 in each of four numbers; with deviations above 0.45 each
costs (0.03 / 0.45)^2 / 2 = 0.002 nats.
"""


@dataclass
class LearntLinear:
    """The linear model with a weight that is learnt; its noise variance is known."""

    weight: nn.Parameter
    variance: float

    def likelihood(self, latents: Tensor) -> IsotropicGaussian:
        """Return p(x | z)."""
        return IsotropicGaussian(latents @ self.weight.T, self.variance)


@pytest.fixture
def orthogonal(source: torch.Generator) -> LinearGaussian:
    """Return a linear model with a diagonal posterior: the family of q holds it."""
    return LinearGaussian.drawn(source, is_orthogonal=True)


def test_exact_posterior_is_reached(orthogonal: LinearGaussian, source: torch.Generator) -> None:
    """From the prior, 600 steps bring every q_i to its posterior: within 0.01 nats of log p(x)."""
    _, data = orthogonal.sample(20, source)
    prior = torch.zeros((20, 2), dtype=torch.float64)
    mean, log_var = per_datapoint.refine(
        orthogonal, data, (prior, prior), source, num_steps=600, num_samples=8, ascent=Ascent(learning_rate=0.05)
    )
    gap = orthogonal.kl_to_posterior(data, mean, log_var)
    assert gap.max().item() < NOISE_NATS
    exact = orthogonal.log_evidence(data)
    torch.testing.assert_close(orthogonal.exact_elbo(data, mean, log_var), exact, rtol=0, atol=NOISE_NATS)


def test_refined_bound_is_not_below_the_amortised_one(source: torch.Generator) -> None:
    """Row by row, the exact bound after refinement is at least the encoder's, and at most log p(x)."""
    linear = LinearGaussian.drawn(source)
    _, data = linear.sample(100, source)
    start = linear.posterior(data)
    refined = per_datapoint.refine(linear, data, start, source)
    before, after = linear.exact_elbo(data, *start), linear.exact_elbo(data, *refined)
    assert (after - before).min().item() > -NOISE_NATS
    assert (after - before).mean().item() > 1
    assert (linear.log_evidence(data) - after).min().item() > -1e-9


def test_refinement_from_the_optimum_stays_there(orthogonal: LinearGaussian, source: torch.Generator) -> None:
    """Refining the exact posterior loses nothing but the noise of the gradients, 0.01 nats."""
    exact = orthogonal.with_exact_encoder()
    _, data = exact.sample(20, source)
    refined = per_datapoint.refine(exact, data, exact.posterior(data), source, num_samples=8)
    assert exact.kl_to_posterior(data, *refined).max().item() < NOISE_NATS


def test_gaps_of_a_linear_model(orthogonal: LinearGaussian, source: torch.Generator) -> None:
    """With a diagonal posterior the whole gap is amortisation, and equals KL(q, posterior) of the encoder."""
    _, data = orthogonal.sample(30, source)
    noise = torch.randn((30, 2_000, 2), generator=source, dtype=torch.float64)
    gaps = per_datapoint.measure_gaps(orthogonal, data, noise, source, num_steps=1_000)
    # Log weights deviate by sqrt(2 KL) = 0.15 for a KL of 0.01, and their mean by 0.15 / sqrt(2000) per row.
    torch.testing.assert_close(gaps.log_evidence, orthogonal.log_evidence(data), rtol=0, atol=0.05)
    assert gaps.gap.approximation.min().item() >= 0
    assert gaps.gap.approximation.max().item() < 0.05
    # The amortised bound is a mean over 2,000 samples of log weights.
    latents = GaussianLatents(*orthogonal.posterior(data))
    samples = latents.rsample(noise)
    log_weights = objectives.log_joint(orthogonal, data)(samples) - latents.log_prob(samples)
    standard_error = log_weights.std(dim=1) / math.sqrt(2_000)
    exact = orthogonal.kl_to_posterior(data, *orthogonal.posterior(data))
    assert bool(((gaps.gap.amortisation - exact).abs() < 5 * standard_error + 0.05).all())


def test_gaps_of_a_vae_are_positive(small_vae: VAE, source: torch.Generator) -> None:
    """An untrained encoder leaves a gap that refinement closes, and the decoder is not touched by it."""
    small_vae.double()
    before = [parameter.detach().clone() for parameter in small_vae.parameters()]
    data = (torch.rand((16, 1, 2, 2), generator=source) < 0.5).double()
    noise = torch.randn((16, 2_000, 2), generator=source, dtype=torch.float64)
    gaps = per_datapoint.measure_gaps(small_vae, data, noise, source, num_steps=200)
    assert gaps.gap.amortisation.min().item() > 0
    # On common samples this is Jensen's inequality, sample by sample.
    assert gaps.gap.approximation.min().item() >= 0
    assert all(torch.equal(one, other) for one, other in zip(before, small_vae.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in small_vae.parameters())


def test_alternation_reaches_the_maximum_likelihood(source: torch.Generator) -> None:
    """Steps on all q_i, then on p: the bound rises to the maximum of log p(x), known by principal components."""
    truth = LinearGaussian.drawn(source, is_orthogonal=True)
    _, data = truth.sample(200, source)
    model = LearntLinear(
        nn.Parameter(0.1 * torch.randn((5, 2), generator=source, dtype=torch.float64)), truth.variance
    )
    table = PosteriorTable.at_prior(200, 2, torch.float64)
    optimizer = torch.optim.Adam([model.weight], lr=0.02)
    trace = per_datapoint.alternate(
        model,
        data,
        table,
        optimizer,
        Alternation(num_epochs=300, batch_size=200, num_q_steps=5, num_samples=4),
        source,
        ascent=Ascent(learning_rate=0.05),
    )
    # Of a model without offset: principal components of the second moment, with known noise variance.
    values, vectors = torch.linalg.eigh(data.T @ data / 200)
    best = vectors[:, -2:] * (values[-2:] - truth.variance).sqrt()
    maximum = LinearGaussian(best, truth.variance, truth.encoder, truth.encoder_log_var).log_evidence(data).mean()
    learnt = LinearGaussian(model.weight.detach(), truth.variance, truth.encoder, truth.encoder_log_var)
    evidence = learnt.log_evidence(data)
    bound = learnt.exact_elbo(data, table.mean, table.log_var)
    assert (evidence - bound).min().item() > -1e-9
    assert evidence.mean().item() <= maximum.item()
    assert maximum.item() - bound.mean().item() < 0.03
    assert trace[-1] > trace[0] + 1


def test_q_steps_leave_the_evidence_alone_and_p_steps_the_posteriors(
    small_vae: VAE, source: torch.Generator
) -> None:
    """A q step moves only the rows of its batch; a p step moves only the decoder."""
    table = PosteriorTable.at_prior(6, 2)
    data, rows = torch.ones(2, 1, 2, 2), torch.tensor([4, 1])
    noise = torch.randn((2, 3, 2), generator=source)
    weights = [parameter.detach().clone() for parameter in small_vae.parameters()]
    per_datapoint.q_step(small_vae, data, table, rows, noise, Ascent())
    assert all(torch.equal(one, other) for one, other in zip(weights, small_vae.parameters(), strict=True))
    moved = (table.mean != 0).any(dim=1).nonzero().flatten().tolist()
    assert moved == [1, 4]
    before = table.mean.clone(), table.log_var.clone()
    optimizer = torch.optim.SGD(small_vae.decoder.parameters(), lr=0.1)
    per_datapoint.p_step(small_vae, data, table, rows, noise, optimizer)
    assert torch.equal(table.mean, before[0])
    assert torch.equal(table.log_var, before[1])
    assert not torch.equal(weights[-1], list(small_vae.parameters())[-1])


def test_rows_have_adam_states_of_their_own(source: torch.Generator) -> None:
    """Each row's steps are those of torch.optim.Adam on that row alone, however often the others moved."""
    table = PosteriorTable(torch.zeros(3, 2).double(), torch.ones(3, 2).double())
    oracle = [torch.tensor([0.0, 0, 1, 1], dtype=torch.float64, requires_grad=True) for _ in range(3)]
    optimizers = [torch.optim.Adam([row], lr=0.1, betas=(0.8, 0.95), maximize=True) for row in oracle]
    ascent = Ascent(learning_rate=0.1, mean_decay=0.8, square_decay=0.95)
    for batch in ([0, 1], [1], [1, 2], [2, 0], [1]):
        gradient = torch.randn((len(batch), 4), generator=source, dtype=torch.float64)
        table.ascend(torch.tensor(batch), gradient[:, :2], gradient[:, 2:], ascent)
        for row, own in zip(batch, gradient, strict=True):
            oracle[row].grad = own
            optimizers[row].step()
    found = torch.cat((table.mean, table.log_var), dim=1)
    torch.testing.assert_close(found, torch.stack(oracle).detach(), rtol=0, atol=1e-12)


def test_parameters_grow_with_the_data() -> None:
    """MNIST with 32 latent dimensions stores 3,840,000 numbers; an encoder 784-400-(32+32) has 339,664."""
    assert PosteriorTable.at_prior(60_000, 32).num_parameters == 2 * 32 * 60_000 == 3_840_000
    sizes = presets.mnist_mlp().model.override(["hidden_dims=[400]", "latent_dim=32"])
    encoder = Encoder(sizes, (1, 28, 28), generator(0, TrainingStream.INIT))
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 339_664
