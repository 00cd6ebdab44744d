"""What an overlay cannot honour is named before it is applied, with the group, the value and what would do."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from serving import cli
from serving.manifest_check import check, quantity
from serving.typed_config import ConfigError
from tests.deploy.rendering import completed, text_of

Tree = dict[str, Any]
Change = Callable[[Tree, Tree], object]
"""Given a RayService and its groups by name, makes one mistake."""


def _documents() -> list[Tree]:
    return list(yaml.load_all(completed(text_of("gpu")), Loader=yaml.CSafeLoader))


def _dumped(documents: list[Tree]) -> str:
    text: str = yaml.dump_all(documents, Dumper=yaml.CSafeDumper)
    return text


def _broken(change: Change) -> str:
    documents = _documents()
    (service,) = [each for each in documents if each["kind"] == "RayService"]
    groups = {group["groupName"]: group for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]}
    change(service, groups)
    return _dumped(documents)


def _pod(group: Tree) -> Tree:
    spec: Tree = group["template"]["spec"]
    return spec


def _ray(group: Tree) -> Tree:
    container: Tree = _pod(group)["containers"][0]
    return container


def _serve(service: Tree, **args: object) -> None:
    """Lay values over the arguments of the application."""
    serve = yaml.safe_load(service["spec"]["serveConfigV2"])
    tree = serve["applications"][0]["args"]
    for name, value in args.items():
        tree[name] = tree[name] | value if isinstance(value, dict) else value
    service["spec"]["serveConfigV2"] = yaml.safe_dump(serve)


MISTAKES: list[tuple[str, Change]] = [
    (
        "group decoder: a pod asks for 4 GPUs, a node of its type has 1",
        lambda _, groups: [
            _ray(groups["decoder"])["resources"][each].update({"nvidia.com/gpu": 4})
            for each in ("limits", "requests")
        ],
    ),
    (
        "group encoder: asks for 1 GPUs; say how many a node has with the annotation vae-serving/node-gpus",
        lambda _, groups: groups["encoder"]["template"]["metadata"].pop("annotations"),
    ),
    (
        "a replica of the decoder needs 2 GPUs, a pod of group decoder has 1",
        lambda service, _: _serve(service, decoder={"num_gpus": 2}),
    ),
    (
        "a replica of the encoder needs 8 processors, a pod of group encoder has 3",
        lambda service, _: _serve(service, encoder={"num_cpus": 8}),
    ),
    (
        "limit and request must be the same whole number; shares of a GPU belong into encoder.num_gpus",
        lambda _, groups: _ray(groups["decoder"])["resources"]["limits"].update({"nvidia.com/gpu": "0.5"}),
    ),
    (
        "no worker group has the label vae.role=decoder, so nothing can run the decoder; groups: gateway, encoder",
        lambda _, groups: groups["decoder"]["labels"].update({"vae.role": "generator"}),
    ),
    (
        "group decoder: label vae.role=generator: nothing runs there; known: gateway, encoder, decoder, all",
        lambda _, groups: groups["decoder"]["labels"].update({"vae.role": "generator"}),
    ),
    (
        "container ray-worker: requests 32Gi of memory, above its limit of 12Gi",
        lambda _, groups: _ray(groups["decoder"])["resources"]["requests"].update({"memory": "32Gi"}),
    ),
    (
        "container ray-worker: no limit of cpu",
        lambda _, groups: _ray(groups["gateway"])["resources"]["limits"].pop("cpu"),
    ),
    ("'lots' is no quantity", lambda _, groups: _ray(groups["gateway"])["resources"]["limits"].update(cpu="lots")),
    (
        "decoder: bundle '/models/vae': image volume 'vae-bundle:1' without a digest",
        lambda _, groups: _volume(groups["decoder"]).update(image={"reference": "vae-bundle:1"}),
    ),
    (
        "volume bundle without a digest; set VAE__BUNDLE_SHA256",
        lambda _, groups: (
            _volume(groups["decoder"]).pop("image"),
            _volume(groups["decoder"]).update(persistentVolumeClaim={"claimName": "x"}),
        ),
    ),
    (
        "bundle 's3://models/vae': without a digest; set bundle_sha256",
        lambda service, _: _serve(service, bundle="s3://models/vae"),
    ),
    (
        "encoder: bundle '/models/vae': nothing is mounted there; add one of the components",
        lambda _, groups: _ray(groups["encoder"]).update(volumeMounts=[{"name": "tmp", "mountPath": "/tmp"}]),  # noqa: S108 - in a pod
    ),
    (
        "image 'vae-serving:latest': give a digest, or a tag that does not move",
        lambda _, groups: _ray(groups["decoder"]).update(image="vae-serving:latest"),
    ),
    (
        "group decoder: minReplicas 99 is above maxReplicas 32",
        lambda _, groups: groups["decoder"].update(minReplicas=99),
    ),
    (
        "the decoder may have 32 replicas, 2 in a pod; group decoder has maxReplicas 4: at least 16 are needed",
        lambda _, groups: groups["decoder"].update(minReplicas=3, maxReplicas=4),
    ),
    (
        "the gateway may have 2 replicas, 1 in a pod; group gateway has minReplicas 1",
        lambda _, groups: groups["gateway"].update(minReplicas=1),
    ),
    (
        "decoder: a port named grpc; only gateways may have one",
        lambda _, groups: _ray(groups["decoder"])["ports"].append({"name": "grpc", "containerPort": 9000}),
    ),
    (
        "group gateway: port vae-metrics is 9090, the service listens on 9999",
        lambda service, _: _serve(service, gateway={"metrics_port": 9999}),
    ),
    (
        "group gateway: readinessProbe must ask grpc port 9000, service vae.v1.VaeService",
        lambda _, groups: _ray(groups["gateway"])["readinessProbe"]["grpc"].update(service="vae.v1.VAE"),
    ),
    (
        "rayClusterDeletionDelaySeconds is 60 s, less than",
        lambda service, _: service["spec"].update(rayClusterDeletionDelaySeconds=60),
    ),
    (
        "gateway.drain_timeout_s is 20 s, less than limits.max_deadline_s: 60 s",
        lambda service, _: _serve(service, limits={"max_deadline_s": 60}),
    ),
    (
        "gateway.drain_notice_s is 19 s, less than P + E of its probe: 25 s",
        lambda _, groups: _ray(groups["gateway"])["readinessProbe"].update(periodSeconds=5),
    ),
    (
        "gateway: terminationGracePeriodSeconds is 30 s, less than preStop + Ray's drain + 15: 110 s",
        lambda _, groups: _pod(groups["gateway"]).update(terminationGracePeriodSeconds=30),
    ),
    (
        "gateway: preStop is 0 s, less than the gateway's drain: 44 s",
        lambda _, groups: _ray(groups["gateway"]).pop("lifecycle"),
    ),
    (
        "decoder: preStop is 0 s, less than the gateway's drain + 5: 49 s",
        lambda _, groups: _ray(groups["decoder"]).pop("lifecycle"),
    ),
    (
        "encoder: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S is 30 s, less than a replacement's start and load",
        lambda _, groups: _ray(groups["encoder"]).update(
            env=[{"name": "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", "value": "30"}]
        ),
    ),
    (
        "serveConfigV2 and the variables VAE__*: decoder.max_replica: Extra inputs are not permitted",
        lambda service, _: _serve(service, decoder={"max_replica": 3}),
    ),
    (
        "serveConfigV2: import_path 'app:build': expected serving.app:from_args",
        lambda service, _: service["spec"].update(
            serveConfigV2=service["spec"]["serveConfigV2"].replace("serving.app:from_args", "app:build")
        ),
    ),
    (
        "route_prefix must be /",
        lambda service, _: service["spec"].update(
            serveConfigV2=service["spec"]["serveConfigV2"].replace("route_prefix: /", "route_prefix: null")
        ),
    ),
    (
        "leave deployments out: they would replace our placement and scaling policy",
        lambda service, _: service["spec"].update(
            serveConfigV2=service["spec"]["serveConfigV2"] + "  deployments: [{name: Decoder, num_replicas: 3}]\n"
        ),
    ),
    ("needs one application", lambda service, _: service["spec"].pop("serveConfigV2")),
    ("not what KubeRay or Kubernetes would take", lambda _, groups: groups["decoder"].pop("template")),
]


def _volume(group: Tree) -> Tree:
    volume: Tree = next(each for each in _pod(group)["volumes"] if each["name"] == "bundle")
    return volume


def test_what_can_be_honoured_passes() -> None:
    """The summary says what there will be."""
    (summary,) = check(_dumped(_documents()))
    assert summary.groups["decoder"] == "3-32 pods of 3 CPU, 1 GPU"
    assert summary.drain_s == 44


@pytest.mark.parametrize(("message", "change"), MISTAKES, ids=[message[:50] for message, _ in MISTAKES])
def test_what_cannot_be_honoured_is_named(message: str, change: Change) -> None:
    """One mistake, one clear line that says where, what, and what would do."""
    with pytest.raises(ConfigError) as raised:
        check(_broken(change))
    assert message in str(raised.value)


def test_budgets_leave_room() -> None:
    """One that allows no eviction, one of a group that does not exist, one in per cent: a line each."""
    documents = _documents()
    first, second, third = (each for each in documents if each["kind"] == "PodDisruptionBudget")
    first["spec"]["minAvailable"] = 3
    second["spec"]["selector"]["matchLabels"]["ray.io/group"] = "other"
    third["spec"]["minAvailable"] = "50%"
    with pytest.raises(ConfigError) as raised:
        check(_dumped(documents))
    text = str(raised.value)
    assert "minAvailable 3 of 3 pods: no node of theirs could be drained" in text
    assert "there is no group 'other'" in text
    assert "minAvailable must be a number of pods" in text


def test_all_mistakes_are_named_at_once() -> None:
    """Not one after the other."""

    def both(service: Tree, groups: Tree) -> None:
        for message, change in MISTAKES:
            if message.startswith(("group decoder: minReplicas", "rayClusterDeletion")):
                change(service, groups)

    with pytest.raises(ConfigError) as raised:
        check(_broken(both))
    assert len(str(raised.value).splitlines()) >= 2


@pytest.mark.parametrize("text", ["", "kind: Pod", "a: [", "- 1"])
def test_what_holds_no_service_is_refused(text: str) -> None:
    """With how to get what does."""
    with pytest.raises(ConfigError, match=r"kubectl kustomize|not YAML"):
        check(text)


@pytest.mark.parametrize(
    ("text", "value"), [("500m", 0.5), ("3Gi", 3 * 2**30), (2, 2), ("1k", 1000), ("1.5", 1.5)]
)
def test_quantities_are_numbers(text: object, value: float) -> None:
    """As Kubernetes reads them."""
    assert float(quantity(text)) == value


def test_the_command_says_what_there_will_be_or_why_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Exit code 0 and the groups; or 2 and the mistakes."""
    file = tmp_path / "manifests.yaml"
    monkeypatch.setattr(sys, "argv", ["vae-serve", "check", "--manifest", str(file), "--json"])
    file.write_text(completed(text_of("gpu")))
    assert cli.run() == 0
    assert json.loads(capsys.readouterr().out)["drain_s"] == 44
    file.write_text(text_of("gpu"))
    assert cli.run() == 2
    assert "without a digest" in capsys.readouterr().err
