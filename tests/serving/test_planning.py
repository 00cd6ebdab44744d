"""A plan holds what it promises and not a replica more: checked with our own batcher, not the planner's model."""

import asyncio
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.capacity import Capacity, Cost, MeasurementError, Run
from serving.loadtest.workload import Operation, parse_mix
from serving.planning import (
    Load,
    Model,
    Numbers,
    TargetBelowFloor,
    TargetOutOfReach,
    copies,
    gateway_cost,
    plan,
    rows_per_s,
)
from serving.typed_config import ConfigError
from tests.serving import virtual_time
from tests.serving.loadtest.synthetic import report
from tests.serving.test_capacity import example
from tests.serving.test_queue_simulation import batched, poisson

QUANTILE_ERROR = 0.05
"""Relative error of a p99 of 12,000 calls here, two standard errors: what two draws of arrivals may differ by."""

ENCODE_1, ENCODE_64, SAMPLE_64 = Operation("encode", 1), Operation("encode", 64), Operation("sample", 64)


def bare(per_call_s: float, per_row_s: float) -> Capacity:
    """Return a service of which only the replicas take time."""
    run = Run(graph=Cost(per_call_s=per_call_s, per_row_s=per_row_s))
    costs = dict.fromkeys(("encode", "decode"), Cost(per_call_s=1e-9, per_row_s=0))
    gateway = example().gateway.model_copy(update={"costs": costs})
    return example(encoder=run, decoder=run, gateway=gateway, floor_s=0.0)


async def served_p99_s(rate: float, operation: Operation, cost: Cost, num_replicas: int, seed: int) -> float:
    """Return the p99 of calls that our own batcher sends to replicas that sleep, in virtual time."""
    arrivals = poisson(rate, 12_000, seed)
    times = await batched(arrivals, np.full(len(arrivals), operation.rows), cost, num_replicas)
    return float(np.quantile(times[1200:], 0.99))


@pytest.mark.parametrize(
    ("rate", "operation", "p99_s", "bound"),
    [
        (900.0, ENCODE_64, 0.012, "p99"),
        (2000.0, Operation("encode", 16), 0.006, "p99"),
        (3000.0, ENCODE_1, 0.0019, "p99"),
        (1500.0, ENCODE_64, 0.05, "utilisation"),
    ],
)
def test_the_planned_replicas_keep_the_time_and_one_fewer_do_not(
    rate: float, operation: Operation, p99_s: float, bound: str, seed: int
) -> None:
    """Arrivals of another seed, the service's own batcher, replicas that sleep as long as a run takes."""
    capacity = bare(1e-3, 5e-5)
    found = plan(Load(rate, {operation: 1.0}, p99_s), capacity)
    tier = found.tiers["encoder"]
    assert tier.bound == bound
    cost = capacity.encoder.cost
    enough = virtual_time.run(served_p99_s(rate, operation, cost, tier.num_replicas, seed))
    assert enough <= p99_s * (1 + QUANTILE_ERROR)
    if bound == "p99":
        fewer = virtual_time.run(served_p99_s(rate, operation, cost, tier.num_replicas - 1, seed))
        assert fewer > p99_s * (1 - QUANTILE_ERROR)
        assert fewer > enough
    else:  # the time would be kept, the headroom would not
        assert tier.load <= 0.7 < tier.load * tier.num_replicas / (tier.num_replicas - 1)


def test_none_of_the_tiers_can_spare_one() -> None:
    """A mix through both graphs and several gateways: one fewer anywhere breaks headroom or p99."""
    load = Load(12_000.0, parse_mix("encode:1=0.5,reconstruct:16=0.3,sample:64=0.2"), 0.016)
    capacity = example()
    found = plan(load, capacity)
    numbers: Numbers = {name: tier.num_replicas for name, tier in found.tiers.items()}
    model = Model(load, capacity, seed=0)
    assert model.is_enough(numbers)
    assert max(found.p99_s.values()) <= load.p99_s
    assert min(numbers.values()) > 1
    for tier in numbers:
        fewer = numbers | {tier: numbers[tier] - 1}
        assert model.demand[tier] / fewer[tier] > load.headroom or not model.is_enough(fewer)


@settings(max_examples=5, deadline=None)
@given(st.floats(10, 4000), st.integers(1, 128), st.floats(0.02, 0.2))
def test_more_is_never_planned_for_less(rate: float, rows: int, p99_s: float) -> None:
    """Half the calls, or twice the time, needs no more of anything; no tier is planned above its headroom."""
    capacity, mix = example(), {Operation("encode", rows): 1.0}
    whole = plan(Load(rate, mix, p99_s), capacity)
    for easier in (Load(rate / 2, mix, p99_s), Load(rate, mix, 2 * p99_s)):
        found = plan(easier, capacity)
        assert all(tier.num_replicas <= whole.tiers[name].num_replicas for name, tier in found.tiers.items())
    assert all(tier.load <= 0.7 + 1e-9 for tier in whole.tiers.values())


def test_only_what_a_method_uses_is_planned() -> None:
    """Encode needs no decoder, Sample no encoder, Reconstruct both."""
    for method, tiers in (
        ("encode", {"encoder"}),
        ("sample", {"decoder"}),
        ("reconstruct", {"encoder", "decoder"}),
    ):
        found = plan(Load(100.0, {Operation(method, 4): 1.0}, 0.1), example())  # type: ignore[arg-type]  # all are
        assert set(found.tiers) == {"gateway", *tiers}


def test_the_sums_add_up() -> None:
    """Processors, memory and GPUs are those of the tiers."""
    found = plan(Load(3000.0, {ENCODE_64: 0.5, SAMPLE_64: 0.5}, 0.1), example())
    number = {name: tier.num_replicas for name, tier in found.tiers.items()}
    assert found.num_cpus == sum(number.values())
    assert found.memory_mib == 1000 + 200 * sum(number.values())
    assert found.num_gpus == 0
    on_gpus = plan(Load(3000.0, {ENCODE_64: 0.5, SAMPLE_64: 0.5}, 0.1), example(device="cuda"), gpu_share=0.25)
    assert on_gpus.num_gpus == 0.25 * (number["encoder"] + number["decoder"])


def test_load_is_a_share_of_the_most_a_tier_can_do() -> None:
    """100 calls of 64 rows a second, against full runs without a pause, and against one processor."""
    capacity = example()
    found = plan(Load(100.0, {ENCODE_64: 1.0}, 0.1), capacity)
    assert rows_per_s(capacity.encoder.cost, 512) == pytest.approx(512 / (1e-3 + 512e-5))
    assert found.tiers["encoder"].load == pytest.approx(6400 / rows_per_s(capacity.encoder.cost, 512))
    assert found.tiers["gateway"].load == pytest.approx(100 * (2e-4 + 64 * 2e-6))


def test_a_time_below_one_call_alone_is_refused_with_the_floor() -> None:
    """The floor is said: hops, gateway and one run; a call larger than a batch has several."""
    capacity = example()
    floor_s = 2e-3 + gateway_cost(ENCODE_64, capacity).seconds(64) + capacity.encoder.cost.seconds(64)
    with pytest.raises(TargetBelowFloor, match=rf"one call of encode:64 alone takes {floor_s * 1e3:.3g} ms"):
        plan(Load(1.0, {ENCODE_1: 0.5, ENCODE_64: 0.5}, floor_s * 0.99), capacity)
    found = plan(Load(1.0, {ENCODE_64: 1.0}, 0.1), capacity)
    assert found.floor_s["encode:64"] == pytest.approx(floor_s)
    assert found.p99_s["encode:64"] == pytest.approx(floor_s, rel=QUANTILE_ERROR)


def test_a_time_just_above_the_floor_is_out_of_reach_at_a_high_rate() -> None:
    """Some calls always meet another: the best that was reached is said."""
    capacity = bare(1e-3, 5e-5)
    with pytest.raises(TargetOutOfReach, match="was the best within"):
        plan(Load(1e7, {ENCODE_1: 1.0}, 1.0502e-3), capacity)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calls_per_s": 0.0}, "--rps 0: expected calls per second above 0"),
        ({"p99_s": -1.0}, "--p99 -1 s: expected a time above 0"),
        ({"headroom": 1.0}, "--headroom 1: expected a share between 0 and 1"),
        ({"headroom": 0.0}, "--headroom 0"),
    ],
)
def test_loads_that_mean_nothing_are_refused(changes: dict[str, Any], words: str) -> None:
    """Which option, and what it may be."""
    with pytest.raises(ConfigError, match=words):
        plan(Load(10.0, {ENCODE_1: 1.0}, 0.1)._replace(**changes), example())


def test_a_method_that_was_not_measured_is_said() -> None:
    """Rather than taken for another."""
    with pytest.raises(MeasurementError, match="interpolate was not measured, only decode"):
        plan(Load(10.0, {Operation("interpolate", 4): 1.0}, 0.1), example())


def test_a_plan_is_the_same_every_time() -> None:
    """Seeded."""
    load = Load(2000.0, {ENCODE_1: 0.9, SAMPLE_64: 0.1}, 0.02)
    assert plan(load, example()) == plan(load, example())


def test_copies_of_a_tested_service_share_the_load() -> None:
    """The best stage within the time, with headroom; a stage that refuses is none."""
    tested = report()
    number, stage = copies(tested, 5000.0, 0.1, headroom=0.7)
    assert stage.offered_per_s == 1100.0
    assert number == -(-5000.0 // (0.7 * stage.goodput_per_s))
    _, strict = copies(tested, 5000.0, 0.013, headroom=0.7)
    assert strict.offered_per_s == 800.0
    with pytest.raises(
        MeasurementError, match=r"no stage answered 99 % of its calls rightly .* the least p99 is 4"
    ):
        copies(tested, 5000.0, 0.001, headroom=0.7)


def test_virtual_time_takes_no_time() -> None:
    """An hour passes at once, and timers come in their order."""

    async def sleepers() -> tuple[float, list[int]]:
        order: list[int] = []

        async def sleep(number: int, seconds: float) -> None:
            await asyncio.sleep(seconds)
            order.append(number)

        await asyncio.gather(sleep(1, 3600.0), sleep(2, 60.0))
        return asyncio.get_running_loop().time(), order

    now_s, order = virtual_time.run(sleepers())
    assert now_s == pytest.approx(3600.0)
    assert order == [2, 1]
