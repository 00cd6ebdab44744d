"""Who is let in: a bounded number of calls and of unread answers, a fair share and a rate for each client."""

import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Final

from serving.config import AdmissionConfig, RateLimit
from serving.errors import QueueFull, RateLimited
from serving.tickets import HIGHEST

_MAX_CLIENTS: Final = 10_000
"""Clients whose rates are remembered. Whoever is forgotten was silent longest, and has saved up its burst anew."""

_RETRY_S: Final = (0.05, 5.0)
_SMOOTHING: Final = 0.05
_ROUNDING: Final = 1e-6
"""Share of the tokens that may be missing: whoever waits as long as was said finds them, however sums round."""


class Admission:
    """Counts the calls in flight and the rates of clients.

    Args:
        config: Bounds.
        clock: Monotonic seconds.
    """

    def __init__(self, config: AdmissionConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._config, self._clock = config, clock
        self._calls: Counter[str] = Counter()
        self._unread: Counter[str] = Counter()
        self._num_unread_bytes = 0
        self._num_calls = 0
        self._ended_at = clock()
        self._interval_s = 0.0
        self._buckets: OrderedDict[tuple[str, str], _Bucket] = OrderedDict()
        limits = [config.rate_limit, *config.clients.values()]
        self._limits_calls = any(limit.calls_per_s for limit in limits)
        self._limits_rows = any(limit.rows_per_s for limit in limits)

    @property
    def num_calls(self) -> int:
        """Calls that were let in and have not ended."""
        return self._num_calls

    def enter(self, client: str, priority: int = HIGHEST) -> None:
        """Let a call in; `leave` must follow.

        Raises:
            QueueFull: If there are too many calls, or too many of this client while others call too; or too much
                is not read.
            RateLimited: If the client calls too fast.
        """
        config, own = self._config, self._calls[client]
        if self._num_calls >= config.shed_at[priority - HIGHEST] * config.max_calls:
            raise QueueFull(retry_after_s=self._time_to_drain_s(), what="too many calls are in flight")
        max_own = config.max_client_share * config.max_calls
        if own >= max_own and own < self._num_calls:
            what = f"{own} of your calls are in flight, your share while others call too"
            raise QueueFull(retry_after_s=self._time_to_drain_s(), what=what)
        if self._unread:
            self._check_unread(client)
        self.count_call(client)
        self._calls[client] = own + 1
        self._num_calls += 1

    def count_call(self, client: str) -> None:
        """Count a call against the client's rate, or one request of a stream.

        Raises:
            RateLimited: If the client calls too fast.
        """
        if self._limits_calls:
            limit = self._limit_of(client)
            self._take(client, "calls", 1, limit.calls_per_s, limit.burst_s)

    def leave(self, client: str) -> None:
        """Count the end of a call that was let in."""
        now = self._clock()
        if self._num_calls > 1:  # else the time since the last end may have been idle
            self._interval_s += (now - self._ended_at - self._interval_s) * _SMOOTHING
        self._ended_at = now
        self._num_calls -= 1
        self._calls[client] -= 1
        if not self._calls[client]:
            del self._calls[client]

    @property
    def num_unread_bytes(self) -> int:
        """Bytes of large answers that nobody has taken yet."""
        return self._num_unread_bytes

    def hold(self, client: str, num_bytes: int) -> Callable[[object], None]:
        """Count an answer that gRPC holds until it is read; return what is to be called then."""
        self._unread[client] += num_bytes
        self._num_unread_bytes += num_bytes

        def let_go(_: object) -> None:
            self._num_unread_bytes -= num_bytes
            self._unread[client] -= num_bytes
            if not self._unread[client]:
                del self._unread[client]

        return let_go

    def _check_unread(self, client: str) -> None:
        limit = self._config.max_unread_bytes
        own = self._unread.get(client, 0)
        if self._num_unread_bytes > limit or own > self._config.max_client_share * limit:
            raise QueueFull(retry_after_s=_RETRY_S[1], what="too many answers wait to be read")

    def charge(self, client: str, num_rows: int) -> None:
        """Count rows of a client before they join a queue.

        Raises:
            RateLimited: If the client asks for rows too fast.
        """
        if self._limits_rows:
            limit = self._limit_of(client)
            self._take(client, "rows", num_rows, limit.rows_per_s, limit.burst_s)

    def _limit_of(self, client: str) -> RateLimit:
        return self._config.clients.get(client, self._config.rate_limit)

    def _take(self, client: str, what: str, amount: int, per_s: float | None, burst_s: float) -> None:
        if per_s is None:
            return
        now = self._clock()
        bucket = self._buckets.get((client, what))
        if bucket is None:
            bucket = self._buckets[client, what] = _Bucket(max(1.0, per_s * burst_s), now)
            if len(self._buckets) > _MAX_CLIENTS:
                self._buckets.popitem(last=False)
        self._buckets.move_to_end((client, what))
        wait_s = bucket.take(amount, per_s, max(1.0, per_s * burst_s), now)
        if wait_s:
            raise RateLimited(retry_after_s=wait_s, limit=f"{per_s:g} {what} per second")

    def _time_to_drain_s(self) -> float:
        """Return when half of the calls in flight will have ended, at the rate at which they end now."""
        low, high = _RETRY_S
        return min(max(self._num_calls / 2 * self._interval_s, low), high)


class _Bucket:
    """Tokens that flow in at a rate. It may go into debt: whatever is larger than it waits, and is served."""

    __slots__ = ("level", "seen_at")

    def __init__(self, level: float, now: float) -> None:
        self.level, self.seen_at = level, now

    def take(self, amount: int, per_s: float, size: float, now: float) -> float:
        """Take tokens and return 0, or the seconds after which they can be taken."""
        self.level = min(size, self.level + (now - self.seen_at) * per_s)
        self.seen_at = now
        needed = min(float(amount), size)
        if self.level < needed * (1.0 - _ROUNDING):
            return (needed - self.level) / per_s
        self.level -= amount
        return 0.0
