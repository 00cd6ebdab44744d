"""Start, serve, drain: one port with the typed API, grpc.health.v1 and reflection."""

import asyncio
import logging
import socket
import time
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from serving import metrics
from serving.batching import BatchReport
from serving.bundle import Manifest
from serving.config import GatewayConfig, LimitsConfig, ServingConfig, address_of
from serving.engine.protocol import Engine, Providers
from serving.errors import PortTaken
from serving.gateway import vae_service
from serving.gateway.health import Health
from serving.gateway.interceptors import LimitTime, MapErrors, Observe, Traffic, handler
from serving.gateway.operations import Operations
from serving.gateway.vae_service import VaeService

logger = logging.getLogger(__name__)

_MESSAGE_OVERHEAD: Final = 64 * 1024
_POLL_S: Final = 0.02


class GatewayServer:
    """One gRPC server in front of one engine. Must be made and used on one event loop.

    Args:
        engine: Who runs the graphs; closed with the server.
        manifest: Description of the model.
        config: Every number.
    """

    def __init__(self, engine: Engine, manifest: Manifest, config: ServingConfig) -> None:
        self._engine, self._config = engine, config
        self._traffic = Traffic()
        self.operations = Operations(engine, manifest, config, on_batch=_observe_batch)
        self._service = VaeService(self.operations, config.limits)
        self.health = Health(
            engine,
            [vae_service.NAME],
            is_stalled=lambda: self.operations.is_stalled,
            on_ready=self._on_ready,
        )
        self._server = grpc.aio.server(options=_options(config.limits))
        self._drain_task: asyncio.Task[None] | None = None
        self.port = 0
        self._metrics: metrics.Endpoint | None = None
        _observe_gateway(self._traffic, self.operations, manifest)

    @property
    def is_draining(self) -> bool:
        """Whether the drain has begun."""
        return self._drain_task is not None

    @property
    def metrics_port(self) -> int | None:
        """Port of the Prometheus endpoint, where there is one."""
        return self._metrics.port if self._metrics else None

    async def start(self) -> None:
        """Bind, serve, and begin to ask the engine for its health.

        Raises:
            PortTaken: If the address cannot be bound.
        """
        surrounds = (Observe(self._traffic), MapErrors(), LimitTime(self._config.limits))
        handlers = {
            name: handler(name, request_type, behaviour, surrounds)
            for name, (request_type, behaviour) in self._service.methods().items()
        }
        generic = grpc.method_handlers_generic_handler(vae_service.NAME, handlers)
        self._server.add_generic_rpc_handlers((generic,))
        health_pb2_grpc.add_HealthServicer_to_server(self.health.servicer, self._server)
        gateway = self._config.gateway
        if gateway.reflection:
            health_name = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
            reflection.enable_server_reflection(
                (vae_service.NAME, health_name, reflection.SERVICE_NAME), self._server
            )
        self.port = _bind(self._server, gateway)
        await self.health.prepare()
        await self._server.start()
        if gateway.metrics_port is not None:
            self._metrics = metrics.expose(gateway.host, gateway.metrics_port)
        logger.info("gateway listens", extra={"host": gateway.host, "port": self.port})
        await self.health.start()

    async def drain(self) -> None:
        """Say NOT_SERVING, keep serving until quiet, then stop. Whoever calls again waits for the same drain.

        `grpc.aio.Server.stop` alone loses calls that the core has accepted and Python has not yet seen.
        """
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())
        await asyncio.shield(self._drain_task)

    async def _drain(self) -> None:
        gateway = self._config.gateway
        logger.info("gateway drains")
        await self.health.enter_drain()
        began = time.monotonic()
        while not self._is_quiet(began) and time.monotonic() - began < gateway.drain_timeout_s:  # noqa: ASYNC110 - quiet is a length of time
            await asyncio.sleep(_POLL_S)
        await self._server.stop(gateway.stop_grace_s)
        await asyncio.sleep(0)  # aborted coroutines finish in the next turn (grpc issue 37239)
        await self.operations.close()
        await self._engine.close()
        if self._metrics is not None:
            self._metrics.close()
        logger.info("gateway stopped", extra={"drain_seconds": round(time.monotonic() - began, 3)})

    def _is_quiet(self, since: float) -> bool:
        silent_s = time.monotonic() - max(self._traffic.last_arrival, since)
        return self._traffic.num_in_flight == 0 and silent_s > self._config.gateway.drain_quiet_s

    def _on_ready(self, providers: Providers) -> None:
        self._service.providers = providers


def check_port(host: str, port: int) -> None:
    """Refuse an address that cannot be listened on, before gRPC prints what it thinks of it.

    Raises:
        PortTaken: If it is in use, or not of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError:
            raise PortTaken(address=address_of(host, port)) from None


def _bind(server: grpc.aio.Server, gateway: GatewayConfig) -> int:
    check_port(gateway.host, gateway.port)
    address = address_of(gateway.host, gateway.port)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise PortTaken(address=address)
    return port


def _options(limits: LimitsConfig) -> list[tuple[str, int]]:
    return [
        ("grpc.max_receive_message_length", limits.max_request_bytes + _MESSAGE_OVERHEAD),
        ("grpc.max_send_message_length", limits.max_response_bytes + _MESSAGE_OVERHEAD),
        # gRPC would share the port with whoever comes second; a second listener must fail loudly.
        ("grpc.so_reuseport", 0),
        # Identity only: 0.3 MB of gzip can inflate to the largest message.
        ("grpc.compression_enabled_algorithms_bitset", 1),
        # Silent sockets are gone after 5 s rather than 120 s; dead peers after 80 s rather than 2 h.
        ("grpc.server_handshake_timeout_ms", 5_000),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
    ]


def _observe_batch(graph: str, report: BatchReport) -> None:
    metrics.BATCH_ROWS.labels(graph).observe(report.num_rows)
    metrics.BATCH_WAIT.labels(graph).observe(report.wait_s)
    metrics.BATCH_RUN.labels(graph).observe(report.run_s)


def _observe_gateway(traffic: Traffic, operations: Operations, manifest: Manifest) -> None:
    """Let the gauges read the facts at scrape time, so that nothing is counted twice."""
    metrics.CALLS_IN_FLIGHT.set_function(lambda: traffic.num_in_flight)
    metrics.QUEUE_ROWS.labels("encoder").set_function(lambda: operations.encoder.num_rows)
    metrics.QUEUE_ROWS.labels("decoder").set_function(lambda: operations.decoder.num_rows)
    metrics.MODEL.info({"name": manifest.name, "version": manifest.version})
