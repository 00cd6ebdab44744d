"""How many gateways and replicas a load needs, by what was measured: utilisation first, then p99 by simulation."""

import math
from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from serving.capacity import Capacity, Cost, MeasurementError, Run
from serving.loadtest.results import LoadReport, Stage
from serving.loadtest.workload import Operation
from serving.queue_simulation import through_gateways, through_replicas
from serving.typed_config import ConfigError

Tier = Literal["gateway", "encoder", "decoder"]
Numbers = dict[Tier, int]

TIERS: Final[tuple[Tier, ...]] = ("gateway", "encoder", "decoder")

ENCODES: Final = frozenset({"encode", "reconstruct", "score"})
"""Methods whose rows run through the encoder."""

DECODES: Final = frozenset({"decode", "sample", "reconstruct", "score"})
"""Methods whose rows run through the decoder; after the encoder if through both."""

MAX_REPLICAS: Final = 4096
"""Replicas of one graph above which a plan is no longer a plan for one service."""

_MIN_CALLS: Final = 40_000
_MAX_CALLS: Final = 200_000
_CALLS_PER_OPERATION: Final = 4_000
"""Calls of the rarest operation wanted in a simulation: forty beyond its p99."""

_WARM_UP: Final = 0.1
"""Share of the calls at the start that is left out: the queues begin empty."""

_GOOD_SHARE: Final = 0.99
_MAX_STEPS: Final = 200


class TargetBelowFloor(ConfigError):
    """The time asked for is less than one call alone takes: no number of replicas helps."""

    def __init__(self, *, p99_s: float, floor_s: float, operation: str) -> None:
        super().__init__(
            f"--p99 {_ms(p99_s)}: one call of {operation} alone takes {_ms(floor_s)}, more replicas do not help; "
            "ask for more time, for fewer rows in a call, or measure a faster machine"
        )
        self.p99_s, self.floor_s, self.operation = p99_s, floor_s, operation


class TargetOutOfReach(ConfigError):
    """The time asked for leaves so little beside one call that a service of this shape cannot hold it."""

    def __init__(self, *, p99_s: float, floor_s: float, reached_s: float) -> None:
        super().__init__(
            f"--p99 {_ms(p99_s)}: {_ms(reached_s)} was the best within {MAX_REPLICAS} replicas, one call alone "
            f"takes {_ms(floor_s)}; ask for more time or fewer rows in a call"
        )
        self.p99_s, self.floor_s, self.reached_s = p99_s, floor_s, reached_s


class Load(NamedTuple):
    """What is asked of the service."""

    calls_per_s: float
    mix: Mapping[Operation, float]
    """Shares; their sum is one."""

    p99_s: float
    """Time in which 99 % of the calls of each operation must be answered, seconds."""

    headroom: float = 0.7
    """Largest share of what a tier can do at most that is planned for, in (0, 1)."""


class TierPlan(NamedTuple):
    """One deployment."""

    num_replicas: int
    load: float
    """What is asked of it, as a share of what it can do at most."""

    bound: str
    """What its number follows from: utilisation, p99, or that there is at least one."""


class Plan(NamedTuple):
    """What a load needs."""

    tiers: dict[Tier, TierPlan]
    num_cpus: float
    num_gpus: float
    memory_mib: float
    p99_s: dict[str, float]
    """Simulated, by operation."""

    floor_s: dict[str, float]
    """One call alone, by operation."""

    num_calls: int
    """Calls that were simulated."""


def plan(load: Load, capacity: Capacity, *, gpu_share: float = 0.5, seed: int = 0) -> Plan:
    """Return the fewest gateways and replicas that carry a load: one fewer of any breaks headroom or p99.

    Args:
        load: What is asked.
        capacity: What calls and runs cost.
        gpu_share: Share of a GPU that a replica reserves, where the graphs run on one.
        seed: Of the simulated arrivals.

    Raises:
        ConfigError: If a number is out of range, or a method was not measured.
        TargetBelowFloor: If one call alone takes longer.
        TargetOutOfReach: If no number up to MAX_REPLICAS is enough.
    """
    check(load)
    floors = {operation: _alone_s(operation, capacity) for operation in load.mix}
    slowest = max(floors, key=floors.__getitem__)
    if floors[slowest] >= load.p99_s:
        raise TargetBelowFloor(p99_s=load.p99_s, floor_s=floors[slowest], operation=slowest.name)
    model = Model(load, capacity, seed=seed)
    fewest = {tier: _fewest(model.demand[tier], load.headroom) for tier in TIERS}
    numbers = _pruned(model, _grown(model, fewest, floors[slowest]), fewest)
    tiers = {
        tier: TierPlan(numbers[tier], model.demand[tier] / numbers[tier], _bound(tier, numbers, fewest))
        for tier in TIERS
        if numbers[tier]
    }
    replicas = (numbers["encoder"], capacity.encoder), (numbers["decoder"], capacity.decoder)
    return Plan(
        tiers=tiers,
        num_cpus=numbers["gateway"] + sum(number * run.threads for number, run in replicas),
        num_gpus=sum(number for number, _ in replicas) * gpu_share if capacity.device == "cuda" else 0.0,
        memory_mib=capacity.shared_memory_mib
        + numbers["gateway"] * capacity.gateway.memory_mib
        + sum(number * run.memory_mib for number, run in replicas),
        p99_s=model.p99_s(numbers),
        floor_s={operation.name: floor for operation, floor in floors.items()},
        num_calls=model.num_calls,
    )


def check(load: Load) -> None:
    """Refuse a load that means nothing.

    Raises:
        ConfigError: If a number is out of range.
    """
    if not 0 < load.calls_per_s < math.inf:
        raise ConfigError(f"--rps {load.calls_per_s:g}: expected calls per second above 0")
    if not 0 < load.p99_s < math.inf:
        raise ConfigError(f"--p99 {load.p99_s:g} s: expected a time above 0")
    if not 0 < load.headroom < 1:
        raise ConfigError(
            f"--headroom {load.headroom:g}: expected a share between 0 and 1; at 1 queues have no end"
        )


class Model:
    """The service under a load: the same arrivals for any numbers, so that numbers are compared alike."""

    def __init__(self, load: Load, capacity: Capacity, *, seed: int) -> None:
        self._capacity, self.load = capacity, load
        self._operations = list(load.mix)
        rarest = min(load.mix.values())
        self.num_calls = int(min(max(_CALLS_PER_OPERATION / rarest, _MIN_CALLS), _MAX_CALLS))
        random = np.random.default_rng(seed)
        self._arrivals = np.cumsum(random.exponential(1 / load.calls_per_s, self.num_calls))
        self._kinds = random.choice(len(self._operations), self.num_calls, p=list(load.mix.values()))
        self._rows = np.array([operation.rows for operation in self._operations])[self._kinds]
        costs = [gateway_cost(operation, capacity).seconds(operation.rows) for operation in self._operations]
        self._gateway_s = np.array(costs)[self._kinds]
        self._seed = seed
        self.demand: dict[Tier, float] = {tier: self._demand(tier) for tier in TIERS}
        """Replicas of each tier that would be busy all the time."""

    def p99_s(self, numbers: Numbers) -> dict[str, float]:
        """Return the simulated p99 of each operation, seconds."""
        times = self._times(numbers)
        start = int(self.num_calls * _WARM_UP)
        times, kinds = times[start:], self._kinds[start:]
        return {
            operation.name: float(np.quantile(times[kinds == kind], 0.99))
            for kind, operation in enumerate(self._operations)
            if (kinds == kind).any()
        }

    def is_enough(self, numbers: Numbers) -> bool:
        """Return whether every operation keeps the time that is asked for."""
        return max(self.p99_s(numbers).values()) <= self.load.p99_s

    def waits_s(self, numbers: Numbers) -> dict[Tier, float]:
        """Return the 99 % quantile of the time in each tier beyond its work for one call alone, seconds."""
        stages = self._stages(numbers)
        return {tier: float(np.quantile(times - alone, 0.99)) for tier, (times, alone) in stages.items()}

    def _times(self, numbers: Numbers) -> NDArray[np.float64]:
        total = np.full(self.num_calls, self._capacity.floor_s)
        for tier, (times, _) in self._stages(numbers).items():
            total[self._in(tier)] += times
        return total

    def _stages(self, numbers: Numbers) -> dict[Tier, tuple[NDArray[np.float64], NDArray[np.float64]]]:
        """Return for each tier the times of its calls in it, and their times alone."""
        random = np.random.default_rng([self._seed, 1])
        at = through_gateways(self._arrivals, self._gateway_s, num_gateways=numbers["gateway"], random=random)
        found: dict[Tier, tuple[NDArray[np.float64], NDArray[np.float64]]] = {
            "gateway": (at - self._arrivals, self._gateway_s)
        }
        graphs: tuple[tuple[Tier, Cost], ...] = (
            ("encoder", self._capacity.encoder.cost),
            ("decoder", self._capacity.decoder.cost),
        )
        for tier, cost in graphs:
            own = self._in(tier)
            if own.any():
                rows, limit = self._rows[own], self._capacity.max_batch_rows
                ends = through_replicas(at[own], rows, cost, num_replicas=numbers[tier], max_batch_rows=limit)
                found[tier] = ends - at[own], cost.per_call_s + cost.per_row_s * rows
                at[own] = ends
        return found

    def _in(self, tier: Tier) -> NDArray[np.bool_]:
        passes = np.array([_passes(operation, tier) for operation in self._operations])
        result: NDArray[np.bool_] = passes[self._kinds]
        return result

    def _demand(self, tier: Tier) -> float:
        capacity = self._capacity
        if tier == "gateway":
            per_call = (
                share * gateway_cost(one, capacity).seconds(one.rows) for one, share in self.load.mix.items()
            )
            return self.load.calls_per_s * sum(per_call)
        run = capacity.encoder if tier == "encoder" else capacity.decoder
        mix = self.load.mix.items()
        rows = sum(share * operation.rows for operation, share in mix if _passes(operation, tier))
        return self.load.calls_per_s * rows / rows_per_s(run.cost, capacity.max_batch_rows)


def rows_per_s(cost: Cost, max_batch_rows: int) -> float:
    """Return the most rows per second of one replica: full batches, one after the other."""
    return max_batch_rows / cost.seconds(max_batch_rows)


def gateway_cost(operation: Operation, capacity: Capacity) -> Cost:
    """Return what a call costs a gateway.

    Raises:
        MeasurementError: If the method was not measured.
    """
    costs = capacity.gateway.costs
    if operation.method not in costs:
        known = ", ".join(sorted(costs))
        raise MeasurementError(source=capacity.model, problem=f"{operation.method} was not measured, only {known}")
    return costs[operation.method]


def copies(report: LoadReport, calls_per_s: float, p99_s: float, *, headroom: float) -> tuple[int, Stage]:
    """Return how many times the service of a load test carries a load of the same mix, and the stage that says so.

    Raises:
        MeasurementError: If no stage answers 99 % rightly within the time.
    """
    good = [stage for stage in report.stages if _is_good(stage, p99_s)]
    if not good:
        seen = [stage.response_time.p99 for stage in report.stages if stage.response_time is not None]
        best = f"the least p99 is {min(seen):.3g} ms" if seen else "nothing was answered"
        problem = f"no stage answered 99 % of its calls rightly with a p99 of {_ms(p99_s)}: {best}"
        raise MeasurementError(source=f"report {report.label}", problem=problem)
    best_stage = max(good, key=lambda stage: stage.goodput_per_s)
    return math.ceil(calls_per_s / (headroom * best_stage.goodput_per_s)), best_stage


def _is_good(stage: Stage, p99_s: float) -> bool:
    times, counts = stage.response_time, stage.counts
    return times is not None and times.p99 <= p99_s * 1e3 and counts.right >= _GOOD_SHARE * counts.sent


def _alone_s(operation: Operation, capacity: Capacity) -> float:
    """Return the time of one call in an idle service, seconds."""
    total = capacity.floor_s + gateway_cost(operation, capacity).seconds(operation.rows)
    full, rest = divmod(operation.rows, capacity.max_batch_rows)
    graphs: tuple[tuple[Tier, Run], ...] = ("encoder", capacity.encoder), ("decoder", capacity.decoder)
    for tier, run in graphs:
        if _passes(operation, tier):
            total += run.cost.seconds(capacity.max_batch_rows if full else rest)
    return total


def _passes(operation: Operation, tier: Tier) -> bool:
    return tier == "gateway" or operation.method in (ENCODES if tier == "encoder" else DECODES)


def _fewest(demand: float, headroom: float) -> int:
    return math.ceil(demand / headroom - 1e-9)


def _grown(model: Model, fewest: Numbers, floor_s: float) -> Numbers:
    """Return numbers that keep the time: always more of the tier in which calls wait longest."""
    numbers = dict(fewest)
    for _ in range(_MAX_STEPS):
        if model.is_enough(numbers):
            return numbers
        waits = model.waits_s(numbers)
        tier = max(waits, key=waits.__getitem__)
        numbers[tier] += max(1, numbers[tier] // 8)
        if numbers[tier] > MAX_REPLICAS:
            break
    reached = max(model.p99_s(numbers).values())
    raise TargetOutOfReach(p99_s=model.load.p99_s, floor_s=floor_s, reached_s=reached)


def _pruned(model: Model, numbers: Numbers, fewest: Numbers) -> Numbers:
    """Return numbers of which none can be less: the dearest tiers are tried first."""
    for tier in reversed(TIERS):
        while numbers[tier] > fewest[tier]:
            fewer = numbers | {tier: numbers[tier] - 1}
            if not model.is_enough(fewer):
                break
            numbers = fewer
    return numbers


def _bound(tier: Tier, numbers: Numbers, fewest: Numbers) -> str:
    if numbers[tier] > fewest[tier]:
        return "p99"
    return "utilisation" if numbers[tier] > 1 else "at least one"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
