"""A line for each call: complete, escaped, without payloads, in the form that its reader wants."""

import asyncio
import io
import json
import os
import time
from typing import Any

import grpc
import pytest

from serving.config import AccessLogMode
from serving.gateway.access_log import AccessLog
from serving.gateway.calls import Call
from serving.tickets import Ticket

HOSTILE = 'x"\n{"event": "forged"}\x1b[31m' + "y" * 500


class Context:
    """What a call asks of gRPC when it begins."""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        """Return the caller's request id."""
        return (("x-request-id", "abc-1"),)


def call(client: str = "key:team-a", code: grpc.StatusCode = grpc.StatusCode.OK) -> Call:
    """Return a call that has ended."""
    context: Any = Context()
    ended = Call("vae.v1.VaeService/Sample", context)
    ended.client, ended.code, ended.request_bytes, ended.response_bytes = client, code, 12, 3456
    ended.taken = Ticket(0.0)
    ended.taken.num_rows, ended.taken.batch_rows, ended.taken.seed = 3, 17, 5
    ended.taken.queue_s, ended.taken.run_s = 0.001, 0.0025
    return ended


async def written(*calls: Call, mode: AccessLogMode = "all", as_json: bool = True) -> list[str]:
    """Return the lines about calls of 4 ms each, at the beginning of 1970."""
    stream = io.StringIO()
    log = AccessLog(mode, stream=stream, as_json=as_json, wall_clock=lambda: 0.25)
    for ended in calls:
        log.write(ended, 0.004)
    log.flush()
    return stream.getvalue().splitlines()


async def test_a_line_says_all_that_is_known() -> None:
    """Who, what, how it ended, sizes, times in whole microseconds, the seed that makes it again."""
    (line,) = await written(call())
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "info",
        "logger": "serving.access",
        "event": "call",
        "request_id": "abc-1",
        "client": "key:team-a",
        "method": "vae.v1.VaeService/Sample",
        "code": "OK",
        "total_us": 4000,
        "request_bytes": 12,
        "response_bytes": 3456,
        "rows": 3,
        "queue_us": 1000,
        "engine_us": 2500,
        "batch_rows": 17,
        "seed": 5,
    }


async def test_a_call_that_ran_nothing_has_no_times_of_rows() -> None:
    """A refused call has a reason instead."""
    refused = call(code=grpc.StatusCode.RESOURCE_EXHAUSTED)
    refused.taken, refused.reason = None, "QUEUE_FULL"
    (line,) = await written(refused)
    facts = json.loads(line)
    assert facts["reason"] == "QUEUE_FULL"
    assert not {"rows", "queue_us", "engine_us", "batch_rows", "seed"} & set(facts)


@pytest.mark.parametrize("as_json", [True, False])
async def test_a_client_cannot_forge_a_line(*, as_json: bool) -> None:
    """Control characters are escaped and long names cut: one call, one line."""
    (line,) = await written(call(client=HOSTILE), as_json=as_json)
    assert "\x1b" not in line
    assert "y" * 130 not in line
    assert "forged" in line
    if as_json:
        assert json.loads(line)["client"] == HOSTILE[:128]


async def test_a_line_for_people_reads_from_left_to_right() -> None:
    """Time, end, method, how long, for how many rows."""
    (line,) = await written(call(), as_json=False)
    assert line == (
        "00:00:00.250  OK  Sample  4.00 ms  3 rows (waited 1.00 ms, ran 2.50 ms, in a batch of 17)"
        '  client="key:team-a"  id=abc-1'
    )


@pytest.mark.parametrize(
    ("mode", "expected"), [("all", ["OK", "INTERNAL"]), ("errors", ["INTERNAL"]), ("none", [])]
)
async def test_the_mode_chooses(mode: AccessLogMode, expected: list[str]) -> None:
    """All calls, those that failed, or none."""
    lines = await written(call(), call(code=grpc.StatusCode.INTERNAL), mode=mode)
    assert [json.loads(line)["code"] for line in lines] == expected


async def test_lines_come_by_themselves_and_in_order() -> None:
    """After a tenth of a second, without anybody who asks for them."""
    stream = io.StringIO()
    log = AccessLog("all", stream=stream, as_json=True)
    log.write(call(), 0.001)
    log.write(call(), 0.002)
    assert stream.getvalue() == ""
    await asyncio.sleep(0.3)
    assert [json.loads(line)["total_us"] for line in stream.getvalue().splitlines()] == [1000, 2000]


async def test_a_reader_who_stops_does_not_stop_the_service(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipe that nobody reads is left half empty for other lines; what has no room is counted, and told later."""
    monkeypatch.setattr("serving.gateway.access_log._MAX_LINES", 2000)
    read_end, write_end = os.pipe()
    with os.fdopen(write_end, "w") as stream:
        log = AccessLog("all", stream=stream, as_json=True)
        ended = call()
        began = time.monotonic()
        for _ in range(6_000):
            log.write(ended, 0.001)
        log.flush(timeout_s=0.3)
        assert time.monotonic() - began < 10
        os.set_blocking(write_end, False)
        assert os.write(write_end, b"x" * 4096) == 4096  # there is room for others
        taken = b""
        while b"lines left out" not in taken or taken.count(b"\n") < 2_000:
            taken += await asyncio.to_thread(os.read, read_end, 1 << 20)
        log.flush()
    os.close(read_end)
    lines = [json.loads(line) for line in taken.replace(b"x", b"").splitlines()]
    left_out = sum(line["number"] for line in lines if line["event"] == "lines left out")
    assert left_out + sum(line["event"] == "call" for line in lines) == 6_000
    assert left_out > 0


async def test_a_reader_who_is_gone_ends_no_call() -> None:
    """A closed pipe switches the log off."""
    stream = io.StringIO()
    log = AccessLog("all", stream=stream, as_json=True)
    log.write(call(), 0.001)
    stream.close()
    log.flush()
    log.write(call(), 0.001)
    log.flush()
