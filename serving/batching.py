"""Rows of concurrent requests become runs of a graph: bounded, fair, by deadline, each caller its own rows.

The unit is the row, not the request: one client may send 500 rows at once. *Batch while busy*: an idle engine
gets the first row at once, without a timer; while all slots are taken, rows gather. A full batch always goes
out, so that pressure becomes visible to the autoscaler as ongoing calls. Slots and full batches in flight grow
with the replicas that run, and what waits is shared among those that are idle.
"""

import asyncio
import functools
import logging
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, Literal, NamedTuple

from serving.config import BatchingConfig
from serving.errors import DeadlineExceeded, DeadlineTooShort, EngineUnavailable, QueueFull
from serving.queueing import Outputs, Request, RowQueue, Rows, Slice, Source, concatenate
from serving.service_times import ServiceTimes
from serving.spans import BatchTrace, RunTrace, Visit, longest_waiting, running
from serving.tickets import HIGHEST, LOWEST, Ticket

Run = Callable[[Rows, float], Awaitable[Outputs]]
DropReason = Literal["expired", "abandoned", "failed"]

logger = logging.getLogger(__name__)

_RATE_SMOOTHING: Final = 0.2
_RETRY_RANGE_S: Final = (0.05, 5.0)
_IDLE_TURNS: Final = 40
_IDLE_TURN_S: Final = 30e-6
"""The event loop is idle when that many turns in a row took less than that long: a quarter of a millisecond in
all. Measured at 128 calls of one row in flight, in one alternating run: 3,686 calls per second with 40 turns,
3,045 with 20, 2,937 without gathering; at 4 in flight a call takes 0.15 ms longer."""


_MIN_SHARE_ROWS: Final = 64
"""Rows below which a run is not split among idle replicas: a call costs milliseconds whatever its size."""


class BatchReport(NamedTuple):
    """What one run was made of, for metrics."""

    num_rows: int
    num_requests: int
    wait_s: float
    run_s: float


class DropReport(NamedTuple):
    """Rows of one request that no run answered, for metrics."""

    num_rows: int
    reason: DropReason


class _Flight:
    """A run in flight."""

    __slots__ = ("num_together",)

    def __init__(self) -> None:
        self.num_together = 1
        """Most runs in flight at a time since it began, itself included."""


class RowBatcher:
    """Gathers rows into runs of one graph.

    Args:
        run: Runs the graph on rows (n, *row_shape), given the seconds after which nobody waits for them; returns
            outputs of n rows each. Pure: may be repeated.
        config: Bounds.
        name: Name of the graph, for errors and logs.
        num_slots: Runs in flight for each replica while rows gather.
        num_replicas: Replicas that run now; 0 while none does because nothing was to do.
        assemble: Makes the rows of a run from slices of sources.
        clock: Monotonic seconds.
        tell: Told about every run that succeeded, and about rows that were let in and got no answer.
    """

    def __init__(
        self,
        run: Run,
        config: BatchingConfig,
        *,
        name: str,
        num_slots: int,
        num_replicas: Callable[[], int] = lambda: 1,
        assemble: Callable[[Sequence[Slice]], Rows] = concatenate,
        clock: Callable[[], float] = time.monotonic,
        tell: Callable[[BatchReport | DropReport], None] = lambda _: None,
    ) -> None:
        self._run, self._config, self._name, self._clock = run, config, name, clock
        self._tell = tell
        self.on_traced_run: Callable[[BatchTrace], None] = lambda _: None
        """Told about every run, failed or not, that rows of a traced call took part in."""
        self._slots_each, self._num_replicas, self._assemble = num_slots, num_replicas, assemble
        self._queue = RowQueue(age_after_s=config.age_after_s)
        self._times = ServiceTimes()
        self._runs: dict[asyncio.Task[None], _Flight] = {}
        self._dispatch_is_scheduled = False
        self._num_idle_turns = 0
        self._gathering_since = self._last_turn = 0.0
        self._company_until = 0.0
        """Until when a row that is alone is expected not to stay so."""
        self._is_closed = False
        self._num_rows_held = 0
        self._num_bytes_held = 0
        self._rows_of_client: Counter[str] = Counter()
        self._rows_of_level = [0] * (LOWEST + 1)
        self._rows_per_s = 0.0
        self._last_progress = clock()

    @property
    def num_rows(self) -> int:
        """Rows that wait or run."""
        return self._num_rows_held

    @property
    def num_waiting(self) -> int:
        """Rows that are in no run yet."""
        return self._queue.num_rows

    @property
    def num_bytes(self) -> int:
        """Bytes of the rows that wait or run."""
        return self._num_bytes_held

    @property
    def longest_wait_s(self) -> float:
        """Age of the request with waiting rows that came first, seconds; 0 if none waits."""
        arrivals = [request.arrived_at for request in self._queue]
        return max(0.0, self._clock() - min(arrivals)) if arrivals else 0.0

    @property
    def num_in_flight(self) -> int:
        """Runs that have begun and not ended."""
        return len(self._runs)

    @property
    def is_stalled(self) -> bool:
        """Whether rows are held and no run has ended for too long; a graph that is waking up is not stalled."""
        is_busy = (bool(self._runs) or self._num_rows_held > 0) and self._num_replicas() > 0
        return is_busy and self._clock() - self._last_progress > self._config.stall_after_s

    async def submit(self, source: Source, ticket: Ticket) -> Outputs:
        """Return the outputs for rows, in their order, whatever they were batched with.

        Args:
            source: An array (n, *row_shape), n >= 1, not to be changed meanwhile; or a recipe for one.
            ticket: Until when, for whom, how urgent; told what came of it.

        Raises:
            QueueFull: If the rows do not fit, or not before their deadline; carries when to come back.
            DeadlineTooShort: If they could not be run before their deadline even now.
            DeadlineExceeded: If they expire before they are run.
            EngineUnavailable: If the batcher is closed.
        """
        request = Request(source, ticket, arrived_at=self._clock())
        num_rows, num_bytes, priority = request.num_rows, source.nbytes, ticket.priority
        self._admit(request, num_bytes)
        self._hold(ticket.client, priority, num_rows, num_bytes)
        if ticket.trace is not None:
            request.visit = ticket.trace.visit(self._name, arrived_at=request.arrived_at, num_rows=num_rows)
        self._queue.add(request)
        self._schedule_dispatch()
        try:
            return await request.future
        except BaseException as error:
            self._tell(DropReport(num_rows, _reason_of(error)))
            if request.visit is not None:
                request.visit.ended_at, request.visit.error = self._clock(), type(error).__name__
            raise
        finally:
            self._hold(ticket.client, priority, -num_rows, -num_bytes)
            self._queue.discard(request)  # if the caller left, nothing of it stays

    async def close(self) -> None:
        """Fail what waits, and end what runs."""
        self._is_closed = True
        for request in self._queue.clear():
            request.fail(EngineUnavailable(graph=self._name))
        for task in self._runs:
            task.cancel()
        await asyncio.gather(*self._runs, return_exceptions=True)

    def _hold(self, client: str, priority: int, num_rows: int, num_bytes: int) -> None:
        self._num_rows_held += num_rows
        self._num_bytes_held += num_bytes
        self._rows_of_level[priority] += num_rows
        held = self._rows_of_client[client] + num_rows
        if held:
            self._rows_of_client[client] = held
        else:
            del self._rows_of_client[client]

    def _admit(self, request: Request, num_bytes: int) -> None:
        if self._is_closed:
            raise EngineUnavailable(graph=self._name)
        if self._num_rows_held == 0:  # a single request always fits an empty queue: the limits of a call bound it
            if not self._runs:
                self._last_progress = request.arrived_at
        elif not self._has_room(request, num_bytes):
            raise QueueFull(retry_after_s=self._time_to_drain_s())
        self._check_deadline(request)

    def _has_room(self, request: Request, num_bytes: int) -> bool:
        config, ticket = self._config, request.ticket
        share = config.shed_at[ticket.priority - HIGHEST]
        max_rows = share * config.max_queue_rows
        num_rows = self._num_rows_held + request.num_rows
        if num_rows > max_rows or self._num_bytes_held + num_bytes > share * config.max_queue_bytes:
            return False
        # Above half of the bound, a client that others wait beside may hold no more than its share of it.
        own = self._rows_of_client[ticket.client]
        is_contended = own and len(self._rows_of_client) > 1 and num_rows > max_rows / 2
        return not is_contended or own + request.num_rows <= max_rows / len(self._rows_of_client)

    def _check_deadline(self, request: Request) -> None:
        """Refuse at once what cannot be answered in time, judged from below by the runs that were measured."""
        left_s, now = request.expires_at - request.arrived_at, request.arrived_at
        max_batch = self._config.max_batch_rows
        held = sum(self._rows_of_level[HIGHEST : request.ticket.priority + 1])
        if left_s > self._times.slowest_s * (2 + held // max_batch):
            return
        if left_s <= 0:
            raise DeadlineExceeded
        own_s = self._times.busy_s(min(request.num_rows, max_batch), now)
        if own_s > left_s:
            raise DeadlineTooShort(given_s=left_s, needed_s=own_s)
        run_s = self._times.busy_s(max_batch, now)
        if held // max_batch * run_s + own_s <= left_s:
            return
        # Not all that is held comes first: a closer look, which costs less than the call that it refuses.
        wait_s = self._queue.num_rows_before(request, max_batch) // max_batch * run_s
        if wait_s + own_s > left_s:
            what = f"about {wait_s:.2f} s of work is ahead, more than the deadline leaves"
            raise QueueFull(retry_after_s=self._time_to_drain_s(), what=what)

    def _time_to_drain_s(self) -> float:
        low, high = _RETRY_RANGE_S
        return min(max(self._num_rows_held / self._rows_per_s, low), high) if self._rows_per_s else low

    def _schedule_dispatch(self) -> None:
        """Let rows gather while the event loop is busy, then dispatch.

        gRPC hands over calls a few at a time, each in a turn of the event loop. A run per handful costs more than
        the rows in it, so a dispatch that has company waits until the loop was idle for some turns (it then has
        no more calls to hand over), at most `max_gather_s`. A row alone goes out in the next turn, unless several
        calls have just been answered together: their callers come back one after the other, and the first of them
        would run by itself while the others wait for it.
        """
        if not self._dispatch_is_scheduled:
            self._dispatch_is_scheduled = True
            self._num_idle_turns = 0
            self._gathering_since = self._last_turn = self._clock()
            asyncio.get_running_loop().call_soon(self._gather)

    def _gather(self) -> None:
        now = self._clock()
        self._num_idle_turns = self._num_idle_turns + 1 if now - self._last_turn < _IDLE_TURN_S else 0
        self._last_turn = now
        is_alone = not self._runs and len(self._queue) == 1 and now >= self._company_until
        is_over = (
            is_alone
            or self._num_idle_turns >= _IDLE_TURNS
            or not self._has_slot()
            or self._queue.num_rows >= self._config.max_batch_rows
            or now - self._gathering_since > self._config.max_gather_s
        )
        if is_over:
            self._dispatch_is_scheduled = False
            self._dispatch()
        else:
            asyncio.get_running_loop().call_soon(self._gather)

    def _dispatch(self) -> None:
        while self._has_slot() and (batch := self._queue.take(self._next_rows(), self._clock())):
            flight = _Flight()
            task = asyncio.get_running_loop().create_task(self._run_batch(batch, flight))
            self._runs[task] = flight
            for other in self._runs.values():
                other.num_together = max(other.num_together, len(self._runs))
            task.add_done_callback(functools.partial(self._on_run_end, batch))

    @property
    def _num_slots(self) -> int:
        return self._slots_each * max(1, self._num_replicas())

    def _has_slot(self) -> bool:
        if len(self._runs) < self._num_slots:
            return True
        is_full = self._queue.num_rows >= self._config.max_batch_rows
        return is_full and len(self._runs) < self._config.max_full_in_flight * max(1, self._num_replicas())

    def _next_rows(self) -> int:
        """Return the most rows of the next run: a full batch, or a share of what waits if more slots are free."""
        max_batch, num_free = self._config.max_batch_rows, self._num_slots - len(self._runs)
        if num_free <= 1:
            return max_batch
        return min(max_batch, max(math.ceil(self._queue.num_rows / num_free), _MIN_SHARE_ROWS))

    def _on_run_end(self, batch: Sequence[Slice], task: "asyncio.Task[None]") -> None:
        del self._runs[task]
        self._last_progress = now = self._clock()
        self._company_until = now + self._config.max_gather_s if len(batch) > 1 else 0.0
        if task.cancelled() or task.exception():  # whatever the reason, and also if it never began
            for part in batch:
                part.request.fail(EngineUnavailable(graph=self._name))
        if not task.cancelled() and (error := task.exception()):
            logger.error("a run ended without resolving its rows", exc_info=error)
        if self._queue:
            self._schedule_dispatch()

    async def _run_batch(self, batch: Sequence[Slice], flight: _Flight) -> None:
        started = self._clock()
        for part in batch:
            request = part.request
            if not request.first_run_at:
                request.first_run_at = started
                if request.visit is not None:
                    request.visit.first_run_at = started
        try:
            await self._run_and_deliver(batch)
        except Exception as error:  # noqa: BLE001 - whatever the engine raises belongs to the callers of this batch
            await self._recover(batch, error)
        else:
            self._report(batch, started, flight.num_together)

    async def _run_and_deliver(self, batch: Sequence[Slice]) -> None:
        visits = [part.request.visit for part in batch if part.request.visit is not None]
        outputs = await (self._run_traced(batch, visits) if visits else self._run_rows(batch))
        offset, now, num_rows = 0, self._clock(), len(outputs[0])
        for request, start, stop in batch:
            end = offset + stop - start
            ticket = request.ticket
            ticket.run_share += (stop - start) / num_rows
            ticket.batch_rows = max(ticket.batch_rows, num_rows)
            if request.deliver(start, tuple(output[offset:end] for output in outputs)):
                ticket.num_rows += request.num_rows
                ticket.queue_s += request.first_run_at - request.arrived_at
                ticket.run_s += now - request.first_run_at
                if request.visit is not None:
                    request.visit.ended_at = now
            offset = end

    async def _run_rows(self, batch: Sequence[Slice]) -> Outputs:
        rows = self._assemble(batch)
        timeout_s = max(part.request.expires_at for part in batch) - self._clock()
        outputs = await self._run(rows, timeout_s)
        if any(len(output) != len(rows) for output in outputs):
            raise EngineUnavailable(graph=self._name, detail="outputs do not have the rows of the input")
        return outputs

    async def _run_traced(self, batch: Sequence[Slice], visits: Sequence[Visit]) -> Outputs:
        """Run rows of which some belong to traced calls; the engine finds the run where it works."""
        run, began_at, error = RunTrace(longest_waiting(visits).context.child()), self._clock(), ""
        for visit in visits:
            visit.runs.append(run.context)
        try:
            with running(run):
                return await self._run_rows(batch)
        except BaseException as failure:
            error = type(failure).__name__
            raise
        finally:
            num_rows = sum(part.stop - part.start for part in batch)
            times = began_at, self._clock()
            self.on_traced_run(BatchTrace(run, self._name, visits, len(batch), num_rows, *times, error))

    async def _recover(self, batch: Sequence[Slice], error: Exception) -> None:
        """Repeat a failed batch request by request, so that one poisonous input hurts only itself.

        When the engine is not there, and its own attempts are spent, all hear so at once: it is not their input.
        """
        if len(batch) == 1 or isinstance(error, EngineUnavailable):
            for part in batch:
                part.request.fail(error)
            return
        logger.warning("a batch failed; its requests are run apart", extra={"graph": self._name})
        for part in batch:
            if not part.request.future.done():
                try:
                    await self._run_and_deliver([part])
                except Exception as own:  # noqa: BLE001 - as above
                    part.request.fail(own)
                self._last_progress = self._clock()

    def _report(self, batch: Sequence[Slice], started: float, num_in_flight: int) -> None:
        now = self._clock()
        run_s = max(now - started, 1e-6)
        num_rows = sum(part.stop - part.start for part in batch)
        self._times.observe(num_rows, run_s, num_in_flight=num_in_flight, now=now)
        rate = num_rows / run_s * num_in_flight
        self._rows_per_s += (rate - self._rows_per_s) * (_RATE_SMOOTHING if self._rows_per_s else 1.0)
        waited = started - min(part.request.arrived_at for part in batch)
        self._tell(BatchReport(num_rows, len(batch), waited, run_s))


def _reason_of(error: BaseException) -> DropReason:
    if isinstance(error, asyncio.CancelledError):
        return "abandoned"
    return "expired" if isinstance(error, DeadlineExceeded) else "failed"
