"""The benchmark of growth: that it measures what it says."""

import asyncio

import pytest
from rich.console import Console

from serving.bundle import Bundle
from serving.engine.protocol import Posterior, Rows
from tests.benchmarks.growth import MAX_LOSS, ROW_S, RUN_S, Result, SleepingEngine, Workload, measure, show

MIN_GROWTH = 1.3
"""Least factor of throughput from one replica to two. Ideal is 2; other programs may use the processors here."""


async def test_throughput_grows_with_the_replicas(small: Bundle) -> None:
    """Twice the sleeping replicas do more, through one batcher; neither does more than its sleep allows."""
    rates = []
    for count in (1, 2):
        workload = Workload(num_rows=64, callers_each=16)
        result = await measure(SleepingEngine(count), small.manifest, count, workload, 1.0)
        most = 512 / (RUN_S + 512 * ROW_S)
        # One full batch each may have begun before the time that is measured.
        assert result.rows_per_s <= count * (most + 512)
        rates.append(result.rows_per_s)
    assert rates[1] > MIN_GROWTH * rates[0]


async def test_an_answer_of_other_rows_stops_the_run(small: Bundle) -> None:
    """Figures of a service that answers wrong are worth nothing."""

    class Confused(SleepingEngine):
        """Answers with the rows upside down."""

        async def encode(self, data: Rows, timeout_s: float) -> Posterior:
            """Return the rows in another order."""
            return await super().encode(data[::-1], timeout_s)

    with pytest.raises(ExceptionGroup) as caught:
        await asyncio.wait_for(measure(Confused(1), small.manifest, 1, Workload(8, 4), 0.2), 30)
    assert caught.group_contains(AssertionError, match="not of the rows")


@pytest.mark.parametrize(("rows_per_s", "verdict"), [(4000.0, "reached"), (3500.0, "not reached")])
def test_the_loss_from_one_to_four_is_judged(rows_per_s: float, verdict: str) -> None:
    """Against a tenth of the throughput per replica."""
    assert MAX_LOSS == 0.1
    results = {1: Result(1000.0, 0.1)._asdict(), 4: Result(rows_per_s, 0.2)._asdict()}
    console = Console(width=120)
    with console.capture() as captured:
        show({"rounds": 1, "seconds": 1.0, "medians": {"16 x 64 rows": {"Ray": results}}}, console)
    assert f"below 10 % {verdict}\n" in captured.get()
