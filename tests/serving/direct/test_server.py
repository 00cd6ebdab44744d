"""The replica's end: who is let in, what is answered, how it ends."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.direct import frames, server
from serving.direct.frames import LENGTH
from serving.direct.server import Address, Backlog, DirectServer, question
from serving.errors import DeadlineExceeded

Rows = NDArray[Any]

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)


@contextlib.asynccontextmanager
async def serving(run: server.Run) -> AsyncIterator[DirectServer]:
    """Start a server; stop it at the end."""
    direct = DirectServer(run, replica="one", host="127.0.0.1")
    await direct.start()
    try:
        yield direct
    finally:
        await direct.close(0)


async def double(
    rows: Rows, outputs: Sequence[str], _timeout_s: float, _backlog: Backlog
) -> tuple[str, list[Any]]:
    """Answer the rows doubled, once for each output."""
    return "v1", [rows * 2 for _ in outputs]


async def ask(address: Address, *outputs: str, token: bytes | None = None) -> tuple[str, list[Any]] | None:
    """Ask over a plain socket; return the answer, or None if there was none."""
    reader, writer = await asyncio.open_connection(address.host, address.port)
    try:
        writer.write(address.token if token is None else token)
        writer.writelines(frames.pack(question(outputs or ("mean",), 5.0, ("gate", 3.5)), [ROWS]))
        (length,) = LENGTH.unpack(await reader.readexactly(LENGTH.size))
        return frames.unpack(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    finally:
        writer.close()


async def test_rows_are_run() -> None:
    """The answer says it is done, by which version, in which time, and brings each output."""
    async with serving(double) as direct:
        assert direct.address is not None
        answer = await ask(direct.address, "mean", "log_var")
    assert answer is not None
    kind, version, run_us = answer[0].split(" ")
    assert (kind, version) == (server.DONE, "v1")
    assert int(run_us) >= 0
    assert [value.tobytes() for value in answer[1]] == [(ROWS * 2).tobytes()] * 2


@pytest.mark.parametrize("token", [b"", b"x" * 32, bytes(31)])
async def test_nobody_is_served_without_the_token(token: bytes) -> None:
    """Another token, or none, gets no answer at all, and nothing runs."""
    runs: list[int] = []

    async def count(
        rows: Rows, _outputs: Sequence[str], _timeout_s: float, _backlog: Backlog
    ) -> tuple[str, list[Any]]:
        runs.append(len(rows))
        return "v1", []

    async with serving(count) as direct:
        assert direct.address is not None
        assert await ask(direct.address, token=token) is None
    assert not runs


async def test_who_says_nothing_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """A connection without a token ends after some seconds, and holds nothing for ever."""
    monkeypatch.setattr(server, "_PREAMBLE_TIMEOUT_S", 0.05)
    async with serving(double) as direct:
        assert direct.address is not None
        reader, writer = await asyncio.open_connection(direct.address.host, direct.address.port)
        with contextlib.suppress(ConnectionResetError):
            assert await asyncio.wait_for(reader.read(), 5) == b""
        writer.close()


async def test_what_the_gateway_says_arrives() -> None:
    """Names of outputs, the time that is left and what waits in the gateway reach the run."""
    heard: list[object] = []

    async def listen(_rows: Rows, *told: object) -> tuple[str, list[Any]]:
        heard.extend(told)
        return "v1", []

    async with serving(listen) as direct:
        assert direct.address is not None
        await ask(direct.address, "mean", "logits")
    assert heard == [("mean", "logits"), 5.0, ("gate", 3.5)]


async def test_tokens_are_made_for_each_server() -> None:
    """No two replicas have the same token, and it is 256 bits long."""
    async with serving(double) as one, serving(double) as other:
        assert one.address is not None
        assert other.address is not None
        assert len(one.address.token) == 32
        assert one.address.token != other.address.token


async def test_a_run_that_fails_says_so_without_its_text(caplog: pytest.LogCaptureFixture) -> None:
    """The caller learns the class of the error; text and stack stay in the replica's log."""

    async def fail(
        _rows: Rows, _outputs: Sequence[str], _timeout_s: float, _backlog: Backlog
    ) -> tuple[str, list[Any]]:
        raise ValueError("secret")

    async with serving(fail) as direct:
        assert direct.address is not None
        with caplog.at_level(logging.ERROR):
            assert await ask(direct.address) == ("failed ValueError", [])
    assert "secret" in caplog.text


async def test_a_run_whose_turn_came_too_late_says_so() -> None:
    """What expired is told apart from what failed."""

    async def late(
        _rows: Rows, _outputs: Sequence[str], _timeout_s: float, _backlog: Backlog
    ) -> tuple[str, list[Any]]:
        raise DeadlineExceeded

    async with serving(late) as direct:
        assert direct.address is not None
        assert await ask(direct.address) == (server.EXPIRED, [])


async def test_a_run_ends_with_its_caller() -> None:
    """When the caller goes, what runs for it is cancelled."""
    began, ended = asyncio.Event(), asyncio.Event()

    async def wait(
        _rows: Rows, _outputs: Sequence[str], _timeout_s: float, _backlog: Backlog
    ) -> tuple[str, list[Any]]:
        began.set()
        try:
            await asyncio.sleep(60)
        finally:
            ended.set()
        return "v1", []

    async with serving(wait) as direct:
        assert direct.address is not None
        asking = asyncio.create_task(ask(direct.address))
        await asyncio.wait_for(began.wait(), 5)
        asking.cancel()
        await asyncio.wait_for(ended.wait(), 5)


async def test_a_drain_answers_what_runs_and_takes_nothing_new() -> None:
    """Closing waits for the run in flight, which gets its answer; who comes later finds nobody."""
    began, may_end = asyncio.Event(), asyncio.Event()

    async def wait(
        rows: Rows, _outputs: Sequence[str], _timeout_s: float, _backlog: Backlog
    ) -> tuple[str, list[Any]]:
        began.set()
        await may_end.wait()
        return "v1", [rows]

    async with serving(wait) as direct:
        address = direct.address
        assert address is not None
        asking = asyncio.create_task(ask(address))
        await asyncio.wait_for(began.wait(), 5)
        closing = asyncio.create_task(direct.close(5))
        await asyncio.sleep(0.05)
        assert not closing.done()
        assert direct.address is None
        with pytest.raises(OSError, match=r"."):
            await ask(address)
        may_end.set()
        answer = await asking
        await closing
    assert answer is not None
    assert answer[0].startswith(server.DONE)
