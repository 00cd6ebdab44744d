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
LikelihoodName = Literal["bernoulli", "gaussian", "categorical"]
BoundName = Literal["elbo", "importance-weighted"]
GradientName = Literal["reparametrised", "sticking-the-landing", "doubly-reparametrised", "score-function"]


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

    likelihood: LikelihoodName = "bernoulli"
    """Family of p(x | z). Bernoulli: pixels are binarised. Gaussian: a density over intensities in [0, 1] with one
    learned variance. Categorical: each pixel takes one of `num_levels` intensities."""

    num_levels: int = Field(default=256, ge=2, le=256)
    """Levels of a categorical likelihood, equally spaced over [0, 1]. The decoder's last layer grows with it."""

    noise_log_var_min: float = Field(default=-13.5, ge=-30, le=0)
    """Lower bound of a Gaussian likelihood's log variance, so that pixels that never vary cannot drive the density
    to infinity. The default is the variance of rounding to 255ths: finer noise would describe the rounding."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        defaults = type(self).model_fields
        for field, likelihood in (("num_levels", "categorical"), ("noise_log_var_min", "gaussian")):
            if self.likelihood != likelihood and getattr(self, field) != defaults[field].default:
                raise ValueError(f"{field} is for likelihood={likelihood}, this is {self.likelihood}; set one")
        if any(width < 1 for width in self.hidden_dims):
            raise ValueError("hidden_dims: every width must be at least 1")
        if any(number < 1 for number in self.channels):
            raise ValueError("channels: every number must be at least 1")
        if self.log_var_min >= self.log_var_max:
            raise ValueError("log_var_min must be below log_var_max")
        return self


class OptimizerConfig(Config):
    """Which bound is climbed, with which gradient, and how: Adam, a schedule, a moving average of the weights.

    What is recorded are always the two terms of the ELBO, whatever is climbed.
    """

    bound: BoundName = "elbo"
    """What is climbed: the evidence lower bound, or the importance-weighted bound of `num_samples` latents (k)."""

    gradient: GradientName = "reparametrised"
    """How the encoder's gradient is estimated; the decoder's is the same for all. Sticking the landing is biased
    for the importance-weighted bound; doubly reparametrised is its unbiased form."""

    baseline: Literal["none", "leave-one-out"] = "none"
    """What the score-function gradient subtracts: nothing, or the mean over the other latents of the image."""

    epochs: int = Field(default=100, ge=1, le=1_000_000)
    """Passes over the training split."""

    batch_size: int = Field(default=256, ge=1)
    """Rows in one step, of all processes. The rows left over at the end of an epoch wait for the next shuffle."""

    schedule: Literal["cosine", "stages"] = "cosine"
    """How the step size falls: half a cosine; or eight stages, each three times as long as the one before."""

    learning_rate: float = Field(default=1e-3, gt=0, allow_inf_nan=False)
    """Step size of Adam at the start."""

    final_learning_rate: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """Step size at the end of the schedule."""

    adam_epsilon: float = Field(default=1e-8, gt=0, allow_inf_nan=False)
    """What Adam adds to the root of the squared gradient, which is that of the mean over the batch."""

    warm_up_fraction: float = Field(default=0.05, ge=0, le=1)
    """Share of all steps over which beta, the weight of the KL term, rises from 0."""

    beta: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Weight of the KL term after the warm-up; only 1 gives a bound on log p(x)."""

    num_samples: int = Field(default=1, ge=1, le=4096)
    """Latents per image and step: more make the ELBO's gradient less noisy; of the weighted bound, k."""

    free_nats: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Nats of KL that each latent dimension has for free (free bits): keeps it from being switched off early."""

    ema_decay: float = Field(default=0.999, ge=0, lt=1)
    """Decay per step of the moving average of the weights, which validation and export use; it takes in every
    eighth step. 0: the weights themselves."""

    precision: Literal["float32", "tf32", "bfloat16"] = "tf32"
    """Arithmetic of the networks. tf32: a GPU's matrix products round their factors to 10 bits, a CPU's do not.
    bfloat16: 7 bits, on a CPU too. Likelihoods, divergences and sums are float32 always, and so is validation."""

    validation_interval_epochs: int = Field(default=1, ge=1)
    """Epochs between two validations, each with a line of metrics and a checkpoint."""

    selection: Literal["validation", "last"] = "validation"
    """Which checkpoint is the result: that of the highest validation bound, or the last one, as papers do that
    choose nothing on validation data."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        problem = self._elbo_problem() if self.bound == "elbo" else self._importance_weighted_problem()
        if self.baseline != "none" and self.gradient != "score-function":
            problem = f"a baseline belongs to gradient=score-function, not to {self.gradient}; set baseline=none"
        if self.baseline == "leave-one-out" and self.num_samples == 1:
            problem = "baseline=leave-one-out needs the other samples of an image; set num_samples to at least 2"
        if self.schedule == "stages" and self.final_learning_rate > self.learning_rate:
            problem = "schedule=stages falls; set final_learning_rate to at most learning_rate"
        if problem:
            raise ValueError(problem)
        return self

    def _elbo_problem(self) -> str:
        """Return what does not go together in a climb of the ELBO; nothing: an empty text."""
        if self.gradient == "doubly-reparametrised":
            return (
                "gradient=doubly-reparametrised is of bound=importance-weighted; for the ELBO it is the same as "
                "gradient=sticking-the-landing"
            )
        if self.free_nats and self.gradient != "reparametrised":
            return (
                f"free_nats is a floor under the closed-form KL, and gradient={self.gradient} estimates that term "
                "from samples; set free_nats=0 or gradient=reparametrised"
            )
        return ""

    def _importance_weighted_problem(self) -> str:
        """Return what does not go together in a climb of the importance-weighted bound."""
        if self.gradient == "score-function":
            return "gradient=score-function is of bound=elbo; take another gradient for bound=importance-weighted"
        neutral = {"beta": 1, "warm_up_fraction": 0, "free_nats": 0}
        remedies = [f"{key}={value}" for key, value in neutral.items() if getattr(self, key) != value]
        if not remedies:
            return ""
        return f"bound=importance-weighted has no KL term to weight or to spare; set {', '.join(remedies)}"


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
