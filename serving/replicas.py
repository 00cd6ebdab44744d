"""The three deployments: a few lines of Ray around `runtime` and `gateway.server`."""

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

from ray import serve
from ray.serve.handle import DeploymentHandle

from serving import bundle, logs
from serving.config import ServingConfig, session_threads
from serving.engine.protocol import Rows
from serving.engine.ray_engine import RayEngine
from serving.errors import EngineUnavailable
from serving.gateway.server import GatewayServer
from serving.runtime import GraphRuntime, LoadReport


class GraphReplica:
    """One graph on one replica.

    Args:
        graph: Which half of the model.
        config: The service's configuration, as plain values.

    Raises:
        StartupError: If the bundle does not verify or its graph does not run here as it should.
    """

    def __init__(self, graph: Literal["encoder", "decoder"], config: dict[str, Any]) -> None:
        logs.configure()
        settings = ServingConfig.parse(config)
        own = settings.encoder if graph == "encoder" else settings.decoder
        self._graph = GraphRuntime(
            bundle.read(settings.bundle), graph, device=settings.device, threads=session_threads(own.num_cpus)
        )
        # Two threads: the copies of one run overlap the compute of the other.
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="onnxruntime")

    async def run(self, rows: Rows, outputs: tuple[str, ...], timeout_s: float) -> tuple[str, tuple[Rows, ...]]:
        """Return the version of the model and its outputs for rows.

        Raises:
            DeadlineExceeded: If the rows' turn comes later than `timeout_s` from now.
        """
        expires_at = time.monotonic() + timeout_s
        loop = asyncio.get_running_loop()
        values = await loop.run_in_executor(self._pool, self._graph.run_until, expires_at, rows, outputs)
        return self._graph.report.version, tuple(values)

    async def describe(self) -> LoadReport:
        """Return what is loaded and where it runs."""
        return self._graph.report


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
        manifest = bundle.read_manifest(settings.bundle)
        self._server = GatewayServer(RayEngine(encoder, decoder, manifest, settings), manifest, settings)
        await self._server.start()

    async def check_health(self) -> None:
        """Fail when the task that watches the engine is dead. An ill engine must not restart gateways."""
        if not self._server.health.is_alive and not self._server.is_draining:
            raise EngineUnavailable(graph="gateway", detail="the health watch has ended")

    async def is_ready(self) -> bool:
        """Return whether both graphs answer."""
        return self._server.health.is_ready

    async def drain(self) -> str:
        """Drain the server while the other deployments still run; return the id of this replica."""
        await self._server.drain()
        return serve.get_replica_context().replica_id.unique_id

    async def __del__(self) -> None:
        """Drain: Serve awaits this before it ends the replica, also after a failed constructor."""
        server: GatewayServer | None = getattr(self, "_server", None)
        if server is not None:
            await server.drain()
