"""Every number of the benchmark. `full()` is what is recorded, `quick()` passes through every line."""

import os
from itertools import product
from typing import Final, Self

from pydantic import Field, model_validator

from serving.typed_config import Config
from training.config import EvaluationConfig, ModelConfig, OptimizerConfig, TrainingConfig

TRAINING_TARGET: Final = 1.5
"""Least ratio of a peer's time for an epoch to ours that we want to see."""

TUTORIAL_TARGET: Final = 2.0
"""The same of the loop that tutorials show."""

EVALUATION_TARGET: Final = 3.0
"""Least ratio of a peer's time for an importance-weighted bound to ours that we want to see."""


class Setting(Config):
    """One network and how it is fitted."""

    latent_dim: int
    """Dimensions of the latents."""

    batch_size: int
    """Rows in one step."""

    num_threads: int
    """CPU threads of each contestant."""


class BenchPlan(Config):
    """What is measured, and how often."""

    num_rounds: int = Field(default=5, ge=1)
    """Timed epochs, or evaluations, of each contestant. One more comes first and is discarded."""

    num_rows: int = Field(default=6400, ge=1)
    """Rows in one epoch, fifty steps of 128; rounded down to whole steps."""

    num_held_out: int = Field(default=1000, ge=1)
    """Rows on which every fitted model is measured."""

    hidden_dim: int = Field(default=400, ge=1)
    """Width of the one hidden layer."""

    latent_dims: tuple[int, ...] = Field(default=(20, 32), min_length=1)
    """20 is the network of pytorch/examples; 32 that of our presets."""

    batch_sizes: tuple[int, ...] = Field(default=(128, 256), min_length=1)
    """Rows in one step."""

    threads: tuple[int, ...] = Field(default=(1, 2), min_length=1)
    """CPU threads of each contestant."""

    learning_rate: float = Field(default=1e-3, gt=0)
    """Step size of Adam, constant."""

    num_importance_samples: int = Field(default=500, ge=100, multiple_of=100)
    """k of the importance-weighted bound: whole chunks of pythae, which silently leaves out what is over."""

    max_images: int = Field(default=100, ge=2)
    """Images whose bound is estimated in one evaluation."""

    seed: int = Field(default=0, ge=0)
    """Seed of initial weights, synthetic data and noise."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.num_rows < max(self.batch_sizes):
            raise ValueError("num_rows: an epoch must hold at least one step of the largest batch")
        if self.num_held_out < self.max_images:
            raise ValueError("max_images: these are the first of the held-out rows, and there are not so many")
        return self

    def settings(self) -> list[Setting]:
        """Return every combination, networks outermost."""
        return [
            Setting(latent_dim=latent_dim, batch_size=batch_size, num_threads=num_threads)
            for latent_dim, batch_size, num_threads in product(self.latent_dims, self.batch_sizes, self.threads)
        ]

    def training(self, setting: Setting) -> TrainingConfig:
        """Return the run of a setting, as our own trainer takes it: no schedule, one validation at the end."""
        num_epochs = self.num_rounds + 1
        return TrainingConfig(
            name="bench",
            seed=self.seed,
            model=ModelConfig(latent_dim=setting.latent_dim, hidden_dims=(self.hidden_dim,), activation="relu"),
            optimizer=OptimizerConfig(
                epochs=num_epochs,
                batch_size=setting.batch_size,
                learning_rate=self.learning_rate,
                final_learning_rate=self.learning_rate,
                warm_up_fraction=0,
                validation_interval_epochs=num_epochs,
            ),
        )

    def evaluation(self) -> EvaluationConfig:
        """Return how a fitted model is measured, as our own evaluation takes it."""
        return EvaluationConfig(
            num_importance_samples=self.num_importance_samples, max_images=self.max_images, seed=self.seed
        )


def full() -> BenchPlan:
    """Return the recorded benchmark: some five minutes on two cores."""
    plan = BenchPlan()
    # More threads than cores would measure how they wait for each other.
    return plan.merge({"threads": tuple(num for num in plan.threads if num <= (os.cpu_count() or 1))})


def quick() -> BenchPlan:
    """Return a benchmark of seconds that passes through every line; its ratios say nothing."""
    return BenchPlan(
        num_rounds=2,
        num_rows=256,
        num_held_out=64,
        hidden_dim=32,
        latent_dims=(4,),
        batch_sizes=(64,),
        threads=(1,),
        num_importance_samples=100,
        max_images=16,
    )
