"""Every pod is one that Pod Security "restricted" admits, and a few steps more; exceptions have reasons.

A rule of our own for each requirement of https://kubernetes.io/docs/concepts/security/pod-security-standards/.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.rendering import (
    COMPONENTS,
    OVERLAYS,
    Tree,
    combine,
    kind,
    pods,
    ray_service,
    templates_of,
)

VOLUMES = {
    "configMap",
    "csi",
    "downwardAPI",
    "emptyDir",
    "ephemeral",
    "image",
    "persistentVolumeClaim",
    "projected",
    "secret",
}
LOWEST_UID = 10_000
"""Below it a user of the node might have the same number."""

EXCEPTIONS = {
    ("head", "service account"): "the autoscaler in the head's pod adds and removes pods; the operator makes its "
    "account, with a role for that alone",
}


def violations(name: str, spec: Tree) -> Iterator[str]:
    """Yield what a pod may not do, or does not forbid itself."""
    for field in ("hostNetwork", "hostPID", "hostIPC", "hostUsers"):
        if spec.get(field):
            yield field
    if spec.get("automountServiceAccountToken") is not False and (name, "service account") not in EXCEPTIONS:
        yield "service account token"
    for volume in spec.get("volumes", []):
        if not set(volume) - {"name"} <= VOLUMES:
            yield f"volume {volume['name']}"
    for container in [*spec["containers"], *spec.get("initContainers", [])]:
        yield from (f"{container['name']}: {fault}" for fault in _of_container(container, spec))


def _of_container(container: Tree, spec: Tree) -> Iterator[str]:
    own = container.get("securityContext", {})
    both = spec.get("securityContext", {}) | own
    needed, resources = {"cpu", "memory"}, container.get("resources", {})
    rules = {
        "allowPrivilegeEscalation": own.get("allowPrivilegeEscalation") is not False,
        "privileged": own.get("privileged"),
        "capabilities": own.get("capabilities", {}) != {"drop": ["ALL"]},
        "runAsNonRoot": both.get("runAsNonRoot") is not True,
        "runAsUser": both.get("runAsUser", 0) < LOWEST_UID,
        "seccompProfile": both.get("seccompProfile", {}).get("type") != "RuntimeDefault",
        "readOnlyRootFilesystem": own.get("readOnlyRootFilesystem") is not True,
        "hostPort": [port for port in container.get("ports", []) if "hostPort" in port],
        "limits": not needed <= set(resources.get("limits", {})),
        "requests": not needed <= set(resources.get("requests", {})),
    }
    return (rule for rule, is_broken in rules.items() if is_broken)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_pods_are_restricted(overlay: str) -> None:
    """Head, groups and the autoscaler beside the head."""
    for name, pod in pods(overlay).items():
        assert not list(violations(name, pod["spec"])), name
    scaler = ray_service(overlay)["spec"]["rayClusterConfig"]["autoscalerOptions"]
    assert not list(_of_container(scaler, {}))


@pytest.mark.parametrize("component", COMPONENTS)
def test_no_component_loosens_them(component: str, tmp_path: Path) -> None:
    """Also the containers and volumes that a component adds."""
    rendered = yaml.load_all(combine(tmp_path, [component]), Loader=yaml.CSafeLoader)
    (service,) = [each for each in rendered if each["kind"] == "RayService"]
    for name, template in templates_of(service).items():
        assert not list(violations(name, template["spec"])), name


LOOSENED: dict[str, Callable[[Tree, Tree], object]] = {
    "hostNetwork": lambda spec, _: spec.update(hostNetwork=True),
    "service account token": lambda spec, _: spec.pop("automountServiceAccountToken"),
    "volume node": lambda spec, _: spec["volumes"].append({"name": "node", "hostPath": {"path": "/"}}),
    "allowPrivilegeEscalation": lambda _, own: own.pop("allowPrivilegeEscalation"),
    "privileged": lambda _, own: own.update(privileged=True),
    "capabilities": lambda _, own: own.update(capabilities={"drop": ["ALL"], "add": ["NET_ADMIN"]}),
    "runAsNonRoot": lambda _, own: own.update(runAsNonRoot=False),
    "runAsUser": lambda _, own: own.update(runAsUser=1000),
    "seccompProfile": lambda _, own: own.update(seccompProfile={"type": "Unconfined"}),
    "readOnlyRootFilesystem": lambda _, own: own.pop("readOnlyRootFilesystem"),
    "limits": lambda spec, _: spec["containers"][0]["resources"].pop("limits"),
    "requests": lambda spec, _: spec["containers"][0]["resources"].pop("requests"),
    "hostPort": lambda spec, _: spec["containers"][0]["ports"].append({"hostPort": 9000}),
}


@pytest.mark.parametrize("fault", LOOSENED)
def test_a_loosened_pod_is_found(fault: str) -> None:
    """Each rule finds what it is about."""
    spec = copy.deepcopy(pods("cpu")["decoder"]["spec"])
    LOOSENED[fault](spec, spec["containers"][0]["securityContext"])
    assert [found for found in violations("decoder", spec) if fault in found]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_reaches_a_pod_that_no_policy_names(overlay: str) -> None:
    """A policy for all pods allows nothing; every other names its pods, and none opens a port of Ray to others."""
    policies = [policy["spec"] for policy in kind(overlay, "NetworkPolicy")]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in policies
    doors = {
        port["port"]
        for policy in policies
        if policy["podSelector"]
        for rule in policy.get("ingress", [])
        if "namespaceSelector" in rule["from"][0]
        for port in rule["ports"]
    }
    assert doors <= {"grpc", "dashboard", "metrics", "vae-metrics", "as-metrics", "dash-metrics", 9091}
    for policy in policies:
        for rule in policy.get("ingress", []):
            assert rule["from"], "from everywhere"
