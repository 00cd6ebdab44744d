"""The manifests and the code say the same: ports, probes, variables, versions, times; the hook really drains."""

import asyncio
import functools
import importlib.metadata
import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.serve.schema import ServeDeploySchema

from serving import planning, ray_environment
from serving.capacity import Capacity
from serving.config import ServingConfig, overrides_from_environment
from serving.gateway import inference_service, vae_service
from serving.gateway.server import HEALTH
from serving.loadtest.workload import parse_mix
from serving.manifest_check import drain_s
from serving.standalone import in_process
from tests.deploy.rendering import (
    DEPLOY,
    OVERLAYS,
    environment,
    kind,
    ray_service,
    serve_config,
    templates,
)
from tests.serving.harness import settings

COUNTS = {"num_replicas", "min_replicas", "max_replicas"}


@functools.cache
def ray_sources() -> str:
    """Return the code of Ray in which its variables are named."""
    folder = Path(ray.__file__).parent
    files = ("_private/ray_constants.py", "serve/_private/constants.py", "_common/usage/usage_constants.py")
    return "\n".join((folder / file).read_text() for file in files)


def config_of(overlay: str) -> ServingConfig:
    """Return the configuration that the application is built from on the cluster, but for the model's digest."""
    variables = environment(overlay, "head")
    variables.pop("VAE__BUNDLE_SHA256", None)
    return ServingConfig.parse(serve_config(overlay)["applications"][0]["args"]).override(
        overrides_from_environment(variables)
    )


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_serve_takes_its_configuration(overlay: str) -> None:
    """By Serve's own schema; the application has a route, and the HTTP proxy listens on loopback alone."""
    schema = ServeDeploySchema.model_validate(serve_config(overlay))
    (application,) = schema.applications
    assert application.route_prefix == "/"
    assert schema.http_options.host == "127.0.0.1"
    assert config_of(overlay).gateway.host == "0.0.0.0"  # noqa: S104 - a pod of its own


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_application_is_built_by_our_code(overlay: str) -> None:
    """The import path names a function of ours."""
    from serving import app  # noqa: PLC0415 - prepares Ray's environment

    assert serve_config(overlay)["applications"][0]["import_path"] == f"serving.app:{app.from_args.__name__}"
    assert serve_config(overlay)["applications"][0]["name"] == app.APPLICATION


def test_the_two_serve_files_differ_in_counts_alone() -> None:
    """What a laptop runs is what production runs."""
    small, large = (
        yaml.safe_load((DEPLOY / name / "serve.yaml").read_text()) for name in ("serve", "serve-production")
    )
    assert _without_counts(small) == _without_counts(large)
    assert small != large


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_the_gateway_has_the_port_for_callers(overlay: str) -> None:
    """By its name KubeRay's Service finds it; a port serve* of the head would take the Service over."""
    config = config_of(overlay)
    for name, template in templates(overlay).items():
        ports = {port["name"]: port["containerPort"] for port in template["spec"]["containers"][0]["ports"]}
        assert ("grpc" in ports) == (name == "gateway")
        assert not [port for port in ports if port.startswith("serve")]
        if name == "gateway":
            assert (ports["grpc"], ports["vae-metrics"]) == (config.gateway.port, config.gateway.metrics_port)
    (door,) = ray_service(overlay)["spec"]["serveService"]["spec"]["ports"]
    assert (door["port"], door["targetPort"]) == (config.gateway.port, "grpc")


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_only_readiness_is_probed_and_only_on_the_gateway(overlay: str) -> None:
    """Its service is one that the code registers; a liveness probe would destroy pods that Serve could keep."""
    for name, template in templates(overlay).items():
        container = template["spec"]["containers"][0]
        assert not {"livenessProbe", "startupProbe"} & set(container)
        assert ("readinessProbe" in container) == (name == "gateway")
    probe = templates(overlay)["gateway"]["spec"]["containers"][0]["readinessProbe"]["grpc"]
    assert probe == {"port": config_of(overlay).gateway.port, "service": vae_service.NAME}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_variable_is_one_that_somebody_reads(overlay: str) -> None:
    """Ray's stand in Ray's code, ours in our configuration: a misspelt one does nothing, without a word."""
    known = ray_sources()
    for pod in templates(overlay):
        variables = environment(overlay, pod)
        unknown = [
            name for name in variables if name.startswith("RAY_") and name.removeprefix("RAY_") not in known
        ]
        assert not unknown
        assert set(variables) == {name for name in variables if re.match(r"RAY_|VAE__|HOME$", name)}
    assert config_of(overlay).bundle


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_containers_set_what_the_laptop_sets(overlay: str) -> None:
    """`serving/ray_environment.py` prepares a local Ray; containers are given the same."""
    for pod in templates(overlay):
        variables = environment(overlay, pod)
        assert int(variables["RAY_worker_niceness"]) == ray_environment.WORKER_NICENESS
        limit = int(variables["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"])
        assert limit == ray_environment.MAX_HANDLE_MESSAGE_BYTES
    assert ray_service(overlay)["spec"]["rayClusterConfig"]["authOptions"] == {"mode": "token"}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_versions_are_those_that_are_tested(overlay: str) -> None:
    """KubeRay decides by rayVersion what it may ask of the image."""
    assert ray_service(overlay)["spec"]["rayClusterConfig"]["rayVersion"] == importlib.metadata.version("ray")


@pytest.mark.parametrize("overlay", [overlay for overlay in OVERLAYS if kind(overlay, "PodMonitor")])
def test_monitoring_asks_where_metrics_are(overlay: str) -> None:
    """The gateway's port by its name, and the discovery of replicas at the gateways' own Service."""
    (monitor,) = kind(overlay, "PodMonitor")
    # The service's own metrics have one way to Prometheus, or each call would count twice.
    assert "vae-metrics" not in [each["port"] for each in monitor["spec"]["podMetricsEndpoints"]]
    (scrape,) = kind(overlay, "ScrapeConfig")
    (discovery,) = scrape["spec"]["httpSDConfigs"]
    (service,) = [each for each in kind(overlay, "Service") if each["metadata"]["name"] == "vae-metrics"]
    host = f"vae-metrics.{service['metadata']['namespace']}.svc"  # Prometheus has a namespace of its own
    assert discovery["url"] == f"http://{host}:{config_of(overlay).gateway.metrics_port}/targets"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_edge_lets_out_what_is_served(overlay: str) -> None:
    """Both protocols and health, by the names that the code registers; reflection stays inside."""
    for route in kind(overlay, "GRPCRoute"):
        (rule,) = route["spec"]["rules"]
        services = {match["method"]["service"] for match in rule["matches"]}
        assert services == {vae_service.NAME, inference_service.NAME, HEALTH}
        (backend,) = rule["backendRefs"]
        assert backend["name"] == ray_service(overlay)["spec"]["serveService"]["metadata"]["name"]


def hook() -> str:
    """Return the script that Kubernetes runs before it ends a gateway's pod."""
    command: list[str] = templates("cpu")["gateway"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"][
        "command"
    ]
    assert command[:2] == ["bash", "-c"]
    return command[2]


async def run_hook(port: int, file: Path) -> int:
    """Run the hook on another port and file than the pod's; return its exit code."""
    config = config_of("cpu").gateway
    script = hook()
    assert f"port={config.port} file={config.drain_file}" in script
    own = script.replace(f"port={config.port} file={config.drain_file}", f"port={port} file={file}")
    process = await asyncio.create_subprocess_exec("bash", "-c", own)
    return await asyncio.wait_for(process.wait(), 30)


async def test_the_hook_drains_the_gateway_and_waits_for_it(bundle_dir: Path, tmp_path: Path) -> None:
    """When it returns, the gateway has said NOT_SERVING, served its notice and stopped."""
    file = tmp_path / "drain"
    config = settings(bundle_dir, f"gateway.drain_file={file}", "gateway.drain_notice_s=0.5")
    async with in_process(config) as server:
        began = asyncio.get_running_loop().time()
        assert await run_hook(server.port, file) == 0
        assert asyncio.get_running_loop().time() - began >= 0.5
        assert server.is_draining
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", server.port)
    assert not file.exists()


async def test_the_hook_returns_at_once_where_no_gateway_runs(tmp_path: Path, unused_tcp_port: int) -> None:
    """A pod of the group may be without one."""
    began = asyncio.get_running_loop().time()
    assert await run_hook(unused_tcp_port, tmp_path / "drain") == 0
    assert asyncio.get_running_loop().time() - began < 2
    assert not (tmp_path / "drain").exists()


def test_the_sums_of_the_readme_are_those_of_the_manifests() -> None:
    """The page on ending shows D, the deletion delay and the grace that are really set."""
    text = (DEPLOY / "README.md").read_text()
    config, spec = config_of("production"), ray_service("production")["spec"]
    assert f"D = {drain_s(config):g} s" in text
    assert f"`rayClusterDeletionDelaySeconds: {spec['rayClusterDeletionDelaySeconds']}`" in text
    graces = {template["spec"]["terminationGracePeriodSeconds"] for template in templates("production").values()}
    assert graces == {120}
    assert "`terminationGracePeriodSeconds: 120`" in text


def test_the_readme_shows_what_the_plan_says() -> None:
    """Gateways, decoders, processors and processor-seconds per million samples, from the recorded costs."""
    row = re.compile(r"^\| [^|]+ \(`--rps (\d+)`\) \| (\d+) \| (\d+) \| (\d+) \| ([\d,]+) \|$", re.MULTILINE)
    rows = [
        [int(cell.replace(",", "")) for cell in found] for found in row.findall((DEPLOY / "README.md").read_text())
    ]
    assert len(rows) == 3
    for calls_per_s, *shown in rows:
        load = planning.Load(calls_per_s, parse_mix("sample:64=1"), p99_s=0.05)
        plan = planning.plan(load, Capacity.recorded())
        numbers = [plan.tiers[tier].num_replicas for tier in ("gateway", "decoder")]
        per_million = 1e6 * plan.num_cpus / (64 * calls_per_s)
        assert shown == [*numbers, round(plan.num_cpus), round(per_million)]


def _without_counts(tree: Any) -> Any:  # noqa: ANN401 - any part of a configuration
    if isinstance(tree, list):
        return [_without_counts(part) for part in tree]
    if isinstance(tree, dict):
        return {key: _without_counts(part) for key, part in tree.items() if key not in COUNTS}
    return tree
