"""Contestants that need other people's packages. Imported where they are used: they need not be there.

Each is written as the project's own example or documentation says, around our networks, so that all contestants
multiply the same matrices.
"""

import tempfile
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from training.bench.tasks import EndRound, EvaluationTask, TrainingTask, shuffled_batches
from training.models.vae import VAE


def train_pythae(task: TrainingTask, end_round: EndRound) -> VAE:
    """Fit with pythae's `TrainingPipeline`: its VAE, its BaseTrainer, its DataLoader."""
    from pythae.pipelines import TrainingPipeline  # noqa: PLC0415
    from pythae.trainers import BaseTrainerConfig  # noqa: PLC0415
    from pythae.trainers.training_callbacks import TrainingCallback  # noqa: PLC0415

    class Turn(TrainingCallback):  # type: ignore[misc]  # published without types
        def on_epoch_end(self, training_config: object, **_: object) -> None:  # noqa: ARG002 - its signature
            end_round()

    vae = task.start()
    with tempfile.TemporaryDirectory() as folder:
        config = BaseTrainerConfig(
            output_dir=folder,
            num_epochs=task.num_rounds,
            learning_rate=task.config.optimizer.learning_rate,
            per_device_train_batch_size=task.batch_size,
            seed=task.config.seed,
            no_cuda=True,
        )
        pipeline = TrainingPipeline(model=pythae_model(vae), training_config=config)
        pipeline(train_data=task.grey(), callbacks=[Turn()])
    return vae


def evaluate_pythae(task: EvaluationTask, end_round: EndRound, *, chunk: int) -> NDArray[np.float64]:
    """Measure with pythae's `get_nll`, so many samples at once; return the negative bound of each image."""
    torch.manual_seed(task.config.seed)
    model = pythae_model(task.vae())
    data, num_samples = task.binary(), task.config.num_importance_samples
    # Without this it would record a graph for gradients that nobody asks for.
    with torch.no_grad():
        nll = [-model.get_nll(row.unsqueeze(0), n_samples=num_samples, batch_size=chunk) for row in data]
        end_round()
        for _ in range(1, task.num_rounds):
            model.get_nll(data, n_samples=num_samples, batch_size=chunk)
            end_round()
    return np.array(nll, dtype=np.float64)


def pythae_model(vae: VAE) -> Any:  # noqa: ANN401 - published without types
    """Return pythae's VAE around the networks of ours."""
    from pythae.models import VAE as PythaeVAE  # noqa: PLC0415, N811
    from pythae.models import VAEConfig  # noqa: PLC0415
    from pythae.models.base.base_utils import ModelOutput  # noqa: PLC0415
    from pythae.models.nn import BaseDecoder, BaseEncoder  # noqa: PLC0415

    class Encoder(BaseEncoder):  # type: ignore[misc]  # published without types
        def __init__(self) -> None:
            super().__init__()
            self.net = vae.encoder

        def forward(self, data: Tensor) -> object:
            mean, log_var = self.net(data)
            return ModelOutput(embedding=mean, log_covariance=log_var)

    class Decoder(BaseDecoder):  # type: ignore[misc]  # published without types
        def __init__(self) -> None:
            super().__init__()
            self.net = vae.decoder

        def forward(self, latents: Tensor) -> object:
            return ModelOutput(reconstruction=torch.sigmoid(self.net(latents)))

    config = VAEConfig(input_dim=vae.data_shape, latent_dim=vae.latent_dim, reconstruction_loss="bce")
    return PythaeVAE(model_config=config, encoder=Encoder(), decoder=Decoder())


def train_pyro(task: TrainingTask, end_round: EndRound) -> VAE:
    """Fit as Pyro's VAE example does: SVI, Trace_ELBO, a DataLoader over tensors."""
    vae, inference = _pyro_inference(task)
    data = task.grey()
    loader = DataLoader(TensorDataset(data, torch.zeros(len(data))), batch_size=task.batch_size, shuffle=True)
    for _ in range(task.num_rounds):
        total = 0.0
        for batch, _label in loader:
            total += inference.step(batch)
        end_round()
    return vae


def train_pyro_tensors(task: TrainingTask, end_round: EndRound) -> VAE:
    """Fit with Pyro as fast as we could make it: batches gathered from one tensor, validation off."""
    import pyro  # noqa: PLC0415

    vae, inference = _pyro_inference(task)
    pyro.enable_validation(is_validate=False)
    data, source = task.grey(), torch.Generator().manual_seed(task.config.seed)
    for _ in range(task.num_rounds):
        total = 0.0
        for batch in shuffled_batches(data, task.batch_size, source):
            total += inference.step(batch)
        end_round()
    pyro.enable_validation(is_validate=True)
    return vae


class PyroVae(nn.Module):
    """Model and guide of Pyro's example, around the networks of ours."""

    def __init__(self, vae: VAE) -> None:
        super().__init__()
        self.encoder, self.decoder, self.latent_dim = vae.encoder, vae.decoder, vae.latent_dim

    def model(self, data: Tensor) -> None:
        """p(z) p(x | z)."""
        import pyro  # noqa: PLC0415
        from pyro import distributions  # noqa: PLC0415

        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(data)):
            zeros = data.new_zeros(len(data), self.latent_dim)
            latents = pyro.sample("latents", distributions.Normal(zeros, torch.ones_like(zeros)).to_event(1))
            probabilities = torch.sigmoid(self.decoder(latents)).flatten(start_dim=1)
            # Grey pixels are outside of its support.
            likelihood = distributions.Bernoulli(probabilities, validate_args=False).to_event(1)
            pyro.sample("observed", likelihood, obs=data.flatten(start_dim=1))

    def guide(self, data: Tensor) -> None:
        """q(z | x)."""
        import pyro  # noqa: PLC0415
        from pyro import distributions  # noqa: PLC0415

        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(data)):
            mean, log_var = self.encoder(data)
            scale = (0.5 * log_var).exp()
            pyro.sample("latents", distributions.Normal(mean, scale).to_event(1))


def _pyro_inference(task: TrainingTask) -> tuple[VAE, Any]:
    """Return a model and the object whose `step` fits it to a batch."""
    import pyro  # noqa: PLC0415
    from pyro.infer import SVI, Trace_ELBO  # noqa: PLC0415
    from pyro.optim import Adam  # noqa: PLC0415

    pyro.clear_param_store()  # its parameters are global; another task may have left some
    pyro.set_rng_seed(task.config.seed)
    vae = task.start()
    both = PyroVae(vae)
    optimizer = Adam({"lr": task.config.optimizer.learning_rate})
    return vae, SVI(both.model, both.guide, optimizer, loss=Trace_ELBO())
