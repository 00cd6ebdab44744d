"""The three deployments: a few lines of Ray around `runtime` and `gateway.server`."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import ray
from ray import serve
from ray.serve.handle import DeploymentHandle

from serving import bundle, logs, metrics, tracing
from serving.config import NUM_METRICS_PORTS, ServingConfig, session_threads
from serving.direct.security import Security
from serving.direct.server import DirectServer
from serving.engine.protocol import Rows
from serving.engine.ray_engine import RayEngine, ReplicaReport
from serving.errors import EngineUnavailable
from serving.exporter import Exporter, Target
from serving.gateway.credentials import is_loopback
from serving.gateway.server import GatewayServer
from serving.meters import CallMeter, RowMeter
from serving.observed_runs import ObservedGraph
from serving.runtime import GraphRuntime
from serving.spans import RunTrace, current_run, received
from serving.tracing import Tracer

_DISCOVERY_TIMEOUT_S: Final = 2.0
"""Time for the other gateways to say where their metrics are, seconds."""

_DRAIN_S: Final = 10.0
"""Time for runs over connections to end when the replica is stopped, seconds: half of what Serve gives it."""


def _replica_id() -> str:
    return str(serve.get_replica_context().replica_id.unique_id)


def _ray_targets() -> list[Target]:
    """Return Ray's exporter on each node that lives; it has Serve's metrics too."""
    nodes = [node for node in ray.nodes() if node["Alive"] and node.get("MetricsExportPort")]  # type: ignore[no-untyped-call]
    return [Target(f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}", {"role": "ray"}) for node in nodes]


class GraphReplica:
    """One graph on one replica.

    Args:
        graph: Which half of the model.
        config: The service's configuration, as plain values.

    Raises:
        StartupError: If the bundle does not verify or its graph does not run here as it should.
    """

    async def __init__(self, graph: bundle.Graph, config: dict[str, Any]) -> None:  # type: ignore[misc]  # Ray Serve awaits a constructor
        logs.configure()
        settings = ServingConfig.parse(config)
        own = settings.encoder if graph == "encoder" else settings.decoder
        runtime = GraphRuntime(
            bundle.read(settings.bundle, sha256=settings.bundle_sha256),
            graph,
            device=settings.device,
            threads=session_threads(own.num_cpus),
            accelerator=settings.bucketed_accelerator(),
        )
        self._graph = ObservedGraph(graph, runtime)
        # Two threads: the copies of one run overlap the compute of the other.
        num_threads = max(2, runtime.report.num_lanes)
        self._pool = ThreadPoolExecutor(max_workers=num_threads, thread_name_prefix="onnxruntime")
        self._meter = RowMeter()
        metrics.describe_build()
        replica, host = _replica_id(), ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._tracer = tracing.start(settings, graph, instance=replica)
        self._direct: DirectServer | None = None
        if own.direct_runs:
            self._direct = DirectServer(self.run, replica=replica, host=host, security=Security.from_environment())
            await self._direct.start()
        self._exporter = Exporter(graph, replica=replica)
        gateway = settings.gateway
        if gateway.metrics_port is not None:
            # Where the gateway listens for this machine alone, so do the replicas beside it.
            metrics_host = gateway.host if is_loopback(gateway.host) else host
            self._exporter.start(metrics_host, own.metrics_port, num_ports=NUM_METRICS_PORTS)

    async def run(
        self,
        rows: Rows,
        outputs: tuple[str, ...],
        timeout_s: float,
        backlog: tuple[str, float] | None = None,
        context: str = "",
    ) -> tuple[str, tuple[Rows, ...]]:
        """Return the version of the model and its outputs for rows.

        Args:
            rows: Input of the graph.
            outputs: Names of the outputs to compute.
            timeout_s: Time in which their turn must come, seconds.
            backlog: Name of the gateway, and this replica's part of the rows that wait there.
            context: Token of the run's trace, where it came by Serve's handle and is traced.

        Raises:
            DeadlineExceeded: If the rows' turn comes later than `timeout_s` from now.
        """
        expires_at = time.monotonic() + timeout_s
        if backlog is not None:
            self._meter.hear(*backlog)
        run = received(context) if context else current_run()
        self._meter.hold(len(rows))
        try:
            loop = asyncio.get_running_loop()
            values = await loop.run_in_executor(self._pool, self._run, expires_at, rows, outputs, run)
        finally:
            self._meter.hold(-len(rows))
            if run is not None and self._tracer is not None:
                self._tracer.end_computation(run)
        return self._graph.report.version, tuple(values)

    async def describe(self) -> ReplicaReport:
        """Return what is loaded, where it runs, and where runs may be sent."""
        address = self._direct.address if self._direct else None
        return ReplicaReport(self._graph.report, address, self._exporter.target)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load since the last time; Serve asks where the deployment scales."""
        return self._meter.report()

    async def __del__(self) -> None:
        """End the runs that Serve does not know of; it awaits this before it ends the replica."""
        direct: DirectServer | None = getattr(self, "_direct", None)
        if direct is not None:
            await direct.close(_DRAIN_S)
        exporter: Exporter | None = getattr(self, "_exporter", None)
        if exporter is not None:
            exporter.close()
        tracer: Tracer | None = getattr(self, "_tracer", None)
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    def _run(self, expires_at: float, rows: Rows, outputs: tuple[str, ...], run: RunTrace | None) -> list[Rows]:
        begun, is_done = self._meter.begin(len(rows)), False
        try:
            values = self._graph.run_until(expires_at, rows, outputs, run)
            is_done = True
        finally:
            self._meter.end(begun, len(rows), is_done=is_done)
        return values


class Gateway:
    """The gRPC server, inside a replica.

    Args:
        config: The service's configuration, as plain values.
        encoder: Handle of the encoder's deployment.
        decoder: Handle of the decoder's deployment.
    """

    async def __init__(  # type: ignore[misc]  # Ray Serve awaits a constructor
        self, config: dict[str, Any], encoder: DeploymentHandle[Any], decoder: DeploymentHandle[Any]
    ) -> None:
        logs.configure()
        settings = ServingConfig.parse(config)
        manifest = bundle.read_manifest(settings.bundle, sha256=settings.bundle_sha256)
        engine = RayEngine(encoder, decoder, manifest, settings)
        self._server = GatewayServer(engine, manifest, settings)
        operations = self._server.operations
        engine.count_waiting = operations.num_waiting
        self._meter = CallMeter(lambda: self._server.num_calls, lambda: operations.num_rows)
        self._engine = engine
        await self._server.start(self._discover)

    async def check_health(self) -> None:
        """Fail when the task that watches the engine is dead. An ill engine must not restart gateways."""
        if not self._server.health.is_alive and not self._server.is_draining:
            raise EngineUnavailable(graph="gateway", detail="the health watch has ended")

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Return the load since the last time; Serve asks where the deployment scales."""
        return self._meter.report()

    async def target(self) -> Target | None:
        """Return where the metrics of this gateway are."""
        return self._server.exporter.target if self._server.exporter else None

    async def _discover(self) -> list[Target]:
        """Return where the metrics of all other processes are: replicas, other gateways, Ray's own exporters."""
        own = serve.get_replica_context()
        gateways = serve.get_deployment_handle(own.deployment, own.app_name)
        asked = gateways.broadcast("target")
        found = await asked.results_async(timeout_s=_DISCOVERY_TIMEOUT_S, return_exceptions=True)
        others = [target for target in found if isinstance(target, Target)]
        return [*others, *self._engine.targets(), *await asyncio.to_thread(_ray_targets)]

    async def is_ready(self) -> bool:
        """Return whether both graphs answer."""
        return self._server.health.is_ready

    async def drain(self) -> None:
        """Drain the server while the other deployments still run."""
        await self._server.drain()

    async def __del__(self) -> None:
        """Drain: Serve awaits this before it ends the replica, also after a failed constructor."""
        server: GatewayServer | None = getattr(self, "_server", None)
        if server is not None:
            await server.drain()
