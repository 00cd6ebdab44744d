"""Laws of `serving.batching`: each caller its own rows, bounded, fair, by deadline, whatever happens."""

import asyncio
import gc
import math
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from serving.batching import BatchReport, DropReport, RowBatcher, Run
from serving.config import MIB, BatchingConfig
from serving.errors import DeadlineExceeded, DeadlineTooShort, EngineUnavailable, QueueFull
from serving.queueing import Outputs
from serving.tickets import Ticket

Rows = NDArray[Any]
FOREVER = math.inf
TIMEOUT_S = 2.0


class Clock:
    """A clock that moves when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        """Return the time."""
        return self.now


class Puppet:
    """An engine whose runs end when they are told to."""

    def __init__(self) -> None:
        self.runs: list[tuple[Rows, asyncio.Future[Outputs]]] = []

    async def run(self, rows: Rows, _timeout_s: float = FOREVER) -> Outputs:
        """Begin a run."""
        future: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        self.runs.append((rows, future))
        return await future

    def sizes(self) -> list[int]:
        """Return the rows of every run so far."""
        return [len(rows) for rows, _ in self.runs]

    def finish(self, index: int) -> None:
        """End a run as it should."""
        rows, future = self.runs[index]
        if not future.done():
            future.set_result((rows * 2, rows + 0.5))

    def fail(self, index: int, error: BaseException) -> None:
        """End a run with an error."""
        self.runs[index][1].set_exception(error)


def tagged(tag: int, num_rows: int, width: int = 3) -> Rows:
    """Return rows that say whose they are: each value is unique and exact in float32."""
    return (np.arange(num_rows * width).reshape(num_rows, width) + tag * 10_000).astype(np.float32)


async def turns(number: int = 100) -> None:
    """Let everything happen that does not wait for the engine; rows gather for some forty idle turns."""
    for _ in range(number):
        await asyncio.sleep(0)


async def done(awaitable: Awaitable[Any]) -> Any:  # noqa: ANN401 - whatever is awaited
    """Await, but never for ever: a caller who hangs fails the test."""
    return await asyncio.wait_for(asyncio.ensure_future(awaitable), TIMEOUT_S)


@pytest.fixture
def puppet() -> Puppet:
    """Return an engine that obeys."""
    return Puppet()


@pytest.fixture
def clock() -> Clock:
    """Return a clock that obeys."""
    return Clock()


Make = Callable[..., RowBatcher]


def _bounds(values: dict[str, float]) -> BatchingConfig:
    return BatchingConfig.parse({"max_batch_rows": 8, "max_full_in_flight": 1} | values)


@pytest.fixture
async def make(puppet: Puppet, clock: Clock) -> AsyncIterator[Make]:
    """Return a maker of batchers on the puppet; they are closed at the end."""
    made: list[RowBatcher] = []

    def maker(
        *,
        num_slots: int = 1,
        num_replicas: Callable[[], int] = lambda: 1,
        tell: Callable[[BatchReport | DropReport], None] = lambda _: None,
        **values: float,
    ) -> RowBatcher:
        batcher = RowBatcher(
            puppet.run,
            _bounds(values),
            name="encoder",
            num_slots=num_slots,
            num_replicas=num_replicas,
            clock=clock,
            tell=tell,
        )
        made.append(batcher)
        return batcher

    yield maker
    for batcher in made:
        await batcher.close()


def submit(
    batcher: RowBatcher, rows: Rows, expires_at: float = FOREVER, *, client: str = "", priority: int = 1
) -> asyncio.Task[Outputs]:
    """Submit in a task of its own."""
    return submit_with(batcher, rows, Ticket(expires_at, client=client, priority=priority))


def submit_with(batcher: RowBatcher, rows: Rows, ticket: Ticket) -> asyncio.Task[Outputs]:
    """Submit in a task of its own, with a ticket to look at."""
    task = asyncio.get_running_loop().create_task(batcher.submit(rows, ticket))
    task.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # not every test asks for the end
    return task


async def test_an_idle_engine_gets_the_first_row_at_once(make: Make, puppet: Puppet) -> None:
    """Nothing waits for company while the engine has nothing to do: no timer, no clock."""
    batcher = make()
    task = submit(batcher, tagged(1, 1))
    await turns(3)
    assert puppet.sizes() == [1]
    puppet.finish(0)
    doubled, shifted = await done(task)
    np.testing.assert_array_equal(doubled, tagged(1, 1) * 2)
    np.testing.assert_array_equal(shifted, tagged(1, 1) + 0.5)


async def test_rows_that_keep_coming_share_a_run(make: Make, puppet: Puppet) -> None:
    """Rows that come in turn after turn gather for a free slot, up to a full batch."""
    batcher = make(num_slots=2)
    submit(batcher, tagged(0, 1))
    await turns()
    for i in range(5):
        submit(batcher, tagged(1 + i, 1))
        await turns(4)
    assert puppet.sizes() == [1]
    await turns()
    assert puppet.sizes() == [1, 5]


async def test_who_was_answered_together_comes_back_together(make: Make, puppet: Puppet, clock: Clock) -> None:
    """After a run of several calls the first row waits for the others; after a run of its own, or later, not."""
    batcher = make(max_gather_s=0.5)
    for i in range(2):
        submit(batcher, tagged(i, 1))
    await turns()
    assert puppet.sizes() == [2]
    puppet.finish(0)
    await turns(3)
    clock.now += 0.4
    submit(batcher, tagged(2, 1))
    await turns(3)
    assert puppet.sizes() == [2]
    submit(batcher, tagged(3, 1))
    await turns()
    assert puppet.sizes() == [2, 2]
    puppet.finish(1)
    await turns(3)
    clock.now += 0.6
    for i in range(2):
        submit(batcher, tagged(4 + i, 1))
        await turns(3)
        assert puppet.sizes() == [2, 2, *[1] * (i + 1)]
        puppet.finish(2 + i)
        await turns(3)


async def test_gathering_has_an_end(make: Make, puppet: Puppet, clock: Clock) -> None:
    """Rows that never stop coming do not keep the first of them waiting longer than the bound."""
    batcher = make(num_slots=2, max_batch_rows=1000, max_gather_s=0.5)
    submit(batcher, tagged(0, 1))
    await turns()
    for i in range(10):
        clock.now += 0.1
        submit(batcher, tagged(1 + i, 1))
        await turns(4)
    assert len(puppet.runs) == 2
    assert 4 <= puppet.sizes()[1] <= 7


async def test_requests_of_one_turn_share_the_first_run(make: Make, puppet: Puppet) -> None:
    """What arrives in the same turn of the loop runs together."""
    batcher = make()
    tasks = [submit(batcher, tagged(i, 2)) for i in range(3)]
    await turns()
    assert puppet.sizes() == [6]
    puppet.finish(0)
    for i, task in enumerate(tasks):
        np.testing.assert_array_equal((await done(task))[0], tagged(i, 2) * 2)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 20, 1), (17, 16, 15), (64,), (8, 8, 8), (1, 9, 1, 9)])
async def test_rows_keep_their_order_whatever_the_grouping(
    make: Make, puppet: Puppet, sizes: tuple[int, ...]
) -> None:
    """Each caller gets its own rows in its own order, split and mixed as they may be."""
    batcher = make()
    tasks = [submit(batcher, tagged(i, size)) for i, size in enumerate(sizes)]
    for index in range(sum(sizes)):
        await turns()
        if index < len(puppet.runs):
            puppet.finish(index)
    for i, (task, size) in enumerate(zip(tasks, sizes, strict=True)):
        doubled, shifted = await done(task)
        np.testing.assert_array_equal(doubled, tagged(i, size) * 2)
        np.testing.assert_array_equal(shifted, tagged(i, size) + 0.5)
    assert sum(puppet.sizes()) == sum(sizes)
    assert max(puppet.sizes()) <= 8
    assert batcher.num_rows == 0


async def test_runs_that_end_out_of_order_mix_nothing(make: Make, puppet: Puppet) -> None:
    """A request split over two runs is put together in its order when the later run ends first."""
    batcher = make(num_slots=3)
    task = submit(batcher, tagged(1, 20))
    await turns()
    assert puppet.sizes() == [8, 8, 4]
    for index in (2, 0, 1):
        puppet.finish(index)
        await turns()
    np.testing.assert_array_equal((await done(task))[0], tagged(1, 20) * 2)


async def test_nobody_takes_more_than_half_while_others_wait(make: Make, puppet: Puppet) -> None:
    """A request of many rows leaves half of a batch to the small ones that wait behind it."""
    batcher = make()
    submit(batcher, tagged(0, 1))
    await turns()
    submit(batcher, tagged(1, 100))
    small = [submit(batcher, tagged(2 + i, 1)) for i in range(4)]
    await turns()
    puppet.finish(0)
    await turns()
    assert puppet.sizes() == [1, 8]
    np.testing.assert_array_equal(
        puppet.runs[1][0], np.concatenate([tagged(1, 4), *(tagged(2 + i, 1) for i in range(4))])
    )
    puppet.finish(1)
    for i, task in enumerate(small):
        np.testing.assert_array_equal((await done(task))[0], tagged(2 + i, 1) * 2)


async def test_what_nobody_else_wants_goes_to_the_large(make: Make, puppet: Puppet) -> None:
    """Fairness wastes no space: two large requests and one small one fill the batch."""
    batcher = make()
    submit(batcher, tagged(0, 1))
    await turns()
    submit(batcher, tagged(1, 100))
    submit(batcher, tagged(2, 1))
    await turns()
    puppet.finish(0)
    await turns()
    assert puppet.sizes() == [1, 8]
    np.testing.assert_array_equal(puppet.runs[1][0], np.concatenate([tagged(1, 7), tagged(2, 1)]))


async def test_a_full_batch_goes_out_beyond_the_slots(make: Make, puppet: Puppet) -> None:
    """Full batches go out up to their own bound, so that pressure is visible; a part of one waits."""
    batcher = make(num_slots=1, max_full_in_flight=3)
    submit(batcher, tagged(0, 1))
    await turns()
    submit(batcher, tagged(1, 7))
    await turns()
    assert puppet.sizes() == [1]
    submit(batcher, tagged(2, 1))
    await turns()
    assert puppet.sizes() == [1, 8]
    submit(batcher, tagged(3, 30))
    await turns()
    assert puppet.sizes() == [1, 8, 8]
    assert batcher.num_in_flight == 3


async def test_slots_and_full_batches_follow_the_replicas(make: Make, puppet: Puppet) -> None:
    """With a second replica twice as many runs go out, of rows that gather and of full batches; and back."""
    num_replicas = 1
    batcher = make(num_replicas=lambda: num_replicas, max_full_in_flight=2)
    for tag in range(3):
        submit(batcher, tagged(tag, 1))
        await turns()
    assert puppet.sizes() == [1]
    num_replicas = 2
    submit(batcher, tagged(3, 1))
    await turns()
    assert puppet.sizes() == [1, 3]
    submit(batcher, tagged(4, 30))
    await turns()
    assert puppet.sizes() == [1, 3, 8, 8]
    assert batcher.num_in_flight == 2 * 2
    assert batcher.num_waiting == 14
    num_replicas = 1
    puppet.finish(0)
    await turns()
    assert batcher.num_in_flight == 3, "what is in flight ends as it began, and nothing takes its place"


async def test_idle_replicas_share_what_waits(make: Make, puppet: Puppet) -> None:
    """A large request does not keep one replica busy beside idle ones, and gets its rows in order."""
    batcher = make(num_replicas=lambda: 4, max_batch_rows=512)
    task = submit(batcher, tagged(1, 500))
    await turns()
    assert puppet.sizes() == [125] * 4
    for index in (2, 0, 3, 1):
        puppet.finish(index)
    doubled, _ = await done(task)
    np.testing.assert_array_equal(doubled, tagged(1, 500) * 2)


async def test_few_rows_are_not_shared(make: Make, puppet: Puppet) -> None:
    """A call costs milliseconds whatever its size: below 64 rows one replica does them."""
    batcher = make(num_replicas=lambda: 4, max_batch_rows=512)
    submit(batcher, tagged(1, 100))
    await turns()
    assert puppet.sizes() == [64, 36]


async def test_a_graph_that_wakes_up_is_not_stalled(make: Make, puppet: Puppet, clock: Clock) -> None:
    """Rows wait while no replica runs on purpose; they go out, once one at a time, and health says nothing."""
    num_replicas = 0
    batcher = make(num_replicas=lambda: num_replicas, stall_after_s=10)
    submit(batcher, tagged(0, 1))
    await turns()
    assert puppet.sizes() == [1]
    clock.now += 11
    assert not batcher.is_stalled
    num_replicas = 1
    assert batcher.is_stalled


async def test_the_dead_do_not_make_a_batch_full(make: Make, puppet: Puppet) -> None:
    """Cancelled rows do not count as pressure: what is left waits for a slot."""
    batcher = make(num_slots=1, max_full_in_flight=3)
    submit(batcher, tagged(0, 1))
    await turns()
    task = submit(batcher, tagged(1, 7))
    await turns()
    task.cancel()
    await turns()
    submit(batcher, tagged(2, 1))
    await turns()
    assert puppet.sizes() == [1]


async def test_the_earliest_deadline_goes_first(make: Make, puppet: Puppet, clock: Clock) -> None:
    """Rows run in the order of their deadlines; among equals, first come is first served."""
    batcher = make(max_batch_rows=1)
    submit(batcher, tagged(0, 1))
    await turns()
    for tag, seconds in ((1, 30), (2, 10), (3, 20), (4, 10), (5, 40)):
        submit(batcher, tagged(tag, 1), clock.now + seconds)
        await turns()
    for index in range(6):
        puppet.finish(index)
        await turns()
    order = [int(rows[0, 0]) // 10_000 for rows, _ in puppet.runs]
    assert order == [0, 2, 4, 3, 1, 5]


async def test_expired_rows_never_reach_the_engine(make: Make, puppet: Puppet, clock: Clock) -> None:
    """Who has stopped waiting is told so, and costs nothing."""
    batcher = make()
    first = submit(batcher, tagged(0, 1))
    await turns()
    late = submit(batcher, tagged(1, 3), clock.now + 5)
    alive = submit(batcher, tagged(2, 1), clock.now + 50)
    await turns()
    clock.now += 10
    puppet.finish(0)
    with pytest.raises(DeadlineExceeded, match="the deadline passed"):
        await done(late)
    await turns()
    assert puppet.sizes() == [1, 1]
    puppet.finish(1)
    await done(asyncio.gather(first, alive))
    assert batcher.num_rows == 0


async def test_rows_that_come_too_late_are_refused(make: Make, puppet: Puppet, clock: Clock) -> None:
    """Rows that have expired on arrival do not run."""
    batcher = make()
    with pytest.raises(DeadlineExceeded, match="the deadline passed"):
        await done(submit(batcher, tagged(0, 1), clock.now - 1))
    assert puppet.runs == []


async def test_cancelled_rows_never_reach_the_engine(make: Make, puppet: Puppet) -> None:
    """A caller who goes away takes its rows along; the counters say so at once."""
    batcher = make()
    submit(batcher, tagged(0, 1))
    await turns()
    gone = submit(batcher, tagged(1, 5))
    await turns()
    assert batcher.num_rows == 6
    gone.cancel()
    await turns()
    assert batcher.num_rows == 1
    puppet.finish(0)
    await turns()
    assert puppet.sizes() == [1]


async def test_a_half_run_request_stops_when_cancelled(make: Make, puppet: Puppet) -> None:
    """The rest of a request whose caller is gone does not run."""
    batcher = make()
    gone = submit(batcher, tagged(1, 100))
    await turns()
    gone.cancel()
    await turns()
    puppet.finish(0)
    await turns()
    assert puppet.sizes() == [8]
    assert batcher.num_rows == 0


async def test_rows_of_callers_who_left_do_not_fill_the_memory(make: Make, puppet: Puppet) -> None:
    """While the engine hangs, callers come and give up: what they brought is let go, and the bound holds."""
    batcher = make(max_batch_rows=64)
    submit(batcher, tagged(0, 1))
    await turns()
    assert puppet.sizes() == [1]
    alive: list[weakref.ref[Rows]] = []
    for i in range(50):
        rows = tagged(i, 4)
        alive.append(weakref.ref(rows))
        task = submit(batcher, rows)
        await turns()
        task.cancel()
        await turns()
        del rows, task
    gc.collect()
    assert sum(ref() is not None for ref in alive) <= 1


async def test_a_full_queue_sheds_and_says_when_to_return(make: Make, puppet: Puppet) -> None:
    """Rows above the bound are refused with a delay; room that is made can be used again."""
    batcher = make(max_queue_rows=10)
    first = submit(batcher, tagged(0, 6))
    await turns()
    second = submit(batcher, tagged(1, 4))
    await turns()
    with pytest.raises(QueueFull, match="the service is busy; retry in ") as caught:
        await done(batcher.submit(tagged(2, 1), Ticket(FOREVER)))
    assert 0.05 <= caught.value.retry_after_s <= 5
    assert batcher.num_rows == 10
    second.cancel()
    await turns()
    third = submit(batcher, tagged(3, 4))
    await turns()
    puppet.finish(0)
    await turns()
    puppet.finish(1)
    await done(asyncio.gather(first, third))
    assert batcher.num_rows == 0
    fourth = submit(batcher, tagged(4, 10))
    await turns()
    assert batcher.num_rows == 10
    fourth.cancel()


async def test_the_queue_is_bounded_in_bytes(make: Make) -> None:
    """A few wide rows fill the queue as many narrow ones do; what leaves makes room."""
    batcher = make(max_queue_bytes=MIB)
    wide = np.zeros((1, MIB // 8), np.float32)
    first, second = submit(batcher, wide), submit(batcher, wide)
    await turns()
    with pytest.raises(QueueFull, match="busy"):
        await done(batcher.submit(wide, Ticket(FOREVER)))
    second.cancel()
    await turns()
    third = submit(batcher, wide)
    await turns()
    assert batcher.num_rows == 2
    first.cancel()
    third.cancel()


async def test_one_request_always_fits_an_empty_queue(make: Make, puppet: Puppet) -> None:
    """A request above the bound is served when nothing else is there: the limits of a call bound it."""
    batcher = make(max_queue_rows=4, max_batch_rows=32)
    task = submit(batcher, tagged(0, 20))
    await turns()
    puppet.finish(0)
    assert len((await done(task))[0]) == 20


async def test_the_delay_grows_with_the_queue(make: Make, puppet: Puppet, clock: Clock) -> None:
    """The hint is the time in which the measured rate empties the queue."""
    batcher = make(max_queue_rows=100, max_batch_rows=10)
    task = submit(batcher, tagged(0, 10))
    await turns()
    clock.now += 0.1
    puppet.finish(0)
    await done(task)
    submit(batcher, tagged(1, 100))
    await turns()
    with pytest.raises(QueueFull, match=r"retry in 1\.00 s") as caught:
        await done(batcher.submit(tagged(2, 1), Ticket(FOREVER)))
    assert caught.value.retry_after_s == pytest.approx(1.0)  # 100 rows at 10 rows in 0.1 s


class Poison(Exception):
    """What the engine says to a poisonous row."""


async def _refuse_poison(rows: Rows, _timeout_s: float) -> Outputs:
    await asyncio.sleep(0)
    if (rows < 0).any():
        raise Poison("poison")
    return (rows * 2,)


def _on(run: Run, *, num_slots: int = 1, **values: float) -> RowBatcher:
    return RowBatcher(run, _bounds(values), name="encoder", num_slots=num_slots)


async def test_a_poisonous_request_hurts_only_itself() -> None:
    """The requests that shared a run with it get their rows; it gets its own error."""
    batcher = _on(_refuse_poison)
    tasks = [submit(batcher, tagged(i, 2)) for i in range(3)]
    poisonous = submit(batcher, -tagged(1, 2))
    with pytest.raises(Poison, match="poison"):
        await done(poisonous)
    for i, task in enumerate(tasks):
        np.testing.assert_array_equal((await done(task))[0], tagged(i, 2) * 2)
    assert batcher.num_rows == 0


@pytest.mark.parametrize("change", [-1, 1])
async def test_a_wrong_number_of_rows_is_an_error_and_no_mix_up(change: int) -> None:
    """An engine that loses or invents a row makes every caller fail; nobody gets another's rows."""

    async def wrong(rows: Rows, _timeout_s: float) -> Outputs:
        return (np.resize(rows, (len(rows) + change, *rows.shape[1:])),)

    batcher = _on(wrong)
    tasks = [submit(batcher, tagged(i, 2)) for i in range(3)]
    for task in tasks:
        with pytest.raises(EngineUnavailable, match="the encoder is not available now"):
            await done(task)
    assert batcher.num_rows == 0


@pytest.mark.parametrize("num_requests", [1, 3])
async def test_an_engine_that_is_cancelled_hangs_nobody(num_requests: int) -> None:
    """A CancelledError that comes out of the engine reaches the callers as an error."""

    async def cancelled(_rows: Rows, _timeout_s: float) -> Outputs:
        raise asyncio.CancelledError

    batcher = _on(cancelled)
    tasks = [submit(batcher, tagged(i, 2)) for i in range(num_requests)]
    for task in tasks:
        with pytest.raises(EngineUnavailable, match="not available"):
            await done(task)
    assert batcher.num_rows == 0


async def test_an_engine_that_is_cancelled_on_the_second_try_hangs_nobody() -> None:
    """A CancelledError while a failed batch is repeated request by request reaches all of its callers."""
    num_runs = 0

    async def cancelled_later(_rows: Rows, _timeout_s: float) -> Outputs:
        nonlocal num_runs
        num_runs += 1
        if num_runs == 1:
            raise Poison("first")
        raise asyncio.CancelledError

    batcher = _on(cancelled_later)
    tasks = [submit(batcher, tagged(i, 2)) for i in range(3)]
    for task in tasks:
        with pytest.raises(EngineUnavailable, match="not available"):
            await done(task)


async def test_closing_fails_what_waits_and_what_runs(make: Make) -> None:
    """Nobody hangs on a closed batcher, and nobody new comes in."""
    batcher = make()
    running = submit(batcher, tagged(0, 1))
    await turns()
    waiting = submit(batcher, tagged(1, 1))
    await turns()
    await done(batcher.close())
    for task in (running, waiting):
        with pytest.raises(EngineUnavailable, match="not available"):
            await done(task)
    with pytest.raises(EngineUnavailable, match="not available"):
        await done(batcher.submit(tagged(2, 1), Ticket(FOREVER)))
    assert (batcher.num_rows, batcher.num_in_flight) == (0, 0)


@pytest.mark.parametrize("num_turns", range(20))
async def test_closing_at_any_moment_hangs_nobody(make: Make, num_turns: int) -> None:
    """A batcher may be closed in any turn of the loop after a submission, its run begun or not."""
    batcher = make()
    tasks = [submit(batcher, tagged(i, 1)) for i in range(2)]
    await turns(num_turns)
    await done(batcher.close())
    for task in tasks:
        with pytest.raises(EngineUnavailable, match="not available"):
            await done(task)


async def test_closing_while_a_batch_is_repeated_hangs_nobody(make: Make, puppet: Puppet) -> None:
    """Requests of a failed batch that wait for their second try are failed by a close."""
    batcher = make()
    tasks = [submit(batcher, tagged(i, 2)) for i in range(3)]
    await turns()
    puppet.fail(0, Poison("first"))
    await turns()
    assert puppet.sizes() == [6, 2]
    await done(batcher.close())
    for task in tasks:
        with pytest.raises(EngineUnavailable, match="not available"):
            await done(task)


async def test_a_stall_is_seen(make: Make, puppet: Puppet, clock: Clock) -> None:
    """Rows that wait while no run ends are a stall, a run that ends is not."""
    batcher = make(stall_after_s=10)
    assert not batcher.is_stalled
    clock.now += 1000
    task = submit(batcher, tagged(0, 1))
    await turns()
    assert not batcher.is_stalled
    clock.now += 9
    assert not batcher.is_stalled
    clock.now += 2
    assert batcher.is_stalled
    puppet.finish(0)
    await done(task)
    assert not batcher.is_stalled


async def test_progress_ends_a_stall(make: Make, puppet: Puppet, clock: Clock) -> None:
    """A slow engine that keeps ending runs is not stalled, however long a request takes."""
    batcher = make(stall_after_s=10)
    submit(batcher, tagged(0, 80))
    for index in range(9):
        await turns()
        clock.now += 9
        assert not batcher.is_stalled
        puppet.finish(index)


async def test_a_stall_is_seen_though_its_callers_give_up(make: Make, clock: Clock) -> None:
    """An engine that hangs is found also when every caller leaves before the stall would be declared."""
    batcher = make(stall_after_s=10)
    for i in range(5):
        task = submit(batcher, tagged(i, 1))
        await turns()
        clock.now += 4
        task.cancel()
        await turns()
    submit(batcher, tagged(9, 1))
    await turns()
    assert batcher.is_stalled


async def test_jumps_of_the_wall_clock_do_not_matter(puppet: Puppet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines and stalls use the monotonic clock: a corrected date expires nothing."""
    batcher = RowBatcher(puppet.run, BatchingConfig(), name="encoder", num_slots=1)
    first = submit(batcher, tagged(0, 1), time.monotonic() + 60)
    await turns()
    second = submit(batcher, tagged(1, 1), time.monotonic() + 60)
    for jump in (1e9, -1e9):
        now = time.time() + jump
        monkeypatch.setattr(time, "time", lambda now=now: now)
        await turns()
        assert not batcher.is_stalled
    puppet.finish(0)
    await turns()
    puppet.finish(1)
    assert len(await done(asyncio.gather(first, second))) == 2


async def test_each_run_is_reported(make: Make, puppet: Puppet, clock: Clock) -> None:
    """A report counts rows and requests, and times the wait and the run."""
    reports: list[BatchReport | DropReport] = []
    batcher = make(tell=reports.append)
    first = submit(batcher, tagged(0, 1))
    await turns()
    others = [submit(batcher, tagged(i, 2)) for i in (1, 2)]
    await turns()
    clock.now += 0.25
    puppet.finish(0)
    await turns()
    clock.now += 0.5
    puppet.finish(1)
    await done(asyncio.gather(first, *others))
    runs = [report for report in reports if isinstance(report, BatchReport)]
    assert runs == reports
    assert [(report.num_rows, report.num_requests) for report in runs] == [(1, 1), (4, 2)]
    assert [report.wait_s for report in runs] == pytest.approx([0.0, 0.25])
    assert [report.run_s for report in runs] == pytest.approx([0.25, 0.5])


async def test_what_waits_is_told(make: Make, puppet: Puppet, clock: Clock) -> None:
    """The age of the first request that still waits, and the bytes that are held."""
    batcher = make()
    assert (batcher.longest_wait_s, batcher.num_bytes) == (0.0, 0)
    first = submit(batcher, tagged(0, 1))
    await turns()
    clock.now += 1.0
    others = [submit(batcher, tagged(i, 2)) for i in (1, 2)]
    await turns()
    clock.now += 0.5
    assert batcher.longest_wait_s == pytest.approx(0.5)  # what runs does not wait
    assert batcher.num_bytes == sum(tagged(i, n).nbytes for i, n in ((0, 1), (1, 2), (2, 2)))
    puppet.finish(0)
    await turns()
    puppet.finish(1)
    await done(asyncio.gather(first, *others))
    assert (batcher.longest_wait_s, batcher.num_bytes) == (0.0, 0)


async def test_rows_without_an_answer_are_reported_with_the_reason(
    make: Make, puppet: Puppet, clock: Clock
) -> None:
    """Expired in the queue, abandoned by their caller, failed with their run: each once, none as a run."""
    reports: list[BatchReport | DropReport] = []
    batcher = make(tell=reports.append)
    first = submit(batcher, tagged(0, 1))
    await turns()
    late = submit(batcher, tagged(1, 2), expires_at=clock.now + 1)
    left = submit(batcher, tagged(2, 3))
    await turns()
    left.cancel()
    await turns()
    clock.now += 2
    puppet.fail(0, Poison("poison"))
    for task, error in ((first, Poison), (late, DeadlineExceeded), (left, asyncio.CancelledError)):
        with pytest.raises(error):
            await done(task)
    assert sorted(reports) == sorted(
        [DropReport(3, "abandoned"), DropReport(1, "failed"), DropReport(2, "expired")]
    )


async def test_a_failed_run_is_not_reported(make: Make, puppet: Puppet) -> None:
    """Metrics of runs count what succeeded."""
    reports: list[BatchReport | DropReport] = []
    batcher = make(tell=reports.append)
    task = submit(batcher, tagged(0, 1))
    await turns()
    puppet.fail(0, Poison("poison"))
    with pytest.raises(Poison, match="poison"):
        await done(task)
    assert reports == [DropReport(1, "failed")]


async def test_types_may_mix_in_one_run() -> None:
    """Rows of uint8 and of float32 share a run, and both are exact."""
    seen: list[np.dtype[Any]] = []

    async def echo(rows: Rows, _timeout_s: float) -> Outputs:
        seen.append(rows.dtype)
        return (rows.astype(np.float32),)

    batcher = _on(echo)
    pixels = np.arange(12, dtype=np.uint8).reshape(4, 3)
    tasks = submit(batcher, pixels), submit(batcher, pixels.astype(np.float32))
    first, second = await done(asyncio.gather(*tasks))
    assert len(seen) == 1
    np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("example", range(12))
async def test_whatever_happens_each_row_is_right_or_a_clear_error(  # noqa: C901 - one story
    example: int, seed: int
) -> None:
    """Random sizes, cancellations, deadlines, failures and lost rows: an oracle finds no row of another."""
    random = np.random.default_rng([seed, example])
    counts = {"right": 0, "failed": 0, "cancelled": 0, "shed": 0, "late": 0}

    async def moody(rows: Rows, _timeout_s: float) -> Outputs:
        await asyncio.sleep(float(random.choice([0, 0, 0.001, 0.003])))
        mood = random.random()
        if mood < 0.05:
            raise Poison("mood")
        if mood < 0.08:
            return (rows[:-1] * 2,)
        if mood < 0.10:
            raise asyncio.CancelledError
        return (rows * 2, rows + 0.5)

    batcher = _on(moody, max_batch_rows=16, num_slots=2, max_full_in_flight=3, max_queue_rows=400)

    async def caller(tag: int) -> None:
        rows = tagged(tag, int(random.choice([1, 1, 1, 2, 5, 17, 40])))
        await asyncio.sleep(float(random.random() * 0.03))
        timeout_s = float(random.choice([0.002, 0.01, 5, 5, 5]))
        try:
            async with asyncio.timeout(float(random.choice([0.003, 5, 5, 5, 5]))):
                outputs = await batcher.submit(rows, Ticket(time.monotonic() + timeout_s))
        except TimeoutError:
            counts["cancelled"] += 1
        except (Poison, EngineUnavailable):
            counts["failed"] += 1
        except (DeadlineExceeded, DeadlineTooShort):
            counts["late"] += 1
        except QueueFull:
            counts["shed"] += 1
        else:
            np.testing.assert_array_equal(outputs[0], rows * 2)
            np.testing.assert_array_equal(outputs[1], rows + 0.5)
            counts["right"] += 1

    await asyncio.wait_for(asyncio.gather(*(caller(tag) for tag in range(150))), TIMEOUT_S)
    assert sum(counts.values()) == 150
    assert counts["right"] > 0  # how many depends on the machine: on a busy one most come too late
    for _ in range(100):
        if not batcher.num_in_flight:
            break
        await asyncio.sleep(0.005)
    assert (batcher.num_rows, batcher.num_in_flight) == (0, 0)
    # Nothing is left behind: the next request is served as the first one was.
    await done(batcher.close())


async def test_an_engine_that_is_not_there_is_not_asked_again_for_each_caller() -> None:
    """All callers of a batch hear at once that they may repeat; their inputs are not to blame."""
    num_runs = 0

    async def absent(_: Rows, _timeout_s: float) -> Outputs:
        nonlocal num_runs
        num_runs += 1
        raise EngineUnavailable(graph="encoder")

    batcher = _on(absent)
    tasks = [submit(batcher, tagged(i, 2)) for i in range(3)]
    for task in tasks:
        with pytest.raises(EngineUnavailable, match="safe to repeat"):
            await done(task)
    assert num_runs == 1


@pytest.mark.parametrize(("priority", "bound"), [(1, 100), (2, 80), (3, 50)])
async def test_the_less_urgent_are_shed_first(make: Make, priority: int, bound: int) -> None:
    """Each priority has its own share of the queue, to the row, and is shed above it."""
    batcher = make(max_queue_rows=100, shed_at=(1.0, 0.8, 0.5))
    submit(batcher, tagged(0, 1))
    await turns(3)
    with pytest.raises(QueueFull, match="busy"):
        await done(submit(batcher, tagged(1, bound), priority=priority))
    submit(batcher, tagged(1, bound - 1), priority=priority)
    await turns(3)
    assert batcher.num_rows == bound
    for lower in range(priority, 4):
        with pytest.raises(QueueFull, match="busy"):
            await done(submit(batcher, tagged(2, 1), priority=lower))
    if priority > 1:
        urgent = submit(batcher, tagged(2, 1), priority=priority - 1)
        await turns(3)
        assert not urgent.done()


async def test_bytes_are_shed_by_priority_too(make: Make) -> None:
    """The share of a priority is one of the bytes as well."""
    batcher = make(max_queue_bytes=MIB)
    submit(batcher, np.zeros((1, MIB // 8), np.float32))
    await turns(3)
    wide = np.zeros((1, MIB // 12), np.float32)  # together 0.83 of the bound
    with pytest.raises(QueueFull, match="busy"):
        await done(submit(batcher, wide, priority=2))
    submit(batcher, wide, priority=1)
    await turns(3)
    assert batcher.num_rows == 2


async def test_a_client_alone_may_fill_the_queue_and_not_beside_others(make: Make) -> None:
    """Above half of the bound, each of the clients that wait may hold its share of it; a new one always fits."""
    batcher = make(max_queue_rows=100)
    greedy = submit(batcher, tagged(0, 60), client="greedy")
    await turns(3)
    more = submit(batcher, tagged(1, 20), client="greedy")
    await turns(3)
    assert batcher.num_rows == 80  # alone: as much as there is
    polite = submit(batcher, tagged(2, 10), client="polite")
    await turns(3)
    assert batcher.num_rows == 90
    with pytest.raises(QueueFull, match="busy"):
        await done(submit(batcher, tagged(3, 1), client="greedy"))  # 80 are more than half of 100 already
    again = submit(batcher, tagged(4, 10), client="polite")
    await turns(3)
    assert batcher.num_rows == 100
    for task in (polite, again):
        task.cancel()
    await turns(3)
    submit(batcher, tagged(5, 20), client="greedy")  # alone again
    await turns(3)
    assert batcher.num_rows == 100
    assert not greedy.done()
    assert not more.done()


async def test_an_empty_queue_takes_one_request_of_any_size_and_priority(make: Make) -> None:
    """The bounds are for what comes beside others."""
    batcher = make(max_queue_rows=4, max_queue_bytes=MIB)
    task = submit(batcher, np.zeros((40, MIB // 16), np.float32), priority=3)
    await turns(3)
    assert (batcher.num_rows, task.done()) == (40, False)
    with pytest.raises(QueueFull, match="busy"):
        await done(submit(batcher, tagged(1, 1)))
    task.cancel()


async def test_a_ticket_says_what_its_rows_took(make: Make, puppet: Puppet, clock: Clock) -> None:
    """Waiting ends with the first run, running with the last; rows that share a run share it in the account."""
    batcher = make()
    first, second = Ticket(FOREVER), Ticket(FOREVER)
    tasks = [submit_with(batcher, tagged(0, 12), first)]
    await turns()
    clock.now += 1
    tasks.append(submit_with(batcher, tagged(1, 4), second))
    await turns()
    clock.now += 2
    puppet.finish(0)  # eight rows of the first
    await turns()
    assert puppet.sizes() == [8, 8]
    clock.now += 4
    puppet.finish(1)  # four of each
    await done(asyncio.gather(*tasks))
    assert (first.num_rows, first.queue_s, first.run_s) == (12, 0.0, 7.0)
    assert (second.num_rows, second.queue_s, second.run_s) == (4, 2.0, 4.0)
    assert (first.run_share, second.run_share) == (1.5, 0.5)


async def test_the_shares_of_all_tickets_are_the_runs(make: Make, puppet: Puppet) -> None:
    """Whatever the sizes, the shares of runs sum to the number of runs, and each ticket has all its rows."""
    batcher = make()
    sizes = (1, 5, 8, 13, 2, 40, 3)
    tickets = [Ticket(FOREVER) for _ in sizes]
    tasks = [submit_with(batcher, tagged(i, size), tickets[i]) for i, size in enumerate(sizes)]
    while not all(task.done() for task in tasks):
        await turns()
        puppet.finish(len(puppet.runs) - 1)
    assert [ticket.num_rows for ticket in tickets] == list(sizes)
    assert sum(ticket.run_share for ticket in tickets) == pytest.approx(len(puppet.runs))


async def test_an_unanswered_ticket_counts_no_rows(make: Make, puppet: Puppet) -> None:
    """Rows of a call that failed or left are nobody's answer."""
    batcher = make()
    gone, failed = Ticket(FOREVER), Ticket(FOREVER)
    leaving = submit_with(batcher, tagged(0, 3), gone)
    await turns()
    failing = submit_with(batcher, tagged(1, 3), failed)
    await turns()
    leaving.cancel()
    puppet.finish(0)
    await turns()
    puppet.fail(1, EngineUnavailable(graph="encoder"))
    with pytest.raises(EngineUnavailable, match="not available"):
        await done(failing)
    assert (gone.num_rows, failed.num_rows, failed.run_share) == (0, 0, 0.0)


async def measured(batcher: RowBatcher, puppet: Puppet, clock: Clock, sizes: list[int], run_s: float) -> None:
    """Let runs of these sizes take so long, one after the other, on an idle engine."""
    for size in sizes:
        task = submit(batcher, tagged(0, size))
        await turns(3)
        clock.now += run_s
        puppet.finish(len(puppet.runs) - 1)
        await done(task)


async def test_nobody_is_refused_by_guess(make: Make, clock: Clock) -> None:
    """While nothing was measured, the shortest deadline and the longest queue are tried."""
    batcher = make(max_queue_rows=100_000)
    tasks = [submit(batcher, tagged(i, 1000), clock.now + 1e-6) for i in range(10)]
    await turns(3)
    assert not any(task.done() for task in tasks)
    assert batcher.num_rows == 10_000


async def test_a_deadline_below_the_measured_time_is_refused_at_once(
    make: Make, puppet: Puppet, clock: Clock
) -> None:
    """Who cannot be answered even by an idle engine hears so before its rows cost anything."""
    batcher = make()
    await measured(batcher, puppet, clock, [4] * 3, 0.1)
    with pytest.raises(
        DeadlineTooShort, match=r"leaves 0\.090 s, and a call like this takes about 0\.100 s"
    ) as caught:
        await done(submit(batcher, tagged(1, 4), clock.now + 0.09))
    assert (caught.value.given_s, caught.value.needed_s) == pytest.approx((0.09, 0.1))
    assert (batcher.num_rows, len(puppet.runs)) == (0, 3)
    task = submit(batcher, tagged(1, 4), clock.now + 0.11)
    await turns(3)
    puppet.finish(3)
    await done(task)


async def test_what_has_expired_is_not_called_too_short(make: Make, puppet: Puppet, clock: Clock) -> None:
    """A deadline that has passed is DEADLINE_EXCEEDED, whatever was measured."""
    batcher = make()
    await measured(batcher, puppet, clock, [4] * 3, 0.1)
    for late_s in (0.0, 1.0):
        with pytest.raises(DeadlineExceeded, match="passed"):
            await done(submit(batcher, tagged(1, 4), clock.now - late_s))


async def test_work_ahead_that_takes_too_long_is_a_full_queue(make: Make, puppet: Puppet, clock: Clock) -> None:
    """A caller whose turn would come too late is told to return; one with more time waits."""
    batcher = make(max_queue_rows=1000)
    await measured(batcher, puppet, clock, [8] * 3, 0.1)
    ahead = [submit(batcher, tagged(0, 8), clock.now + 1.05)]
    await turns()
    ahead += [submit(batcher, tagged(1 + i, 8), clock.now + 1.05) for i in range(10)]
    await turns()
    assert puppet.sizes()[3:] == [8]  # one runs, ten wait: a second
    with pytest.raises(
        QueueFull, match=r"about 1\.00 s of work is ahead, more than the deadline leaves"
    ) as caught:
        await done(submit(batcher, tagged(20, 8), clock.now + 1.05))
    assert caught.value.retry_after_s == pytest.approx(1.1, rel=0.05)  # 88 rows at 80 a second
    patient = submit(batcher, tagged(21, 8), clock.now + 1.15)
    await turns(3)
    assert not patient.done()
    assert not any(task.done() for task in ahead)


async def test_the_work_of_others_does_not_close_the_door(make: Make, puppet: Puppet, clock: Clock) -> None:
    """Few rows with little time come in beside a long queue: they are in the next run."""
    batcher = make(max_queue_rows=10_000)
    await measured(batcher, puppet, clock, [8] * 3, 0.1)
    submit(batcher, tagged(1, 8), clock.now + 60, client="large")
    await turns()
    submit(batcher, tagged(2, 800), clock.now + 60, client="large")
    await turns()
    small = submit(batcher, tagged(3, 2), clock.now + 0.5, client="small")
    urgent = submit(batcher, tagged(4, 2), clock.now + 0.5, client="large")  # its own deadlines are later
    await turns()
    assert not small.done()
    assert not urgent.done()
    clock.now += 0.1
    puppet.finish(3)
    await turns()
    clock.now += 0.1
    puppet.finish(4)
    np.testing.assert_array_equal((await done(small))[0], tagged(3, 2) * 2)
    np.testing.assert_array_equal((await done(urgent))[0], tagged(4, 2) * 2)


async def test_less_urgent_work_is_not_ahead(make: Make, puppet: Puppet, clock: Clock) -> None:
    """Generation and background work do not keep out what callers have sent."""
    batcher = make(max_queue_rows=1000)
    await measured(batcher, puppet, clock, [8] * 3, 0.1)
    for tag in range(11):
        submit(batcher, tagged(tag, 8), clock.now + 1.05, priority=3)
        await turns()  # one runs, ten wait
    with pytest.raises(QueueFull, match="of work is ahead"):
        await done(submit(batcher, tagged(20, 8), clock.now + 1.05, priority=3))
    urgent = submit(batcher, tagged(21, 8), clock.now + 1.05, priority=1)
    await turns(3)
    assert not urgent.done()


async def test_a_service_that_refuses_recovers(make: Make, puppet: Puppet, clock: Clock) -> None:
    """After a slow time, a caller with a short deadline is tried again after some half-lives; then all come in."""
    batcher = make()
    await measured(batcher, puppet, clock, [1] * 3, 1.0)
    with pytest.raises(DeadlineTooShort, match="takes about"):
        await done(submit(batcher, tagged(1, 1), clock.now + 0.1))
    clock.now += 6.7  # ten times less: three half-lives and a third, of two seconds
    task = submit(batcher, tagged(1, 1), clock.now + 0.1)
    await turns(3)
    clock.now += 0.01
    puppet.finish(3)
    await done(task)
    for index in range(4, 14):
        again = submit(batcher, tagged(1, 1), clock.now + 0.1)
        await turns(3)
        clock.now += 0.01
        puppet.finish(index)
        await done(again)


async def test_one_slow_run_shuts_nobody_out(make: Make, puppet: Puppet, clock: Clock) -> None:
    """A run of a minute among runs of ten milliseconds: the next caller with a tenth of a second comes in."""
    batcher = make()
    await measured(batcher, puppet, clock, [1] * 3, 0.01)
    await measured(batcher, puppet, clock, [1], 60.0)
    task = submit(batcher, tagged(1, 1), clock.now + 0.1)
    await turns(3)
    puppet.finish(4)
    await done(task)


async def test_a_slow_first_run_shuts_nobody_out(make: Make, puppet: Puppet, clock: Clock) -> None:
    """A graph that wakes up in ten seconds and then is fast is open to short deadlines at once."""
    batcher = make()
    await measured(batcher, puppet, clock, [1], 10.0)
    for index in range(1, 6):
        task = submit(batcher, tagged(1, 1), clock.now + 0.1)
        await turns(3)
        clock.now += 0.01
        puppet.finish(index)
        await done(task)


class Simulation:
    """A batcher on an engine of one processor in virtual time: a run of n rows needs a + b n seconds of it.

    Args:
        fixed_s: The a of a run.
        per_row_s: The b of a run.
        num_parallel: Runs that share the processor evenly.
    """

    def __init__(self, fixed_s: float, per_row_s: float, num_parallel: int) -> None:
        self.fixed_s, self.per_row_s, self.clock = fixed_s, per_row_s, Clock()
        self.left_s: dict[asyncio.Future[None], float] = {}
        self.batcher = RowBatcher(
            self._run,
            _bounds({"max_full_in_flight": num_parallel, "max_queue_rows": 10_000}),
            name="encoder",
            num_slots=num_parallel,
            clock=self.clock,
        )

    def time_of(self, num_rows: int) -> float:
        """Return the time of one run on the idle engine."""
        return self.fixed_s + self.per_row_s * num_rows

    async def _run(self, rows: Rows, _timeout_s: float) -> Outputs:
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.left_s[future] = self.time_of(len(rows))
        await future
        return (rows,)

    async def advance(self, seconds: float) -> None:
        """Let so much time pass, and end the runs that end in it."""
        while True:
            await turns(60)
            step = min([left * len(self.left_s) for left in self.left_s.values()], default=math.inf)
            used = min(step, seconds)
            self.clock.now += used
            seconds -= used
            for future in list(self.left_s):
                self.left_s[future] -= used / max(1, len(self.left_s))
            ended = [future for future, left in self.left_s.items() if left <= 1e-12]
            for future in ended:
                del self.left_s[future]
                future.set_result(None)
            if not ended and seconds <= 0:
                return


@given(
    fixed_s=st.sampled_from([0.0, 0.001, 0.1]),
    per_row_s=st.sampled_from([0.0001, 0.01]),
    num_parallel=st.sampled_from([1, 3]),
    calls=st.lists(
        st.tuples(
            st.sampled_from([1, 2, 7, 8, 20]),
            st.sampled_from([0.3, 0.9, 1.05, 2.0, 10.0]),
            st.sampled_from([0.0, 0.0, 0.1, 1.0, 30.0]),
            st.sampled_from("ab"),
        ),
        min_size=5,
        max_size=40,
    ),
)
@settings(max_examples=40, deadline=None)
def test_who_could_be_answered_in_time_is_never_told_that_its_deadline_is_too_short(
    fixed_s: float, per_row_s: float, num_parallel: int, calls: list[tuple[int, float, float, str]]
) -> None:
    """Deadlines are refused as too short only where the idle engine would miss them; no answer is wrong."""

    async def simulate() -> None:
        simulation = Simulation(fixed_s, per_row_s, num_parallel)

        async def call(tag: int, num_rows: int, factor: float, client: str) -> str:
            alone_s = sum(simulation.time_of(min(8, num_rows - start)) for start in range(0, num_rows, 8))
            rows, timeout_s = tagged(tag, num_rows), factor * alone_s
            ticket = Ticket(simulation.clock.now + timeout_s, client=client)
            try:
                outputs = await simulation.batcher.submit(rows, ticket)
            except DeadlineTooShort:
                assert timeout_s < alone_s
                return "short"
            except (DeadlineExceeded, QueueFull):
                return "late"
            np.testing.assert_array_equal(outputs[0], rows)
            return "right"

        tasks = []
        for tag, (num_rows, factor, pause, client) in enumerate(calls):
            tasks.append(asyncio.ensure_future(call(tag, num_rows, factor, client)))
            await simulation.advance(pause * simulation.time_of(8))
        await simulation.advance(1e6)
        assert {task.result() for task in tasks} <= {"short", "late", "right"}
        assert (simulation.batcher.num_rows, simulation.batcher.num_in_flight) == (0, 0)
        last = asyncio.ensure_future(call(999, 8, 1.05, "c"))  # on the idle engine, with enough time: always right
        await simulation.advance(1e6)
        assert last.result() == "right"
        await simulation.batcher.close()

    asyncio.run(simulate())
