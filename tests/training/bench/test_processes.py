"""Workers take turns; the clock stands still while they wait; what goes wrong in one is told."""

import itertools
import os
import time
from collections.abc import Iterator

import numpy as np
import pytest

from training.bench.processes import Lap, Worker, alternate, workers
from training.bench.tasks import EndRound, EvaluationTask, Measured
from training.errors import ContestantFailed


def work_and_tell(task: EvaluationTask, end_round: EndRound) -> Measured:
    """Work a little in each round; return when each round began and ended, on the clock that processes share."""
    times = [time.monotonic()]
    for number in range(task.num_rounds):
        time.sleep(0.02)
        times.append(time.monotonic())
        end_round()
        if number + 1 < task.num_rounds:
            times.append(time.monotonic())
    return Measured(np.array(times))


def fail(_: EvaluationTask, end_round: EndRound) -> Measured:
    """Fail in the second round."""
    end_round()
    raise RuntimeError("no more of this")


def stop_early(_: EvaluationTask, end_round: EndRound) -> Measured:
    """Do one round whatever was asked for."""
    end_round()
    return Measured(np.zeros(1))


def die(_: EvaluationTask, __: EndRound) -> Measured:
    """End the process."""
    os._exit(1)


@pytest.fixture(scope="module")
def pair() -> Iterator[list[Worker]]:
    """Return two workers."""
    with workers(2) as field:
        yield field


@pytest.fixture
def task(evaluation_task: EvaluationTask) -> EvaluationTask:
    """Return a task of three rounds."""
    return evaluation_task._replace(num_rounds=3)


def test_never_do_two_work_at_once_and_waiting_costs_nothing(pair: list[Worker], task: EvaluationTask) -> None:
    """The rounds of both, laid on one clock, do not overlap; a lap is the round without the wait before it."""
    for worker in pair:
        worker.begin("x", work_and_tell, task)
    laps = alternate(pair, task.num_rounds)
    rounds = []
    for worker, own in zip(pair, laps, strict=True):
        outcome = worker.outcome()
        assert isinstance(outcome, Measured)
        spans = outcome.nll.reshape(-1, 2)
        rounds += [tuple(span) for span in spans]
        # The other one sleeps 20 ms in between; a scheduler may add to any lap, but not take from it.
        assert all(lap.seconds >= 0.02 for lap in own)
        assert sum(lap.seconds for lap in own) < spans[-1, 1] - spans[0, 0]
    rounds.sort()
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(rounds))


def test_each_round_another_one_is_first(pair: list[Worker], task: EvaluationTask) -> None:
    """Whoever follows a busy round finds a warm processor; so the order changes."""
    for worker in pair:
        worker.begin("x", work_and_tell, task)
    alternate(pair, task.num_rounds)
    first, second = (worker.outcome() for worker in pair)
    assert isinstance(first, Measured)
    assert isinstance(second, Measured)
    began = first.nll[::2] < second.nll[::2]
    assert began.tolist() == [True, False, True]


def test_processor_time_leaves_out_sleep(pair: list[Worker], task: EvaluationTask) -> None:
    """What other programs or waiting take is in the seconds, not in the processor time."""
    worker = pair[0]
    worker.begin("x", work_and_tell, task)
    laps = [worker.round() for _ in range(task.num_rounds)]
    worker.outcome()
    assert all(lap.cpu_seconds < lap.seconds for lap in laps)


def test_failure_is_told_with_its_cause_and_the_worker_goes_on(pair: list[Worker], task: EvaluationTask) -> None:
    """The name of the contestant and the last lines of its traceback; the next task finds a working process."""
    worker = pair[0]
    worker.begin("clumsy", fail, task)
    worker.round()
    with pytest.raises(ContestantFailed, match=r"'clumsy' failed(?s:.)*no more of this"):
        worker.round()
    worker.begin("another", work_and_tell, task)
    assert isinstance(worker.round(), Lap)
    for _ in range(task.num_rounds - 1):
        worker.round()
    worker.outcome()


def test_other_number_of_rounds_is_no_result(pair: list[Worker], task: EvaluationTask) -> None:
    """Times of something else than an epoch must not become a ratio."""
    worker = pair[1]
    worker.begin("hasty", stop_early, task)
    worker.round()
    with pytest.raises(ContestantFailed, match="another number of rounds"):
        worker.round()


@pytest.mark.usefixtures("pair")
def test_death_of_a_process_is_told(task: EvaluationTask) -> None:
    """Instead of waiting for it for ever."""
    with workers(1) as (worker,):
        worker.begin("fragile", die, task)
        with pytest.raises(ContestantFailed, match="its process ended"):
            worker.round()
