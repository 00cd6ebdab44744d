"""How long runs of a graph take, learned from the runs; and so what cannot be answered in time."""

from typing import Final

_DOWN: Final = 0.5
_UP: Final = 0.1
"""Weights of a new time below and above the estimate: a time that was reached once can be reached again, while a
slow run may have shared its processor."""

_MAX_GROWTH: Final = 1.5
"""Most that one run can raise an estimate: a run that another replica repeated is no measure of the next."""

_HALF_LIFE_S: Final = 2.0
"""Without new runs an estimate loses half of itself in this time, seconds. So a call that was refused too
strictly is let in again soon, and its run corrects the estimate."""

_MIN_RUNS: Final = 3
"""Runs of a size before their times count, and then the least of them: the first run of a graph may load, compile
or wake what the next ones find ready."""


class _Bucket:
    """Runs of about the same size."""

    __slots__ = ("busy_s", "num_rows", "num_runs", "seen_at")

    def __init__(self, num_rows: float, busy_s: float, seen_at: float) -> None:
        self.num_rows, self.busy_s, self.seen_at = num_rows, busy_s, seen_at
        self.num_runs = 1

    def aged_s(self, now: float) -> float:
        """Return the estimate, less what it lost since the last run."""
        return float(self.busy_s * 0.5 ** ((now - self.seen_at) / _HALF_LIFE_S))

    def observe(self, num_rows: int, busy_s: float, now: float) -> None:
        """Learn from one more run."""
        self.num_runs += 1
        if self.num_runs <= _MIN_RUNS:
            if busy_s < self.busy_s:
                self.num_rows, self.busy_s = num_rows, busy_s
        else:
            self.busy_s = self._moved(busy_s, self.aged_s(now))
            self.num_rows += (num_rows - self.num_rows) * _UP
        self.seen_at = now

    def _moved(self, seen_s: float, aged_s: float) -> float:
        if seen_s < aged_s:
            return aged_s + (seen_s - aged_s) * _DOWN
        if seen_s <= self.busy_s:  # what was forgotten in silence still holds
            return seen_s
        return min(self.busy_s + (seen_s - self.busy_s) * _UP, self.busy_s * _MAX_GROWTH)


class ServiceTimes:
    """Estimates from below the time for which a run keeps the engine from others.

    A run of n rows takes t(n) = a + b n with a, b >= 0, so a known t(m) bounds t(n) from below: by t(m) itself if
    m <= n, by t(m) n / m otherwise. Runs are known by powers of two of their rows; the tightest bound counts. Of
    k runs that share an engine each is charged a k-th of its time: alone it may be as fast as that.
    """

    def __init__(self) -> None:
        self._buckets: dict[int, _Bucket] = {}
        self.slowest_s = 0.0
        """Largest estimate, not aged, seconds: what is above it needs no closer look."""

    def observe(self, num_rows: int, run_s: float, *, num_in_flight: int, now: float) -> None:
        """Learn from one run.

        Args:
            num_rows: Its rows.
            run_s: Its time, seconds.
            num_in_flight: Runs that shared the engine with it, itself included.
            now: Monotonic time.
        """
        busy_s = run_s / num_in_flight
        bucket = self._buckets.get(num_rows.bit_length())
        if bucket is None:
            self._buckets[num_rows.bit_length()] = _Bucket(num_rows, busy_s, now)
        else:
            bucket.observe(num_rows, busy_s, now)
        self.slowest_s = max(bucket.busy_s for bucket in self._buckets.values())

    def busy_s(self, num_rows: int, now: float) -> float:
        """Return the least time that a run of so many rows keeps the engine, seconds; 0 if nothing is known."""
        return max(
            (
                bucket.aged_s(now) * min(1.0, num_rows / bucket.num_rows)
                for bucket in self._buckets.values()
                if bucket.num_runs >= _MIN_RUNS
            ),
            default=0.0,
        )
