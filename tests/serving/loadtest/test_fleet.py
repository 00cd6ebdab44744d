"""Several processes send together what one would send, and their death is noticed."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest

from serving.loadtest.arrivals import Paced, Segment
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.errors import GeneratorDied, ServiceNotReady
from serving.loadtest.fleet import Course, Fleet, Progress
from serving.loadtest.generator import ClosedLoop, Request
from serving.loadtest.limits import measure_limits
from tests.serving.loadtest.servers import ANSWER, BODY, in_thread, serving, settings

NUM_PROCESSES = 2


class Answers:
    """A server that writes down what it was sent."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []
        self.endpoint = Endpoint(target="")

    async def answer(self, body: bytes, _context: object) -> bytes:
        """Write down and answer."""
        self.bodies.append(body)
        return ANSWER


@pytest.fixture(scope="module")
def answers() -> Iterator[Answers]:
    """Run a server beside the test, which blocks."""
    state = Answers()
    with in_thread(lambda: serving(state.answer)) as state.endpoint:
        yield state


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Return two processes with sixteen requests."""
    requests = [Request(BODY + b"%d" % number, ANSWER) for number in range(16)]
    with Fleet(settings(requests=requests), NUM_PROCESSES) as processes:
        yield processes


def run(fleet: Fleet, endpoint: Endpoint, plan: Any, **options: Any) -> Course:  # noqa: ANN401 - as `Fleet.run`
    """Carry out a plan at one address."""
    return fleet.run([endpoint] * fleet.num_processes, plan, **options)


def steady(rate: float = 200.0, seconds: float = 1.0) -> Paced:
    """Return arrivals at equal distances."""
    return Paced(law="constant", segments=(Segment(rate, seconds),), shares=(1.0,), seed=3)


def test_processes_send_together_what_one_would_send(fleet: Fleet, answers: Answers) -> None:
    """All that is due is sent once, by both; every line of every ledger arrives."""
    answers.bodies.clear()
    told: list[Progress] = []
    course = run(fleet, answers.endpoint, steady(), on_progress=told.append)
    assert len(course.records) == len(answers.bodies) == 200
    expected = [int(number * 16) for arrivals in steady().part(0, 1) for number in arrivals.request]
    assert sorted(answers.bodies) == sorted(BODY + b"%d" % index for index in expected)
    assert sorted(course.records["due_s"].round(6).tolist()) == pytest.approx([i / 200 for i in range(200)])
    assert sum(len(progress.lines) for progress in told) == 200
    assert course.stopped_s is None
    assert 0 < course.cpu_share(0.0, 1.0) < 2


def test_callers_are_shared_out(fleet: Fleet, answers: Answers) -> None:
    """A closed loop of three has two callers in one process and one in the other."""
    course = run(fleet, answers.endpoint, ClosedLoop(concurrency=3, seconds=0.5))
    assert len(course.records) > 3
    assert (course.records["due_s"] < 0.5).all()


def test_a_plan_can_be_cut_short(fleet: Fleet, answers: Answers) -> None:
    """What was sent has its end; the course says when it was cut."""
    began = time.monotonic()
    course = run(fleet, answers.endpoint, steady(seconds=60.0), is_stopped=lambda: time.monotonic() - began > 1.0)
    assert time.monotonic() - began < 10
    assert course.stopped_s is not None
    assert 0 < len(course.records) < 1000
    after = run(fleet, answers.endpoint, steady(seconds=0.2))  # and the processes obey again
    assert len(after.records) == 40


def test_the_generator_is_measured_against_an_echo(fleet: Fleet) -> None:
    """Both processes, each against an echo of its own: more calls together than one call at a time would make."""
    limits = measure_limits(fleet)
    assert limits.num_processes == NUM_PROCESSES
    assert limits.calls_per_s > 1000 / limits.echo_p50_ms / 4
    assert limits.echo_p50_ms > 0


def test_an_address_without_a_service(fleet: Fleet) -> None:
    """The processes say so, and obey again."""
    with pytest.raises(ServiceNotReady, match=r"127\.0\.0\.1:1: no connection"):
        run(fleet, Endpoint(target="127.0.0.1:1"), steady())


def test_a_process_that_dies_is_noticed(answers: Answers) -> None:
    """Its lines are missing, so there is no report; and nothing is left running."""
    with contextlib.ExitStack() as stack:
        fleet = stack.enter_context(Fleet(settings(), NUM_PROCESSES))
        victim, other = fleet._processes  # noqa: SLF001 - whose process else
        assert victim.pid is not None
        pid = victim.pid

        def kill(progress: Progress) -> None:
            if progress.at_s > 0.3 and victim.is_alive():
                os.kill(pid, signal.SIGKILL)

        with pytest.raises(GeneratorDied, match="-9"):
            run(fleet, answers.endpoint, steady(seconds=20.0), on_progress=kill)
    assert not other.is_alive()
