"""How many replicas a load needs, and that a policy can never harm Serve's controller."""

import math
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve.autoscaling_policy import _apply_delay_logic
from ray.serve.config import AutoscalingConfig

from serving.config import ServingConfig
from serving.scaling import SLACK, GatewayPolicy, GraphPolicy, gateway_options, options, settled

TARGET_LOAD, DRAIN_S = 0.7, 1.0
ROW_S = 1e-4


def context(num_replicas: int, *, num_calls: float = 0.0, **metrics: Any) -> Any:  # noqa: ANN401 - as Serve's
    """Return what Serve shows a policy: the metrics of replicas 0, 1, ..."""
    found = {name: dict(enumerate(values)) for name, values in metrics.items()}
    return SimpleNamespace(
        aggregated_metrics=found or None, target_num_replicas=num_replicas, total_num_requests=num_calls
    )


def graph(num_replicas: int, busy: list[float], *, waiting: float = 0.0, **metrics: list[float]) -> float:
    """Return the decision on a graph whose replicas run large runs, unless the metrics say otherwise."""
    each: dict[str, Any] = {
        "row_s": [ROW_S] * len(busy),
        "least_row_s": [ROW_S] * len(busy),
        "waiting_rows": [waiting],
    }
    shown = context(num_replicas, busy=busy, **(each | metrics))
    decision, state = GraphPolicy(TARGET_LOAD, DRAIN_S)(shown)
    assert state == {}
    return decision


@pytest.mark.parametrize(
    ("num_replicas", "busy", "expected"),
    [
        (1, [0.69], 1),
        (1, [0.71], 2),
        (1, [1.0], 2),
        (2, [1.0, 1.0], 3),
        (4, [1.0] * 4, 6),  # 4 / 0.7 = 5.7
        (2, [0.6, 0.6], 2),
        (2, [0.3, 0.2], 1),
        (4, [0.1] * 4, 1),
    ],
)
def test_replicas_follow_the_time_they_work(num_replicas: int, busy: list[float], expected: int) -> None:
    """As many as work for the target share of their time."""
    assert graph(num_replicas, busy) == expected


def test_small_runs_are_not_pressure() -> None:
    """A replica that is always busy with runs of a few rows makes larger ones before it needs help."""
    # One row of a run costs ten times as much as in large runs: a tenth of the time would do.
    assert graph(1, [1.0], row_s=[10 * ROW_S]) == 1


def test_a_new_replica_that_knows_small_runs_only_does_not_ask_for_more() -> None:
    """What a row costs is taken from whoever knows best: else each new replica would call for the next."""
    busy, row_s, least = [1.0] * 3, [4 * ROW_S] * 3, [ROW_S, 4 * ROW_S, 4 * ROW_S]
    assert graph(3, busy, row_s=row_s, least_row_s=least) == 2  # three quarters of a replica, with slack


@pytest.mark.parametrize(("num_waiting", "expected"), [(0, 1), (3_000, 1), (12_000, 2), (25_000, 3)])
def test_rows_that_wait_are_to_run_in_a_second(num_waiting: int, expected: int) -> None:
    """Beside the work that there is, 0.3 / 0.7 replicas, one for each second of waiting rows."""
    assert graph(1, [0.3], waiting=num_waiting) == expected


def test_a_load_at_the_border_neither_starts_nor_stops_replicas() -> None:
    """Hysteresis: what a decision leads to leads to the same decision, for any load and number of replicas."""
    for load in [step / 37 for step in range(1, 400)]:
        for start in (1, 2, 5, 20):
            num_replicas = settled(load / TARGET_LOAD, start)
            assert num_replicas >= load / TARGET_LOAD
            for wobble in (0.0, 0.5 * (1 - SLACK)):  # less than the slack, downwards
                assert settled(load * (1 - wobble) / TARGET_LOAD, int(num_replicas)) <= num_replicas
            assert settled(load / TARGET_LOAD, int(num_replicas)) == num_replicas


def test_fewer_replicas_need_slack() -> None:
    """From two to one only when one would stay clearly below its target."""
    assert settled(0.99, 2) == 2
    assert settled(SLACK - 0.01, 2) == 1


def test_a_graph_in_use_stays_awake_and_one_without_work_may_sleep() -> None:
    """One row a minute is work; the calls of health checks, which Serve counts, are not."""
    assert graph(1, [1e-6]) == 1
    assert graph(1, [0.0], waiting=1.0) == 1
    assert graph(1, [0.0]) == 0
    idle = context(1, num_calls=1.0, busy=[0.0], row_s=[ROW_S], least_row_s=[ROW_S], waiting_rows=[0.0])
    assert GraphPolicy(TARGET_LOAD, DRAIN_S)(idle)[0] == 0


def test_without_reports_the_calls_in_flight_count() -> None:
    """Before the first report, and if none ever comes, the policy is Serve's own."""
    policy = GraphPolicy(TARGET_LOAD, DRAIN_S)
    assert policy(context(1, num_calls=3.0))[0] == 3
    assert policy(context(2, num_calls=0.0))[0] == 1
    assert policy(context(0, num_calls=0.0))[0] == 0


def test_gateways_follow_their_processor_time_or_their_calls() -> None:
    """Whichever needs more: long streams use little processor."""
    policy = GatewayPolicy(TARGET_LOAD, max_calls=100)
    assert policy(context(1, busy=[0.6], calls=[10]))[0] == 1
    assert policy(context(1, busy=[0.9], calls=[10]))[0] == 2
    assert policy(context(1, busy=[0.1], calls=[90]))[0] == 2
    assert policy(context(2, busy=[0.1, 0.1], calls=[5, 5]))[0] == 1
    assert policy(context(3))[0] == 3


class Broken:
    """A context that has changed so that nothing of it can be read."""

    target_num_replicas = 3

    @property
    def aggregated_metrics(self) -> dict[str, dict[int, float]]:
        """Fail."""
        raise RuntimeError("not as it was")


@pytest.mark.parametrize("policy", [GraphPolicy(TARGET_LOAD, DRAIN_S), GatewayPolicy(TARGET_LOAD, 10)])
@pytest.mark.parametrize("metrics", [Broken(), context(3, busy=["?"], calls=["?"]), context(3, busy=[math.nan])])
def test_a_policy_never_raises(policy: Any, metrics: Any) -> None:  # noqa: ANN401 - of both kinds
    """One that did would stop the scaling of every application: instead the number of replicas stays."""
    assert policy(metrics) == (3, {})


@pytest.mark.parametrize(("low", "high", "scales"), [(1, 1, False), (2, 2, False), (3, 1, False), (1, 3, True)])
def test_a_deployment_scales_only_where_there_is_room(low: int, high: int, *, scales: bool) -> None:
    """Equal bounds fix the number of replicas, of graphs and of gateways."""
    chosen = ServingConfig().override(
        [
            f"encoder.min_replicas={low}",
            f"encoder.max_replicas={high}",
            f"gateway.num_replicas={low}",
            f"gateway.max_replicas={high}",
        ]
    )
    for found in (options(chosen.encoder), gateway_options(chosen.gateway)):
        assert ("autoscaling_config" in found) == scales
        assert scales or found["num_replicas"] == low


def test_serve_takes_the_options() -> None:
    """Every setting arrives. There is no initial number, to which a deployment under load would fall back."""
    config = ServingConfig().override(
        [
            "decoder.min_replicas=0",
            "decoder.max_replicas=4",
            "decoder.scaling.up_after_s=2",
            "decoder.scaling.down_after_s=5",
            "decoder.scaling.zero_after_s=7",
        ]
    )
    taken = AutoscalingConfig(**options(config.decoder)["autoscaling_config"])
    assert (taken.min_replicas, taken.initial_replicas, taken.max_replicas) == (0, None, 4)
    assert (taken.upscale_delay_s, taken.downscale_delay_s, taken.downscale_to_zero_delay_s) == (2, 5, 7)
    policy = taken.policy.get_policy()(**taken.policy.policy_kwargs)
    assert policy(context(1, busy=[1.0], row_s=[ROW_S], least_row_s=[ROW_S]))[0] == 2


def test_the_controller_needs_nothing_of_ours_to_read_a_policy() -> None:
    """It is pickled by value: a controller on a node without this package can call it."""
    config = ServingConfig().override(["decoder.max_replicas=4"])
    taken = AutoscalingConfig(**options(config.decoder)["autoscaling_config"])
    program = (
        "import sys, pickle, types\n"
        "sys.modules['serving'] = None\n"
        "policy = pickle.loads(bytes.fromhex(sys.argv[1]))(0.7, 1.0)\n"
        "context = types.SimpleNamespace(aggregated_metrics=None, target_num_replicas=2, total_num_requests=5.0)\n"
        "print(policy(context)[0])\n"
    )
    pickled = taken.policy.get_serialized_policy_def()
    assert pickled is not None
    done = subprocess.run(
        [sys.executable, "-c", program, pickled.hex()], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.stdout == "5.0\n", done.stderr


def test_a_load_that_comes_and_goes_keeps_its_replicas() -> None:
    """Serve's delay begins anew whenever the load is back: bursts each few seconds stop nothing."""
    config = AutoscalingConfig(
        **options(ServingConfig().override(["decoder.max_replicas=2"]).decoder)["autoscaling_config"]
    )
    num_replicas, state = 2, dict[str, Any]()
    for second in range(120):
        is_burst = second % 10 < 3
        wanted = int(graph(num_replicas, [1.0, 0.9] if is_burst else [0.0, 0.0]))
        num_replicas, state = _apply_delay_logic(
            min(2, max(1, wanted)), num_replicas, config, state, float(second)
        )
        assert num_replicas == 2


RUN_S, MAX_BATCH = 0.01, 512
"""Times of the simulated graph: a run takes 10 ms and 0.1 ms a row, so a replica runs 8,366 rows/s at most."""


def simulated(rows_per_s: float, num_replicas: int, least: list[float], waiting: float) -> tuple[Any, float]:
    """Return what replicas report of a steady load that they share, and the rows that wait after another second.

    An engine that takes whatever waits makes runs of n rows with n = rate (a + b n): n = rate a / (1 - rate b).
    """
    rate = rows_per_s / num_replicas
    gathered = rate * RUN_S / (1 - rate * ROW_S) if rate * ROW_S < 1 else math.inf
    num_rows = MAX_BATCH if waiting else min(max(gathered, 1.0), MAX_BATCH)
    run_s = RUN_S + ROW_S * num_rows
    waiting = max(0.0, waiting + rows_per_s - num_replicas * num_rows / run_s) if num_rows == MAX_BATCH else 0.0
    least[:] = [min([run_s / num_rows, *least])]
    each = [run_s / num_rows] * num_replicas
    busy = [min(1.0, rate * run_s / num_rows)] * num_replicas
    return context(num_replicas, busy=busy, row_s=each, least_row_s=least, waiting_rows=[waiting]), waiting


@pytest.mark.parametrize("rows_per_s", [50, 1_000, 5_000, 20_000, 60_000])
def test_a_steady_load_settles_on_enough_replicas_and_not_many_more(rows_per_s: float) -> None:
    """Whatever the first guess: the load is carried, nothing waits, and the number stays."""
    capacity = MAX_BATCH / (RUN_S + ROW_S * MAX_BATCH)
    enough = math.ceil(rows_per_s / capacity)
    policy, num_replicas, waiting = GraphPolicy(TARGET_LOAD, DRAIN_S), 1, 0.0
    least: list[float] = []
    history = []
    for _ in range(60):
        shown, waiting = simulated(rows_per_s, num_replicas, least, waiting)
        num_replicas = min(64, max(1, int(policy(shown)[0])))
        history.append(num_replicas)
    assert len(set(history[-20:])) == 1
    assert waiting == 0
    # What it does not know is how cheap rows are in runs that never came: then it takes some replicas more.
    assert enough <= num_replicas <= math.ceil(2 * rows_per_s / capacity / TARGET_LOAD / SLACK) + 1
