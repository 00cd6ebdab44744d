"""Ray's autoscaler, by the code that its container runs: which groups it sees in a render, which it grows."""

from collections import Counter
from typing import Any

import pytest
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated import common_pb2

from serving import app
from serving.config import ROLE_LABEL, ServingConfig
from tests.deploy.rendering import GROUPS, OVERLAYS, ray_service
from tests.deploy.test_agreement import config_of

GPU_OVERLAYS = [overlay for overlay in OVERLAYS if overlay != "cpu"]


def seen(overlay: str) -> dict[str, Any]:
    """Return what the autoscaler makes of the cluster's spec."""
    spec = ray_service(overlay)["spec"]["rayClusterConfig"]
    cluster = {"metadata": {"name": "vae-abcde", "namespace": "vae"}, "spec": spec}
    config: dict[str, Any] = _derive_autoscaling_config_from_ray_cr(cluster)
    return config


def replica_of(role: str, config: ServingConfig) -> Any:  # noqa: ANN401 - Ray's own type
    """Return the demand that one more replica of a deployment is to the autoscaler."""
    application: Any = app.build(config, by_role=True)._bound_deployment  # noqa: SLF001 - Serve has no public view
    parts = (application, *(arg._bound_deployment for arg in application.init_args[1:]))  # noqa: SLF001 - as above
    options = next(part.ray_actor_options for part in parts if part.name == role.capitalize())
    bundle = {"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)}
    ((key, text),) = options["label_selector"].items()
    values = text.removeprefix("in(").removesuffix(")").split(",")
    operators: Any = common_pb2
    selector = [(key, operators.LabelSelectorOperator.LABEL_OPERATOR_IN, values)]
    return ResourceRequestUtil.make({name: n for name, n in bundle.items() if n}, label_selectors=[selector])


def launched(overlay: str, role: str, num_replicas: int) -> Counter[str]:
    """Return how many pods of each group an empty cluster is given for replicas of a role, without the least."""
    types = AutoscalingConfig(seen(overlay), skip_content_hash=True).get_node_type_configs()
    for node_type in types.values():
        node_type.min_worker_nodes = 0
    demand = ResourceRequestUtil.group_by_count([replica_of(role, config_of(overlay))] * num_replicas)
    request = SchedulingRequest(
        disable_launch_config_check=True, node_type_configs=types, resource_requests=demand
    )
    reply = ResourceDemandScheduler().schedule(request)
    return Counter({launch.instance_type: launch.count for launch in reply.to_launch})


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_it_sees_the_groups_that_serve_asks_for(overlay: str) -> None:
    """Their labels and bounds; and a head on which nothing is placed."""
    types = seen(overlay)["available_node_types"]
    assert set(types) == {*GROUPS, "headgroup"}
    assert types["headgroup"]["resources"]["CPU"] == 0
    for name in GROUPS:
        assert types[name]["labels"][ROLE_LABEL] == name
        assert types[name]["resources"]["CPU"] >= 1
        assert 0 < types[name]["min_workers"] < types[name]["max_workers"]


@pytest.mark.parametrize("role", GROUPS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_group_grows_whose_replicas_wait(overlay: str, role: str) -> None:
    """A load on Sample adds decoder nodes, and no others."""
    found = launched(overlay, role, num_replicas=1)
    found.pop("headgroup", None)
    assert found == {role: 1}


@pytest.mark.parametrize("overlay", GPU_OVERLAYS)
def test_two_replicas_share_a_gpu(overlay: str) -> None:
    """Four more replicas are two more nodes."""
    found = launched(overlay, "decoder", num_replicas=4)
    assert found["decoder"] == 2
