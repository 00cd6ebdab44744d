"""What is shown while a load test runs."""

import io

import numpy as np
from rich.console import Console

from serving.loadtest.fleet import Progress
from serving.loadtest.ledger import OUTCOMES, RECORD
from serving.loadtest.progress import Display
from serving.loadtest.results import Outcome


def lines(number: int, outcome: Outcome = Outcome.RIGHT) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """Return ends that took 20 ms."""
    records = np.zeros(number, RECORD)
    records["outcome"], records["response_us"] = OUTCOMES.index(outcome), 20_000
    return records


def test_plain_lines_where_there_is_no_terminal() -> None:
    """A line at the begin, then one every five seconds: logs stay short."""
    now, file = [100.0], io.StringIO()
    with Display(Console(file=file, width=60), clock=lambda: now[0]) as display:
        display.begin("50/s", 12)
        for second in range(12):
            now[0] = 101.0 + second
            ends = [lines(49), lines(1, Outcome.LOST)]
            display.update(Progress(float(second), np.concatenate(ends), 3))
        display.tell("done [not markup]")
    assert file.getvalue().splitlines() == [
        "50/s: 12 s",
        "50/s  4/12 s  50/s  p99 20.0 ms  3 in flight  245 right, 5 lost",
        "50/s  9/12 s  50/s  p99 20.0 ms  3 in flight  490 right, 10 lost",
        "done [not markup]",
    ]


def test_one_line_that_changes_on_a_terminal() -> None:
    """It is redrawn at each update, and gone at the end."""
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=100)
    with Display(console) as display:
        display.begin("8 callers", 5)
        display.update(Progress(1.0, lines(10), 8))
        display.update(Progress(1.0, lines(0), 8))
    assert "8 callers  1/5 s" in file.getvalue()
    assert "10 right" in file.getvalue()
