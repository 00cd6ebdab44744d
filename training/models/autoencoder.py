"""The deterministic autoencoder: the networks of the VAE without a distribution over the latents.

It has codes but no p(z), hence neither log p(x) nor samples: a latent is not yet a generative model. Codes lie
wherever the decoder can tell them apart, so that draws from N(0, I) decode to pictures of nothing. A density
that is fitted to the codes afterwards (a `GaussianMixture` with one component will do) makes it a sampler.

References:
    Kingma and Welling, An Introduction to Variational Autoencoders, 2019. https://arxiv.org/abs/1906.02691
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from training.config import ModelConfig
from training.likelihoods import Bernoulli
from training.models.networks import Decoder, Encoder

ReconstructionLoss = Literal["cross_entropy", "squared_error"]


class Autoencoder(nn.Module):
    """Encoder and decoder of the VAE; the code of a row is what would be the posterior mean.

    The half of the encoder's last layer that would be the log variance is there, and nothing reads it: the same
    configuration and generator give the same initial weights as `VAE`.

    Args:
        config: Sizes of the networks. Of the likelihood only the form of the decoder's answer matters: one number
            per pixel, as for a Bernoulli or a Gaussian.
        data_shape: Shape of one row of data.
        generator: Source of the initial weights.

    Raises:
        ValueError: If the likelihood is categorical.
    """

    def __init__(self, config: ModelConfig, data_shape: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        if config.likelihood == "categorical":
            raise ValueError("likelihood: an autoencoder answers one number per pixel; set bernoulli or gaussian")
        self.data_shape, self.latent_dim = data_shape, config.latent_dim
        self.encoder = Encoder(config, data_shape, generator)
        self.decoder = Decoder(config, data_shape, generator)

    def encode(self, data: Tensor) -> Tensor:
        """Return codes, shape (n, latent_dim), for data in [0, 1], shape (n, *data_shape)."""
        codes: Tensor = self.encoder(data)[0]
        return codes

    def decode(self, codes: Tensor) -> Tensor:
        """Return pixels in (0, 1), shape (n, *data_shape), for codes of shape (n, latent_dim)."""
        return torch.sigmoid(self.decoder(codes))

    def reconstruct(self, data: Tensor) -> Tensor:
        """Return decode(encode(data)); the same answer every time, for nothing is drawn."""
        return self.decode(self.encode(data))

    def reconstruction_error(self, data: Tensor, loss: ReconstructionLoss = "cross_entropy") -> Tensor:
        r"""Return what training minimises, summed over the pixels, shape (n,).

        .. math:: -\sum_j x_j \log \hat x_j + (1 - x_j) \log(1 - \hat x_j)
            \quad \textrm{or} \quad \sum_j (x_j - \hat x_j)^2

        The first is -log p(x | z) of a VAE with z at the code, in nats, if the data are binary; it lies below the
        VAE's expected one, and it is no bound on -log p(x).

        Args:
            data: In [0, 1], shape (n, *data_shape).
            loss: Which of the two.

        Raises:
            ValueError: If the data have another shape or leave [0, 1].
        """
        self._check(data)
        return self._error(data, loss)

    def fit(
        self,
        data: Tensor,
        generator: torch.Generator,
        *,
        num_steps: int,
        batch_size: int = 128,
        learning_rate: float = 1e-3,
        loss: ReconstructionLoss = "cross_entropy",
        listener: Callable[[int], None] = lambda _: None,
    ) -> tuple[float, ...]:
        """Minimise the mean reconstruction error by Adam.

        Args:
            data: In [0, 1], shape (n, *data_shape), on the device of the model.
            generator: Chooses the rows of each step, with replacement.
            num_steps: Steps.
            batch_size: Rows in one step.
            learning_rate: Step size.
            loss: Which error.
            listener: Told the number of steps done, after each.

        Returns:
            Mean error of the rows of each step, before the step.

        Raises:
            ValueError: If the data have another shape, leave [0, 1], or are constant.
        """
        self._check(data)
        if bool((data == data[:1]).all()):
            raise ValueError("data: all rows are equal, there is nothing to encode; give data that vary")
        # Fused: of a step of 784-512-512-32 it takes 30 % off.
        optimizer = torch.optim.Adam(self.parameters(), lr=learning_rate, fused=True)
        errors = []
        for step in range(num_steps):
            rows = torch.randint(len(data), (batch_size,), generator=generator, device=data.device)
            error = self._error(data[rows], loss).mean()
            optimizer.zero_grad(set_to_none=True)
            torch.autograd.backward(error)
            optimizer.step()
            errors.append(error.detach())
            listener(step + 1)
        return tuple(torch.stack(errors).tolist()) if errors else ()

    def _error(self, data: Tensor, loss: ReconstructionLoss) -> Tensor:
        logits = self.decoder(self.encode(data))
        if loss == "cross_entropy":
            return -Bernoulli(logits, event_dims=len(self.data_shape)).log_prob(data)
        return (data - torch.sigmoid(logits)).square().flatten(start_dim=1).sum(dim=1)

    def _check(self, data: Tensor) -> None:
        if data.shape[1:] != self.data_shape or not len(data):
            raise ValueError(
                f"data: shape {tuple(data.shape)}, expected (rows, {', '.join(map(str, self.data_shape))})"
            )
        # Not "min < 0 or max > 1": NaN is in no order.
        if not bool(((data >= 0) & (data <= 1)).all()):
            raise ValueError("data: a value is NaN or outside [0, 1]; divide pixels by 255 and repair the rest")
