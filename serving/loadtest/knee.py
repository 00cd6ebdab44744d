"""Finds where more load stops to give more right answers in time."""

from collections.abc import Callable
from typing import Final

from serving.loadtest.results import Knee, Stage

MIN_GOOD: Final = 0.99
"""Share of right answers that a good stage has."""

RESOLUTION: Final = 0.08
"""The search ends when the bad rate is at most this much above the good one."""

_MIN_RATE: Final = 0.5
_MAX_RATE: Final = 1e5


def is_good(stage: Stage, p99_limit_ms: float) -> bool:
    """Return whether a stage gave its right answers in time."""
    if stage.response_time is None or not stage.counts.sent:
        return False
    return stage.counts.right >= MIN_GOOD * stage.counts.sent and stage.response_time.p99 <= p99_limit_ms


def find_knee(measure: Callable[[float], Stage | None], *, start_per_s: float, p99_limit_ms: float) -> Knee:
    """Double the rate until it is bad, then halve the interval; from a bad start, halve the rate first.

    A bad stage is measured again before it counts: on a shared machine one hiccup would move the knee.

    Args:
        measure: Measures a stage at a rate; None if it was interrupted.
        start_per_s: First rate, requests per second.
        p99_limit_ms: Bound of the response time's 99th percentile, milliseconds.
    """
    criterion = f"at least {MIN_GOOD:.0%} right answers and p99 of response time at most {p99_limit_ms:g} ms"
    good: float | None = None
    bad: float | None = None
    rate = start_per_s
    while _MIN_RATE <= rate <= _MAX_RATE:
        verdict = _judge(measure, rate, p99_limit_ms)
        if verdict is None:
            break
        if verdict:
            good = rate
        else:
            bad = rate
        if good is not None and bad is not None:
            if bad <= good * (1 + RESOLUTION):
                break
            rate = (good + bad) / 2
        else:
            rate = rate * 2 if verdict else rate / 2
    return Knee(criterion=criterion, good_per_s=good, bad_per_s=bad)


def _judge(measure: Callable[[float], Stage | None], rate: float, p99_limit_ms: float) -> bool | None:
    for _ in range(2):
        if (stage := measure(rate)) is None:
            return None
        if is_good(stage, p99_limit_ms):
            return True
    return False
