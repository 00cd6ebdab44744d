"""Contestants in processes of their own, who take turns.

A process is told to begin a round and answers how long the round took; in between it waits. It lives through many
tasks, for importing PyTorch takes longer than most of them.
"""

import contextlib
import io
import multiprocessing
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch

from training.bench.tasks import EndRound, Outcome, Task
from training.errors import ContestantFailed

Work = Callable[[Any, EndRound], Outcome]
"""Does a task, a function that another process can import: takes the task and what to call after every round."""

_START: Final = "start"
_ENDED: Final = "its process ended"
_PATIENCE_S: Final = 10.0


class Lap(NamedTuple):
    """How long one round took."""

    seconds: float
    """On the clock."""

    cpu_seconds: float
    """Of the processor, all threads together: nothing of it goes to other programs."""


class Failure(NamedTuple):
    """A contestant's last words."""

    text: str


class Worker:
    """A process that does the work of contestants, seen from outside.

    Args:
        connection: To the process.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection, self._contestant = connection, ""

    def begin(self, contestant: str, work: Work, task: Task) -> None:
        """Hand over a task of a contestant; its first round begins with `round`."""
        self._contestant = contestant
        self._send((work, task))

    def round(self) -> Lap:
        """Let it do one round and return how long that took."""
        self._send(_START)
        lap: Lap = self._receive(Lap)
        return lap

    def outcome(self) -> Outcome:
        """Return what came of the task after its last round."""
        outcome: Outcome = self._receive(Outcome)
        return outcome

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise ContestantFailed(self._contestant, problem=_ENDED) from None

    def _receive(self, kind: Any) -> Any:  # noqa: ANN401 - a class or a union of classes, and one of them
        try:
            message = self._connection.recv()
        except (EOFError, OSError):
            message = Failure(_ENDED)
        if isinstance(message, kind):
            return message
        problem = (
            message.text if isinstance(message, Failure) else "it did another number of rounds than asked for"
        )
        raise ContestantFailed(self._contestant, problem=problem)


@contextmanager
def workers(num: int, packages: Path | None = None) -> Iterator[list[Worker]]:
    """Return so many processes; they end with the block.

    Args:
        num: How many.
        packages: A folder of packages that they may import beside those of this environment.
    """
    context = multiprocessing.get_context("spawn")  # a fork would inherit the threads' locks
    with ExitStack() as stack:
        made = []
        for _ in range(num):
            here, there = context.Pipe()
            process = context.Process(target=serve, args=(there, packages), daemon=True)
            process.start()
            there.close()
            stack.callback(_end, process)
            stack.callback(here.close)
            made.append(Worker(here))
        yield made


def serve(connection: Connection, packages: Path | None) -> None:
    """Do tasks as they come, until nobody asks any more: what the process of a worker runs."""
    if packages is not None:
        sys.path.append(str(packages))  # at the end: everything that both have is ours
    with (
        # Whatever it prints is no output of the command that started it.
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        # An error of the connection: whoever asked is gone, and will not read a traceback either.
        contextlib.suppress(EOFError, OSError, KeyboardInterrupt),
    ):
        while True:
            work, task = connection.recv()
            connection.send(_answer(connection, work, task))


def _answer(connection: Connection, work: Work, task: Task) -> Outcome | Failure:
    torch.set_num_threads(task.num_threads)
    rounds = Rounds(connection, task.num_rounds)
    try:
        rounds.wait()
        return work(task, rounds.end)
    except Exception:  # noqa: BLE001 - other people's code; whoever asked decides
        return Failure(traceback.format_exc(limit=-3))


class Rounds:
    """The clock inside the process: stands still while the contestant waits for its turn.

    Args:
        connection: To whoever gives the turns.
        num_rounds: After the last of them there is no further turn to wait for.
    """

    def __init__(self, connection: Connection, num_rounds: int) -> None:
        self._connection, self._left = connection, num_rounds
        self._began = Lap(0, 0)

    def wait(self) -> None:
        """Wait for the turn and start the clock."""
        self._connection.recv()
        self._began = _now()

    def end(self) -> None:
        """Say how long the round took and wait for the next."""
        now = _now()
        self._connection.send(Lap(*(after - before for after, before in zip(now, self._began, strict=True))))
        self._left -= 1
        if self._left:
            self.wait()


def alternate(field: Sequence[Worker], num_rounds: int) -> list[list[Lap]]:
    """Return the laps of every worker: one after the other in each round, each time another one first.

    Raises:
        ContestantFailed: If one of them does.
    """
    laps: list[list[Lap]] = [[] for _ in field]
    for number in range(num_rounds):
        for offset in range(len(field)):
            place = (number + offset) % len(field)
            laps[place].append(field[place].round())
    return laps


def _now() -> Lap:
    return Lap(time.perf_counter(), time.process_time())


def _end(process: Any) -> None:  # noqa: ANN401 - the class depends on the context
    """Wait for a process that nobody asks any more; do not wait for ever."""
    process.join(_PATIENCE_S)
    if process.is_alive():
        process.terminate()
        process.join()
