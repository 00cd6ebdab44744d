"""What KubeRay v1.7.0 refuses although its schema allows it, or does in silence: its source, by its meaning.

`ray-operator/controllers/ray/utils/validation.go` and the reconcilers of RayService and pods, tag v1.7.0.
"""

import re
from collections.abc import Iterator, Mapping

from tests.deploy.rendering import Tree, templates_of

MAX_NAME = 47
MAX_GROUPS_OF_KUEUE = 17
OWN_ENVIRONMENT = {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "RAY_CLUSTER_NAME", "FQ_RAY_IP", "RAY_NODE_TYPE_NAME"}
LOGICAL = {"num-cpus", "num-gpus", "memory", "resources"}
HEAD_DEFAULTS = {"app.kubernetes.io/name", "app.kubernetes.io/created-by"}


def refusals(service: Tree) -> Iterator[str]:
    """Yield what the operator would refuse of a RayService, or do other than its author wanted."""
    yield from _of_service(service)
    yield from _of_cluster(service["spec"]["rayClusterConfig"])
    yield from _of_groups(service["spec"]["rayClusterConfig"])
    yield from _of_templates(service)


def _of_service(service: Tree) -> Iterator[str]:
    spec, metadata = service["spec"], service["metadata"]
    if len(metadata["name"]) > MAX_NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", metadata["name"]):
        yield "name: at most 47 characters of a DNS label"
    timeout = (metadata.get("annotations") or {}).get("ray.io/initializing-timeout", "1m")
    if not re.fullmatch(r"[1-9]\d*|([1-9]\d*(h|m|s))+", timeout):
        yield "ray.io/initializing-timeout: a Go duration or seconds"
    if spec.get("upgradeStrategy", {}).get("type", "NewCluster") not in {"NewCluster", "None"}:
        yield "upgradeStrategy: incremental upgrades know no gRPC"
    if spec.get("rayClusterDeletionDelaySeconds", 0) < 0:
        yield "rayClusterDeletionDelaySeconds: not negative"
    if "selector" in spec.get("serveService", {}).get("spec", {}):
        yield "serveService: its selector is overwritten"
    if not spec.get("excludeHeadPodFromServeSvc"):
        yield "excludeHeadPodFromServeSvc: else the head is an endpoint"
    if (metadata.get("labels") or {}).get("kueue.x-k8s.io/queue-name"):
        cluster = spec["rayClusterConfig"]
        if cluster.get("enableInTreeAutoscaling"):
            yield "kueue: no quota for what the autoscaler adds"
        if len(cluster["workerGroupSpecs"]) > MAX_GROUPS_OF_KUEUE:
            yield "kueue: at most 17 groups"


def _of_cluster(cluster: Tree) -> Iterator[str]:
    auth, scaler = cluster.get("authOptions", {}), cluster.get("autoscalerOptions")
    is_scaled, redis = cluster.get("enableInTreeAutoscaling"), cluster.get("gcsFaultToleranceOptions", {})
    has_tokens = auth.get("mode") == "token"
    head_service = cluster["headGroupSpec"].get("headService", {})
    yield from _broken(
        {
            "authOptions: token needs rayVersion 2.52": has_tokens and _version(cluster) < (2, 52),
            "authOptions: no Kubernetes tokens for a RayService": auth.get("enableK8sTokenAuth"),
            "networkPolicy: behind a feature gate that is off": "networkPolicy" in cluster,
            "tlsOptions: behind a feature gate that is off": "tlsOptions" in cluster,
            "autoscalerOptions: without enableInTreeAutoscaling": scaler is not None and not is_scaled,
            "autoscalerOptions: v2, or labels are not understood": is_scaled
            and (scaler or {}).get("version") != "v2",
            "gcsFaultToleranceOptions: redis needs redisAddress": redis.get("backend") == "redis"
            and "redisAddress" not in redis,
            "headService: its name is the operator's": "name" in head_service.get("metadata", {}),
        }
    )


def _broken(rules: Mapping[str, object]) -> Iterator[str]:
    """Yield the rules for which it is true that they are broken."""
    return (rule for rule, is_broken in rules.items() if is_broken)


def _of_groups(cluster: Tree) -> Iterator[str]:
    groups = cluster["workerGroupSpecs"]
    names = [group["groupName"] for group in groups]
    if len(set(names)) < len(names):
        yield "workerGroupSpecs: one group per name"
    is_v2 = cluster.get("autoscalerOptions", {}).get("version") == "v2"
    for group in groups:
        if not 0 <= group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
            yield f"{group['groupName']}: minReplicas <= replicas <= maxReplicas"
        if {"idleTimeoutSeconds", "priority"} & set(group) and not is_v2:
            yield f"{group['groupName']}: idleTimeoutSeconds and priority are v2's"
        if [key for key in group.get("labels", {}) if key.startswith("ray.io/")]:
            yield f"{group['groupName']}: labels ray.io/* are reserved"
        yield from _of_start(group["groupName"], group)
    yield from _of_start("head", cluster["headGroupSpec"])


def _of_start(name: str, group: Tree) -> Iterator[str]:
    start = group.get("rayStartParams", {})
    if "labels" in start:
        yield f"{name}: rayStartParams.labels is refused; use labels"
    if group.get("resources") and LOGICAL & set(start):
        yield f"{name}: resources or rayStartParams, not both"
    if [value for value in start.values() if not isinstance(value, str)]:
        yield f"{name}: rayStartParams are strings"


def _of_templates(service: Tree) -> Iterator[str]:
    for name, template in templates_of(service).items():
        if template["spec"]["containers"]:
            yield from (f"{name}: {rule}" for rule in _broken(_template_rules(name, template)))
        else:
            yield f"{name}: no container"


def _template_rules(name: str, template: Tree) -> dict[str, object]:
    spec: Tree = template["spec"]
    ray: Tree = spec["containers"][0]
    ports = [port.get("name", "") for port in ray.get("ports", [])]
    labels: dict[str, str] = template.get("metadata", {}).get("labels", {})
    is_head = name == "head"
    return {
        "restartPolicy is Never with autoscaler v2": spec.get("restartPolicy", "Never") != "Never",
        "a variable that the operator sets": OWN_ENVIRONMENT & {each["name"] for each in ray.get("env", [])},
        "command and args are replaced": {"command", "args"} & set(ray),
        "Ray counts processors by the limit": not ray.get("resources", {}).get("limits", {}).get("cpu"),
        "a port's name twice": len(set(ports)) < len(ports),
        "labels ray.io/* are the operator's": [key for key in labels if key.startswith("ray.io/")],
        "labels by which its Service finds it": is_head and HEAD_DEFAULTS & set(labels),
        "a port serve* takes the Service's port over": is_head
        and [port for port in ports if port.startswith("serve")],
    }


def _version(cluster: Tree) -> tuple[int, ...]:
    return tuple(int(part) for part in cluster.get("rayVersion", "0.0").split(".")[:2])
