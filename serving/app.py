"""Composition root: from a configuration to a running service on Ray."""

import contextlib
import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Final

from serving import ray_environment

ray_environment.prepare()  # Ray reads its environment when it is imported

import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import LoggingConfig

from serving import bundle, scaling, tracing
from serving.config import ROLE_LABEL, ServingConfig, overrides_from_environment
from serving.engine.protocol import GRAPHS
from serving.errors import ProviderUnavailable, ServiceFailed
from serving.gateway.server import check_credentials, check_port
from serving.replicas import Gateway, GraphReplica

logger = logging.getLogger(__name__)

APPLICATION: Final = "vae"
_SHUTDOWN_SLACK_S: Final = 10.0
_CALL_TIMEOUT_S: Final = 2.0
_POLL_S: Final = 0.1
_OBJECT_STORE_BYTES: Final = 100 * 2**20
"""Of a local cluster: calls go by value, the store stays empty."""

_MAX_ONGOING: Final = 256
"""Far above what gateways have in flight: Serve polls with growing pauses once replicas are full."""


def build(config: ServingConfig, *, by_role: bool = False) -> serve.Application:
    """Return the Serve application: Gateway -> Encoder and Decoder.

    Args:
        config: The service's configuration.
        by_role: Whether each deployment runs only on nodes whose label `vae.role` names it, or is `all`.
    """
    # One listener per node, unless they share the port: its replacement starts when the port is free.
    spread: dict[str, Any] = {} if config.gateway.share_port else {"max_replicas_per_node": 1}
    front = serve.deployment(
        name="Gateway",
        graceful_shutdown_timeout_s=_shutdown_s(config),
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1.0,
        health_check_timeout_s=5.0,
        ray_actor_options={"num_cpus": config.gateway.num_cpus} | _placement("gateway", by_role=by_role),
        **scaling.gateway_options(config.gateway),
        **spread,
    )(Gateway)
    graphs = (_graph(graph, config, by_role=by_role) for graph in GRAPHS)
    return front.bind(config.model_dump(), *graphs)


def _placement(role: str, *, by_role: bool) -> dict[str, Any]:
    return {"label_selector": {ROLE_LABEL: f"in({role},all)"}} if by_role else {}


def from_args(args: dict[str, Any]) -> serve.Application:
    """Return the application of a Serve config file, for its `import_path`; each deployment on nodes of its role.

    Args:
        args: Our configuration tree. What depends on where it runs comes from variables such as
            VAE__GATEWAY__HOST, see `config.overrides_from_environment`.

    Raises:
        ConfigError: If a key is unknown or a value is out of range.
        StartupError: If the bundle does not verify, or credentials cannot be read. Serve keeps what ran before.
    """
    config = ServingConfig.parse(args).override(overrides_from_environment(os.environ))
    bundle.read(config.bundle, sha256=config.bundle_sha256)
    check_credentials(config.gateway)
    return build(_located(config), by_role=True)


def _shutdown_s(config: ServingConfig) -> float:
    """Return the time that a gateway may take to drain and stop."""
    gateway = config.gateway
    return gateway.drain_notice_s + gateway.drain_timeout_s + gateway.stop_grace_s + _SHUTDOWN_SLACK_S


def _graph(graph: bundle.Graph, config: ServingConfig, *, by_role: bool) -> serve.Application:
    replicas = config.encoder if graph == "encoder" else config.decoder
    deployment = serve.deployment(
        name=graph.capitalize(),
        max_ongoing_requests=_MAX_ONGOING,
        graceful_shutdown_wait_loop_s=0.1,
        health_check_period_s=1.0,
        health_check_timeout_s=5.0,
        ray_actor_options={"num_cpus": replicas.num_cpus, "num_gpus": config.gpu_share(graph)}
        | _placement(graph, by_role=by_role),
        **scaling.options(replicas),
    )(GraphReplica)
    return deployment.bind(graph, config.model_dump())


class Stopped(Exception):
    """The service was asked to stop before it served."""


@contextlib.contextmanager
def on_ray(
    config: ServingConfig, *, tell: Callable[[str], None] = lambda _: None, stop: threading.Event | None = None
) -> Iterator[int]:
    """Run the service on Ray; yield its port once it is healthy; then drain, and stop what was started.

    A cluster named by RAY_ADDRESS is used; else a local one is started, and stopped at the end.

    Args:
        config: The service's configuration.
        tell: Told what happens, a line each.
        stop: Set by somebody who no longer wants the service; watched while it starts.

    Raises:
        StartupError: If the bundle does not verify, credentials cannot be read, the port is taken or a
            deployment does not come up. Nothing that was started is left running then.
        Stopped: If `stop` was set before the service was healthy. Nothing is left running then either.
    """
    # Checked here first: a one-line error instead of a deployment that fails three times.
    manifest = bundle.read(config.bundle, sha256=config.bundle_sha256).manifest
    if config.gateway.port == 0:
        raise ServiceFailed(
            reason="gateway.port: 0 lets the system choose, which only the in-process engine can tell"
        )
    tracing.check(config.tracing)
    check_credentials(config.gateway)  # before sources become one below, so that errors name the right one
    located = _located(config)
    check_port(config.gateway.host, config.gateway.port)
    tell(f"bundle verified: {manifest.name} {manifest.version}")
    is_local = "RAY_ADDRESS" not in os.environ
    try:
        _connect(config, is_local=is_local)
        tell("local Ray started" if is_local else "connected to Ray")
        with _deployed(located, stop or threading.Event()):
            tell("deployments healthy: Gateway, Encoder, Decoder")
            yield config.gateway.port
            tell("draining")
    finally:
        if ray.is_initialized():
            ray.shutdown()  # a local cluster goes with the driver that started it


def _located(config: ServingConfig) -> ServingConfig:
    """Return a configuration that means the same in any replica's process: whole paths, and API keys by value.

    Only hashes of keys travel; a replica on a cluster does not have this process's environment.
    """
    gateway, auth = config.gateway, config.gateway.auth
    tls = {name: bundle.absolute(path) for name, path in gateway.tls.model_dump().items() if path}
    keys = os.environ.get(auth.api_keys_variable) if auth.api_keys_variable else None
    known: dict[str, Any] = {}
    if keys is not None:
        known = {"api_keys": ",".join(filter(None, (auth.api_keys, keys))), "api_keys_variable": ""}
    if auth.api_keys_file:
        known["api_keys_file"] = bundle.absolute(auth.api_keys_file)
    if auth.jwt is not None:
        known["jwt"] = {"jwks": bundle.absolute(auth.jwt.jwks)}
    return config.merge({"bundle": bundle.absolute(config.bundle), "gateway": {"tls": tls, "auth": known}})


def _connect(config: ServingConfig, *, is_local: bool) -> None:
    quiet: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if is_local:
        quiet["address"] = "local"  # else Ray would join whatever cluster already runs on this machine
        parts = (config.encoder, config.decoder)
        num_gateways = max(config.gateway.num_replicas, config.gateway.max_replicas)
        needed = num_gateways * config.gateway.num_cpus + sum(
            part.num_cpus * max(part.min_replicas, part.max_replicas) for part in parts
        )
        # Logical processors: a laptop with two must still place all three deployments.
        quiet["num_cpus"] = max(os.cpu_count() or 1, math.ceil(needed) + 1)
        quiet["include_dashboard"] = False
        quiet["object_store_memory"] = _OBJECT_STORE_BYTES
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(**quiet)
    except (ConnectionError, RuntimeError, ValueError) as error:
        where = "a local Ray did not start" if is_local else f"no Ray cluster at {os.environ['RAY_ADDRESS']}"
        raise ServiceFailed(reason=f"{where}: {str(error).strip().splitlines()[0][:200]}") from error
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, on_sigterm)  # Ray puts a handler of its own there, which ends the process
    num_gpus = sum(config.gpu_share(graph) for graph in ("encoder", "decoder"))
    if is_local and num_gpus > _num_gpus():
        raise ProviderUnavailable(asked="CUDAExecutionProvider", actual="none: Ray finds too few GPUs")
    # Ours is the account of what happens; a router that had to ask twice, on a busy machine, is none.
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(
        proxy_location="Disabled", logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False)
    )


def _num_gpus() -> float:
    return float(ray.cluster_resources().get("GPU", 0))  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def _deployed(config: ServingConfig, stop: threading.Event) -> Iterator[None]:
    """Deploy, wait until both graphs answer; at the end drain the gateway, then delete the application."""
    deadline = time.monotonic() + config.start_timeout_s
    # `serve.run` waits without limit for what cannot be placed, so it waits in a thread that may be left behind.
    handles: Future[DeploymentHandle[Any]] = Future()
    threading.Thread(target=_deploy, args=(build(config), handles), daemon=True).start()
    try:
        while not (handles.done() and _is_ready(handles, config.gateway.num_replicas)):
            if time.monotonic() > deadline:
                states = "; ".join(line[:200] for line in _deployment_states().splitlines())
                raise ServiceFailed(
                    reason=f"the service was not healthy in {config.start_timeout_s:g} s: {states}"
                )
            if stop.wait(_POLL_S):
                raise Stopped
        yield
    finally:
        if handles.done() and not handles.exception():
            _drain(handles.result(), _shutdown_s(config))
        serve.delete(APPLICATION)


def _drain(gateway: DeploymentHandle[Any], timeout_s: float) -> None:
    """Drain every gateway while the graphs still run: calls made after the deletion has begun would hang."""
    try:
        # Each of them, however many there are now; one that is lost must not keep the others from draining.
        ends = gateway.broadcast("drain").results(timeout_s=timeout_s, return_exceptions=True)
    except Exception as error:  # noqa: BLE001 - what does not drain must be stopped all the same
        ends = [error]
    for end in ends:
        if isinstance(end, BaseException):
            logger.warning("a gateway did not drain", extra={"reason": type(end).__name__})


def _deploy(application: serve.Application, handles: "Future[DeploymentHandle[Any]]") -> None:
    try:
        handles.set_result(serve.run(application, name=APPLICATION, route_prefix=None))
    except Exception as error:  # noqa: BLE001 - handed to the thread that waits
        handles.set_exception(error)


def _is_ready(handles: "Future[DeploymentHandle[Any]]", num_gateways: int) -> bool:
    """Return whether all gateways serve: Serve may call an application running while one of them still starts."""
    try:
        handle = handles.result()
    except Exception as error:
        raise ServiceFailed(reason=f"the deployments did not come up: {_cause(error)}") from error
    try:
        answers = handle.broadcast("is_ready").results(timeout_s=_CALL_TIMEOUT_S, return_exceptions=True)
        return sum(answer is True for answer in answers) >= num_gateways
    except (TimeoutError, RayActorError, DeploymentUnavailableError):
        return False  # asked again until the deadline, which reports the states


def _deployment_states() -> str:
    application = serve.status().applications.get(APPLICATION)
    deployments = application.deployments if application else {}
    return "\n".join(f"{name} {info.status.value} {info.message}" for name, info in deployments.items())


def _cause(error: Exception) -> str:
    """Return the error of ours that a replica ended with, where Serve's report names one."""
    report = f"{error}\n{_deployment_states()}"
    lines = [line.strip() for line in report.splitlines() if line.strip()]
    ours = [line.partition("serving.errors.")[2] for line in lines if "serving.errors." in line]
    return (ours or lines)[-1][:400]
