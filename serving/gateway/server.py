"""Start, serve, drain: one port with the typed API, grpc.health.v1 and reflection."""

import asyncio
import functools
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2_grpc
from prometheus_client import Gauge

from serving import metrics, tracing
from serving.batching import BatchReport, DropReport, RowBatcher
from serving.bundle import Graph, Manifest
from serving.config import GatewayConfig, ServingConfig, address_of
from serving.engine.protocol import GRAPHS, Engine, Providers
from serving.errors import PortTaken
from serving.exporter import Discover, Exporter, nobody_else
from serving.gateway import inference_service, vae_service
from serving.gateway.access_log import AccessLog
from serving.gateway.admission import Admission
from serving.gateway.calls import Method, Patience, Reading, handler
from serving.gateway.credentials import check_plaintext, server_credentials
from serving.gateway.guard import Guard
from serving.gateway.health import Health
from serving.gateway.identity import Identity
from serving.gateway.inference_service import InferenceService
from serving.gateway.interceptors import Admit, Authenticate, LimitTime, MapErrors, Observe, Trace, Traffic
from serving.gateway.operations import Operations
from serving.gateway.vae_service import VaeService

logger = logging.getLogger(__name__)

HEALTH: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_MESSAGE_OVERHEAD: Final = 64 * 1024
_POLL_S: Final = 0.02
_DRAIN_FILE_POLL_S: Final = 0.2


class GatewayServer:
    """One gRPC server in front of one engine. Must be made and used on one event loop.

    Args:
        engine: Who runs the graphs; closed with the server.
        manifest: Description of the model.
        config: Every number.

    Raises:
        CredentialsError: If a certificate, a key or a key set cannot be read, or plaintext would leave the
            machine.
        TracingUnavailable: If traces are asked for and OpenTelemetry is not installed.
    """

    def __init__(self, engine: Engine, manifest: Manifest, config: ServingConfig) -> None:
        self._engine, self._config = engine, config
        gateway = config.gateway
        check_plaintext(gateway.host, gateway)
        self._credentials = server_credentials(gateway.tls)
        self._identity = Identity(gateway.auth, gateway.tls)
        self._admission = Admission(gateway.admission)
        self._traffic = Traffic()
        self._reading = Reading(gateway.transport.body_timeout_s)
        self.operations = Operations(
            engine,
            manifest,
            config,
            tell=functools.partial(_observe_rows, config.batching.max_batch_rows),
            charge=self._admission.charge,
        )
        self._tracer = tracing.start(config, "gateway")
        if self._tracer is not None:
            for batcher in (batcher for graph in GRAPHS for batcher in self.operations.batchers(graph)):
                batcher.on_traced_run = self._tracer.end_run
        self._service = VaeService(self.operations, config.limits)
        self._services: dict[str, dict[str, Method]] = {vae_service.NAME: self._service.methods()}
        if gateway.open_inference:
            inference = InferenceService(
                self.operations,
                config,
                is_ready=lambda: self.health.is_ready,
                count_call=self._admission.count_call,
            )
            self._services[inference_service.NAME] = inference.methods()
        self.health = Health(
            engine,
            list(self._services),
            is_stalled=lambda: self.operations.is_stalled,
            on_ready=self._on_ready,
        )
        self._server = grpc.aio.server(options=_options(config))
        self._drain_task: asyncio.Task[None] | None = None
        self._drain_request: asyncio.Task[None] | None = None
        self.port = 0
        self.exporter: Exporter | None = None
        self._access_log = AccessLog(gateway.access_log)
        self._version = manifest.version
        self._observe_gateway(config)
        metrics.MODEL.info({"name": manifest.name, "version": manifest.version})
        metrics.describe_build()

    @property
    def is_draining(self) -> bool:
        """Whether the drain has begun."""
        return self._drain_task is not None

    @property
    def num_calls(self) -> int:
        """Calls in flight."""
        return self._traffic.num_in_flight

    @property
    def metrics_port(self) -> int | None:
        """Port of the Prometheus endpoint, where there is one."""
        return self.exporter.port if self.exporter else None

    async def start(self, discover: Discover = nobody_else) -> None:
        """Bind, serve, and begin to ask the engine for its health.

        Args:
            discover: Finds the other processes that have metrics.

        Raises:
            PortTaken: If the address cannot be bound.
            CredentialsError: If the key set of tokens cannot be had.
        """
        await self._identity.start()
        for service, methods in self._services.items():
            handlers = {name: self._handler(f"{service}/{name}", method) for name, method in methods.items()}
            self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        names = (*self._services, HEALTH, reflection.SERVICE_NAME)
        others: list[tuple[Callable[[Any, Any], None], object]] = [
            (health_pb2_grpc.add_HealthServicer_to_server, self.health.servicer),
            (reflection_pb2_grpc.add_ServerReflectionServicer_to_server, reflection.aio.ReflectionServicer(names)),
        ]
        guards = tuple(Guard(self._identity, add, servicer) for add, servicer in others)
        self._server.add_generic_rpc_handlers(guards)
        gateway = self._config.gateway
        self.port = _bind(self._server, gateway, self._credentials)
        await self.health.prepare()
        await self._server.start()
        if gateway.metrics_port is not None:
            self.exporter = Exporter(
                "gateway", is_ready=lambda: self.health.is_ready and not self.is_draining, discover=discover
            )
            self.exporter.start(gateway.host, gateway.metrics_port, num_ports=1)
        logger.info("gateway listens", extra={"host": gateway.host, "port": self.port})
        await self.health.start()
        if gateway.drain_file:
            self._drain_request = asyncio.get_running_loop().create_task(self._await_drain_file())

    async def drain(self) -> None:
        """Say NOT_SERVING, keep serving until quiet, then stop. Whoever calls again waits for the same drain.

        `grpc.aio.Server.stop` alone loses calls that the core has accepted and Python has not yet seen.
        """
        if self._drain_task is None:
            self._drain_task = asyncio.get_running_loop().create_task(self._drain())
        await asyncio.shield(self._drain_task)

    async def _await_drain_file(self) -> None:
        """Drain when the file appears. One that an earlier gateway has left behind asks for nothing."""
        self._remove_drain_file()
        while not self._is_drain_asked():  # noqa: ASYNC110 - the file comes from another process
            await asyncio.sleep(_DRAIN_FILE_POLL_S)
        await self.drain()

    def _is_drain_asked(self) -> bool:
        return Path(self._config.gateway.drain_file).exists()

    def _remove_drain_file(self) -> None:
        Path(self._config.gateway.drain_file).unlink(missing_ok=True)

    async def _drain(self) -> None:
        gateway = self._config.gateway
        logger.info("gateway drains")
        await self.health.enter_drain()
        await asyncio.sleep(gateway.drain_notice_s)
        self._reading.drain()
        began = time.monotonic()
        while not self._is_quiet(began) and time.monotonic() - began < gateway.drain_timeout_s:  # noqa: ASYNC110 - quiet is a length of time
            await asyncio.sleep(_POLL_S)
        await self._server.stop(gateway.stop_grace_s)
        await asyncio.sleep(0)  # aborted coroutines finish in the next turn (grpc issue 37239)
        await self.operations.close()
        await self._engine.close()
        await self._identity.close()
        self._access_log.flush()
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.close)
        if self.exporter is not None:
            self.exporter.close()
        if self._drain_request is not None:
            self._drain_request.cancel()
            self._remove_drain_file()
        logger.info("gateway stopped", extra={"drain_seconds": round(time.monotonic() - began, 3)})

    def _handler(self, path: str, method: Method) -> "grpc.RpcMethodHandler[bytes, bytes]":
        limits, transport = self._config.limits, self._config.gateway.transport
        limit_time = (
            LimitTime(default_s=limits.default_deadline_s, max_s=limits.max_deadline_s)
            if method.unary
            else LimitTime(default_s=limits.max_stream_s, max_s=limits.max_stream_s)
        )
        surrounds = (
            *([Trace(self._tracer, is_unary=bool(method.unary))] if self._tracer else ()),
            Observe(self._traffic, self._access_log),
            MapErrors(),
            Authenticate(self._identity, max_metadata_bytes=2 * transport.max_metadata_bytes),
            Admit(self._admission),
            limit_time,
        )
        patience = Patience(self._reading, transport.write_timeout_s)
        metrics.expect(path.rpartition("/")[2])
        return handler(path, method, surrounds, patience, version=self._version)

    def _is_quiet(self, since: float) -> bool:
        silent_s = time.monotonic() - max(self._traffic.last_arrival, since)
        return self._traffic.num_in_flight == 0 and silent_s > self._config.gateway.drain_quiet_s

    def _on_ready(self, providers: Providers) -> None:
        self._service.providers = providers

    def _observe_gateway(self, config: ServingConfig) -> None:
        """Let the gauges read the facts at scrape time, so that nothing is counted twice."""
        metrics.register_gateway()
        metrics.CALLS_IN_FLIGHT.set_function(lambda: self._traffic.num_in_flight)
        metrics.CALLS_LIMIT.set(config.gateway.admission.max_calls)
        metrics.READY.set_function(lambda: self.health.is_ready and not self.is_draining)
        fewest = {"encoder": config.encoder.min_replicas, "decoder": config.decoder.min_replicas}
        for graph in GRAPHS:
            metrics.batch(graph)
            metrics.REPLICAS_MIN.labels(graph).set(fewest[graph] if config.engine == "ray" else 1)
            metrics.REPLICAS.labels(graph).set_function(functools.partial(self._engine.num_answering, graph))
            metrics.QUEUE_LIMIT.labels(graph).set(config.batching.max_queue_rows)
            batchers = self.operations.batchers(graph)
            facts: list[tuple[Gauge, Callable[[RowBatcher], float], Callable[[list[float]], float]]] = [
                (metrics.QUEUE_ROWS, lambda batcher: batcher.num_rows, sum),
                (metrics.QUEUE_WAITING_ROWS, lambda batcher: batcher.num_waiting, sum),
                (metrics.QUEUE_BYTES, lambda batcher: batcher.num_bytes, sum),
                (metrics.QUEUE_AGE, lambda batcher: batcher.longest_wait_s, max),
                (metrics.BATCHES_IN_FLIGHT, lambda batcher: batcher.num_in_flight, sum),
                (metrics.BATCHER_STALLED, lambda batcher: batcher.is_stalled, max),
            ]
            for gauge, read, join in facts:
                gauge.labels(graph).set_function(functools.partial(_joined, batchers, read, join))


def check_credentials(gateway: GatewayConfig) -> None:
    """Refuse what keeps a gateway from being safe, before one is started.

    Raises:
        CredentialsError: If plaintext would leave the machine, or a certificate or key file cannot be read.
    """
    check_plaintext(gateway.host, gateway)
    server_credentials(gateway.tls)
    Identity(gateway.auth, gateway.tls)


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


def _bind(server: grpc.aio.Server, gateway: GatewayConfig, credentials: grpc.ServerCredentials | None) -> int:
    if not gateway.share_port:
        check_port(gateway.host, gateway.port)
    address = address_of(gateway.host, gateway.port)
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if port == 0:
        raise PortTaken(address=address)
    return port


def _options(config: ServingConfig) -> list[tuple[str, int]]:
    """Return the options of the gRPC server; `TransportConfig` says why each is what it is."""
    limits, gateway, transport = config.limits, config.gateway, config.gateway.transport
    identity, gzip = 1, 4  # bits of grpc_compression_algorithm
    options = [
        ("grpc.max_receive_message_length", limits.max_request_bytes + _MESSAGE_OVERHEAD),
        ("grpc.max_send_message_length", limits.max_response_bytes + _MESSAGE_OVERHEAD),
        ("grpc.max_metadata_size", transport.max_metadata_bytes),
        ("grpc.absolute_max_metadata_size", 2 * transport.max_metadata_bytes),
        # Several gateways share the port on purpose; otherwise gRPC would share it with whoever comes second,
        # and a second listener must fail loudly.
        ("grpc.so_reuseport", int(gateway.share_port)),
        (
            "grpc.compression_enabled_algorithms_bitset",
            identity | gzip if transport.compression == "gzip" else identity,
        ),
        ("grpc.server.max_pending_requests", transport.max_pending_calls),
        ("grpc.server.max_pending_requests_hard_limit", transport.max_pending_calls),
        ("grpc.server_handshake_timeout_ms", _ms(transport.handshake_timeout_s)),
        ("grpc.keepalive_time_ms", _ms(transport.keepalive_time_s)),
        ("grpc.keepalive_timeout_ms", _ms(transport.keepalive_timeout_s)),
        ("grpc.http2.min_ping_interval_without_data_ms", _ms(transport.min_ping_interval_s)),
        ("grpc.max_connection_idle_ms", _ms(transport.max_connection_idle_s)),
        ("grpc.max_connection_age_ms", _ms(transport.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", _ms(transport.max_connection_age_grace_s)),
    ]
    if transport.max_concurrent_streams is not None:
        options.append(("grpc.max_concurrent_streams", transport.max_concurrent_streams))
    return options


def _ms(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def _observe_rows(max_rows: int, graph: Graph, report: BatchReport | DropReport) -> None:
    if isinstance(report, DropReport):
        metrics.ROWS_DROPPED.labels(graph, report.reason).inc(report.num_rows)
        return
    meters = metrics.batch(graph)
    meters.rows.observe(report.num_rows)
    meters.fill.observe(report.num_rows / max_rows)
    meters.wait.observe(report.wait_s)
    meters.run.observe(report.run_s)


def _joined(
    batchers: Sequence[RowBatcher], read: Callable[[RowBatcher], float], join: Callable[[list[float]], float]
) -> float:
    return join([float(read(batcher)) for batcher in batchers])
