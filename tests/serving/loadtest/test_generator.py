"""The generator against real servers that behave, or misbehave, as told."""

import asyncio
import time
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from serving.loadtest import summary
from serving.loadtest.arrivals import Paced, Segment
from serving.loadtest.dialects import DIALECTS
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.generator import ClosedLoop, Generator, Part, Request, Settings, new_event_loop
from serving.loadtest.ledger import AFTER_DEADLINE, GRACE_S, NO_REASON, Ledger
from serving.loadtest.results import Counts, Stage
from serving.loadtest.workload import ModelFacts, Operation, contents
from tests.serving.loadtest.servers import ANSWER, BODY, Capacity, serving, settings, silent

RATE = 100.0
SECONDS = 0.5
SENT = 50


def steady(seconds: float = SECONDS, rate: float = RATE) -> Paced:
    """Return arrivals at equal distances."""
    return Paced(law="constant", segments=(Segment(rate, seconds),), shares=(1.0,), seed=1)


async def attack(
    endpoint: Endpoint, given: Settings | None = None, plan: Paced | ClosedLoop | None = None
) -> Stage:
    """Carry out a plan in this event loop; return what came of it."""
    ledger, plan = Ledger(), plan or steady()
    generator = Generator(given or settings(), endpoint, ledger)
    await generator.open()
    await generator.run(plan, Part(0, 1), start_s=time.monotonic())
    assert generator.num_in_flight == 0
    await generator.close()
    return stage_of(ledger, plan.seconds)


def stage_of(ledger: Ledger, seconds: float) -> Stage:
    """Return what a ledger says."""
    return summary.stage(
        summary.read_lines(ledger.take()),
        begin_s=0.0,
        seconds=seconds + 60,
        names=["encode:1"],
        rows=[1],
        offered_per_s=None,
        concurrency=1,
        generator_cpu=0.0,
    )


def only(**numbers: int) -> Counts:
    """Return a ledger with these ends and no others."""
    none = dict.fromkeys(("right", "refused", "lost", "wrong"), 0)
    return Counts(sent=sum(numbers.values()), **(none | numbers))


async def test_right_answers_are_right() -> None:
    """Each request is sent once, and its answer is compared with its own right answer."""
    seen: list[bytes] = []

    async def answer(body: bytes, _context: object) -> bytes:
        seen.append(body)
        return b"answer to " + body

    requests = [Request(b"%d" % index, b"answer to %d" % index) for index in range(8)]
    async with serving(answer) as endpoint:
        stage = await attack(endpoint, settings(requests=requests))
    assert stage.counts == only(right=SENT)
    assert len(seen) == SENT
    assert len(set(seen)) == len(requests)
    assert stage.operations[0].statuses == {"OK": SENT}


async def test_wrong_answers_are_seen() -> None:
    """Each fifth answer is another request's: exactly these are wrong."""
    number = 0

    async def answer(body: bytes, _context: object) -> bytes:
        nonlocal number
        number += 1
        return b"answer to " + (body if number % 5 else b"another")

    async with serving(answer) as endpoint:
        stage = await attack(endpoint, settings(requests=[Request(BODY, b"answer to " + BODY)]))
    assert stage.counts == only(right=SENT - SENT // 5, wrong=SENT // 5)
    assert stage.goodput_per_s * stage.seconds == SENT - SENT // 5


@pytest.mark.parametrize(
    ("code", "has_reason", "expected", "status"),
    [
        (grpc.StatusCode.RESOURCE_EXHAUSTED, True, "refused", "RESOURCE_EXHAUSTED"),
        (grpc.StatusCode.UNAVAILABLE, True, "refused", "UNAVAILABLE"),
        (grpc.StatusCode.UNAVAILABLE, False, "lost", NO_REASON),
        (grpc.StatusCode.INVALID_ARGUMENT, True, "lost", "INVALID_ARGUMENT"),
        (grpc.StatusCode.INTERNAL, True, "lost", "INTERNAL"),
        (grpc.StatusCode.CANCELLED, False, "lost", "CANCELLED"),
    ],
)
async def test_statuses_are_classified(
    code: grpc.StatusCode,
    has_reason: bool,  # noqa: FBT001 - a row of the table
    expected: str,
    status: str,
) -> None:
    """What the service says ends in the class that the ledger's table gives it."""

    async def abort(_body: bytes, context: Any) -> bytes:  # noqa: ANN401 - of gRPC
        trailers = (("vae-error-reason", "SOME"),) if has_reason else ()
        await context.abort(code, "no", trailers)
        return b""

    async with serving(abort) as endpoint:
        stage = await attack(endpoint)
    assert stage.counts == only(**{expected: SENT})
    assert stage.operations[0].statuses == {status: SENT}
    assert stage.response_time is None


async def test_an_exception_of_the_service_is_a_loss() -> None:
    """The status that gRPC makes of it, UNKNOWN, is none of the contract."""

    async def fail(_body: bytes, _context: object) -> bytes:
        raise RuntimeError

    async with serving(fail) as endpoint:
        assert (await attack(endpoint)).operations[0].statuses == {"UNKNOWN": SENT}


async def test_late_answers_are_refusals_in_time() -> None:
    """A service that is slower than the deadline ends calls at the deadline, by gRPC's own clock on its side."""

    async def answer(_body: bytes, _context: object) -> bytes:
        await asyncio.sleep(1.0)
        return ANSWER

    began = time.monotonic()
    async with serving(answer) as endpoint:
        stage = await attack(endpoint, settings(deadline_s=0.2))
    assert stage.operations[0].statuses == {"DEADLINE_EXCEEDED": SENT}
    assert stage.counts == only(refused=SENT)
    assert time.monotonic() - began < SECONDS + 1.0


async def test_requests_without_an_end_are_lost() -> None:
    """A service that says nothing is given up a second after the deadline, and every request of it is lost."""
    async with silent() as endpoint:
        stage = await attack(endpoint, settings(deadline_s=0.2), steady(0.2))
    assert stage.operations[0].statuses == {AFTER_DEADLINE: 20}
    assert stage.counts == only(lost=20)


async def test_the_service_is_told_the_deadline() -> None:
    """The deadline travels as gRPC sends it, though this side keeps no timer of gRPC."""
    remaining: list[float] = []

    async def answer(_body: bytes, context: Any) -> bytes:  # noqa: ANN401 - of gRPC
        remaining.append(context.time_remaining())
        return ANSWER

    async with serving(answer) as endpoint:
        await attack(endpoint, settings(deadline_s=3.0))
    assert len(remaining) == SENT
    assert 2.5 < min(remaining) <= max(remaining) <= 3.0  # half a second for a slow machine


async def test_a_broken_connection_is_a_loss() -> None:
    """A server that stops at once takes its calls with it: UNAVAILABLE, but nobody said so."""
    begun = asyncio.Event()

    async def hang(_body: bytes, _context: object) -> bytes:
        begun.set()
        await asyncio.sleep(30)
        return ANSWER

    async with serving(hang) as endpoint:
        task = asyncio.create_task(attack(endpoint, plan=steady(0.1)))
        await begun.wait()
    stage = await task
    assert stage.counts.lost == stage.counts.sent == 10
    assert NO_REASON in stage.operations[0].statuses


async def test_a_stall_is_seen_by_all_who_would_have_come() -> None:
    """No coordinated omission: while one call holds the service for a second, a hundred others are due.

    They are sent, and wait; so the 90th percentile shows the stall. Callers in a closed loop, who wait with their
    next question until they have an answer, ask almost nothing meanwhile, and their percentile does not show it.
    """
    lock = asyncio.Lock()
    number = 0

    async def answer(_body: bytes, _context: object) -> bytes:
        nonlocal number
        number += 1
        async with lock:
            if number == 50:
                await asyncio.sleep(1.0)
        return ANSWER

    async with serving(answer) as endpoint:
        opened = await attack(endpoint, plan=steady(2.0))
    number = 0
    async with serving(answer) as endpoint:
        closed = await attack(endpoint, plan=ClosedLoop(concurrency=1, seconds=2.0))
    assert opened.counts == only(right=200)
    assert opened.response_time is not None
    assert closed.response_time is not None
    # Half of the requests were due within the stall; the wait falls evenly from 1 s to 0.
    assert opened.response_time.p90 > 500
    assert closed.response_time.p90 < 200
    assert closed.response_time.max > 900


async def test_a_late_generator_shows_in_response_times_not_in_service_times() -> None:
    """If this process itself is held up, requests count from when they were due, and the lag says who was late."""

    async def answer(_body: bytes, _context: object) -> bytes:
        return ANSWER

    async with serving(answer) as endpoint:
        task = asyncio.create_task(attack(endpoint, plan=steady(1.0)))
        await asyncio.sleep(0.3)
        time.sleep(0.5)  # noqa: ASYNC251 - that is the point
        stage = await task
    assert stage.response_time is not None
    assert stage.service_time is not None
    assert stage.counts == only(right=100)
    assert stage.response_time.p90 > 300
    assert stage.send_lag_p99_ms > 300
    assert stage.response_time.p90 > stage.service_time.p50 + 200


async def test_a_closed_loop_keeps_its_callers_busy() -> None:
    """As many calls as callers are in flight, and Little's law holds: rate x time = callers."""
    in_flight, highest = 0, 0

    async def answer(_body: bytes, _context: object) -> bytes:
        nonlocal in_flight, highest
        in_flight += 1
        highest = max(highest, in_flight)
        await asyncio.sleep(0.02)
        in_flight -= 1
        return ANSWER

    async with serving(answer) as endpoint:
        stage = await attack(endpoint, plan=ClosedLoop(concurrency=8, seconds=1.0))
    assert highest == 8
    assert stage.service_time is not None
    assert stage.counts.right * stage.service_time.mean / 1000 == pytest.approx(8, rel=0.15)


async def test_callers_wait_as_long_as_the_service_asks() -> None:
    """A refusal that says when to come back is obeyed: two callers, put off for 0.2 s each time, in one second."""

    async def refuse(_body: bytes, context: Any) -> bytes:  # noqa: ANN401 - of gRPC
        trailers = (("grpc-retry-pushback-ms", "200"),)
        await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "busy", trailers)
        return b""

    async with serving(refuse) as endpoint:
        stage = await attack(endpoint, plan=ClosedLoop(concurrency=2, seconds=1.0))
    assert 4 <= stage.counts.refused <= 10


async def test_a_stop_ends_what_is_sent_not_what_was() -> None:
    """After a stop nothing more is sent, and what was sent still gets its end."""
    open_gate = asyncio.Event()

    async def answer(_body: bytes, _context: object) -> bytes:
        await open_gate.wait()
        return ANSWER

    for plan in (steady(60.0), ClosedLoop(concurrency=3, seconds=60.0)):
        ledger = Ledger()
        open_gate.clear()
        async with serving(answer) as endpoint:
            generator = Generator(settings(), endpoint, ledger)
            await generator.open()
            run = asyncio.create_task(generator.run(plan, Part(0, 1), start_s=time.monotonic()))
            await asyncio.sleep(0.2)
            generator.stop()
            open_gate.set()
            async with asyncio.timeout(5):
                await run
            await generator.close()
        stage = stage_of(ledger, plan.seconds)
        assert 1 <= stage.counts.sent < 200
        assert stage.counts == only(right=stage.counts.sent)


async def test_requests_are_sent_when_they_are_due() -> None:
    """The lag is far below the milliseconds that epoll would add; half of all requests show the timer itself."""

    def measure() -> Stage:
        async def run() -> Stage:
            async def answer(_body: bytes, _context: object) -> bytes:
                return ANSWER

            async with serving(answer) as endpoint:
                return await attack(endpoint, plan=steady(1.0, rate=97.0))

        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            return runner.run(run())

    stages = [await asyncio.to_thread(measure) for _ in range(3)]
    lags = [
        stage.response_time.p50 - stage.service_time.p50
        for stage in stages
        if stage.response_time and stage.service_time
    ]
    assert min(lags) < 0.5  # milliseconds; epoll rounds up, so that its median would be above


async def test_a_token_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replaced file of a token is used when the old one was kept long enough; an absent one is ignored."""
    monkeypatch.setattr("serving.loadtest.generator._TOKEN_S", 0.1)
    path = tmp_path / "token"
    path.write_text("first\n")
    seen: list[str] = []

    async def answer(_body: bytes, context: Any) -> bytes:  # noqa: ANN401 - of gRPC
        seen.append(dict(context.invocation_metadata())["authorization"])
        if len(seen) == 10:
            path.unlink()
        if len(seen) == 30:
            path.write_text("second")
        return ANSWER

    async with serving(answer) as endpoint:
        await attack(Endpoint(target=endpoint.target, token_file=path, priority=3))
    assert set(seen[:30]) == {"Bearer first"}
    assert seen[-1] == "Bearer second"


async def test_retries_are_those_of_the_published_client() -> None:
    """With them an attempt that is refused is repeated; without, each request is one attempt."""
    number = 0

    async def answer(_body: bytes, context: Any) -> bytes:  # noqa: ANN401 - of gRPC
        nonlocal number
        number += 1
        if number <= 2:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "no", (("vae-error-reason", "X"),))
        return ANSWER

    async with serving(answer) as endpoint:
        raw = await attack(endpoint, plan=steady(rate=10.0))
        number = 0
        configured = await attack(Endpoint(target=endpoint.target, retries=True), plan=steady(rate=10.0))
    assert raw.counts == only(right=3, refused=2)
    assert configured.counts == only(right=5)


async def test_other_bytes_of_the_same_content_are_right() -> None:
    """If the bytes differ, the tensors decide: another order of fields is right, another number is wrong."""
    dialect, operation = DIALECTS["vae"], Operation("encode", 2)
    facts = ModelFacts("small", "v", (1, 4, 4), 2, None)
    body = dialect.body(operation, contents(operation, facts, seed=1, index=0))
    from protos.vae.v1 import vae_pb2 as pb  # noqa: PLC0415
    from serving.tensors import to_message  # noqa: PLC0415

    values = np.zeros((2, 2), np.float32)
    mean = pb.EncodeResponse(mean=to_message(values)).SerializeToString()
    log_var = pb.EncodeResponse(log_var=to_message(values), model_version="v").SerializeToString()
    off = pb.EncodeResponse(mean=to_message(values + np.float32(1e-3))).SerializeToString()
    answers = [log_var + mean, mean + log_var, off + log_var, b"\xff\xff no message"]

    async def answer(_body: bytes, _context: object) -> bytes:
        answers.append(answers.pop(0))
        return answers[-1]

    async with serving(answer) as endpoint:
        exact = await attack(endpoint, settings(requests=[Request(body, mean + log_var)]), steady(0.4))
        loose = settings(requests=[Request(body, mean + log_var)])
        object.__setattr__(loose, "tolerance", 1e-2)
        close = await attack(endpoint, loose, steady(0.4))
    assert exact.counts == only(right=20, wrong=20)
    assert close.counts == only(right=30, wrong=10)


async def test_what_is_not_checked_is_right_if_it_is_answered() -> None:
    """Without a right answer only the status counts."""

    async def answer(_body: bytes, _context: object) -> bytes:
        return b"anything"

    async with serving(answer) as endpoint:
        assert (await attack(endpoint, settings(requests=[Request(BODY)]))).counts == only(right=SENT)


async def test_a_server_at_its_capacity_is_measured_as_such() -> None:
    """Two places of 10 ms answer 200 requests per second, however many are offered."""
    async with serving(Capacity(2, 0.010).answer) as endpoint:
        stage = await attack(endpoint, settings(deadline_s=20), ClosedLoop(concurrency=16, seconds=1.0))
    assert 100 < stage.counts.right <= 16 + 200
    assert GRACE_S == 1.0
