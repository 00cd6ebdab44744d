"""What a rendered overlay asks for that no cluster can give it: said before it is applied.

Works on the text that `kubectl kustomize` prints; needs no cluster, no Ray and no Kubernetes library. Schemas are
not its business: what is checked is whether the parts agree, that is Serve's configuration, the groups of pods it
runs on, and the times of a drain.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from typing import Any, Final, NamedTuple

import yaml

from serving.client import SERVICE
from serving.config import ENVIRONMENT, ROLE_LABEL, ServingConfig, overrides_from_environment
from serving.typed_config import ConfigError

Tree = dict[str, Any]

_Loader: Final = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C, ten times as fast, where libyaml is there."""

ROLES: Final = ("gateway", "encoder", "decoder")
IMPORT_PATH: Final = "serving.app:from_args"
GPU: Final = "nvidia.com/gpu"
NODE_GPUS: Final = "vae-serving/node-gpus"
"""Annotation of a group's pods: GPUs of a node of its type."""

PREEMPTIBLE: Final = "vae-serving/preemptible"
"""Label of pods whose nodes may be taken away: they do not wait for the gateways' drain."""

ENDPOINT_S: Final = 15
"""E: time until no load balancer sends to an endpoint that is gone, seconds."""

LOAD_S: Final = 10
"""Time of a replacement to start and load a model on a node that is there, seconds."""

SERVE_GRACE_S: Final = 20
"""Serve's graceful_shutdown_timeout_s, which Encoder and Decoder leave as it is, seconds."""

SPARE_S: Final = 15
"""Between the last thing that a pod waits for and its end by force, seconds."""

_UNITS: Final = {
    "": Decimal(1), "m": Decimal("0.001"), "k": Decimal(10**3), "M": Decimal(10**6), "G": Decimal(10**9),
    "T": Decimal(10**12), "Ki": Decimal(2**10), "Mi": Decimal(2**20), "Gi": Decimal(2**30), "Ti": Decimal(2**40),
}  # fmt: skip
_DIGEST: Final = re.compile(r"@sha256:[0-9a-f]{64}$")
_SHA256: Final = re.compile(r"^[0-9a-f]{64}$")


class Pods(NamedTuple):
    """The head or a worker group of a RayService."""

    name: str
    role: str
    """Value of the label `vae.role`; empty for the head."""

    spec: Tree
    """The pods' spec."""

    metadata: Tree
    least: int
    most: int

    @property
    def container(self) -> Tree:
        """The Ray container."""
        first: Tree = self.spec["containers"][0]
        return first

    @property
    def is_preemptible(self) -> bool:
        """Whether its nodes may be taken away."""
        return (self.metadata.get("labels") or {}).get(PREEMPTIBLE) == "true"

    def limit(self, resource: str) -> Decimal:
        """Return how much of a resource the Ray container may have."""
        return quantity(self.container.get("resources", {}).get("limits", {}).get(resource, 0))


class Service(NamedTuple):
    """A RayService and what belongs to it."""

    name: str
    spec: Tree
    head: Pods
    groups: list[Pods]
    config: ServingConfig
    environment: Mapping[str, str]
    """Variables of the head's Ray container."""

    config_maps: Mapping[str, Mapping[str, str]]

    @property
    def all_pods(self) -> list[Pods]:
        """The head and all groups."""
        return [self.head, *self.groups]

    def group_of(self, role: str) -> Pods | None:
        """Return the group in which a deployment runs."""
        return next((group for group in self.groups if group.role in {role, "all"}), None)


class Summary(NamedTuple):
    """A service that can be applied."""

    name: str
    groups: dict[str, str]
    drain_s: float


def check(text: str) -> list[Summary]:
    """Return the services of a rendered overlay.

    Raises:
        ConfigError: If it holds none, or asks for what cannot be; a line for each problem.
    """
    try:
        documents: list[Tree] = [
            document for document in yaml.load_all(text, Loader=_Loader) if isinstance(document, dict)
        ]
    except yaml.YAMLError as error:
        raise ConfigError(f"not YAML: {str(error).splitlines()[0]}") from None
    found = [document for document in documents if document.get("kind") == "RayService"]
    if not found:
        raise ConfigError("no RayService in it: give what `kubectl kustomize deploy/overlays/NAME` prints")
    try:
        services = [_service(document, documents) for document in found]
        problems = [
            f"{service.name}: {problem}" for service in services for problem in _problems(service, documents)
        ]
        if not problems:
            return [_summary(service) for service in services]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ConfigError(f"not what KubeRay or Kubernetes would take: {type(error).__name__}: {error}") from None
    raise ConfigError("\n".join(problems))


def quantity(value: object) -> Decimal:
    """Return a Kubernetes quantity as a number.

    Example:
        >>> quantity("500m"), quantity("2Ki"), quantity(3)
        (Decimal('0.500'), Decimal('2048'), Decimal('3'))

    Raises:
        ConfigError: If it is none.
    """
    match = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(value))
    if match is None or match[2] not in _UNITS:
        raise ConfigError(f"{value!r} is no quantity, such as 2, 500m or 3Gi")
    return Decimal(match[1]) * _UNITS[match[2]]


def drain_s(config: ServingConfig) -> float:
    """Return D: the longest drain of a gateway, seconds."""
    gateway = config.gateway
    return gateway.drain_notice_s + gateway.drain_timeout_s + gateway.stop_grace_s


def _service(document: Tree, documents: list[Tree]) -> Service:
    name, spec = document["metadata"]["name"], document["spec"]
    cluster = spec["rayClusterConfig"]
    maps = {
        each["metadata"]["name"]: each.get("data") or {} for each in documents if each.get("kind") == "ConfigMap"
    }
    template = cluster["headGroupSpec"]["template"]
    head = Pods("head", "", template["spec"], template.get("metadata") or {}, 1, 1)
    groups = [_group(group) for group in cluster.get("workerGroupSpecs") or []]
    environment = _environment(head.container, maps)
    return Service(name, spec, head, groups, _config(name, spec, environment), environment, maps)


def _group(group: Tree) -> Pods:
    template = group["template"]
    return Pods(
        name=group["groupName"],
        role=(group.get("labels") or {}).get(ROLE_LABEL, ""),
        spec=template["spec"],
        metadata=template.get("metadata") or {},
        least=group.get("minReplicas", 0),
        most=group.get("maxReplicas", 0),
    )


def _environment(container: Tree, maps: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    found: dict[str, str] = {}
    for source in container.get("envFrom") or []:
        found |= maps.get((source.get("configMapRef") or {}).get("name", ""), {})
    return found | {each["name"]: each["value"] for each in container.get("env") or [] if "value" in each}


def _config(name: str, spec: Tree, environment: Mapping[str, str]) -> ServingConfig:
    try:
        serve = yaml.safe_load(spec.get("serveConfigV2") or "") or {}
        (application,) = serve["applications"]
        import_path, args = application["import_path"], application["args"]
    except (yaml.YAMLError, KeyError, TypeError, ValueError):
        raise ConfigError(f"{name}: serveConfigV2 needs one application with import_path and args") from None
    if import_path != IMPORT_PATH:
        raise ConfigError(f"{name}: serveConfigV2: import_path {import_path!r}: expected {IMPORT_PATH}")
    if application.get("deployments"):
        reason = "they would replace our placement and scaling policy as a whole; write args instead"
        raise ConfigError(f"{name}: serveConfigV2: leave deployments out: {reason}")
    if application.get("route_prefix") is None:
        raise ConfigError(f"{name}: serveConfigV2: route_prefix must be /: without a route no pod gets ready")
    try:
        return ServingConfig.parse(args).override(overrides_from_environment(environment))
    except ConfigError as error:
        raise ConfigError(f"{name}: serveConfigV2 and the variables {ENVIRONMENT}*: {error}") from None


def _problems(service: Service, documents: list[Tree]) -> Iterator[str]:
    for pods in service.all_pods:
        for each in _OF_PODS:
            yield from each(service, pods)
    for role in ROLES:
        yield from _of_deployment(service, role)
    yield from _of_doors(service)
    yield from _of_drain(service)
    yield from _of_budgets(service, documents)


def _of_resources(_: Service, pods: Pods) -> Iterator[str]:
    for container in [*pods.spec["containers"], *(pods.spec.get("initContainers") or [])]:
        where = f"{pods.name}, container {container['name']}"
        resources = container.get("resources") or {}
        limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
        for name in sorted({"cpu", "memory"} - set(limits)):
            yield f"{where}: no limit of {name}; Ray takes what a node has from it"
        for name, asked in requests.items():
            if name in limits and quantity(asked) > quantity(limits[name]):
                yield f"{where}: requests {asked} of {name}, above its limit of {limits[name]}"
        gpus = {str(each.get(GPU, 0)) for each in (limits, requests)}
        if len(gpus) > 1 or any(quantity(each) % 1 for each in gpus):
            yield (
                f"{where}: {GPU}: limit and request must be the same whole number; shares of a GPU belong into "
                "encoder.num_gpus and decoder.num_gpus"
            )


def _of_node(_: Service, pods: Pods) -> Iterator[str]:
    asked = pods.limit(GPU)
    if not asked:
        return
    known = (pods.metadata.get("annotations") or {}).get(NODE_GPUS)
    if known is None:
        yield f"group {pods.name}: asks for {asked} GPUs; say how many a node has with the annotation {NODE_GPUS}"
    elif asked > quantity(known):
        yield f"group {pods.name}: a pod asks for {asked} GPUs, a node of its type has {known}"


def _of_group(_: Service, pods: Pods) -> Iterator[str]:
    if pods.name == "head":
        return
    if pods.role not in {*ROLES, "all"}:
        known = ", ".join((*ROLES, "all"))
        yield f"group {pods.name}: label {ROLE_LABEL}={pods.role or '(none)'}: nothing runs there; known: {known}"
    if pods.least > pods.most:
        yield f"group {pods.name}: minReplicas {pods.least} is above maxReplicas {pods.most}"


def _of_image(_: Service, pods: Pods) -> Iterator[str]:
    for container in [*pods.spec["containers"], *(pods.spec.get("initContainers") or [])]:
        image = str(container.get("image", ""))
        name = image.rpartition("/")[2]
        if not _DIGEST.search(image) and (":" not in name or name.endswith(":latest") or "replace-with" in name):
            yield (
                f"{pods.name}, container {container['name']}: image {image!r}: give a digest, or a tag that does "
                "not move, in the overlay's images:"
            )


def _of_bundle(service: Service, pods: Pods) -> Iterator[str]:
    config, where = service.config, f"{pods.name}: bundle {service.config.bundle!r}"
    if "://" in config.bundle:
        if not config.bundle_sha256:
            yield f"{where}: without a digest; set bundle_sha256 to the SHA-256 of its manifest.json"
        return
    mounts = [
        mount
        for mount in pods.container.get("volumeMounts") or []
        if f"{config.bundle}/".startswith(f"{mount['mountPath'].rstrip('/')}/")
    ]
    if not config.bundle or not mounts:
        yield f"{where}: nothing is mounted there; add one of the components model-image, model-pvc, model-store"
        return
    name = max(mounts, key=lambda mount: len(mount["mountPath"]))["name"]
    volume: Tree = next((each for each in pods.spec.get("volumes") or [] if each["name"] == name), {})
    if "image" in volume:
        reference = str(volume["image"].get("reference", ""))
        if not _DIGEST.search(reference):
            yield f"{where}: image volume {reference!r} without a digest; end it with @sha256:..."
    elif not config.bundle_sha256 and not _is_fetched(service, pods, name):
        yield f"{where}: volume {name} without a digest; set {ENVIRONMENT}BUNDLE_SHA256 to the manifest's SHA-256"


def _is_fetched(service: Service, pods: Pods, volume: str) -> bool:
    """Return whether an init container fills the volume, and knows with what."""
    return any(
        volume in {mount["name"] for mount in container.get("volumeMounts") or []}
        and _SHA256.match(_environment(container, service.config_maps).get("VAE_BUNDLE_SHA256", ""))
        for container in pods.spec.get("initContainers") or []
    )


_OF_PODS: Final[tuple[Callable[[Service, Pods], Iterator[str]], ...]] = (
    _of_group,
    _of_resources,
    _of_node,
    _of_image,
    _of_bundle,
)


def _of_deployment(service: Service, role: str) -> Iterator[str]:
    group = service.group_of(role)
    if group is None:
        known = ", ".join(each.name for each in service.groups) or "none"
        yield f"no worker group has the label {ROLE_LABEL}={role}, so nothing can run the {role}; groups: {known}"
        return
    config = service.config
    if role == "gateway":
        part = config.gateway
        cpus, gpus, least, most = part.num_cpus, 0.0, part.num_replicas, max(part.num_replicas, part.max_replicas)
    else:
        graph = config.encoder if role == "encoder" else config.decoder
        cpus, gpus = graph.num_cpus, config.gpu_share("encoder" if role == "encoder" else "decoder")
        least, most = graph.min_replicas, max(graph.min_replicas, graph.max_replicas)
    if gpus > group.limit(GPU):
        yield f"a replica of the {role} needs {gpus:g} GPUs, a pod of group {group.name} has {group.limit(GPU)}"
        return
    per_pod = int(
        min(group.limit("cpu") / Decimal(str(cpus)), group.limit(GPU) / Decimal(str(gpus)) if gpus else 999)
    )
    if per_pod == 0:
        has = group.limit("cpu")
        yield f"a replica of the {role} needs {cpus:g} processors, a pod of group {group.name} has {has}"
        return
    if role == "gateway" and not config.gateway.share_port:
        per_pod = 1
    for wanted, have, field in ((least, group.least, "minReplicas"), (most, group.most, "maxReplicas")):
        if have * per_pod < wanted:
            yield (
                f"the {role} may have {wanted} replicas, {per_pod} in a pod; group {group.name} has {field} "
                f"{have}: at least {math.ceil(wanted / per_pod)} are needed"
            )


def _of_doors(service: Service) -> Iterator[str]:
    """Check what only the gateway's pods must have: the port, its probe, the metrics."""
    gateway = service.config.gateway
    for pods in service.all_pods:
        ports = {port.get("name"): port["containerPort"] for port in pods.container.get("ports") or []}
        if pods.role not in {"gateway", "all"}:
            if "grpc" in ports:
                yield f"{pods.name}: a port named grpc; only gateways may have one, or callers are sent there"
            continue
        for name, port in (("grpc", gateway.port), ("vae-metrics", gateway.metrics_port)):
            if ports.get(name) != port:
                yield f"group {pods.name}: port {name} is {ports.get(name)}, the service listens on {port}"
        probe = (pods.container.get("readinessProbe") or {}).get("grpc") or {}
        if probe.get("port") != gateway.port or probe.get("service") != SERVICE:
            yield f"group {pods.name}: readinessProbe must ask grpc port {gateway.port}, service {SERVICE}"


def _of_drain(service: Service) -> Iterator[str]:
    """Check the sums of deploy/README.md, Ending."""
    config = service.config
    gateway, transport, longest_s = config.gateway, config.gateway.transport, config.limits.max_deadline_s
    drain = drain_s(config)
    age_s = 1.1 * transport.max_connection_age_s + transport.max_connection_age_grace_s
    yield from _enough("gateway.drain_timeout_s", gateway.drain_timeout_s, "limits.max_deadline_s", longest_s)
    delay = service.spec.get("rayClusterDeletionDelaySeconds", 60)
    what = "1.1 max_connection_age_s + its grace + max_deadline_s + E"
    yield from _enough("rayClusterDeletionDelaySeconds", delay, what, age_s + longest_s + ENDPOINT_S)
    for pods in service.all_pods:
        name = pods.name
        environment = _environment(pods.container, service.config_maps)
        ray_s = float(environment.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", 30))
        proxy_s = float(environment.get("RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S", 30))
        hook_s = _hook_s(pods)
        grace_s = pods.spec.get("terminationGracePeriodSeconds", 30)
        what = "preStop + Ray's drain + 15"
        yield from _enough(f"{name}: terminationGracePeriodSeconds", grace_s, what, hook_s + ray_s + SPARE_S)
        if pods.is_preemptible:
            continue
        if pods.role == "gateway":
            probe = pods.container.get("readinessProbe") or {}
            probe_s = probe.get("periodSeconds", 10) * probe.get("failureThreshold", 3)
            what = "P + E of its probe"
            yield from _enough("gateway.drain_notice_s", gateway.drain_notice_s, what, probe_s + ENDPOINT_S)
            yield from _enough(f"{name}: preStop", hook_s, "the gateway's drain", drain)
        else:
            yield from _enough(f"{name}: preStop", hook_s, "the gateway's drain + 5", drain + 5)
            what = "a replacement's start and load, Serve's grace, its proxy and 10"
            needed = LOAD_S + SERVE_GRACE_S + proxy_s + 10
            yield from _enough(f"{name}: RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S", ray_s, what, needed)


def _enough(field: str, actual: float, what: str, needed: float) -> Iterator[str]:
    if actual < needed:
        yield f"{field} is {actual:g} s, less than {what}: {needed:g} s"


def _hook_s(pods: Pods) -> float:
    """Return the longest time that a preStop hook takes: that of a sleep, or of the loop of a script."""
    hook = (pods.container.get("lifecycle") or {}).get("preStop") or {}
    if "sleep" in hook:
        return float(hook["sleep"]["seconds"])
    loop = re.search(r"\{1\.\.(\d+)\}", " ".join((hook.get("exec") or {}).get("command") or []))
    return float(loop[1]) if loop else 0.0


def _of_budgets(service: Service, documents: list[Tree]) -> Iterator[str]:
    for document in documents:
        if document.get("kind") != "PodDisruptionBudget":
            continue
        name, spec = document["metadata"]["name"], document["spec"]
        least, labels = spec.get("minAvailable"), spec["selector"]["matchLabels"]
        if not isinstance(least, int):
            yield f"budget {name}: minAvailable must be a number of pods: a RayCluster has no scale subresource"
            continue
        group = next((each for each in service.groups if each.name == labels.get("ray.io/group")), None)
        if group is None:
            yield f"budget {name}: there is no group {labels.get('ray.io/group')!r}"
        elif least >= group.least:
            yield f"budget {name}: minAvailable {least} of {group.least} pods: no node of theirs could be drained"


def _summary(service: Service) -> Summary:
    groups = {
        pods.name: f"{pods.least}-{pods.most} pods of {pods.limit('cpu')} CPU, {pods.limit(GPU)} GPU"
        for pods in service.groups
    }
    return Summary(service.name, groups, drain_s(service.config))
