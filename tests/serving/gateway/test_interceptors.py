"""What surrounds a call: malformed bytes, surprises, ids, deadlines and callers who go away."""

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client import REGISTRY

from protos.vae.v1 import vae_pb2 as pb
from serving import errors
from serving.bundle import Bundle
from serving.gateway.interceptors import Sparingly
from serving.gateway.server import GatewayServer
from serving.tensors import to_message
from tests.serving.harness import (
    SERVICE,
    PuppetEngine,
    call,
    eventually,
    failure,
    read_until_failure,
    sample_stream,
    serving_with,
    settings,
    trailers,
    wire,
)

METHODS = ("Encode", "Decode", "Sample", "Reconstruct", "Interpolate", "Score", "SampleStream", "GetModel")
TEXT = "/secret/path of a BadClass"

DEFAULT_S, MAX_S = 0.6, 1.6
"""Deadlines of the service that holds calls: so far apart that a stall of the machine does not confuse them."""


@pytest.fixture
def engine(small: Bundle) -> PuppetEngine:
    """Return an engine that obeys."""
    return PuppetEngine(small.manifest)


@pytest.fixture
async def held(bundle_dir: Path, small: Bundle, engine: PuppetEngine) -> AsyncIterator[GatewayServer]:
    """Run a gateway in front of the engine that obeys, with short deadlines."""
    config = settings(bundle_dir, f"limits.default_deadline_s={DEFAULT_S}", f"limits.max_deadline_s={MAX_S}")
    async with serving_with(engine, small.manifest, config) as server:
        yield server


@pytest.fixture
async def patient(bundle_dir: Path, small: Bundle, engine: PuppetEngine) -> AsyncIterator[GatewayServer]:
    """Run a gateway in front of the engine that obeys, with deadlines that no stall of the machine passes."""
    async with serving_with(engine, small.manifest, settings(bundle_dir)) as server:
        yield server


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "body",
    [b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x08", b"\x0a\x02\x08", b"\x00" * 20, b"\x0b" * 200, b"hello"],
    ids=["tag", "length", "no value", "inside", "field zero", "deep groups", "text"],
)
async def test_bytes_that_do_not_parse_are_bad_input(service: GatewayServer, method: str, body: bytes) -> None:
    """Malformed bytes end as INVALID_ARGUMENT with a fixed text, never as UNKNOWN with a parser's."""
    async with wire(service.port) as channel:
        try:
            await call(channel, method, body)
        except grpc.aio.AioRpcError as error:
            if trailers(error)["vae-error-reason"] != "MALFORMED_MESSAGE":
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017 - it parsed, as something else
                return
            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT  # noqa: PT017 - the call may also succeed
            assert error.details() == (  # noqa: PT017 - as above
                f"request: expected a {method}Request message, got bytes that do not parse"
            )
        else:
            assert method == "GetModel"  # unknown fields are skipped, and this request has no other


async def test_an_unknown_method_is_unimplemented(service: GatewayServer) -> None:
    """A method that does not exist is UNIMPLEMENTED."""
    async with wire(service.port) as channel:
        unary: Any = channel.unary_unary(f"/{SERVICE}/Train")
        with pytest.raises(grpc.aio.AioRpcError, match="UNIMPLEMENTED"):
            await unary(b"", timeout=5)


@pytest.mark.parametrize("error", [RuntimeError(TEXT), KeyError(TEXT), TypeError(TEXT), OSError(TEXT)])
async def test_a_surprise_shows_an_id_and_nothing_else(
    held: GatewayServer, engine: PuppetEngine, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """The caller reads an id; path, class, text and stack are in the log, under the same id."""
    engine.error = error
    async with wire(held.port) as channel:
        ended = await failure(channel, "Sample", pb.SampleRequest(num_samples=1))
    assert ended.code() is grpc.StatusCode.INTERNAL
    sent = f"{ended.details()} {ended.trailing_metadata()}"
    for word in ("secret", "BadClass", "Traceback", type(error).__name__, ".py", "/"):
        assert word not in sent.replace("type.googleapis.com/google", "")
    assert trailers(ended)["vae-error-reason"] == "INTERNAL"
    (record,) = [record for record in caplog.records if record.message == "call failed"]
    assert record.levelno == logging.ERROR
    assert vars(record)["error_id"] in str(ended.details())
    assert vars(record)["method"] == "Sample"
    assert record.exc_info is not None


@pytest.mark.parametrize("given", ["abc", "A-1_b.c", "x" * 64])
async def test_a_good_request_id_is_the_callers(held: GatewayServer, engine: PuppetEngine, given: str) -> None:
    """A well-formed id of the caller is the one that it is told."""
    engine.error = RuntimeError("surprise")
    async with wire(held.port) as channel:
        ended = await failure(
            channel, "Sample", pb.SampleRequest(num_samples=1), metadata=(("x-request-id", given),)
        )
    assert ended.details() == f"internal error {given}; tell the operator this id"


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, "<script>", "../../etc", "${jndi}", "a;b"])
async def test_a_bad_request_id_is_replaced(held: GatewayServer, engine: PuppetEngine, given: str) -> None:
    """An id that could forge a log line or a page is not repeated."""
    engine.error = RuntimeError("surprise")
    async with wire(held.port) as channel:
        ended = await failure(
            channel, "Sample", pb.SampleRequest(num_samples=1), metadata=(("x-request-id", given),)
        )
    text = str(ended.details())
    assert text != f"internal error {given}; tell the operator this id"
    assert len(text.split()[2]) == 17  # sixteen digits of ours and the semicolon


async def test_a_call_without_a_deadline_gets_the_default(held: GatewayServer, engine: PuppetEngine) -> None:
    """Nobody waits for ever: a call that brings no deadline ends after the default one."""
    engine.is_open.clear()
    started = time.monotonic()
    async with wire(held.port) as channel:
        pending = failure(channel, "Sample", pb.SampleRequest(num_samples=1), timeout=None)
        ended = await asyncio.wait_for(pending, 5)
    assert ended.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert trailers(ended)["vae-error-reason"] == "DEADLINE_EXCEEDED"
    assert DEFAULT_S - 0.05 < time.monotonic() - started < MAX_S - 0.05
    await eventually(lambda: held.operations.decoder.num_rows == 0)


async def test_a_long_deadline_is_cut(held: GatewayServer, engine: PuppetEngine) -> None:
    """A caller who would wait a minute is told after the longest time that the service allows."""
    engine.is_open.clear()
    started = time.monotonic()
    async with wire(held.port) as channel:
        pending = failure(channel, "Sample", pb.SampleRequest(num_samples=1), timeout=60)
        ended = await asyncio.wait_for(pending, 5)
    assert ended.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert MAX_S - 0.05 < time.monotonic() - started < 4


async def test_a_short_deadline_is_kept(held: GatewayServer, engine: PuppetEngine) -> None:
    """A caller's own deadline ends the call, and its rows leave the queue."""
    engine.is_open.clear()
    started = time.monotonic()
    async with wire(held.port) as channel:
        ended = await failure(channel, "Sample", pb.SampleRequest(num_samples=1), timeout=0.05)
    assert ended.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert time.monotonic() - started < DEFAULT_S - 0.05
    await eventually(lambda: held.operations.decoder.num_rows == 0)


async def test_a_caller_who_goes_away_leaves_no_rows(held: GatewayServer, engine: PuppetEngine) -> None:
    """Cancelled calls leave the queue at once, those that wait as well as those that run."""
    engine.is_open.clear()
    data = to_message(np.zeros((4, 1, 4, 4), np.uint8))
    async with wire(held.port) as channel:
        tasks = [asyncio.ensure_future(call(channel, "Encode", pb.EncodeRequest(data=data))) for _ in range(5)]
        await eventually(lambda: held.operations.encoder.num_rows == 20)
        for task in tasks:
            task.cancel()
        await eventually(lambda: held.operations.encoder.num_rows == 0)
        engine.is_open.set()
        await eventually(lambda: engine.num_running == 0)
        await eventually(lambda: held.operations.encoder.num_in_flight == 0)
        assert len((await call(channel, "Encode", pb.EncodeRequest(data=data))).mean.data) == 4 * 2 * 4


def _calls(method: str, code: str) -> float:
    return REGISTRY.get_sample_value("vae_calls_total", {"method": method, "code": code}) or 0.0


async def test_each_call_is_counted_under_its_end(patient: GatewayServer, engine: PuppetEngine) -> None:
    """Calls are counted by method and code: success, bad input, surprise, deadline and a caller who leaves."""
    codes = ("OK", "INVALID_ARGUMENT", "INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED")
    before = {code: _calls("Sample", code) for code in codes}
    async with wire(patient.port) as channel:
        await call(channel, "Sample", pb.SampleRequest(num_samples=1))
        await failure(channel, "Sample", pb.SampleRequest())
        engine.error = RuntimeError("surprise")
        await failure(channel, "Sample", pb.SampleRequest(num_samples=1))
        engine.error = None
        engine.is_open.clear()
        await failure(channel, "Sample", pb.SampleRequest(num_samples=1), timeout=0.3)
        await eventually(
            lambda: patient.operations.decoder.num_rows == 0
        )  # else its row is taken for the next call's
        task = asyncio.ensure_future(call(channel, "Sample", pb.SampleRequest(num_samples=1), timeout=30))
        await eventually(lambda: patient.operations.decoder.num_rows == 1)
        task.cancel()
        await eventually(lambda: REGISTRY.get_sample_value("vae_calls_in_flight") == 0)
    assert {code: _calls("Sample", code) - before[code] for code in codes} == dict.fromkeys(codes, 1.0)


def _value(name: str, **labels: str) -> float:
    return REGISTRY.get_sample_value(name, labels) or 0.0


async def test_each_call_is_measured_once(held: GatewayServer) -> None:
    """Sizes are those on the wire, rows those of the request, and the stages are parts of the whole."""
    names = [
        "vae_call_latency_seconds_sum", "vae_call_rows_sum", "vae_request_bytes_sum", "vae_response_bytes_sum",
        "vae_call_rows_count", "vae_request_bytes_count", "vae_response_bytes_count",
    ]  # fmt: skip
    stages = ("receive", "queue", "engine", "reply")

    def read() -> dict[str, float]:
        found = {name: _value(name, method="Sample") for name in names}
        return found | {
            stage: _value("vae_call_stage_seconds_sum", method="Sample", stage=stage) for stage in stages
        }

    before, request = read(), pb.SampleRequest(num_samples=3, seed=1)
    async with wire(held.port) as channel:
        response = await call(channel, "Sample", request)
        await eventually(lambda: _value("vae_calls_in_flight") == 0)
    grew = {name: value - before[name] for name, value in read().items()}
    assert grew["vae_call_rows_sum"] == 3
    assert grew["vae_request_bytes_sum"] == request.ByteSize()
    assert grew["vae_response_bytes_sum"] == response.ByteSize()
    assert [grew[name] for name in names if name.endswith("count")] == [1, 1, 1]
    assert sum(grew[stage] for stage in stages) == pytest.approx(grew["vae_call_latency_seconds_sum"], rel=1e-6)
    assert all(grew[stage] > 0 for stage in stages)


async def test_errors_are_counted_by_reason_and_by_who_must_act(held: GatewayServer, engine: PuppetEngine) -> None:
    """A caller's mistake is no alarm of ours; a surprise and a lost engine are."""
    expected = {("OUT_OF_RANGE", "client"): 1, ("INTERNAL", "service"): 1, ("ENGINE_UNAVAILABLE", "service"): 1}

    def read(key: tuple[str, str]) -> float:
        return _value("vae_call_errors_total", method="Sample", reason=key[0], blame=key[1])

    before = {key: read(key) for key in expected}
    async with wire(held.port) as channel:
        await failure(channel, "Sample", pb.SampleRequest())
        engine.error = RuntimeError("surprise")
        await failure(channel, "Sample", pb.SampleRequest(num_samples=1))
        engine.error = errors.EngineUnavailable(graph="decoder")
        await failure(channel, "Sample", pb.SampleRequest(num_samples=1))
        await eventually(lambda: _value("vae_calls_in_flight") == 0)
    assert {key: read(key) - before[key] for key in expected} == expected


async def test_every_answer_names_its_call(held: GatewayServer, engine: PuppetEngine) -> None:
    """Success and failure carry the id; timings only whoever asks for them."""
    async with wire(held.port) as channel:
        method: Any = channel.unary_unary(
            f"/{SERVICE}/Sample", request_serializer=pb.SampleRequest.SerializeToString
        )
        for metadata in ((("x-request-id", "a-1"),), (("x-request-id", "a-1"), ("vae-timings", "1"))):
            answer = method(pb.SampleRequest(num_samples=2), metadata=metadata)
            await answer
            found = {key for key, _ in await answer.trailing_metadata()}
            has_timings = {"vae-queue-us", "vae-engine-us", "vae-total-us", "vae-batch-rows"} <= found
            assert has_timings == (len(metadata) == 2)
            assert "x-request-id" in found
        engine.error = RuntimeError("surprise")
        ended = await failure(
            channel, "Sample", pb.SampleRequest(num_samples=1), metadata=(("x-request-id", "a-2"),)
        )
    assert trailers(ended)["x-request-id"] == "a-2"


async def test_a_stream_is_counted_under_its_end(held: GatewayServer, engine: PuppetEngine) -> None:
    """A stream is one call, counted once, by how it ended; also when its reader left."""
    codes = ("OK", "INVALID_ARGUMENT", "INTERNAL", "DEADLINE_EXCEEDED", "CANCELLED")
    before = {code: _calls("SampleStream", code) for code in codes}
    many = pb.SampleStreamRequest(num_samples=1_000_000, seed=1, max_chunk_rows=2)
    async with wire(held.port) as channel:
        few = pb.SampleStreamRequest(num_samples=10, seed=1, max_chunk_rows=2)
        assert len([chunk async for chunk in sample_stream(channel, few)]) == 5
        await read_until_failure(sample_stream(channel, pb.SampleStreamRequest()))
        engine.error = RuntimeError("surprise")
        await read_until_failure(sample_stream(channel, few))
        engine.error = None
        _, error = await read_until_failure(sample_stream(channel, many, timeout=0.3))
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        stream = sample_stream(channel, many, timeout=30)
        await stream.read()
        stream.cancel()
        await eventually(lambda: sum(_calls("SampleStream", code) - before[code] for code in codes) == 5)
    assert {code: _calls("SampleStream", code) - before[code] for code in codes} == dict.fromkeys(codes, 1.0)
    assert REGISTRY.get_sample_value("vae_calls_in_flight") == 0


async def test_a_surprise_in_the_middle_of_a_stream_shows_an_id_and_nothing_else(
    held: GatewayServer, engine: PuppetEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """What was sent is right, and the end tells a stranger no more than the end of a call."""
    async with wire(held.port) as channel:
        stream = sample_stream(channel, pb.SampleStreamRequest(num_samples=1000, seed=1, max_chunk_rows=2))
        await stream.read()
        engine.error = RuntimeError(TEXT)
        responses, error = await read_until_failure(stream)
    assert [part.first_row for part in responses] == [2 * (1 + index) for index in range(len(responses))]
    assert error.code() is grpc.StatusCode.INTERNAL
    sent = f"{error.details()} {error.trailing_metadata()}"
    for word in ("secret", "BadClass", "Traceback", "RuntimeError", ".py", "/"):
        assert word not in sent.replace("type.googleapis.com/google", "")
    (record,) = [record for record in caplog.records if record.message == "call failed"]
    assert vars(record)["error_id"] in str(error.details())
    assert vars(record)["method"] == "SampleStream"


async def test_callers_who_leave_are_no_errors_in_the_log(
    held: GatewayServer, engine: PuppetEngine, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelled calls and streams, and connections that go, are everyday: the log says nothing of them."""
    for _ in range(3):
        engine.is_open.set()
        async with wire(held.port) as channel:
            stream = sample_stream(channel, pb.SampleStreamRequest(num_samples=1_000_000, seed=1))
            await stream.read()
            engine.is_open.clear()
            pending = asyncio.ensure_future(call(channel, "Sample", pb.SampleRequest(num_samples=1)))
            await eventually(lambda: REGISTRY.get_sample_value("vae_calls_in_flight") == 2)
            pending.cancel()
        await eventually(lambda: REGISTRY.get_sample_value("vae_calls_in_flight") == 0)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.fixture
def told() -> errors.EngineUnavailable:
    """Return an error whose detail is for the operator."""
    return errors.EngineUnavailable(graph="encoder", detail="actor 17 on 10.0.0.1 died")


async def test_what_an_operator_must_see_is_logged_and_not_sent(
    held: GatewayServer, engine: PuppetEngine, told: errors.EngineUnavailable, caplog: pytest.LogCaptureFixture
) -> None:
    """The cause of a lost replica is in the log with method and client, and in no trailer."""
    engine.error = told
    async with wire(held.port) as channel:
        error = await failure(channel, "Sample", pb.SampleRequest(num_samples=1))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert "10.0.0.1" not in f"{error.details()} {error.trailing_metadata()}"
    (record,) = [record for record in caplog.records if record.message == "call failed"]
    assert (record.levelno, vars(record)["detail"]) == (logging.WARNING, told.detail)
    assert vars(record)["method"] == "Sample"
    assert vars(record)["client"]


def test_strangers_cannot_fill_the_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of many lines in a second the first are written; the next second's first says how many were left out."""
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    sparingly = Sparingly(lines_per_s=3)
    assert [sparingly.allow() for _ in range(10)] == [0, 0, 0] + [None] * 7
    now = 101.0
    assert [sparingly.allow() for _ in range(4)] == [7, 0, 0, None]
    now = 1e9
    assert sparingly.allow() == 1


@pytest.mark.parametrize("method", ["Sample", "SampleStream"])
async def test_an_error_that_the_catalogue_does_not_know_is_hidden(
    held: GatewayServer, engine: PuppetEngine, method: str
) -> None:
    """A class of ours that was forgotten, or that belongs to the start, is INTERNAL, and its text stays here."""

    class Forgotten(errors.QueueFull):
        """A subclass of a known error is not that error."""

    for error in (
        Forgotten(retry_after_s=1.0, what="/secret/path"),
        errors.PortTaken(address="/secret/path"),
        grpc.aio.UsageError("/secret/path"),
        TimeoutError("/secret/path"),
        MemoryError("/secret/path"),
    ):
        engine.error = error
        async with wire(held.port) as channel:
            requests: dict[str, Any] = {
                "Sample": pb.SampleRequest(num_samples=1),
                "SampleStream": pb.SampleStreamRequest(num_samples=1),
            }
            ended = await failure(channel, method, requests[method])
        assert (type(error), ended.code()) == (type(error), grpc.StatusCode.INTERNAL)
        assert "secret" not in f"{ended.details()} {ended.trailing_metadata()}"


@pytest.mark.parametrize("limit", ["max_calls=4", "rate_limit={calls_per_s: 2, burst_s: 2}"])
async def test_too_many_calls_are_shed_with_a_delay(
    bundle_dir: Path, small: Bundle, engine: PuppetEngine, limit: str
) -> None:
    """Calls above a bound or a rate are RESOURCE_EXHAUSTED; after the time that is stated they pass."""
    engine.is_open.clear()
    config = settings(bundle_dir, f"gateway.admission.{limit}")
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        request = pb.SampleRequest(num_samples=1)
        held = [asyncio.ensure_future(call(channel, "Sample", request)) for _ in range(4)]
        await eventually(lambda: server.operations.decoder.num_rows == 4)
        error = await failure(channel, "Sample", request)
        found = trailers(error)
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert found["vae-error-reason"] == ("QUEUE_FULL" if limit.startswith("max") else "RATE_LIMITED")
        delay_ms = int(found["grpc-retry-pushback-ms"])
        assert 50 <= delay_ms <= 5000
        engine.is_open.set()
        await asyncio.gather(*held)
        if limit.startswith("rate"):
            await asyncio.sleep(delay_ms / 1000)
        await call(channel, "Sample", request)


async def test_the_retry_policy_reaches_a_service_that_recovers(bundle_dir: Path, small: Bundle) -> None:
    """UNAVAILABLE is repeated by a client that uses the recommended service configuration."""
    from serving.client import SERVICE_CONFIG  # noqa: PLC0415 - the configuration of one test
    from serving.errors import EngineUnavailable  # noqa: PLC0415 - the error of one test

    engine = PuppetEngine(small.manifest)
    engine.error = EngineUnavailable(graph="decoder", detail="lost")
    async with serving_with(engine, small.manifest, settings(bundle_dir)) as server:
        options = [("grpc.service_config", json.dumps(SERVICE_CONFIG))]
        async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}", options) as channel:
            pending = asyncio.ensure_future(call(channel, "Sample", pb.SampleRequest(num_samples=1)))
            await asyncio.sleep(0.05)
            engine.error = None
            assert (await pending).seed >= 0
