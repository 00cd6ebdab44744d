"""How many replicas a deployment has."""

from typing import Any, Final

from serving.config import ReplicasConfig

METRICS_INTERVAL_S: Final = 1.0
LOOK_BACK_S: Final = 4.0
UPSCALE_DELAY_S: Final = 2.0
DOWNSCALE_DELAY_S: Final = 6.0


def options(replicas: ReplicasConfig) -> dict[str, Any]:
    """Return the deployment options that fix or scale the number of replicas.

    Serve's own policy sees one ongoing call per run; full batches always go out, so rows that wait show as more
    than one ongoing call, and the deployment grows about 6 s after a load begins.
    """
    if replicas.max_replicas <= replicas.min_replicas:
        return {"num_replicas": replicas.min_replicas}
    return {
        "autoscaling_config": {
            "min_replicas": replicas.min_replicas,
            "max_replicas": replicas.max_replicas,
            "target_ongoing_requests": 1,
            "metrics_interval_s": METRICS_INTERVAL_S,
            "look_back_period_s": LOOK_BACK_S,
            "upscale_delay_s": UPSCALE_DELAY_S,
            "downscale_delay_s": DOWNSCALE_DELAY_S,
        }
    }
