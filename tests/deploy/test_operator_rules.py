"""What the operator's schema lets through and the operator does not: none of it is in an overlay."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.deploy.operator_rules import refusals
from tests.deploy.rendering import COMPONENTS, OVERLAYS, Tree, combine, ray_service

Change = Callable[[Tree, Tree, Tree], object]
"""Given a RayService, its cluster and its decoder's group, makes one mistake."""

MISTAKES: dict[str, Change] = {
    "name: at most 47": lambda service, *_: service["metadata"].update(name="v" * 48),
    "ray.io/initializing-timeout": lambda service, *_: service["metadata"].update(
        annotations={"ray.io/initializing-timeout": "soon"}
    ),
    "incremental upgrades know no gRPC": lambda service, *_: service["spec"].update(
        upgradeStrategy={"type": "NewClusterWithIncrementalUpgrade"}
    ),
    "rayClusterDeletionDelaySeconds: not negative": lambda service, *_: service["spec"].update(
        rayClusterDeletionDelaySeconds=-1
    ),
    "its selector is overwritten": lambda service, *_: service["spec"]["serveService"]["spec"].update(selector={}),
    "else the head is an endpoint": lambda service, *_: service["spec"].pop("excludeHeadPodFromServeSvc"),
    "kueue: no quota": lambda service, *_: service["metadata"].update(labels={"kueue.x-k8s.io/queue-name": "vae"}),
    "token needs rayVersion 2.52": lambda _, cluster, __: cluster.update(rayVersion="2.51.0"),
    "no Kubernetes tokens": lambda _, cluster, __: cluster["authOptions"].update(enableK8sTokenAuth=True),
    "networkPolicy: behind a feature gate": lambda _, cluster, __: cluster.update(networkPolicy={}),
    "tlsOptions: behind a feature gate": lambda _, cluster, __: cluster.update(tlsOptions={}),
    "without enableInTreeAutoscaling": lambda _, cluster, __: cluster.update(enableInTreeAutoscaling=False),
    "v2, or labels are not understood": lambda _, cluster, __: cluster["autoscalerOptions"].update(version="v1"),
    "redis needs redisAddress": lambda _, cluster, __: cluster.update(
        gcsFaultToleranceOptions={"backend": "redis"}
    ),
    "its name is the operator's": lambda _, cluster, __: cluster["headGroupSpec"].update(
        headService={"metadata": {"name": "head"}}
    ),
    "one group per name": lambda _, __, group: group.update(groupName="encoder"),
    "minReplicas <= replicas <= maxReplicas": lambda _, __, group: group.update(maxReplicas=0),
    "are v2's": lambda _, cluster, group: (group.update(priority=1), cluster.pop("autoscalerOptions")),
    "labels ray.io/\\* are reserved": lambda _, __, group: group["labels"].update({"ray.io/x": "y"}),
    "rayStartParams.labels is refused": lambda _, __, group: group["rayStartParams"].update(labels="a=b"),
    "resources or rayStartParams": lambda _, cluster, __: cluster["headGroupSpec"].update(resources={"CPU": "1"}),
    "rayStartParams are strings": lambda _, __, group: group["rayStartParams"].update({"num-cpus": 1}),
    "no container": lambda _, __, group: group["template"]["spec"].update(containers=[]),
    "restartPolicy is Never": lambda _, __, group: group["template"]["spec"].update(restartPolicy="Always"),
    "a variable that the operator sets": lambda _, __, group: _ray(group).update(env=[{"name": "FQ_RAY_IP"}]),
    "command and args are replaced": lambda _, __, group: _ray(group).update(command=["vae-serve"]),
    "Ray counts processors by the limit": lambda _, __, group: _ray(group)["resources"]["limits"].pop("cpu"),
    "a port's name twice": lambda _, __, group: _ray(group)["ports"].extend([{"name": "metrics"}]),
    "labels ray.io/\\* are the operator's": lambda _, __, group: group["template"]["metadata"]["labels"].update(
        {"ray.io/serve": "false"}
    ),
    "labels by which its Service finds it": lambda _, cluster, __: cluster["headGroupSpec"]["template"][
        "metadata"
    ]["labels"].update({"app.kubernetes.io/name": "vae"}),
    "a port serve\\* takes": lambda _, cluster, __: _ray(cluster["headGroupSpec"])["ports"].append(
        {"name": "serve-grpc"}
    ),
}


def _ray(group: Tree) -> Tree:
    container: Tree = group["template"]["spec"]["containers"][0]
    return container


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_operator_refuses_nothing(overlay: str) -> None:
    """No rule of its is broken."""
    assert not list(refusals(ray_service(overlay)))


@pytest.mark.parametrize("component", COMPONENTS)
def test_the_operator_refuses_no_component(component: str, tmp_path: Path) -> None:
    """On the base alone."""
    rendered = yaml.load_all(combine(tmp_path, [component]), Loader=yaml.CSafeLoader)
    (service,) = [each for each in rendered if each["kind"] == "RayService"]
    assert not list(refusals(service))


@pytest.mark.parametrize("rule", MISTAKES)
def test_a_mistake_is_refused(rule: str) -> None:
    """Each rule finds the mistake that it is about."""
    service = copy.deepcopy(ray_service("cpu"))
    cluster = service["spec"]["rayClusterConfig"]
    MISTAKES[rule](service, cluster, cluster["workerGroupSpecs"][2])
    assert [found for found in refusals(service) if rule.replace("\\", "") in found]
