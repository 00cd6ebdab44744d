"""What a person sees: progress on standard error, results on standard output.

Bars are drawn on a terminal only; a log file gets a plain line for every event.
"""

import json
import sys
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

from training.collapse import COLLAPSE_KL
from training.config import TrainingConfig
from training.trainer import Metrics

_MEBIBYTE = 2**20


class FitProgress:
    """Shows a fit as it goes; a context manager, and a listener of the trainer."""

    def __init__(self, config: TrainingConfig) -> None:
        self._num_epochs = config.optimizer.epochs
        self._warned = False
        console = Console(stderr=True)
        self._bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
            if console.is_terminal
            else None
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("fitting", total=self._num_epochs)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, metrics: Metrics) -> None:
        """Show one validation."""
        line = (
            f"epoch {metrics.epoch}/{self._num_epochs}  train ELBO {metrics.train.elbo:.2f}  "
            f"validation ELBO {metrics.validation.elbo:.2f} = {metrics.validation.log_likelihood:.2f} "
            f"- KL {metrics.validation.kl:.2f}  {_weighted(metrics)}{metrics.seconds:.1f} s"
            f"{'  best' if metrics.is_best else ''}"
        )
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=metrics.epoch, description=line)
        else:
            say(line)
        if metrics.has_collapsed and not self._warned:
            self._warned = True
            say(
                f"warning: the KL term is {metrics.train.kl:.2f} nats, below {COLLAPSE_KL:g}: the posterior has "
                "collapsed and the latents carry nothing; lower optimizer.beta or raise "
                "optimizer.warm_up_fraction"
            )


class DownloadProgress:
    """Shows downloads; a context manager, and the progress argument of `data.load`."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = (
            Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                console=console,
            )
            if console.is_terminal
            else None
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, name: str, done: int, total: int | None) -> None:
        """Show that bytes came."""
        if self._bar is None:
            if done == total:
                say(f"downloaded {name}, {done / _MEBIBYTE:.1f} MiB")
            return
        self._bar.start()
        if name not in self._tasks:
            self._tasks[name] = self._bar.add_task(name, total=total)
        self._bar.update(self._tasks[name], completed=done, total=total)


def _weighted(metrics: Metrics) -> str:
    """Return the bound that is climbed where it is not the ELBO."""
    bound = metrics.validation.importance_weighted
    return "" if bound is None else f"importance-weighted {bound:.2f}  "


def say(text: str) -> None:
    """Write a line for the person, not for a program."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201  # standard error is this program's log


def show_json(content: dict[str, Any]) -> None:
    """Write the result as one JSON object on one line."""
    print(json.dumps(content), flush=True)  # noqa: T201  # the result of a command


def show_text(text: str) -> None:
    """Write a line of the result."""
    print(text, flush=True)  # noqa: T201  # the result of a command


def show_table(title: str, columns: list[str], rows: list[list[str]]) -> None:
    """Write the result as a table; the first column is text, the others are aligned to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
