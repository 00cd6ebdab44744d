"""The simulated queues obey queueing theory where it has formulas, and our own batcher everywhere."""

import asyncio
import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.batching import RowBatcher
from serving.capacity import Cost
from serving.config import BatchingConfig
from serving.queue_simulation import MIN_SHARE_ROWS, through_gateways, through_replicas
from serving.queueing import Outputs
from serving.tickets import Ticket
from tests.serving import virtual_time

Rows = NDArray[np.int64]
Times = NDArray[np.float64]

SAMPLING = 0.04
"""Relative error of a mean of 200,000 calls: four times its standard error, which is 1 % at these loads (seen over
seeds), because the times of neighbours go together."""

TICK_S = 1e-12
"""What a look at the clock adds to it, because a clock goes on within one instant of virtual time too: far less
than any time here."""

EXACT = 1e-9
"""Sums of floats in another order."""

SPLIT = 0.05
"""Where calls are split over runs: the batcher gives one call at most half of a run that others wait for."""


def poisson(rate: float, num: int, seed: int) -> Times:
    """Return arrival times."""
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, num))


def settled(values: Times) -> Times:
    """Return values without the first tenth, when the queue was filling."""
    return values[len(values) // 10 :]


@pytest.mark.parametrize("load", [0.3, 0.7, 0.85])
def test_a_gateway_waits_as_pollaczek_and_khinchine_say(load: float, seed: int) -> None:
    """Mean wait of M/G/1: lambda E[S^2] / (2 (1 - rho))."""
    arrivals = poisson(load, 200_000, seed)
    service = np.random.default_rng(seed + 1).choice([0.5, 2.0], len(arrivals), p=[2 / 3, 1 / 3])
    ends = through_gateways(arrivals, service, num_gateways=1, random=np.random.default_rng(0))
    expected = load * np.square(service).mean() / (2 * (1 - load * service.mean()))
    assert settled(ends - arrivals - service).mean() == pytest.approx(expected, rel=SAMPLING)


def test_a_gateway_is_the_recursion_of_lindley(seed: int) -> None:
    """A call begins when it is there and the one before it is done: computed one by one."""
    random = np.random.default_rng(seed)
    arrivals, service = poisson(1.0, 500, seed), random.exponential(0.8, 500)
    expected, free_at = [], 0.0
    for arrival, work in zip(arrivals, service, strict=True):
        free_at = max(arrival, free_at) + work
        expected.append(free_at)
    ends = through_gateways(arrivals, service, num_gateways=1, random=random)
    np.testing.assert_allclose(ends, expected, rtol=1e-12)


def test_gateways_share_calls(seed: int) -> None:
    """K gateways under k times the load of one behave as one."""
    means = []
    for number in (1, 4):
        arrivals = poisson(0.6 * number, 200_000, seed)
        service = np.ones_like(arrivals)
        ends = through_gateways(arrivals, service, num_gateways=number, random=np.random.default_rng(seed))
        means.append(settled(ends - arrivals).mean())
    assert means[1] == pytest.approx(means[0], rel=SAMPLING)


@pytest.mark.parametrize("load", [0.1, 0.4, 0.8])
def test_one_replica_batches_as_inoue_says(load: float, seed: int) -> None:
    """Mean time of a queue that takes all that waits, runs of a + b n: his closed bound, which is nearly the mean.

    E[W] <= min(phi_0, phi_1), with phi_0 = (b + a) / (2 (1 - lb)) (1 + 2 la + (1 - la) / (1 + lb)) and
    phi_1 = 3/2 a / (1 - lb) + b/2 (lb + 2) / (1 - (lb)^2), l the arrivals per second (theorem 2).
    """
    a, b, rate = 20.0, 1.0, load
    arrivals = poisson(rate, 200_000, seed)
    ends = through_replicas(
        arrivals, np.ones(len(arrivals), int), _cost(a, b), num_replicas=1, max_batch_rows=10**9
    )
    low = (a + b) / (2 * (1 - rate * b)) * (1 + 2 * rate * a + (1 - rate * a) / (1 + rate * b))
    high = 1.5 * a / (1 - rate * b) + b / 2 * (rate * b + 2) / (1 - (rate * b) ** 2)
    bound = min(low, high)
    mean = settled(ends - arrivals).mean()
    assert mean <= bound * (1 + SAMPLING)
    assert mean == pytest.approx(bound, rel=SAMPLING)


def test_replicas_that_never_batch_wait_as_crommelin_says(seed: int) -> None:
    """Runs of one row on c replicas: the mean wait of M/D/c, by the exact series of Crommelin."""
    num_replicas, load = 3, 0.8
    arrivals = poisson(num_replicas * load, 200_000, seed)
    rows = np.ones(len(arrivals), int)
    ends = through_replicas(arrivals, rows, _cost(1.0, 0.0), num_replicas=num_replicas, max_batch_rows=1)
    expected = crommelin_mean_wait(num_replicas, load)
    assert settled(ends - arrivals).mean() - 1 == pytest.approx(expected, rel=SAMPLING)


def crommelin_mean_wait(num_servers: int, load: float) -> float:
    """Return the mean wait of M/D/c in service times.

    E[W] = sum_i exp(-i a) (sum_{j >= ic} (ia)^j / j! - 1/load sum_{j >= ic + 1} (ia)^j / j!), a = c load.

    References:
        Crommelin, Delay probability formulae when the holding times are constant, 1932.
    """
    offered, total = num_servers * load, 0.0
    for i in range(1, 400):
        mean = i * offered
        logs = np.arange(i * num_servers, i * num_servers + 2000)
        terms = np.exp(-mean + logs * math.log(mean) - np.array([math.lgamma(j + 1) for j in logs]))
        total += terms.sum() - terms[1:].sum() / load
    return total


def test_a_call_alone_takes_its_run(seed: int) -> None:
    """Nothing waits where nothing meets."""
    arrivals, rows = poisson(1e-6, 100, seed), np.arange(1, 101)
    ends = through_replicas(arrivals, rows, _cost(2.0, 0.5), num_replicas=1, max_batch_rows=1000)
    np.testing.assert_allclose(ends - arrivals, 2 + 0.5 * rows, rtol=0, atol=1e-6)


def test_a_call_larger_than_a_batch_ends_with_its_last_run() -> None:
    """Ten rows in runs of four on one replica: three runs."""
    ends = through_replicas(np.array([1.0]), np.array([10]), _cost(1.0, 0.1), num_replicas=1, max_batch_rows=4)
    assert ends[0] == pytest.approx(1 + 3 * 1.0 + 10 * 0.1)


def test_free_replicas_share_what_waits() -> None:
    """Two replicas take half of a large call each, and none below the least share."""
    cost = _cost(0.0, 1.0)
    (end,) = through_replicas(np.array([0.0]), np.array([200]), cost, num_replicas=2, max_batch_rows=512)
    assert end == 100
    (end,) = through_replicas(
        np.array([0.0]), np.array([MIN_SHARE_ROWS]), cost, num_replicas=2, max_batch_rows=512
    )
    assert end == MIN_SHARE_ROWS


def test_the_order_of_the_arguments_does_not_matter(seed: int) -> None:
    """Arrivals may come in any order; each call gets its own end."""
    arrivals = poisson(1.0, 300, seed)
    rows = np.random.default_rng(seed).integers(1, 9, 300)
    order = np.random.default_rng(seed).permutation(300)
    options = {"num_replicas": 2, "max_batch_rows": 16}
    ends = through_replicas(arrivals, rows, _cost(1.0, 0.2), **options)
    shuffled = through_replicas(arrivals[order], rows[order], _cost(1.0, 0.2), **options)
    np.testing.assert_array_equal(shuffled, ends[order])


@pytest.mark.parametrize(
    ("rate", "rows", "num_replicas", "tolerance"),
    [
        (300.0, (1,), 1, EXACT),
        (2500.0, (1,), 1, EXACT),
        (900.0, (1, 16), 2, EXACT),
        (500.0, (64,), 2, EXACT),
        (700.0, (1, 64, 200), 4, SPLIT),
    ],
)
def test_the_batcher_of_the_service_takes_the_same_time(
    rate: float, rows: Sequence[int], num_replicas: int, tolerance: float, seed: int
) -> None:
    """Our own `RowBatcher` in virtual time, with runs that sleep: mean and p99 are those of the simulation."""
    cost = _cost(1e-3, 5e-5)
    arrivals = poisson(rate, 6000, seed)
    sizes = np.random.default_rng(seed).choice(rows, len(arrivals))
    simulated = through_replicas(arrivals, sizes, cost, num_replicas=num_replicas, max_batch_rows=512) - arrivals
    real = virtual_time.run(batched(arrivals, sizes, cost, num_replicas))
    assert real.mean() == pytest.approx(simulated.mean(), rel=tolerance)
    assert np.quantile(real, 0.99) == pytest.approx(np.quantile(simulated, 0.99), rel=tolerance)


async def batched(arrivals: Times, rows: Rows, cost: Cost, num_replicas: int) -> Times:
    """Return how long calls take in the service's own batcher before replicas that sleep."""
    loop = asyncio.get_running_loop()
    replicas = asyncio.Semaphore(num_replicas)
    took, ticks = np.empty(len(arrivals)), itertools.count()

    async def run(batch: NDArray[np.float32], _timeout_s: float) -> Outputs:
        async with replicas:
            await asyncio.sleep(cost.seconds(len(batch)))
        return (batch,)

    batcher = RowBatcher(
        run,
        BatchingConfig(max_queue_rows=10**9, max_queue_bytes=2**40, stall_after_s=1e9, max_gather_s=0.0),
        name="encoder",
        num_slots=1,
        num_replicas=lambda: num_replicas,
        clock=lambda: loop.time() + next(ticks) * TICK_S,
    )

    async def call(index: int) -> None:
        began = loop.time()
        await batcher.submit(np.zeros((int(rows[index]), 1), np.float32), Ticket(began + 1e6))
        took[index] = loop.time() - began

    async with asyncio.TaskGroup() as calls:
        for index, arrival in enumerate(arrivals):
            await asyncio.sleep(arrival - loop.time())
            calls.create_task(call(index))
    await batcher.close()
    return took


def _cost(a: float, b: float) -> Cost:
    return Cost(per_call_s=a, per_row_s=b)
