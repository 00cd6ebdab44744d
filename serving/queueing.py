"""Rows that wait: who is next, and how much of a run each caller gets.

Higher priorities first, and what waits long moves up. Clients of one priority share a run max-min fairly: nobody
gets more than another who still wants some. The requests of one client go by deadline, and while others wait none
of them takes more than half of a run.
"""

import asyncio
import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import attrgetter
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from serving.errors import DeadlineExceeded
from serving.spans import Visit
from serving.tickets import HIGHEST, Ticket

Rows = NDArray[Any]
Outputs = tuple[Rows, ...]

_by_expiry: Final = attrgetter("expires_at")


class Source(Protocol):
    """Where the rows of a request come from: an array, or a recipe that is followed when a run needs them."""

    @property
    def nbytes(self) -> int:
        """Bytes of the rows once they are made."""

    def __len__(self) -> int:
        """Return the number of rows."""


class Request:
    """Rows of one caller, and what came back for them so far."""

    __slots__ = (
        "arrived_at", "expires_at", "first_run_at", "future", "num_done", "num_rows", "num_taken", "outputs",
        "source", "ticket", "visit",
    )  # fmt: skip

    def __init__(self, source: Source, ticket: Ticket, *, arrived_at: float) -> None:
        self.source, self.ticket, self.arrived_at = source, ticket, arrived_at
        self.expires_at, self.first_run_at = ticket.expires_at, 0.0
        self.num_rows = len(source)
        self.future: asyncio.Future[Outputs] = asyncio.get_running_loop().create_future()
        self.num_taken = self.num_done = 0
        self.outputs: Outputs = ()
        self.visit: Visit | None = None
        """What is noted of it; None unless its call is traced."""

    @property
    def num_waiting(self) -> int:
        """Rows that are not yet in a run."""
        return self.num_rows - self.num_taken

    def take(self, num_rows: int) -> "Slice":
        """Return the next rows as a slice of this request."""
        start = self.num_taken
        self.num_taken += num_rows
        return Slice(self, start, self.num_taken)

    def deliver(self, start: int, outputs: Outputs) -> bool:
        """Take the outputs of the rows from `start` on; resolve, and return True, when all rows have theirs."""
        num_rows = len(outputs[0])
        if num_rows == self.num_rows:
            self.outputs = outputs
        else:
            if not self.outputs:
                self.outputs = tuple(
                    np.empty((self.num_rows, *output.shape[1:]), output.dtype) for output in outputs
                )
            for whole, part in zip(self.outputs, outputs, strict=True):
                whole[start : start + num_rows] = part
        self.num_done += num_rows
        if self.num_done == self.num_rows and not self.future.done():
            self.future.set_result(self.outputs)
            return True
        return False

    def fail(self, error: BaseException) -> None:
        """Resolve with an error, unless resolved."""
        if not self.future.done():
            self.future.set_exception(error)


class Slice(NamedTuple):
    """Consecutive rows of one request inside one run."""

    request: Request
    start: int
    stop: int

    @property
    def rows(self) -> Rows:
        """The rows, where the source is an array."""
        rows: Rows = self.request.source[self.start : self.stop]  # type: ignore[index]  # recipes have no slices
        return rows


def concatenate(batch: Sequence[Slice]) -> Rows:
    """Return the rows of slices whose sources are arrays."""
    return batch[0].rows if len(batch) == 1 else np.concatenate([part.rows for part in batch])


class RowQueue:
    """Requests with rows that are in no run yet.

    Args:
        age_after_s: Time of waiting after which a request moves up by one priority, seconds.
    """

    def __init__(self, *, age_after_s: float) -> None:
        self._age_after_s = age_after_s
        self._requests: list[Request] = []
        self.num_rows = 0
        """Rows that are in no run yet."""

    def __len__(self) -> int:
        return len(self._requests)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._requests)

    def add(self, request: Request) -> None:
        """Let a request wait."""
        bisect.insort(self._requests, request, key=_by_expiry)
        self.num_rows += request.num_waiting

    def discard(self, request: Request) -> None:
        """Forget a request whose caller left."""
        if request.num_waiting and request in self._requests:
            self._requests.remove(request)
            self.num_rows -= request.num_waiting

    def clear(self) -> list[Request]:
        """Forget all; return them."""
        requests, self._requests, self.num_rows = self._requests, [], 0
        return requests

    def num_rows_before(self, request: Request, max_rows: int) -> int:
        """Return how many rows are surely run before the last row of a request that is about to wait.

        Of its own client, those of earlier deadlines, but for what it shares runs with; of each other client as
        many as its own gets meanwhile, but for the odd row of each run.

        Args:
            request: With its time of arrival.
            max_rows: Most rows in one run.
        """
        client, priority, now = request.ticket.client, request.ticket.priority, request.arrived_at
        own = largest = 0
        others: Counter[str] = Counter()
        for other in self._requests:
            if other.ticket.priority > priority or other.expires_at <= now:
                continue
            if other.ticket.client != client:
                others[other.ticket.client] += other.num_waiting
            elif other.expires_at <= request.expires_at:
                own += other.num_waiting
                largest = max(largest, other.num_waiting)
        own += min(largest, request.num_rows) - largest
        share = max(1, max_rows // (1 + len(others)))
        meanwhile = (own + request.num_rows) * share // (share + 1)
        return own + sum(min(waiting, meanwhile) for waiting in others.values())

    def take(self, max_rows: int, now: float) -> list[Slice]:
        """Return the rows of the next run, at most `max_rows`; nothing of the expired and cancelled."""
        self._drop_the_dead(now)
        if self.num_rows <= max_rows:
            self.num_rows = 0
            waiting, self._requests = self._requests, []
            return [request.take(request.num_waiting) for request in waiting]
        shares: dict[Request, int] = {}
        space = max_rows
        levels: dict[int, list[Request]] = {}
        for request in self._requests:
            levels.setdefault(self._level(request, now), []).append(request)
        for _, requests in sorted(levels.items()):
            space -= _share(requests, space, shares, half=max(1, max_rows // 2))
        self.num_rows -= max_rows - space
        batch = [request.take(share) for request, share in shares.items() if share]
        self._requests = [request for request in self._requests if request.num_waiting]
        return batch

    def _level(self, request: Request, now: float) -> int:
        return max(HIGHEST, request.ticket.priority - int((now - request.arrived_at) / self._age_after_s))

    def _drop_the_dead(self, now: float) -> None:
        """Drop cancelled and expired requests: their rows never reach the engine."""
        is_alive = True
        for request in self._requests:
            if request.expires_at <= now:
                request.fail(DeadlineExceeded())
            if request.future.done():
                self.num_rows -= request.num_waiting
                is_alive = False
        if not is_alive:
            self._requests = [request for request in self._requests if not request.future.done()]


def _share(requests: Sequence[Request], space: int, shares: dict[Request, int], *, half: int) -> int:
    """Share the space of a run among the requests of one priority; return how much of it is taken."""
    clients: dict[str, list[Request]] = {}
    for request in requests:
        clients.setdefault(request.ticket.client, []).append(request)
    wants = [(sum(request.num_waiting for request in own), own) for own in clients.values()]
    if len(wants) <= space:  # else a row each, by deadline: whoever wants most must not always be the last
        wants.sort(key=lambda want: want[0])  # stable: the earliest deadline first among equals
    left = space
    for index, (want, own) in enumerate(wants):
        given = min(want, left, max(1, left // (len(wants) - index)))
        left -= given
        _share_of_client(own, given, shares, half=half)
    return space - left


def _share_of_client(requests: Sequence[Request], space: int, shares: dict[Request, int], *, half: int) -> None:
    """Share by deadline; what nobody else wants goes to the large requests, in order."""
    limit = half if len(requests) > 1 else space
    for request in requests:
        shares[request] = share = min(request.num_waiting, limit, space)
        space -= share
    for request in requests:
        extra = min(request.num_waiting - shares[request], space)
        shares[request] += extra
        space -= extra
