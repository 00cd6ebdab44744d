"""Laws of `serving.queueing`: bounded runs, each row once and in order, urgent first, and fair."""

import asyncio
import math
from collections import Counter
from collections.abc import Iterable

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from serving.errors import DeadlineExceeded
from serving.queueing import Request, RowQueue, Slice, concatenate
from serving.tickets import LOWEST, Ticket

FOREVER = math.inf
CLIENTS = ("a", "b", "c", "d")


class Rows:
    """A source that is only as long as it says: the queue must not look inside."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    @property
    def nbytes(self) -> int:
        """One byte a row."""
        return self._num_rows


def request(
    num_rows: int,
    *,
    client: str = "",
    priority: int = 1,
    expires_at: float = FOREVER,
    arrived_at: float = 0.0,
) -> Request:
    """Return a request of so many rows."""
    return Request(Rows(num_rows), Ticket(expires_at, client=client, priority=priority), arrived_at=arrived_at)


def queue_of(requests: Iterable[Request], *, age_after_s: float = 1e9) -> RowQueue:
    """Return a queue in which requests wait."""
    queue = RowQueue(age_after_s=age_after_s)
    for waiting in requests:
        queue.add(waiting)
    return queue


def rows_of(batch: list[Slice]) -> Counter[str]:
    """Return the rows of each client in a run."""
    counts: Counter[str] = Counter()
    for owner, start, stop in batch:
        counts[owner.ticket.client] += stop - start
    return counts


def fair_shares(wants: list[int], space: int) -> list[int]:
    """Return the max-min fair shares by filling up row by row: the definition, as an oracle."""
    shares = [0] * len(wants)
    while space and shares != wants:
        poorest = min((i for i in range(len(wants)) if shares[i] < wants[i]), key=lambda i: shares[i])
        shares[poorest] += 1
        space -= 1
    return shares


async def test_the_small_are_in_the_next_run_whatever_the_large_want() -> None:
    """A client with 10,000 rows waits first, one with 3 comes later: the 3 are in the next run."""
    queue = queue_of([request(10_000, client="large", expires_at=1), request(3, client="small", expires_at=9)])
    assert rows_of(queue.take(64, 0.0)) == {"large": 61, "small": 3}
    assert queue.num_rows == 10_000 - 61


@given(wants=st.lists(st.integers(1, 40), min_size=1, max_size=12), max_rows=st.integers(1, 64))
@example(wants=[100, 100, 100], max_rows=64)
@example(wants=[1] * 12, max_rows=5)
@settings(max_examples=200, deadline=None)
def test_clients_share_a_run_max_min_fairly(wants: list[int], max_rows: int) -> None:
    """The shares are the oracle's, but for who gets the odd row; no space is left while somebody wants it."""

    async def check() -> None:
        queue = queue_of(request(want, client=str(index)) for index, want in enumerate(wants))
        got = rows_of(queue.take(max_rows, 0.0))
        assert sum(got.values()) == min(max_rows, sum(wants))
        expected = fair_shares(wants, max_rows)
        assert sorted(got[str(i)] for i in range(len(wants))) == sorted(expected)
        assert all(abs(got[str(i)] - share) <= 1 for i, share in enumerate(expected))

    asyncio.run(check())


@pytest.mark.parametrize("num_clients", [2, 3, 5, 7, 64])
async def test_the_greedy_get_equal_rows(num_clients: int) -> None:
    """Clients that all want more than there is get the same number of rows, but for one."""
    queue = queue_of(request(1000, client=str(index)) for index in range(num_clients))
    counts = rows_of(queue.take(64, 0.0))
    assert len(counts) == num_clients
    assert max(counts.values()) - min(counts.values()) <= 1
    assert sum(counts.values()) == 64


async def test_a_client_gains_nothing_by_many_requests() -> None:
    """A hundred requests of one client get what one request of another gets."""
    many = [request(1, client="many", expires_at=1) for _ in range(100)]
    queue = queue_of([*many, request(100, client="one", expires_at=2)])
    assert rows_of(queue.take(10, 0.0)) == {"many": 5, "one": 5}


async def test_more_clients_than_rows_get_one_each_by_deadline() -> None:
    """When not every client can have a row, the earliest deadlines have theirs, large or small."""
    queue = queue_of(request(1 + index, client=str(index), expires_at=100 - index) for index in range(20))
    assert rows_of(queue.take(8, 0.0)) == {str(index): 1 for index in range(19, 11, -1)}


async def test_the_large_are_not_starved_by_ever_new_small_ones() -> None:
    """Though new clients of one row would fill every run, a client of ten rows is done in bounded time."""
    large = request(10, client="large", expires_at=100.0)
    queue, runs = queue_of([large]), 0
    for index in range(12):
        queue.add(request(1, client=f"first {index}", expires_at=100.0))
    while large.num_waiting:
        runs += 1
        assert runs < 200
        for index in range(8):
            queue.add(request(1, client=f"{runs} {index}", expires_at=100.0 + runs))
        queue.take(8, 0.0)


async def test_urgent_rows_go_first() -> None:
    """A run is filled by priority; the less urgent get what is left."""
    queue = queue_of(
        [
            request(100, client="background", priority=3, expires_at=1),
            request(5, client="generation", priority=2, expires_at=2),
            request(6, client="sent", priority=1, expires_at=3),
        ]
    )
    assert rows_of(queue.take(16, 0.0)) == {"sent": 6, "generation": 5, "background": 5}


@pytest.mark.parametrize(("now", "first"), [(0.9, "urgent"), (1.0, "urgent"), (1.9, "urgent"), (2.0, "both")])
async def test_what_waits_moves_up(now: float, first: str) -> None:
    """A row of priority 3 has that of a new row of priority 1 after two times the age, and no time before."""
    old = request(50, client="old", priority=3, arrived_at=0.0)
    queue = queue_of([old, request(50, client="urgent", priority=1, arrived_at=now)], age_after_s=1.0)
    expected = {"urgent": 8} if first == "urgent" else {"urgent": 4, "old": 4}
    assert rows_of(queue.take(8, now)) == expected


async def test_nothing_moves_above_the_highest() -> None:
    """Rows of priority 1 that have waited long share with new ones: age is no priority of its own."""
    queue = queue_of([request(50, client="old"), request(50, client="new", arrived_at=99.0)], age_after_s=1.0)
    assert rows_of(queue.take(8, 99.0)) == {"old": 4, "new": 4}


async def test_inside_a_client_the_large_leave_half_to_the_rest() -> None:
    """The earliest deadline of a client takes half of its share at most, while others of its own wait."""
    first, second, third = (request(size, client="a", expires_at=i) for i, size in enumerate((100, 2, 3), start=1))
    queue = queue_of([third, second, first])
    batch = queue.take(16, 0.0)
    assert [(part.request, part.stop - part.start) for part in batch] == [(first, 11), (second, 2), (third, 3)]
    queue = queue_of([request(100, client="a", expires_at=1), request(100, client="a", expires_at=2)])
    assert [part.stop - part.start for part in queue.take(16, 0.0)] == [8, 8]


async def test_the_expired_are_told_and_take_no_space() -> None:
    """Rows whose deadline is now or past fail with DEADLINE_EXCEEDED; the run is filled with others."""
    past, now, alive = (request(20, client=str(i), expires_at=float(i)) for i in (1, 2, 3))
    queue = queue_of([past, now, alive])
    assert rows_of(queue.take(8, 2.0)) == {"3": 8}
    assert queue.num_rows == 12
    for dead in (past, now):
        with pytest.raises(DeadlineExceeded, match="the deadline passed"):
            dead.future.result()
    assert not alive.future.done()


async def test_a_half_taken_request_that_expires_takes_nothing_more() -> None:
    """The rest of a request that expires between two runs is dropped, and counted no more."""
    dying = request(20, expires_at=5.0)
    queue = queue_of([dying])
    queue.take(8, 0.0)
    assert queue.take(8, 6.0) == []
    assert (queue.num_rows, len(queue)) == (0, 0)
    with pytest.raises(DeadlineExceeded, match="passed"):
        dying.future.result()


async def test_forgetting_is_exact() -> None:
    """Who leaves takes along what is not yet in a run, once, whenever it leaves."""
    one, two = request(20), request(5)
    queue = queue_of([one, two])
    queue.take(8, 0.0)
    waiting = one.num_waiting
    before = queue.num_rows
    queue.discard(one)
    assert queue.num_rows == before - waiting
    queue.discard(one)
    assert queue.num_rows == before - waiting
    assert queue.clear() == [request_ for request_ in (two,) if request_.num_waiting]
    assert (queue.num_rows, len(queue)) == (0, 0)
    queue.discard(two)
    assert queue.num_rows == 0


async def test_slices_of_arrays_are_put_together_in_order() -> None:
    """The rows of a run are the rows of its slices; a single slice is not copied."""
    ticket = Ticket(FOREVER)
    arrays = [np.arange(12, dtype=np.float32).reshape(6, 2), -np.ones((3, 2), np.float32)]
    one, two = (Request(array, ticket, arrived_at=0.0) for array in arrays)
    one.take(1)
    batch = [one.take(3), two.take(2)]
    np.testing.assert_array_equal(concatenate(batch), np.concatenate([arrays[0][1:4], arrays[1][:2]]))
    assert np.shares_memory(concatenate(batch[:1]), arrays[0])


async def test_outputs_in_any_order_make_the_whole() -> None:
    """The parts of a request may come back in any order; the future resolves with the last of them, once."""
    whole = request(5)
    rows = np.arange(10).reshape(5, 2)
    assert not whole.deliver(3, (rows[3:], -rows[3:]))
    assert not whole.deliver(0, (rows[:1], -rows[:1]))
    assert not whole.future.done()
    assert whole.deliver(1, (rows[1:3], -rows[1:3]))
    for expected, output in zip((rows, -rows), whole.future.result(), strict=True):
        np.testing.assert_array_equal(output, expected)


async def test_a_failure_is_final() -> None:
    """Outputs that come after an error, and errors after outputs, change nothing."""
    failed, answered = request(2), request(1)
    failed.fail(DeadlineExceeded())
    assert not failed.deliver(0, (np.zeros((2, 1)),))
    with pytest.raises(DeadlineExceeded):
        failed.future.result()
    assert answered.deliver(0, (np.ones((1, 1)),))
    answered.fail(DeadlineExceeded())
    assert answered.future.result()[0].tolist() == [[1.0]]


REQUESTS = st.lists(
    st.tuples(st.sampled_from(CLIENTS), st.integers(1, 60), st.integers(1, 5)), min_size=0, max_size=10
)


@given(
    others=REQUESTS,
    size=st.integers(1, 60),
    client=st.sampled_from((*CLIENTS, "new")),
    expiry=st.integers(1, 5),
    max_rows=st.integers(2, 16).map(lambda half: 2 * half),  # two halves of an odd run leave a row to a third
)
@example(others=[("a", 2, 1), ("c", 1, 1), ("c", 1, 1)], size=2, client="b", expiry=1, max_rows=4)
@settings(max_examples=300, deadline=None)
def test_the_work_ahead_is_never_overestimated(
    others: list[tuple[str, int, int]], size: int, client: str, expiry: int, max_rows: int
) -> None:
    """As many full runs as are said to be ahead of a request end before the run with its last row begins."""

    async def check() -> None:
        queue = queue_of(request(rows, client=name, expires_at=100.0 + when) for name, rows, when in others)
        mine = request(size, client=client, expires_at=100.0 + expiry)
        ahead = queue.num_rows_before(mine, max_rows) // max_rows
        queue.add(mine)
        num_runs = 0
        while mine.num_waiting:
            queue.take(max_rows, 0.0)
            num_runs += 1
        assert num_runs - 1 >= ahead

    asyncio.run(check())


async def test_the_work_ahead_is_what_will_be_run_first() -> None:
    """Rows of earlier deadlines of one's own, fair shares of others; nothing later, less urgent or expired."""
    mine = request(4, client="me", priority=2, expires_at=50.0, arrived_at=10.0)
    assert queue_of([]).num_rows_before(mine, 512) == 0
    own = [request(100, client="me", expires_at=40.0), request(100, client="me", expires_at=40.0)]
    assert queue_of(own).num_rows_before(mine, 512) == 104  # the larger of the two leaves it half of each run
    assert queue_of([request(100, client="me", expires_at=60.0)]).num_rows_before(mine, 512) == 0
    assert queue_of([request(100, client="other", expires_at=60.0)]).num_rows_before(mine, 512) == 3  # but for one
    assert queue_of([request(3, client="other", expires_at=60.0)]).num_rows_before(mine, 512) == 3
    assert queue_of([request(100, client="me", priority=3, expires_at=40.0)]).num_rows_before(mine, 512) == 0
    assert queue_of([request(100, client="me", expires_at=9.0)]).num_rows_before(mine, 512) == 0


class Machine(RuleBasedStateMachine):
    """Requests come, leave, expire and are taken; a list of (request, row) says what may still be taken."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.now = 100.0
        self.waiting: dict[Request, list[int]] = {}
        self.taken: dict[Request, list[int]] = {}

    @initialize(age_after_s=st.sampled_from([0.5, 2.0, 1e9]))
    def begin(self, age_after_s: float) -> None:
        """Begin empty."""
        self.age_after_s = age_after_s
        self.queue = RowQueue(age_after_s=age_after_s)

    def teardown(self) -> None:
        """Let go of the loop."""
        for owner in [*self.waiting, *self.taken]:
            if owner.future.done() and not owner.future.cancelled():
                owner.future.exception()
        self.loop.close()

    @rule(
        num_rows=st.sampled_from([1, 1, 2, 5, 40]),
        client=st.sampled_from(CLIENTS),
        priority=st.integers(1, LOWEST),
        seconds=st.sampled_from([0.0, 1.0, 3.0, FOREVER]),
    )
    def submit(self, num_rows: int, client: str, priority: int, seconds: float) -> None:
        """Let a request wait."""

        async def make() -> Request:
            return request(
                num_rows,
                client=client,
                priority=priority,
                expires_at=self.now + seconds,
                arrived_at=self.now,
            )

        made = self.loop.run_until_complete(make())
        self.queue.add(made)
        self.waiting[made] = list(range(num_rows))
        self.taken[made] = []

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0]))
    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds

    @precondition(lambda self: self.waiting)
    @rule(data=st.data(), leaves=st.booleans())
    def cancel(self, data: st.DataObject, *, leaves: bool) -> None:
        """Cancel a request; its caller takes it along at once, or the queue finds out."""
        gone = data.draw(st.sampled_from(list(self.waiting)))
        gone.future.cancel()
        if leaves:
            self.queue.discard(gone)
            del self.waiting[gone]

    @rule(max_rows=st.sampled_from([1, 2, 7, 16, 64]))
    def take(self, max_rows: int) -> None:
        """Take a run and hold it against the laws."""
        alive = {
            owner: rows
            for owner, rows in self.waiting.items()
            if rows and owner.expires_at > self.now and not owner.future.done()
        }
        levels = {owner: self.level_of(owner) for owner in alive}
        before = {owner: len(rows) for owner, rows in alive.items()}
        batch = self.queue.take(max_rows, self.now)
        assert sum(part.stop - part.start for part in batch) == min(max_rows, sum(before.values()))
        assert len({part.request for part in batch}) == len(batch)
        counts: Counter[Request] = Counter()
        for owner, start, stop in batch:
            assert stop > start
            rows = alive[owner]  # nothing of the dead
            assert rows[: stop - start] == list(range(start, stop))  # the next ones, in order, each once
            del rows[: stop - start]
            self.taken[owner].extend(range(start, stop))
            counts[owner] = stop - start
        self.check_fairness(counts, before, levels)
        self.waiting = {owner: rows for owner, rows in alive.items() if rows}

    def level_of(self, owner: Request) -> int:
        """Return the priority of a request that may have moved up."""
        return max(1, owner.ticket.priority - math.floor((self.now - owner.arrived_at) / self.age_after_s))

    def check_fairness(
        self, counts: Counter[Request], before: dict[Request, int], levels: dict[Request, int]
    ) -> None:
        """Assert that a level gets rows only when those above want none, and its clients get fair shares."""
        space = sum(counts.values())
        for level in sorted(set(levels.values())):
            wants: Counter[str] = Counter()
            got: Counter[str] = Counter()
            for owner, num_waiting in before.items():
                if levels[owner] == level:
                    wants[owner.ticket.client] += num_waiting
                    got[owner.ticket.client] += counts[owner]
            expected = fair_shares(list(wants.values()), space)
            assert sorted(got.values()) == sorted(expected)
            space -= sum(expected)

    @invariant()
    def counts_agree(self) -> None:
        """The number of rows is the sum over the requests, whatever happened."""
        if hasattr(self, "queue"):
            assert self.queue.num_rows == sum(owner.num_waiting for owner in self.queue)
            assert self.queue.num_rows >= 0
            assert set(self.queue) == set(self.waiting)


TestRowQueue = Machine.TestCase
TestRowQueue.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
