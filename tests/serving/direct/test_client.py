"""The gateway's end: which replica runs the rows, and what is told when one is gone."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.direct import client
from serving.direct.client import Lane, LaneLost, Lanes, RunFailed
from serving.direct.security import Security
from serving.direct.server import Address, Backlog, DirectServer, Run
from serving.errors import DeadlineExceeded
from serving.spans import RunTrace, current_run, new_context
from tests.certificates import Authority
from tests.serving.direct.test_security import tls

Rows = NDArray[Any]

ROWS = np.arange(6, dtype=np.float32).reshape(2, 3)
NOWHERE = Address("gone", "127.0.0.1", 9, bytes(32))


class Replica:
    """A real server whose graph doubles its rows when it may."""

    def __init__(self) -> None:
        self.may_answer = asyncio.Event()
        self.may_answer.set()
        self.num_begun = 0

    async def run(
        self, rows: Rows, outputs: Sequence[str], _timeout_s: float, _backlog: Backlog
    ) -> tuple[str, list[Any]]:
        """Double."""
        self.num_begun += 1
        await self.may_answer.wait()
        return "v1", [rows * 2 for _ in outputs]


@contextlib.asynccontextmanager
async def listening(run: Run, name: str = "one", security: Security | None = None) -> AsyncIterator[DirectServer]:
    """Start a replica's server; stop it at the end."""
    direct = DirectServer(run, replica=name, host="127.0.0.1", security=security)
    await direct.start()
    try:
        yield direct
    finally:
        await direct.close(0)


def lane_to(direct: DirectServer, security: Security | None = None) -> Lane:
    """Return a way to a server."""
    assert direct.address is not None
    return Lane(direct.address, security or Security())


async def eventually(condition: Callable[[], Any]) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.005)


async def test_rows_run_on_the_replica() -> None:
    """Outputs, version and time of the run come back; a connection is used again."""
    async with listening(Replica().run) as direct:
        lane = lane_to(direct)
        for _ in range(3):
            answer = await lane.run(ROWS, ["mean", "log_var"], 5)
            assert [output.tobytes() for output in answer.outputs] == [(ROWS * 2).tobytes()] * 2
            assert answer.version == "v1"
            assert answer.run_s >= 0
        assert len(lane._idle) == 1  # noqa: SLF001 - three runs in turn need one connection
        lane.close()


async def test_the_trace_of_a_run_crosses() -> None:
    """The replica works for the run that the gateway names, and for no other."""
    heard: list[RunTrace | None] = []

    async def listen(
        rows: Rows, _outputs: Sequence[str], _timeout_s: float, _backlog: Backlog
    ) -> tuple[str, list[Any]]:
        heard.append(current_run())
        return "v1", [rows]

    context = new_context()._replace(state="congo=t61,rojo=00f0 67aa")
    async with listening(listen) as direct:
        lane = lane_to(direct)
        await lane.run(ROWS, ["mean"], 5, ("gate", 0.0), context.token)
        await lane.run(ROWS, ["mean"], 5)
        lane.close()
    traced, untraced = heard
    assert traced is not None
    assert traced.context == context
    assert untraced is None


async def test_large_arrays_cross_whole() -> None:
    """Megabytes arrive as they were sent, both ways."""
    rows = np.random.default_rng(0).random((4096, 784), dtype=np.float32)
    async with listening(Replica().run) as direct:
        lane = lane_to(direct)
        (output,) = (await lane.run(rows, ["mean"], 30)).outputs
        lane.close()
    assert np.array_equal(output, rows * 2)


async def test_runs_at_a_time_do_not_mix() -> None:
    """Many in flight on one way: each gets its own rows."""
    async with listening(Replica().run) as direct:
        lane = lane_to(direct)

        async def run(value: int) -> bool:
            rows = np.full((value % 5 + 1, 3), value, np.float32)
            return np.array_equal((await lane.run(rows, ["mean"], 5)).outputs[0], rows * 2)

        assert all(await asyncio.gather(*(run(value) for value in range(100))))
        assert lane.num_in_flight == 0
        lane.close()


async def test_a_replica_that_dies_under_a_run_is_told() -> None:
    """The run in flight hears at once that it may have run, and the connection is forgotten."""
    replica = Replica()
    replica.may_answer.clear()
    async with listening(replica.run) as direct:
        lane = lane_to(direct)
        running = asyncio.create_task(lane.run(ROWS, ["mean"], 30))
        await eventually(lambda: replica.num_begun)
        await direct.close(0)
        with pytest.raises(LaneLost, match="connection lost") as lost:
            await running
    assert lost.value.may_have_run
    assert not lane.has_open_connections


async def test_a_replica_that_drains_answers_and_is_left() -> None:
    """The run in flight gets its rows; the connection that closed behind it is not used again."""
    replica = Replica()
    replica.may_answer.clear()
    async with listening(replica.run) as direct:
        lane = lane_to(direct)
        running = asyncio.create_task(lane.run(ROWS, ["mean"], 30))
        await eventually(lambda: replica.num_begun)
        closing = asyncio.create_task(direct.close(5))
        await asyncio.sleep(0)
        replica.may_answer.set()
        assert np.array_equal((await running).outputs[0], ROWS * 2)
        await closing
        await eventually(lambda: not lane.has_open_connections)


async def test_a_replica_that_is_not_there_never_ran() -> None:
    """A connection that cannot be made is told apart from one that broke."""
    with pytest.raises(LaneLost, match="no connection") as lost:
        await Lane(NOWHERE, Security()).run(ROWS, ["mean"], 5)
    assert not lost.value.may_have_run


async def test_an_idle_connection_that_ends_is_noticed_at_once() -> None:
    """No run has to fail first."""
    async with listening(Replica().run) as direct:
        lane = lane_to(direct)
        await lane.run(ROWS, ["mean"], 5)
        assert lane.has_open_connections
        await direct.close(0)
        await eventually(lambda: not lane.has_open_connections)


async def test_a_replica_that_hangs_is_given_up() -> None:
    """After the time the run is lost, and its connection with it: a late answer belongs to nobody."""
    replica = Replica()
    replica.may_answer.clear()
    async with listening(replica.run) as direct:
        lane = lane_to(direct)
        with pytest.raises(LaneLost, match="no answer in time"):
            await lane.run(ROWS, ["mean"], 0.05)
        assert not lane.has_open_connections
        replica.may_answer.set()
        assert np.array_equal((await lane.run(ROWS, ["mean"], 5)).outputs[0], ROWS * 2)
        lane.close()


async def test_who_leaves_takes_the_connection_along() -> None:
    """A cancelled run leaves no connection on which its answer could reach somebody else."""
    replica = Replica()
    replica.may_answer.clear()
    async with listening(replica.run) as direct:
        lane = lane_to(direct)
        running = asyncio.create_task(lane.run(ROWS, ["mean"], 30))
        await eventually(lambda: replica.num_begun)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert not lane.has_open_connections
        assert lane.num_in_flight == 0


async def test_failures_and_lateness_in_the_replica_are_told_apart() -> None:
    """A graph that raises is not a replica that is lost."""

    async def run(
        _rows: Rows, outputs: Sequence[str], _timeout_s: float, _backlog: Backlog
    ) -> tuple[str, list[Any]]:
        raise DeadlineExceeded if outputs[0] == "late" else ValueError

    async with listening(run) as direct:
        lane = lane_to(direct)
        with pytest.raises(DeadlineExceeded):
            await lane.run(ROWS, ["late"], 5)
        with pytest.raises(RunFailed, match="ValueError"):
            await lane.run(ROWS, ["mean"], 5)
        lane.close()


async def test_with_certificates_only_members_talk(tmp_path: Path) -> None:
    """Over mutual TLS rows run; a caller of another authority does not get in."""
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside, outside):
        folder.mkdir()
    security = tls(inside)
    async with listening(Replica().run, security=security) as direct:
        lane = lane_to(direct, security)
        assert np.array_equal((await lane.run(ROWS, ["mean"], 5)).outputs[0], ROWS * 2)
        lane.close()
        for stranger in (tls(outside, Authority("another")), Security()):
            with pytest.raises(LaneLost):
                await lane_to(direct, stranger).run(ROWS, ["mean"], 2)


@contextlib.asynccontextmanager
async def deployment(*names: str) -> AsyncIterator[tuple[Lanes, dict[str, DirectServer]]]:
    """Run replicas; yield the ways to them, all of them open."""
    lanes = Lanes()
    async with contextlib.AsyncExitStack() as stack:
        servers = {name: await stack.enter_async_context(listening(Replica().run, name)) for name in names}
        for direct in servers.values():
            assert direct.address is not None
            lanes.confirm(direct.address)
        stack.callback(lanes.close)
        await eventually(lambda: all(lane.has_open_connections for lane in lanes._lanes.values()))  # noqa: SLF001
        yield lanes, servers


async def test_the_least_busy_replica_is_next_in_turn_among_equals() -> None:
    """Equal replicas take turns; a busy one waits until others are as busy."""
    async with deployment("a", "b", "c") as (lanes, _):
        seen = {chosen.address.replica for _ in range(3) if (chosen := lanes.choose())}
        assert seen == {"a", "b", "c"}
        busy = lanes.choose()
        assert busy is not None
        busy.num_in_flight = 1
        assert all(lanes.choose() is not busy for _ in range(6))


async def test_a_replica_is_chosen_only_while_a_connection_to_it_is_open() -> None:
    """A replica that cannot be reached is never waited for, and one that stopped is left at once."""
    async with deployment("a") as (lanes, servers):
        lanes.confirm(NOWHERE)
        assert [lanes.choose().address.replica for _ in range(4)] == ["a"] * 4  # type: ignore[union-attr]
        await eventually(lambda: len(lanes) == 1)  # the other was given up
        await servers["a"].close(0)
        await eventually(lambda: lanes.choose() is None)


async def test_a_replica_that_cannot_be_reached_is_left_alone_for_a_while() -> None:
    """Its port may be closed to us: no attempt each second, and another address is another matter."""
    now = 0.0
    lanes = Lanes(clock=lambda: now)
    lanes.confirm(NOWHERE)
    await eventually(lambda: len(lanes) == 0)
    lanes.confirm(NOWHERE)
    assert len(lanes) == 0
    now = client._RETRY_AFTER_S + 1  # noqa: SLF001
    lanes.confirm(NOWHERE)
    assert len(lanes) == 1
    lanes.close()


async def test_a_replica_that_lost_a_run_is_avoided_for_the_time_asked_for() -> None:
    """A confirmation within it changes nothing; one after it brings the replica back."""
    now = 0.0
    async with listening(Replica().run) as direct:
        assert direct.address is not None
        lanes = Lanes(clock=lambda: now)
        lanes.confirm(direct.address)
        await eventually(lanes.choose)
        lane = lanes.choose()
        assert lane is not None
        lanes.drop(lane, avoid_s=5)
        lanes.confirm(direct.address)
        assert len(lanes) == 0
        now = 6.0
        lanes.confirm(direct.address)
        await eventually(lanes.choose)
        lanes.close()


async def test_a_replica_that_lost_its_idle_connections_is_connected_to_again() -> None:
    """Confirmed while no connection is open, it gets a new one."""
    async with deployment("a") as (lanes, servers):
        lane = lanes.choose()
        assert lane is not None
        for connection in lane._idle:  # noqa: SLF001
            connection.abort()
        await eventually(lambda: lanes.choose() is None)
        address = servers["a"].address
        assert address is not None
        lanes.confirm(address)
        await eventually(lambda: lanes.choose() is lane)


async def test_a_replica_at_another_address_is_another_one() -> None:
    """The same id with another port or token replaces the way; the same address keeps it."""
    lanes = Lanes()
    lanes.confirm(NOWHERE)
    (first,) = lanes._lanes.values()  # noqa: SLF001
    lanes.confirm(NOWHERE)
    assert list(lanes._lanes.values()) == [first]  # noqa: SLF001
    lanes.confirm(NOWHERE._replace(port=10))
    (second,) = lanes._lanes.values()  # noqa: SLF001
    assert second is not first
    lanes.close()


async def test_replicas_of_which_nothing_is_heard_are_forgotten() -> None:
    """Half a minute without a word and without a connection."""
    now = 0.0
    async with deployment("a") as (lanes, servers):
        lanes._clock = lambda: now  # noqa: SLF001
        (lane,) = lanes._lanes.values()  # noqa: SLF001
        lane.confirmed_at = 0.0
        await servers["a"].close(0)
        await eventually(lambda: not lane.has_open_connections)
        now = client._FORGET_AFTER_S + 1  # noqa: SLF001
        lanes.confirm(NOWHERE._replace(replica="other"))
        assert lane not in lanes._lanes.values()  # noqa: SLF001
