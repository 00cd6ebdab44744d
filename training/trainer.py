"""The loop: step, validate, record, save.

On a CPU a resumed run repeats what an uninterrupted one does, bit for bit, on the same number of threads and
processes.
"""

import copy
import json
import math
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from torch import Tensor

from serving.typed_config import Config
from training import acceleration, checkpoint
from training.checkpoint import Checkpoint, RunFolder, write_atomically
from training.collapse import COLLAPSE_KL
from training.config import OptimizerConfig, TrainingConfig
from training.data import Dataset
from training.distributed import ALONE, STEPS_BETWEEN_AGREEMENTS, Processes
from training.errors import BatchTooLarge, DeviceUnavailable, Diverged, ResumeMismatch, RowsConstant
from training.models.vae import VAE
from training.noise import TrainingStream, generator
from training.observations import marginals, observed
from training.schedule import Schedule
from training.step_objective import NUM_RECORDED, StepObjective, noise_shape

_VALIDATION_ROWS_AT_ONCE: Final = 2000

_AVERAGING_INTERVAL: Final = 8
"""Steps from one weight of the moving average to the next, once it is no longer young. Each reads and writes all
weights, at every step three per cent of the small model's time; the horizon of the average is the same."""

_YOUNG_STEPS: Final = 80
"""First steps of a run, each of which enters the average: it shall not lag behind what moves fast."""

DeviceName = Literal["auto", "cpu", "cuda"]


class Terms(Config):
    """The bound and its two terms, means over rows in nats."""

    elbo: float
    """Evidence lower bound: log_likelihood - kl."""

    log_likelihood: float
    """Expected log p(x | z)."""

    kl: float
    """Divergence from the posterior to the prior."""

    importance_weighted: float | None = None
    """Importance-weighted bound of num_samples latents, where that is what is climbed."""

    @property
    def climbed(self) -> float:
        """The bound that is climbed."""
        return self.elbo if self.importance_weighted is None else self.importance_weighted


class Metrics(Config):
    """One line of metrics.jsonl: the steps since the last line, and a validation at their end."""

    epoch: int
    """Epochs done."""

    step: int
    """Steps done."""

    train: Terms
    """Raw weights, mean over the steps since the last line."""

    validation: Terms
    """Averaged weights on the validation split; one posterior sample per row, or num_samples of them for the
    importance-weighted bound."""

    learning_rate: float
    """Step size of the last step."""

    beta: float
    """Weight of the KL term in the last step."""

    is_best: bool
    """This checkpoint is the result so far: the highest validation bound, or simply the last."""

    has_collapsed: bool
    """The KL term is below one nat although the warm-up is over."""

    seconds: float
    """Time since this process began to fit, seconds."""


class FitResult(NamedTuple):
    """How a run ended."""

    checkpoint: Checkpoint
    is_finished: bool
    seconds: float


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
    """Fit a model in this process alone and leave checkpoints and metrics in the run folder.

    Args:
        config: What to do.
        dataset: The images.
        run: Where to write; exists.
        device: Where to compute.
        resume_from: State to continue from.
        should_stop: Asked after every step; if true, the state is saved and the fit ends.
        listener: Told about every validation.

    Raises:
        BatchTooLarge: If a batch has more rows than the training split.
        RowsConstant: If all training rows are the same.
        Diverged: If the ELBO is not finite; the last checkpoint is from before.
    """
    trainer = Trainer(config, dataset, run, device=device)
    if resume_from is not None:
        trainer.restore(resume_from)
    return trainer.run(should_stop, listener)


def drop_later_metrics(run: RunFolder, step: int) -> None:
    """Keep the lines of metrics up to a step: the later ones are made again."""
    if run.metrics.exists():
        lines = run.metrics.read_text().splitlines(keepends=True)
        kept = "".join(line for line in lines if _step_of(line) <= step)
        write_atomically(run.metrics, kept.encode())


def check_setup(config: TrainingConfig, dataset: Dataset, *, num_processes: int = 1) -> None:
    """Refuse what cannot be fitted.

    Raises:
        BatchTooLarge: If a batch has more rows than the training split.
        BatchUneven: If the processes cannot share a batch equally.
        RowsConstant: If all training rows are the same.
    """
    batch_size, num_rows = config.optimizer.batch_size, len(dataset.train)
    if num_rows < batch_size:
        raise BatchTooLarge(batch_size=batch_size, num_rows=num_rows)
    Processes(size=num_processes).rows(batch_size)
    if (dataset.train == dataset.train[0]).all():
        raise RowsConstant(dataset.name, num_rows=num_rows)


class Trainer:
    """One run: model, averaged model, optimiser, and how far they are.

    Args:
        config: What to do.
        dataset: The images; kept as uint8 on the device as a whole.
        run: Where checkpoints and metrics go.
        device: Where to compute.
        processes: Those that share the work; each has a trainer of the same arguments, and the first one writes.
        is_compiled: Try to make steps faster, see `training.acceleration`; results differ by rounding.

    Raises:
        BatchTooLarge: If a batch has more rows than the training split.
        BatchUneven: If the processes cannot share a batch equally.
        RowsConstant: If all training rows are the same.
    """

    def __init__(
        self,
        config: TrainingConfig,
        dataset: Dataset,
        run: RunFolder,
        *,
        device: torch.device,
        processes: Processes = ALONE,
        is_compiled: bool = False,
    ) -> None:
        settings = config.optimizer
        check_setup(config, dataset, num_processes=processes.size)
        self._rows = processes.rows(settings.batch_size)
        self._config, self._run, self._device, self._processes = config, run, device, processes
        self._train = torch.from_numpy(dataset.train.copy()).to(device)
        self._validation = torch.from_numpy(dataset.validation.copy()).to(device)
        self._steps_per_epoch = len(self._train) // settings.batch_size
        self._schedule = Schedule(settings, settings.epochs * self._steps_per_epoch)
        self._vae = VAE(config.model, dataset.data_shape, generator(config.seed, TrainingStream.INIT))
        self._vae.decoder.start_at(*marginals(config.model, dataset.train))
        self._vae.to(device)
        self._averaged = copy.deepcopy(self._vae).requires_grad_(requires_grad=False)
        self._averaging: tuple[list[Tensor], list[Tensor]] = (
            list(self._averaged.parameters()),
            list(self._vae.parameters()),
        )
        self._optimizer = _adam(self._vae, config, is_captured=is_compiled and device.type == "cuda")
        self._kl_weight = torch.ones((), device=device)
        self._objective = self._prepared_objective(is_compiled=is_compiled)
        # Collectives of several processes are not captured.
        is_captured = is_compiled and processes.size == 1
        self._step_on = acceleration.stepping(self._take_step_on, is_captured=is_captured, device=device)
        self._step = 0
        self._first_step_of_sums = 0
        self._sums = torch.zeros(NUM_RECORDED, dtype=torch.float64, device=device)
        self._num_finite = torch.zeros((), dtype=torch.int64, device=device)
        self._best_bound = self._validation_bound = -math.inf
        self._has_collapsed = self._is_stop_wanted = False
        self._saved_step: int | None = None
        self._order = torch.empty(0)

    def restore(self, saved: Checkpoint) -> None:
        """Continue from a checkpoint; later metrics in the run folder are dropped, for they are made again."""
        self._vae.load_state_dict(saved.weights)
        self._averaged.load_state_dict(saved.averaged_weights)
        _load_optimizer(self._optimizer, saved.optimizer)
        self._step = self._saved_step = saved.step
        self._sums = saved.sums.to(self._device)
        self._num_finite.fill_(saved.num_summed)
        self._first_step_of_sums = saved.step - saved.num_summed
        self._best_bound, self._validation_bound = saved.best_bound, saved.validation_bound
        self._has_collapsed = saved.has_collapsed
        if self._processes.is_first:
            drop_later_metrics(self._run, saved.step)

    def run(self, should_stop: Callable[[], bool], listener: Callable[[Metrics], None]) -> FitResult:
        """Do the steps that are left."""
        began = time.monotonic()
        precision: Literal["ieee", "tf32"] = "tf32" if self._config.optimizer.precision == "tf32" else "ieee"
        if self._step % self._steps_per_epoch:
            self._shuffle()
        with acceleration.matrix_products(precision, self._device):
            while self._step < self._schedule.num_steps:
                if self._step % self._steps_per_epoch == 0:
                    self._shuffle()
                self._take_step()
                is_asked_to_stop = self._is_asked_to_stop(should_stop)
                if self._is_validation_due():
                    listener(self._validate(time.monotonic() - began))
                elif is_asked_to_stop:
                    self._save_between_validations()
                if is_asked_to_stop:
                    break
        is_finished = self._step >= self._schedule.num_steps
        return FitResult(self._checkpoint(), is_finished, time.monotonic() - began)

    def _prepared_objective(self, *, is_compiled: bool) -> torch.nn.Module:
        settings, shape = self._config.optimizer, self._vae.data_shape
        objective: torch.nn.Module = StepObjective(self._vae, settings, joined_mean=self._processes.joined_mean)
        if is_compiled:
            num_rows = self._rows.stop - self._rows.start
            data = torch.zeros((num_rows, *shape), device=self._device)
            noise = torch.zeros(noise_shape(settings, num_rows, self._vae.latent_dim), device=self._device)
            objective = acceleration.compiled(objective, data, noise, self._kl_weight)
        return self._processes.divided(objective, self._device)

    def _shuffle(self) -> None:
        source = generator(
            self._config.seed,
            TrainingStream.SHUFFLE,
            self._step // self._steps_per_epoch,
            device=self._device,
        )
        self._order = torch.randperm(len(self._train), generator=source, device=self._device)

    def _take_step(self) -> None:
        data, noise = self._batch()
        self._kl_weight.fill_(self._schedule.beta(self._step))
        _set_learning_rate(self._optimizer, self._schedule.learning_rate(self._step))
        # Summed on the device: reading a number at every step would make a GPU wait for us.
        # What is recorded are the bound and its terms; weights and free bits change only what is climbed.
        self._sums += self._step_on(data, noise)
        self._num_finite += self._sums.isfinite().all()
        self._average()
        self._step += 1

    def _batch(self) -> tuple[Tensor, Tensor]:
        """Return this process's rows of the step's batch, and their noise.

        Every process draws for the whole batch and takes its rows: what a row is does not depend on who has it.
        """
        settings = self._config.optimizer
        first = self._step % self._steps_per_epoch * settings.batch_size
        rows = self._order[first : first + settings.batch_size]
        pixels = self._train.index_select(0, rows)
        data = observed(self._config.model, pixels, self._generator(TrainingStream.BINARISE))
        noise = torch.randn(
            noise_shape(settings, settings.batch_size, self._vae.latent_dim),
            generator=self._generator(TrainingStream.POSTERIOR),
            device=self._device,
        )
        return data[self._rows], noise[self._rows]

    def _take_step_on(self, data: Tensor, noise: Tensor) -> Tensor:
        """Move the weights; return what is recorded, shape (3,). This is what a GPU replays."""
        climbed, recorded = self._objective(data, noise, self._kl_weight)
        self._optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(-climbed)
        self._optimizer.step()
        kept: Tensor = recorded
        return kept

    @torch.no_grad()
    def _average(self) -> None:
        if self._config.optimizer.ema_decay == 0:
            return  # the average is the weights, which are copied when somebody looks
        is_young = self._step < _YOUNG_STEPS
        if not is_young and self._step % _AVERAGING_INTERVAL:
            return
        # A young average forgets faster, otherwise it would be the initial weights for a thousand steps.
        decay = min(self._config.optimizer.ema_decay, (1 + self._step) / (10 + self._step))
        averaged, weights = self._averaging
        # The one kernel that torch.optim.swa_utils uses too.
        torch._foreach_lerp_(averaged, weights, 1 - decay ** (1 if is_young else _AVERAGING_INTERVAL))

    def _settle_average(self) -> None:
        """Bring an average without memory up to date."""
        if self._config.optimizer.ema_decay == 0:
            self._averaged.load_state_dict(self._vae.state_dict())

    def _is_asked_to_stop(self, should_stop: Callable[[], bool]) -> bool:
        """Return whether all processes stop after this step."""
        # Once a step: between two askings the answer may change.
        self._is_stop_wanted |= should_stop()
        if self._processes.size == 1:
            return self._is_stop_wanted
        return self._step % STEPS_BETWEEN_AGREEMENTS == 0 and self._processes.agree(is_wanted=self._is_stop_wanted)

    def _is_validation_due(self) -> bool:
        epoch, rest = divmod(self._step, self._steps_per_epoch)
        interval = self._config.optimizer.validation_interval_epochs
        return rest == 0 and (epoch % interval == 0 or epoch == self._config.optimizer.epochs)

    def _validate(self, seconds: float) -> Metrics:
        """Measure, record and save."""
        sums = self._processes.joined_mean(self._sums)
        train = self._terms(sums / (self._step - self._first_step_of_sums))
        validation = self._measure_averaged()
        if not (math.isfinite(train.climbed) and math.isfinite(train.elbo) and math.isfinite(validation.climbed)):
            raise self._diverged()
        last_step = self._step - 1
        is_warm = self._step > self._schedule.warm_up_steps
        self._has_collapsed = is_warm and train.kl < COLLAPSE_KL
        is_best = validation.climbed > self._best_bound or self._config.optimizer.selection == "last"
        self._validation_bound = validation.climbed
        self._best_bound = max(validation.climbed, self._best_bound)
        self._first_step_of_sums = self._step
        self._sums.zero_()
        self._num_finite.zero_()
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
        if self._processes.is_first:
            with self._run.metrics.open("a") as file:
                file.write(metrics.model_dump_json(exclude_none=True) + "\n")
        # The best one first: a crash in between repeats this validation and writes the same best again.
        self._save(*([self._run.best] if is_best else []), self._run.last)
        return metrics

    def _save_between_validations(self) -> None:
        self._sums = self._processes.joined_mean(self._sums)
        are_finite = [bool(tensor.isfinite().all()) for tensor in (self._sums, *self._vae.parameters())]
        if not all(are_finite):
            raise self._diverged()
        self._save(self._run.last)

    def _save(self, *paths: Path) -> None:
        if self._processes.is_first:
            checkpoint.save(self._checkpoint(), *paths)
        self._saved_step = self._step

    def _diverged(self) -> Diverged:
        return Diverged(
            epoch=self._step // self._steps_per_epoch,
            step=min(self._step, self._first_step_of_sums + int(self._num_finite) + 1),
            kept_step=self._saved_step,
        )

    @torch.inference_mode()
    def _measure_averaged(self) -> Terms:
        """Return the validation figures of the averaged weights; the noise is the same at every validation."""
        self._settle_average()
        settings, latent_dim = self._config.optimizer, self._vae.latent_dim
        is_weighted = settings.bound == "importance-weighted"
        plain = {"precision": "float32", "gradient": "reparametrised"}
        measured = settings.merge(plain) if is_weighted else OptimizerConfig()
        objective = StepObjective(self._averaged, measured)
        # A row of a categorical likelihood has a number for each level, and each sample has a row.
        per_row = (self._vae.decoder.num_levels or 1) * (measured.num_samples if is_weighted else 1)
        sums = torch.zeros(NUM_RECORDED, dtype=torch.float64, device=self._device)
        one = torch.ones((), device=self._device)
        chunks = torch.split(self._validation, max(1, _VALIDATION_ROWS_AT_ONCE // per_row))
        with acceleration.matrix_products("ieee", self._device):
            for number, pixels in enumerate(chunks):
                if number % self._processes.size != self._processes.rank:
                    continue
                source = generator(self._config.seed, TrainingStream.VALIDATION, number, device=self._device)
                data = observed(self._config.model, pixels, source)
                shape = noise_shape(measured, len(data), latent_dim)
                noise = torch.randn(shape, generator=source, device=self._device)
                _, means = objective(data, noise, one)
                sums += len(data) * means.double()
        return self._terms(self._processes.joined_sum(sums) / len(self._validation))

    def _terms(self, means: Tensor) -> Terms:
        log_likelihood, kl, bound = means.tolist()
        is_weighted = self._config.optimizer.bound == "importance-weighted"
        return Terms(
            elbo=log_likelihood - kl,
            log_likelihood=log_likelihood,
            kl=kl,
            importance_weighted=bound if is_weighted else None,
        )

    def _generator(self, stream: TrainingStream) -> torch.Generator:
        return generator(self._config.seed, stream, self._step, device=self._device)

    def _checkpoint(self) -> Checkpoint:
        self._settle_average()
        return Checkpoint(
            config=self._config,
            step=self._step,
            weights=_on_cpu(self._vae.state_dict()),
            averaged_weights=_on_cpu(self._averaged.state_dict()),
            optimizer=_optimizer_state(self._optimizer),
            sums=self._sums.cpu().clone(),
            num_summed=self._step - self._first_step_of_sums,
            best_bound=self._best_bound,
            validation_bound=self._validation_bound,
            has_collapsed=self._has_collapsed,
            saved=datetime.now(UTC).isoformat(timespec="seconds"),
        )


def _adam(vae: VAE, config: TrainingConfig, *, is_captured: bool) -> torch.optim.Adam:
    settings = config.optimizer
    weights = list(vae.parameters())
    # A captured step reads its step size from the device.
    rate = (
        torch.tensor(settings.learning_rate, device=weights[0].device) if is_captured else settings.learning_rate
    )
    return torch.optim.Adam(weights, lr=rate, eps=settings.adam_epsilon, fused=True, capturable=is_captured)


def _set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state, the same whether steps are captured or not."""
    state = optimizer.state_dict()
    groups = [{**group, "lr": float(group["lr"]), "capturable": False} for group in state["param_groups"]]
    return {**state, "param_groups": groups}


def _load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a state, and keep how this process takes its steps."""
    own = [{key: group[key] for key in ("lr", "capturable")} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, kept in zip(optimizer.param_groups, own, strict=True):
        group.update(kept)


def _step_of(line: str) -> float:
    """Return the step of a line of metrics; infinity for the half line that a crash may leave."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


def _on_cpu(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().cpu().clone() for name, weight in weights.items()}
