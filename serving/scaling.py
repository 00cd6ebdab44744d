"""How many replicas a deployment has: what the policies make of the replicas' reports.

Serve sees one call per run of a graph and none of the gateway's calls, so neither rows that wait in a gateway nor
how long runs take; and a load whose runs never get full keeps a replica busy with one call at a time. The policies
here use what `meters` reports. Serve pickles them by value into its controller, so this file imports little, and a
policy that raised would stop the scaling of every application: they never do.
"""

import abc
import logging
import math
from typing import Any, Final

from serving.config import GatewayConfig, ReplicasConfig, ScalingConfig

METRICS_INTERVAL_S: Final = 0.5
LOOK_BACK_S: Final = 2.0
"""Reports are means over the time since the one before, so a short look back is enough."""

SLACK: Final = 0.8
"""Share of the target load that fewer replicas must stay below before there are fewer: without it a load at the
border would start and stop a replica again and again."""

MAX_CALLS_SHARE: Final = 0.5
"""Share of the calls that gateways let in above which there are more gateways: streams use little processor."""


class _Policy(abc.ABC):
    """A policy as Serve's controller calls it, once in each of its turns."""

    def __call__(self, context: Any) -> tuple[float, dict[str, Any]]:  # noqa: ANN401 - an AutoscalingContext
        """Return the number of replicas before Serve's delays and bounds; if in doubt, as many as there are."""
        try:
            return self.decide(context), {}
        except Exception:
            logging.getLogger("ray.serve").exception("the scaling policy failed; the number of replicas stays")
            return float(getattr(context, "target_num_replicas", 1)), {}

    @abc.abstractmethod
    def decide(self, context: Any) -> float:  # noqa: ANN401 - as above
        """Return the number of replicas."""


class GraphPolicy(_Policy):
    """Decides for Encoder or Decoder.

    The work, in replicas, is the time in which they run something, less what large runs would save: small runs
    cost more per row, but a busier replica makes larger ones. Rows that wait need as many more replicas as run
    them in `drain_s`.

    Args:
        target_load: Share of its time that a replica should work, in (0, 1].
        drain_s: Time in which waiting rows should be run, seconds.
    """

    def __init__(self, target_load: float, drain_s: float) -> None:
        self._target_load, self._drain_s = target_load, drain_s

    def decide(self, context: Any) -> float:  # noqa: ANN401 - as above
        """Return the number of replicas."""
        metrics: dict[str, dict[Any, float]] = context.aggregated_metrics or {}
        busy, row_s = metrics.get("busy", {}), metrics.get("row_s", {})
        if not busy:
            # No replica has reported yet, or reports do not come: Serve's own signal, one call in flight each.
            return max(float(context.total_num_requests), min(1.0, float(context.target_num_replicas)))
        least_s = min((value for value in metrics.get("least_row_s", {}).values() if value > 0), default=0.0)
        work = sum(share * _efficiency(least_s, row_s.get(replica, 0.0)) for replica, share in busy.items())
        num_waiting = sum(metrics.get("waiting_rows", {}).values())
        needed = work / self._target_load + num_waiting * least_s / self._drain_s
        # Not Serve's count of calls: it sees the gateways' health checks too, which must not keep it awake.
        is_used = num_waiting > 0 or any(busy.values())
        return max(settled(needed, context.target_num_replicas), float(is_used))


class GatewayPolicy(_Policy):
    """Decides for the Gateway.

    Args:
        target_load: Processor time per time that a gateway should use, in (0, 1].
        max_calls: Calls that one gateway lets in.
    """

    def __init__(self, target_load: float, max_calls: int) -> None:
        self._target_load, self._max_calls = target_load, max_calls

    def decide(self, context: Any) -> float:  # noqa: ANN401 - as above
        """Return the number of gateways."""
        metrics: dict[str, dict[Any, float]] = context.aggregated_metrics or {}
        if not metrics.get("busy"):
            return float(context.target_num_replicas)
        by_load = sum(metrics["busy"].values()) / self._target_load
        by_calls = sum(metrics.get("calls", {}).values()) / (MAX_CALLS_SHARE * self._max_calls)
        return settled(max(by_load, by_calls), context.target_num_replicas)


def settled(needed: float, num_replicas: int) -> float:
    """Return the number of replicas for what is needed: more at once, fewer only with some slack."""
    if needed > num_replicas:
        return float(math.ceil(needed))
    return float(min(math.ceil(needed / SLACK), num_replicas))


def _efficiency(least_row_s: float, row_s: float) -> float:
    """Return the share of the time of runs that would be left if all were large; 1 if that is not known."""
    return min(1.0, least_row_s / row_s) if least_row_s > 0 and row_s > 0 else 1.0


def options(replicas: ReplicasConfig) -> dict[str, Any]:
    """Return the deployment options that fix or scale the replicas of a graph."""
    if replicas.max_replicas <= replicas.min_replicas:
        return {"num_replicas": replicas.min_replicas}
    scaling = replicas.scaling
    kwargs = {"target_load": scaling.target_load, "drain_s": scaling.drain_s}
    bounds = replicas.min_replicas, replicas.max_replicas
    return {"autoscaling_config": _autoscaling(bounds, scaling, GraphPolicy, kwargs)}


def gateway_options(gateway: GatewayConfig) -> dict[str, Any]:
    """Return the deployment options that fix or scale the gateways."""
    if gateway.max_replicas <= gateway.num_replicas:
        return {"num_replicas": gateway.num_replicas}
    kwargs = {"target_load": gateway.scaling.target_load, "max_calls": gateway.admission.max_calls}
    bounds = gateway.num_replicas, gateway.max_replicas
    return {"autoscaling_config": _autoscaling(bounds, gateway.scaling, GatewayPolicy, kwargs)}


def _autoscaling(
    bounds: tuple[int, int], scaling: ScalingConfig, policy: type, kwargs: dict[str, Any]
) -> dict[str, Any]:
    low, high = bounds
    return {
        # No initial number: each deployment would go back to it, whatever the load. Where none need run, the first
        # gateway wakes one, because it has to see that it does.
        "min_replicas": low,
        "max_replicas": high,
        "target_ongoing_requests": 1,
        "metrics_interval_s": METRICS_INTERVAL_S,
        "look_back_period_s": LOOK_BACK_S,
        "upscale_delay_s": scaling.up_after_s,
        "downscale_delay_s": scaling.down_after_s,
        "downscale_to_zero_delay_s": scaling.zero_after_s,
        "policy": {"policy_function": f"{policy.__module__}:{policy.__name__}", "policy_kwargs": kwargs},
    }
