"""Which models of images the study trains: the VAE that is measured, its variants, and autoencoders like them.

The quick study trains them on 8x8 digits in about a minute on one thread, the full one on MNIST and Fashion-MNIST.
"""

import io
from pathlib import Path
from typing import Final, NamedTuple

import torch
from torch import Tensor

from training import checkpoint, presets
from training.checkpoint import averaged_model, write_atomically
from training.config import TrainingConfig
from training.data import MAX_PIXEL, Dataset, Pixels, binarise_rows
from training.models.autoencoder import Autoencoder
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.observations import marginals
from training.study.setup import Study
from training.trainer import Metrics

COLLAPSING_BETA: Final = 20.0
"""A weight of the KL term at which the latents of any of these models carry nothing."""

_BINARISATION_SEED: Final = 0

_STEPS_BETWEEN_LINES: Final = 1000
"""Of an autoencoder's fit: half a minute on MNIST."""

_AUTOENCODER_FIT: Final = 2_700
"""Counts of the study's own in the streams of `training.noise.generator`: row of the checklist times 100."""


class Snapshot(NamedTuple):
    """A model on its way."""

    epoch: int
    """Epochs done; 0 is the model before its first step."""
    vae: VAE
    """The averaged weights."""


def main_config(study: Study) -> TrainingConfig:
    """Return the VAE that is measured: quick, the preset `digits` in 400 epochs; full, the preset `mnist-mlp`."""
    seed = f"seed={study.seed}"
    if study.is_full:
        return presets.mnist_mlp().override([seed])
    # About 0.3 nats short of the preset's 1000 epochs, in 40 % of their time.
    shorter = ["optimizer.epochs=400", "optimizer.validation_interval_epochs=50"]
    return presets.digits().override([seed, *shorter])


def second_config(study: Study) -> TrainingConfig | None:
    """Return the VAE of the second data set, Fashion-MNIST; the quick study has none."""
    return presets.fashion_mlp().override([f"seed={study.seed}"]) if study.is_full else None


def plane_config(study: Study) -> TrainingConfig:
    """Return the same VAE with two latent dimensions: they can be drawn, and integrated over on a grid."""
    config = main_config(study)
    # To bend the data into a plane takes bigger steps.
    changes = study.size(
        quick=["optimizer.epochs=250", "optimizer.learning_rate=0.002"],
        full=["optimizer.epochs=50", "optimizer.learning_rate=0.002"],
    )
    return config.override([f"name={config.name}-plane", "model.latent_dim=2", *changes])


def history_config(study: Study) -> TrainingConfig:
    """Return the measured VAE in a shorter run, of which `history` keeps snapshots."""
    config = main_config(study)
    changes = study.size(
        quick=["optimizer.epochs=64", "optimizer.validation_interval_epochs=4"], full=["optimizer.epochs=32"]
    )
    return config.override([f"name={config.name}-history", *changes])


def collapsed_config(study: Study) -> TrainingConfig:
    """Return the measured VAE with a KL term so heavy that nothing is encoded."""
    config = main_config(study)
    changes = study.size(
        quick=["optimizer.epochs=60", "optimizer.validation_interval_epochs=20"], full=["optimizer.epochs=10"]
    )
    return config.override([f"name={config.name}-collapsed", f"optimizer.beta={COLLAPSING_BETA}", *changes])


def history(study: Study) -> tuple[Snapshot, ...]:
    """Return the model of `history_config` before training and after 2^j epochs, each once it was fitted."""
    config = history_config(study)
    folder = study.run_folder(config)

    def keep(metrics: Metrics) -> None:
        if metrics.epoch.bit_count() == 1:
            write_atomically(folder.path / f"epoch-{metrics.epoch}.pt", folder.last.read_bytes())

    trained = study.trained(config, listener=keep)
    shape = trained.dataset.data_shape
    untrained = VAE(config.model, shape, generator(config.seed, TrainingStream.INIT))
    untrained.decoder.start_at(*marginals(config.model, trained.dataset.train))
    snapshots = [Snapshot(0, untrained.requires_grad_(requires_grad=False).eval().to(study.device))]
    for epoch in (2**power for power in range(config.optimizer.epochs.bit_length())):
        path = folder.path / f"epoch-{epoch}.pt"
        # Where validations are rarer than powers of two, or a crash came between the two files, there is none.
        if path.exists():
            snapshots.append(Snapshot(epoch, averaged_model(checkpoint.load(path), shape, study.device)))
    return tuple(snapshots)


def autoencoder(study: Study, config: TrainingConfig) -> Autoencoder:
    """Return the autoencoder with the networks of a configuration, from the same initial weights.

    It is fitted to the grey pixels of the training split, in steps of as many rows as the VAE; what is left out is
    the noise and the KL term. Its weights are kept in the study's folder.

    Args:
        study: The setting.
        config: Of the VAE that it is compared with.
    """
    dataset = study.dataset(config)
    model = Autoencoder(config.model, dataset.data_shape, generator(config.seed, TrainingStream.INIT))
    path = study.run_folder(config).path.with_name(f"{config.name}-autoencoder") / "weights.pt"
    weights = _kept_weights(path, config)
    if weights is None:
        weights = _fit_autoencoder(study, config, model, dataset)
        buffer = io.BytesIO()
        torch.save({"config": config.to_json(), "weights": weights}, buffer)
        write_atomically(path, buffer.getvalue())
    model.load_state_dict(weights)
    return model.requires_grad_(requires_grad=False).eval().to(study.device)


def grey(pixels: Pixels) -> Tensor:
    """Return pixels as intensities in [0, 1], float32, same shape."""
    return torch.from_numpy(pixels.copy()).float() / MAX_PIXEL


def binary(pixels: Pixels) -> Tensor:
    """Return pixels as zeros and ones, the same for an image each time: what a Bernoulli likelihood is of."""
    return binarise_rows(pixels, seed=_BINARISATION_SEED)


def num_parameters(module: torch.nn.Module) -> int:
    """Return how many numbers are learnt in a network."""
    return sum(parameter.numel() for parameter in module.parameters())


def _fit_autoencoder(
    study: Study, config: TrainingConfig, model: Autoencoder, dataset: Dataset
) -> dict[str, Tensor]:
    settings = config.optimizer
    # Half as many: without the noise of the latents the steps go straight.
    num_steps = settings.epochs * (len(dataset.train) // settings.batch_size) // 2
    model.decoder.start_at(*marginals(config.model, dataset.train))
    model.to(study.device)

    def tell(step: int) -> None:
        if step % _STEPS_BETWEEN_LINES == 0 and step < num_steps:
            study.say(f"  {config.name}: autoencoder, step {step}/{num_steps}")

    errors = model.fit(
        grey(dataset.train).to(study.device),
        generator(config.seed, TrainingStream.STUDY, _AUTOENCODER_FIT, device=study.device),
        num_steps=num_steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        listener=tell,
    )
    study.say(f"  {config.name}: autoencoder, {num_steps} steps, reconstruction error {errors[-1]:.2f}")
    return {name: weight.detach().cpu() for name, weight in model.state_dict().items()}


def _kept_weights(path: Path, config: TrainingConfig) -> dict[str, Tensor] | None:
    """Return weights that an earlier study kept, if they are of this configuration."""
    if not path.exists():
        return None
    kept = torch.load(path, weights_only=True)
    return kept["weights"] if kept["config"] == config.to_json() else None
