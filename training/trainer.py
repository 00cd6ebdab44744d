"""The loop: step, validate, record, save.

On a CPU a resumed run repeats what an uninterrupted one does, bit for bit, on the same number of threads.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor

from serving.typed_config import Config
from training import checkpoint, objectives
from training.checkpoint import Checkpoint, RunFolder, write_atomically
from training.config import OptimizerConfig, TrainingConfig
from training.data import MAX_PIXEL, Dataset, binarise
from training.errors import DeviceUnavailable, Diverged, ResumeMismatch
from training.models.vae import VAE
from training.noise import TrainingStream, generator

COLLAPSE_KL: Final = 1.0
"""Below this KL term, nats per row, the latents carry next to nothing: the posterior has collapsed."""

_VALIDATION_ROWS_AT_ONCE: Final = 2000

DeviceName = Literal["auto", "cpu", "cuda"]


class Terms(Config):
    """The bound and its two terms, means over rows in nats."""

    elbo: float
    """Evidence lower bound: log_likelihood - kl."""

    log_likelihood: float
    """Expected log p(x | z)."""

    kl: float
    """Divergence from the posterior to the prior."""


class Metrics(Config):
    """One line of metrics.jsonl: the steps since the last line, and a validation at their end."""

    epoch: int
    """Epochs done."""

    step: int
    """Steps done."""

    train: Terms
    """Raw weights, mean over the steps since the last line."""

    validation: Terms
    """Averaged weights on the validation split, one posterior sample per row."""

    learning_rate: float
    """Step size of the last step."""

    beta: float
    """Weight of the KL term in the last step."""

    is_best: bool
    """The validation ELBO is the highest so far."""

    has_collapsed: bool
    """The KL term is below one nat although the warm-up is over."""

    seconds: float
    """Time since this process began to fit, seconds."""


class FitResult(NamedTuple):
    """How a run ended."""

    checkpoint: Checkpoint
    is_finished: bool
    seconds: float


class Schedule(NamedTuple):
    """Step size and weight of the KL term as functions of the step."""

    config: OptimizerConfig
    num_steps: int

    @property
    def warm_up_steps(self) -> int:
        """Steps until beta has its final value."""
        return math.ceil(self.config.warm_up_fraction * self.num_steps)

    def learning_rate(self, step: int) -> float:
        """Return the step size: half a cosine from the first to the final value."""
        first, final = self.config.learning_rate, self.config.final_learning_rate
        return final + 0.5 * (first - final) * (1 + math.cos(math.pi * step / self.num_steps))

    def beta(self, step: int) -> float:
        """Return the weight of the KL term: a line from zero, then constant."""
        return objectives.kl_weight(step, num_warm_up_steps=self.warm_up_steps, beta=self.config.beta)


def choose_device(name: DeviceName) -> torch.device:
    """Return the device of that name; auto: the GPU if there is one.

    Raises:
        DeviceUnavailable: If a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceUnavailable(name)
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def load_for_resume(config: TrainingConfig, path: Path) -> Checkpoint:
    """Return the checkpoint to continue from. Only the number of epochs may differ from its configuration.

    With another number of epochs the schedule is that of the new number, from the checkpoint's step on.

    Raises:
        ResumeMismatch: If it was made with another configuration; names the values that differ.
    """
    found = checkpoint.load(path)
    differences = [
        change for change in config.changes_from(found.config) if not change.startswith("optimizer.epochs=")
    ]
    if differences:
        raise ResumeMismatch(location=str(path), differences=differences)
    return found


def fit(
    config: TrainingConfig,
    dataset: Dataset,
    run: RunFolder,
    *,
    device: torch.device,
    resume_from: Checkpoint | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    listener: Callable[[Metrics], None] = lambda _: None,
) -> FitResult:
    """Fit a model and leave checkpoints and metrics in the run folder.

    Args:
        config: What to do.
        dataset: The images.
        run: Where to write; exists.
        device: Where to compute.
        resume_from: State to continue from.
        should_stop: Asked after every step; if true, the state is saved and the fit ends.
        listener: Told about every validation.

    Raises:
        Diverged: If the ELBO is not finite; the last checkpoint is from before.
    """
    trainer = Trainer(config, dataset, run, device=device)
    if resume_from is not None:
        trainer.restore(resume_from)
    return trainer.run(should_stop, listener)


class Trainer:
    """One run: model, averaged model, optimiser, and how far they are.

    Args:
        config: What to do.
        dataset: The images; kept as uint8 on the device as a whole.
        run: Where checkpoints and metrics go.
        device: Where to compute.
    """

    def __init__(self, config: TrainingConfig, dataset: Dataset, run: RunFolder, *, device: torch.device) -> None:
        self._config, self._run, self._device = config, run, device
        self._train = torch.from_numpy(dataset.train.copy()).to(device)
        self._validation = torch.from_numpy(dataset.validation.copy()).to(device)
        self._steps_per_epoch = max(1, len(self._train) // config.optimizer.batch_size)
        self._schedule = Schedule(config.optimizer, config.optimizer.epochs * self._steps_per_epoch)
        self._vae = VAE(config.model, dataset.data_shape, generator(config.seed, TrainingStream.INIT))
        self._vae.decoder.start_at(torch.from_numpy(dataset.train.mean(axis=0) / MAX_PIXEL).float())
        self._vae.to(device)
        self._averaged = copy.deepcopy(self._vae).requires_grad_(requires_grad=False)
        self._optimizer = torch.optim.Adam(self._vae.parameters(), lr=config.optimizer.learning_rate, fused=True)
        self._step = 0
        self._first_step_of_sums = 0
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._best_elbo = self._validation_elbo = -math.inf
        self._has_collapsed = False
        self._order = torch.empty(0)

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint; later metrics in the run folder are dropped, for they are made again."""
        self._vae.load_state_dict(saved.weights)
        self._averaged.load_state_dict(saved.averaged_weights)
        self._optimizer.load_state_dict(saved.optimizer)
        self._step = saved.step
        self._sums = saved.sums.to(self._device)
        self._first_step_of_sums = saved.step - saved.num_summed
        self._best_elbo, self._validation_elbo = saved.best_elbo, saved.validation_elbo
        self._has_collapsed = saved.has_collapsed
        if self._run.metrics.exists():
            lines = self._run.metrics.read_text().splitlines(keepends=True)
            kept = "".join(line for line in lines if _step_of(line) <= self._step)
            write_atomically(self._run.metrics, kept.encode())

    def run(self, should_stop: Callable[[], bool], listener: Callable[[Metrics], None]) -> FitResult:
        """Do the steps that are left."""
        began = time.monotonic()
        if self._step % self._steps_per_epoch:
            self._shuffle()
        while self._step < self._schedule.num_steps:
            if self._step % self._steps_per_epoch == 0:
                self._shuffle()
            self._take_step()
            is_asked_to_stop = should_stop()  # Once a step: between two askings the answer may change.
            if self._is_validation_due():
                listener(self._validate(time.monotonic() - began))
            elif is_asked_to_stop:
                if not bool(self._sums.isfinite().all()):
                    raise Diverged(epoch=self._step // self._steps_per_epoch)
                checkpoint.save(self._checkpoint(), self._run.last)
            if is_asked_to_stop:
                break
        is_finished = self._step >= self._schedule.num_steps
        return FitResult(self._checkpoint(), is_finished, time.monotonic() - began)

    def _shuffle(self) -> None:
        source = generator(
            self._config.seed,
            TrainingStream.SHUFFLE,
            self._step // self._steps_per_epoch,
            device=self._device,
        )
        self._order = torch.randperm(len(self._train), generator=source, device=self._device)

    def _take_step(self) -> None:
        first = self._step % self._steps_per_epoch * self._config.optimizer.batch_size
        rows = self._order[first : first + self._config.optimizer.batch_size]
        data = binarise(self._train.index_select(0, rows), self._generator(TrainingStream.BINARISE))
        settings, dim = self._config.optimizer, self._vae.latent_dim
        noise = torch.randn(
            (len(rows), dim) if settings.num_samples == 1 else (len(rows), settings.num_samples, dim),
            generator=self._generator(TrainingStream.POSTERIOR),
            device=self._device,
        )
        posterior = self._vae.posterior(data)
        bound = objectives.elbo_of_posterior(self._vae, data, *posterior, noise)
        climbed = objectives.weighted_bound(
            bound, *posterior, kl_weight=self._schedule.beta(self._step), free_nats=settings.free_nats
        )
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(-climbed)
        for group in self._optimizer.param_groups:
            group["lr"] = self._schedule.learning_rate(self._step)
        self._optimizer.step()
        self._average()
        # Summed on the device: reading a number at every step would make a GPU wait for us.
        # What is recorded is the bound; weight and free bits change only what is climbed.
        self._sums += torch.stack((bound.log_likelihood.detach().mean(), bound.kl.detach().mean()))
        self._step += 1

    @torch.no_grad()
    def _average(self) -> None:
        # A young average forgets faster, otherwise it would be the initial weights for a thousand steps.
        decay = min(self._config.optimizer.ema_decay, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(  # the one kernel launch that torch.optim.swa_utils uses too
            list(self._averaged.parameters()), list(self._vae.parameters()), 1 - decay
        )

    def _is_validation_due(self) -> bool:
        epoch, rest = divmod(self._step, self._steps_per_epoch)
        interval = self._config.optimizer.validation_interval_epochs
        return rest == 0 and (epoch % interval == 0 or epoch == self._config.optimizer.epochs)

    def _validate(self, seconds: float) -> Metrics:
        """Measure, record and save."""
        train = _terms((self._sums / (self._step - self._first_step_of_sums)).tolist())
        validation = self._measure_averaged()
        if not math.isfinite(train.elbo) or not math.isfinite(validation.elbo):
            raise Diverged(epoch=self._step // self._steps_per_epoch)
        last_step = self._step - 1
        is_warm = self._step > self._schedule.warm_up_steps
        self._has_collapsed = is_warm and train.kl < COLLAPSE_KL
        is_best = validation.elbo > self._best_elbo
        self._validation_elbo, self._best_elbo = validation.elbo, max(validation.elbo, self._best_elbo)
        self._first_step_of_sums = self._step
        self._sums.zero_()
        metrics = Metrics(
            epoch=self._step // self._steps_per_epoch,
            step=self._step,
            train=train,
            validation=validation,
            learning_rate=self._schedule.learning_rate(last_step),
            beta=self._schedule.beta(last_step),
            is_best=is_best,
            has_collapsed=self._has_collapsed,
            seconds=round(seconds, 3),
        )
        state = self._checkpoint()
        with self._run.metrics.open("a") as file:
            file.write(metrics.model_dump_json() + "\n")
        # The best one first: a crash in between repeats this validation and writes the same best again.
        if is_best:
            checkpoint.save(state, self._run.best)
        checkpoint.save(state, self._run.last)
        return metrics

    @torch.inference_mode()
    def _measure_averaged(self) -> Terms:
        """Return the validation figures of the averaged weights; the noise is the same at every validation."""
        sums = torch.zeros(2, dtype=torch.float64, device=self._device)
        for number, pixels in enumerate(torch.split(self._validation, _VALIDATION_ROWS_AT_ONCE)):
            source = generator(self._config.seed, TrainingStream.VALIDATION, number, device=self._device)
            data = binarise(pixels, source)
            noise = torch.randn((len(data), self._vae.latent_dim), generator=source, device=self._device)
            bound = objectives.elbo(self._averaged, data, noise)
            sums += torch.stack((bound.log_likelihood.sum(), bound.kl.sum()))
        return _terms((sums / len(self._validation)).tolist())

    def _generator(self, stream: TrainingStream) -> torch.Generator:
        return generator(self._config.seed, stream, self._step, device=self._device)

    def _checkpoint(self) -> Checkpoint:
        return Checkpoint(
            config=self._config,
            step=self._step,
            weights=_on_cpu(self._vae.state_dict()),
            averaged_weights=_on_cpu(self._averaged.state_dict()),
            optimizer=self._optimizer.state_dict(),
            sums=self._sums.cpu().clone(),
            num_summed=self._step - self._first_step_of_sums,
            best_elbo=self._best_elbo,
            validation_elbo=self._validation_elbo,
            has_collapsed=self._has_collapsed,
            saved=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _step_of(line: str) -> float:
    """Return the step of a line of metrics; infinity for the half line that a crash may leave."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _on_cpu(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}


def _terms(means: list[float]) -> Terms:
    log_likelihood, kl = means
    return Terms(elbo=log_likelihood - kl, log_likelihood=log_likelihood, kl=kl)
