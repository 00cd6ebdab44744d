"""Every number that decides what a training run does, with unit and range.

Complete configurations are made in `presets`. The default of a field is what an MNIST-sized problem wants.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from serving.typed_config import Config

DatasetName = Literal["digits", "mnist", "fashion-mnist", "own"]


class DataConfig(Config):
    """Which images, and how they are divided."""

    name: DatasetName = "digits"
    """Data set; `vae-train data` lists them. `own` is what lies at `path`."""

    path: str = ""
    """The user's own data: a folder of images, or a .npy, .npz or IDX file."""

    image_size: int | None = Field(default=None, ge=1, le=4096)
    """Side to which the images of a folder are scaled and cropped, pixels; null: they all have one size."""

    data_shape: tuple[int, ...] = ()
    """Shape of one row of own data, as it was found when the run began."""

    split_seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the split into training, validation and test, where no official split exists."""

    max_train_rows: int | None = Field(default=None, ge=1)
    """Use only the first rows of the training split; null: all. For smoke runs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.name == "own") != bool(self.path):
            raise ValueError("own data need name=own and a path, and nothing else has a path")
        return self


class ModelConfig(Config):
    """Encoder and decoder: perceptrons, with convolutions between data and perceptron on request.

    The decoder mirrors the encoder.
    """

    latent_dim: int = Field(default=32, ge=1, le=65_536)
    """Dimensions of the latents."""

    hidden_dims: tuple[int, ...] = Field(default=(400,), min_length=1)
    """Widths of the encoder's hidden layers, from data to latents; the decoder has them in reverse."""

    channels: tuple[int, ...] = Field(default=(), max_length=6)
    """Channels of the encoder's convolutions, each of which halves height and width; none: perceptrons alone."""

    activation: Literal["silu", "relu", "tanh"] = "silu"
    """Non-linearity after each hidden layer."""

    log_var_min: float = Field(default=-12.0, ge=-30)
    """Lower clamp of the posterior's log variance: keeps a certain posterior from dividing by zero."""

    log_var_max: float = Field(default=8.0, le=30)
    """Upper clamp of the posterior's log variance: keeps its exponential finite in float32."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if any(width < 1 for width in self.hidden_dims):
            raise ValueError("hidden_dims: every width must be at least 1")
        if any(number < 1 for number in self.channels):
            raise ValueError("channels: every number must be at least 1")
        if self.log_var_min >= self.log_var_max:
            raise ValueError("log_var_min must be below log_var_max")
        return self


class OptimizerConfig(Config):
    """How the ELBO is maximised: Adam, cosine schedule, moving average of the weights."""

    epochs: int = Field(default=100, ge=1, le=1_000_000)
    """Passes over the training split."""

    batch_size: int = Field(default=256, ge=1)
    """Rows in one step. The rows left over at the end of an epoch wait for the next shuffle."""

    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Step size of Adam at the start."""

    final_learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Step size at the end of the cosine schedule."""

    warm_up_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps over which beta, the weight of the KL term, rises from 0."""

    beta: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Weight of the KL term after the warm-up; only 1 gives a bound on log p(x)."""

    num_samples: int = Field(default=1, ge=1, le=4096)
    """Latents per image and step from which the bound is estimated: more make its gradient less noisy."""

    free_nats: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Nats of KL that each latent dimension has for free (free bits): keeps it from being switched off early."""

    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay per step of the moving average of the weights, which validation and export use."""

    validation_interval_epochs: int = Field(default=1, ge=1)
    """Epochs between two validations, each with a line of metrics and a checkpoint."""


class EvaluationConfig(Config):
    """How a finished model is measured."""

    num_importance_samples: int = Field(default=500, ge=1, lt=2**20)
    """k of the importance-weighted bound; 5000 is the convention of the literature."""

    max_images: int = Field(default=1000, ge=2)
    """Images of the split that are measured, from its start."""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the binarisation and of the posterior samples; fixed per image index."""


class TrainingConfig(Config):
    """Everything that decides the result of a training run."""

    name: str = Field(default="vae", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    """Name of the model; names the run folder and the bundle unless others are given."""

    seed: int = Field(default=0, ge=0, lt=2**64)
    """Seed of the run: initial weights, shuffles, binarisation and posterior noise."""

    data: DataConfig = DataConfig()
    """Which images."""

    model: ModelConfig = ModelConfig()
    """Which networks."""

    optimizer: OptimizerConfig = OptimizerConfig()
    """How they are fitted."""

    evaluation: EvaluationConfig = EvaluationConfig()
    """How the result is measured."""

    def to_json(self) -> str:
        """Return the configuration as it stands in a run folder."""
        return self.model_dump_json(indent=2) + "\n"

    def changes_from(self, base: Self) -> list[str]:
        """Return the dotted assignments that turn another configuration into this one."""
        theirs, ours = _flat(base.model_dump(mode="json")), _flat(self.model_dump(mode="json"))
        return [f"{key}={json.dumps(ours[key])}" for key in ours if ours[key] != theirs[key]]

    def sha256(self) -> str:
        """Return the digest that ties a bundle to its configuration."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _flat(values: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
