"""What the replicas report about their load, for the policies of `scaling`.

Each report covers the whole time since the one before it, so no run is missed between two samples.
"""

import threading
import time
from collections.abc import Callable
from typing import Final

_SMOOTHING: Final = 0.2
_MIN_RUNS: Final = 3
"""Runs of about one size before their time counts: the first may load or wake what the next ones find ready."""

_FORGET_S: Final = 600.0
"""Age at which the time of a size that no longer comes is forgotten, seconds: the machine may have changed."""

_HALF_LIFE_S: Final = 1.0
"""Half of the weight of a run in the mean time per row is gone after so long, seconds."""

_FRESH_S: Final = 3.0
"""Age at which what a gateway said about its waiting rows no longer counts, seconds: several runs long for a
gateway that has rows waiting, since it sends a run whenever one ends."""


class _Size:
    """Time per row of the runs of about one size."""

    __slots__ = ("num_runs", "row_s", "seen_at")

    def __init__(self, row_s: float, seen_at: float) -> None:
        self.row_s, self.seen_at, self.num_runs = row_s, seen_at, 1

    def observe(self, row_s: float, now: float) -> None:
        """Learn from one more run; of the first ones the quickest counts."""
        self.num_runs += 1
        self.seen_at = now
        if self.num_runs <= _MIN_RUNS:
            self.row_s = min(self.row_s, row_s)
        else:
            self.row_s += (row_s - self.row_s) * _SMOOTHING


class RowMeter:
    """Measures one replica of a graph: how busy it is, what a row costs, what waits for it.

    Runs that overlap share the replica: each is charged its part of the time, in the manner of processor sharing.
    May be used by several threads.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._num_running = self._num_running_rows = self._num_rows_held = 0
        self._turned_at = self._reported_at = clock()
        self._busy_s = 0.0
        self._share_s = 0.0
        """Time that a run which began at the start would have been charged until now."""
        self._recent_s = self._recent_rows = 0.0
        self._ended_at = self._turned_at
        self._sizes: dict[int, _Size] = {}
        self._backlogs: dict[str, tuple[float, float]] = {}

    def hold(self, num_rows: int) -> None:
        """Count rows that arrive; or, as a negative number, rows that are answered or given up."""
        with self._lock:
            self._num_rows_held += num_rows

    def begin(self, num_rows: int) -> float:
        """Count a run that begins; return what `end` needs."""
        with self._lock:
            self._turn()
            self._num_running += 1
            self._num_running_rows += num_rows
            return self._share_s

    def end(self, begun: float, num_rows: int, *, is_done: bool) -> None:
        """Count a run that ends.

        Args:
            begun: From `begin`.
            num_rows: Its rows.
            is_done: Whether they were really run; if not, its time tells nothing.
        """
        with self._lock:
            now = self._turn()
            self._num_running -= 1
            self._num_running_rows -= num_rows
            if not is_done:
                return
            run_s = self._share_s - begun
            row_s = run_s / num_rows
            kept = 0.5 ** ((now - self._ended_at) / _HALF_LIFE_S)
            self._recent_s = self._recent_s * kept + run_s
            self._recent_rows = self._recent_rows * kept + num_rows
            self._ended_at = now
            size = self._sizes.get(num_rows.bit_length())
            if size is None:
                self._sizes[num_rows.bit_length()] = _Size(row_s, now)
            else:
                size.observe(row_s, now)

    def hear(self, gateway: str, num_waiting: float) -> None:
        """Take what a gateway says: this replica's part of the rows that wait there."""
        with self._lock:
            self._backlogs[gateway] = num_waiting, self._clock()

    def report(self) -> dict[str, float]:
        """Return what is known.

        Returns:
            busy: Share of the time since the last report in which something ran, in [0, 1].
            row_s: Time per row in the runs of late, seconds; 0 if there were none.
            least_row_s: Least time per row at any size of runs, seconds: what a row costs when runs are large. 0
                if nothing is known.
            waiting_rows: Rows that wait here, and this replica's part of those that wait in the gateways.
        """
        with self._lock:
            now = self._turn()
            elapsed_s = max(now - self._reported_at, 1e-6)
            self._backlogs = {key: held for key, held in self._backlogs.items() if now - held[1] < _FRESH_S}
            self._sizes = {key: size for key, size in self._sizes.items() if now - size.seen_at < _FORGET_S}
            known = [size.row_s for size in self._sizes.values() if size.num_runs >= _MIN_RUNS]
            # What was given up may still run.
            num_waiting_here = max(0, self._num_rows_held - self._num_running_rows)
            num_waiting = num_waiting_here + sum(num_rows for num_rows, _ in self._backlogs.values())
            report = {
                "busy": min(1.0, self._busy_s / elapsed_s),
                "row_s": self._recent_s / self._recent_rows if self._recent_rows else 0.0,
                "least_row_s": min(known, default=0.0),
                "waiting_rows": float(num_waiting),
            }
            self._reported_at, self._busy_s = now, 0.0
            return report

    def _turn(self) -> float:
        """Charge the time since the last turn to whatever ran in it; return the time."""
        now = self._clock()
        if self._num_running:
            self._busy_s += now - self._turned_at
            self._share_s += (now - self._turned_at) / self._num_running
        self._turned_at = now
        return now


class CallMeter:
    """Measures one gateway: its processor time, and what is in flight in it.

    The time of the whole process, not of the event loop's thread: Serve's router and gRPC's own threads share the
    interpreter and the processor with it, so a gateway is at its limit while that thread runs three quarters of
    the time.

    Args:
        num_calls: Calls in flight.
        num_rows: Rows that wait or run.
        clock: Monotonic seconds.
        processor_clock: Seconds of processor time of this process.
    """

    def __init__(
        self,
        num_calls: Callable[[], int],
        num_rows: Callable[[], int],
        *,
        clock: Callable[[], float] = time.monotonic,
        processor_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._num_calls, self._num_rows = num_calls, num_rows
        self._clock, self._processor_clock = clock, processor_clock
        self._reported_at, self._processor_s = clock(), processor_clock()

    def report(self) -> dict[str, float]:
        """Return what is so now, and the mean of `busy` since the last report.

        Returns:
            busy: Processor time per time; Python code on one event loop cannot use much more than 1.
            calls: Calls in flight.
            rows: Rows that wait or run.
        """
        now, processor_s = self._clock(), self._processor_clock()
        busy = (processor_s - self._processor_s) / max(now - self._reported_at, 1e-6)
        self._reported_at, self._processor_s = now, processor_s
        return {"busy": busy, "calls": float(self._num_calls()), "rows": float(self._num_rows())}
