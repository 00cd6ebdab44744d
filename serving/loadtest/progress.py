"""Says what a load test does while it does it: one line that changes on a terminal, plain lines elsewhere."""

import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Final, Self

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from serving.loadtest.fleet import Progress
from serving.loadtest.ledger import OUTCOMES
from serving.loadtest.results import Outcome

_PLAIN_EVERY_S: Final = 5.0
_SHOWN_S: Final = 1.0
"""Time over which rates and percentiles are shown."""


class Display:
    """Shows progress; use it as a context.

    Args:
        console: Where to.
        clock: Monotonic time, seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        self._title, self._total_s = "", 0.0
        self._counts = dict.fromkeys(OUTCOMES, 0)
        self._recent: list[tuple[float, Any]] = []
        self._told_at = 0.0

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def tell(self, line: str) -> None:
        """Show a line that stays."""
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def begin(self, title: str, seconds: float) -> None:
        """Begin a stage."""
        self._title, self._total_s = title, seconds
        self._counts = dict.fromkeys(OUTCOMES, 0)
        self._recent, self._told_at = [], self._clock()
        self.tell(f"{title}: {seconds:g} s")

    def update(self, progress: Progress) -> None:
        """Show what happened since the last time."""
        now, lines = self._clock(), progress.lines
        for outcome, number in zip(OUTCOMES, np.bincount(lines["outcome"], minlength=len(OUTCOMES)), strict=True):
            self._counts[outcome] += int(number)
        if len(lines):
            self._recent.append((now, lines))
        self._recent = [(at, part) for at, part in self._recent if at > now - _SHOWN_S]
        if self._live is not None:
            self._live.update(Text(self._line(progress)), refresh=True)
        elif now - self._told_at >= _PLAIN_EVERY_S:
            self._told_at = now
            self.tell(self._line(progress))

    def _line(self, progress: Progress) -> str:
        recent = [part for _, part in self._recent]
        lines = np.concatenate(recent) if recent else progress.lines
        right = lines["response_us"][lines["outcome"] == OUTCOMES.index(Outcome.RIGHT)]
        p99 = f"{np.quantile(right, 0.99) / 1000:.1f} ms" if len(right) else "-"
        counts = ", ".join(f"{number:,} {outcome}" for outcome, number in self._counts.items() if number)
        at_s, rate = min(max(progress.at_s, 0.0), self._total_s), len(lines) / _SHOWN_S
        return (
            f"{self._title}  {at_s:.0f}/{self._total_s:g} s  {rate:,.0f}/s  p99 {p99}  "
            f"{progress.num_in_flight:,} in flight  {counts or 'nothing yet'}"
        )
