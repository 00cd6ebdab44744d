"""Every metric of the service. Labels come from closed sets only: method, code, reason, graph, and what is loaded.

Gateways and replicas are processes of their own, and each answers `/metrics` itself (`exporter`). What a call or
a run does is measured where it happens and nowhere else: a gateway counts calls, rows that wait and runs as it
sees them; a replica what its session did. So sums over processes count nothing twice, and a restart shows as a
new series or a reset that `rate` and `increase` know, never as a number that silently falls.
"""

import functools
import platform
from importlib import metadata
from typing import Final, Protocol

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, Info

from serving.loop_metrics import LoopCounter, LoopHistogram

_LATENCY_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_STAGE_BUCKETS: Final = (0.0001, 0.0002, 0.0005, *_LATENCY_BUCKETS)
_ROW_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
_SIZE_BUCKETS: Final = tuple(64 * 4**power for power in range(11))
_SHARE_BUCKETS: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)

# Of a gateway: calls.
CALLS: Final = LoopCounter("vae_calls", "Calls that ended.", ["method", "code"])
CALL_LATENCY: Final = LoopHistogram(
    "vae_call_latency_seconds", "Time from a call's arrival to its end.", ["method"], buckets=_LATENCY_BUCKETS
)
CALL_STAGE: Final = LoopHistogram(
    "vae_call_stage_seconds",
    "Time of a call in one stage: receive (credentials, admission, body), queue (until its first row runs), engine"
    " (until its last row is back, transport included), reply (checks, noise, the bytes of the answer).",
    ["method", "stage"],
    buckets=_STAGE_BUCKETS,
)
CALL_ROWS: Final = LoopHistogram(
    "vae_call_rows", "Rows that were run for a call, in both graphs.", ["method"], buckets=_ROW_BUCKETS
)
REQUEST_BYTES: Final = LoopHistogram(
    "vae_request_bytes", "Size of a request message.", ["method"], buckets=_SIZE_BUCKETS
)
RESPONSE_BYTES: Final = LoopHistogram(
    "vae_response_bytes", "Size of all messages of an answer.", ["method"], buckets=_SIZE_BUCKETS
)
CALL_ERRORS: Final = LoopCounter(
    "vae_call_errors",
    "Calls that ended with an error of ours, by reason and by who must act: client, load or service.",
    ["method", "reason", "blame"],
)
CALLS_IN_FLIGHT: Final = Gauge("vae_calls_in_flight", "Calls that have begun and not ended.", registry=None)
CALLS_LIMIT: Final = Gauge("vae_calls_limit", "Calls in flight above which calls are shed.", registry=None)

# Of a gateway: rows and runs.
QUEUE_ROWS: Final = Gauge("vae_queue_rows", "Rows that wait or run.", ["graph"])
QUEUE_WAITING_ROWS: Final = Gauge("vae_queue_waiting_rows", "Rows that are in no run yet.", ["graph"])
QUEUE_BYTES: Final = Gauge("vae_queue_bytes", "Bytes of the rows that wait or run.", ["graph"])
QUEUE_AGE: Final = Gauge("vae_queue_age_seconds", "Age of the request that has waited longest.", ["graph"])
QUEUE_LIMIT: Final = Gauge("vae_queue_limit_rows", "Rows that wait or run above which calls are shed.", ["graph"])
BATCH_ROWS: Final = LoopHistogram("vae_batch_rows", "Rows in one run of a graph.", ["graph"], buckets=_ROW_BUCKETS)
BATCH_FILL: Final = LoopHistogram(
    "vae_batch_fill_ratio", "Rows in one run as a share of the most.", ["graph"], buckets=_SHARE_BUCKETS
)
BATCH_WAIT: Final = LoopHistogram(
    "vae_batch_wait_seconds", "Longest wait of a row before its run.", ["graph"], buckets=_STAGE_BUCKETS
)
BATCH_RUN: Final = LoopHistogram(
    "vae_batch_run_seconds", "Time of one run, transport included.", ["graph"], buckets=_STAGE_BUCKETS
)
BATCHES_IN_FLIGHT: Final = Gauge("vae_batches_in_flight", "Runs that have begun and not ended.", ["graph"])
BATCHER_STALLED: Final = Gauge(
    "vae_batcher_stalled", "1 if rows are held and no run has ended for too long.", ["graph"]
)
ROWS_DROPPED: Final = LoopCounter(
    "vae_rows_dropped",
    "Rows that no run answered: expired, abandoned by their caller, or failed.",
    ["graph", "reason"],
)
REPLICAS: Final = Gauge("vae_replicas", "Replicas that answered the last check.", ["graph"])
REPLICAS_MIN: Final = Gauge("vae_replicas_min", "Fewest replicas that the configuration asks for.", ["graph"])
READY: Final = Gauge("vae_ready", "1 if both graphs answer as they should, else 0.", registry=None)
MODEL: Final = Info("vae_model", "The model that the gateway answers for.", registry=None)

# Of whoever runs a graph: a replica, or the only process of the in-process engine. Its runs are in threads.
REPLICA_RUN: Final = Histogram(
    "vae_replica_run_seconds", "Time of one run inside the replica.", ["graph"], buckets=_STAGE_BUCKETS
)
REPLICA_ROWS: Final = Counter("vae_replica_rows", "Rows that were run.", ["graph"])
REPLICA_FAILURES: Final = Counter("vae_replica_failures", "Runs that failed or came too late.", ["graph"])
REPLICA_MODEL: Final = Gauge(
    "vae_replica_model",
    "1; the labels say what the replica serves: version of the model, which is a digest of both graphs; execution"
    " provider; precision.",
    ["graph", "version", "provider", "precision"],
)
REPLICA_LOAD: Final = Gauge(
    "vae_replica_load_seconds", "Time to load the graph, check its known answers and warm it up.", ["graph"]
)
REPLICA_DEVICE_BYTES: Final = Gauge(
    "vae_replica_device_bytes", "Bytes of a GPU that the replica's buffers take; 0 on a processor.", ["graph"]
)

# Of every process.
BUILD: Final = Info("vae_build", "Versions of what runs.")


@functools.cache
def register_gateway() -> None:
    """Export what a gateway alone has: what has no labels exists at once, and a replica is never ready."""
    for metric in (CALLS_IN_FLIGHT, CALLS_LIMIT, READY, MODEL):
        REGISTRY.register(metric)


def describe_build() -> None:
    """Say which versions run in this process."""
    names = {"version": "vae-serving", "grpcio": "grpcio", "onnxruntime": "onnxruntime-gpu", "ray": "ray"}
    found = {label: _version_of(name) for label, name in names.items()}
    BUILD.info({**found, "python": platform.python_version()})


class LoadReport(Protocol):
    """What loading a graph took and chose, see `runtime.LoadReport`."""

    @property
    def version(self) -> str:
        """Version of the model."""
        ...

    @property
    def provider(self) -> str:
        """Execution provider of ONNX Runtime."""
        ...

    @property
    def precision(self) -> str:
        """Arithmetic of matrix products."""
        ...

    @property
    def load_s(self) -> float:
        """Time it took, seconds."""
        ...

    @property
    def device_bytes(self) -> int:
        """Bytes of buffers on the device."""
        ...


def _version_of(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


class CallMetrics:
    """What is counted of each call of one method, found once."""

    __slots__ = (
        "_method", "codes", "engine", "latency", "queue", "receive", "reply", "request_bytes",
        "response_bytes", "rows",
    )  # fmt: skip

    def __init__(self, method: str) -> None:
        self._method = method
        self.codes: dict[str, LoopCounter.Child] = {}
        self.latency = CALL_LATENCY.labels(method)
        self.receive, self.queue, self.engine, self.reply = (
            CALL_STAGE.labels(method, stage) for stage in ("receive", "queue", "engine", "reply")
        )
        self.rows = CALL_ROWS.labels(method)
        self.request_bytes, self.response_bytes = REQUEST_BYTES.labels(method), RESPONSE_BYTES.labels(method)

    def end(self, code: str) -> None:
        """Count a call that ended with a code."""
        counter = self.codes.get(code)
        if counter is None:
            counter = self.codes[code] = CALLS.labels(self._method, code)
        counter.inc()

    def error(self, reason: str, blame: str) -> None:
        """Count a call that ended with an error of ours."""
        CALL_ERRORS.labels(self._method, reason, blame).inc()


@functools.cache
def call(method: str) -> CallMetrics:
    """Return what is counted of the calls of a method."""
    return CallMetrics(method)


_FIRST_CODES: Final = ("OK", "DEADLINE_EXCEEDED", "INTERNAL", "RESOURCE_EXHAUSTED", "UNAVAILABLE")
_DROP_REASONS: Final = ("expired", "abandoned", "failed")


def expect(method: str) -> None:
    """Let the counters of a method exist from the start, for the codes that rules watch.

    A counter that appears with its first call has no increase that `rate` could see: a method that failed once
    in its life would look as if it never had.
    """
    for code in _FIRST_CODES:
        CALLS.labels(method, code)


class BatchMetrics:
    """What is counted of each run of one graph, found once."""

    __slots__ = ("fill", "rows", "run", "wait")

    def __init__(self, graph: str) -> None:
        self.rows, self.fill = BATCH_ROWS.labels(graph), BATCH_FILL.labels(graph)
        self.wait, self.run = BATCH_WAIT.labels(graph), BATCH_RUN.labels(graph)
        for reason in _DROP_REASONS:
            ROWS_DROPPED.labels(graph, reason)  # exists from the start, as for calls


@functools.cache
def batch(graph: str) -> BatchMetrics:
    """Return what is counted of the runs of a graph."""
    return BatchMetrics(graph)


class ReplicaMetrics:
    """What is counted of each run in the process that runs a graph, found once. May be used by several threads."""

    __slots__ = ("_failures", "_rows", "_run")

    def __init__(self, graph: str) -> None:
        self._run, self._rows = REPLICA_RUN.labels(graph), REPLICA_ROWS.labels(graph)
        self._failures = REPLICA_FAILURES.labels(graph)

    def ran(self, num_rows: int, seconds: float) -> None:
        """Count a run."""
        self._run.observe(seconds)
        self._rows.inc(num_rows)

    def failed(self) -> None:
        """Count a run that failed, or whose turn came too late."""
        self._failures.inc()


@functools.cache
def replica(graph: str) -> ReplicaMetrics:
    """Return what is counted where a graph runs."""
    return ReplicaMetrics(graph)


_described: dict[str, tuple[str, str, str, str]] = {}


def describe_replica(graph: str, report: LoadReport) -> None:
    """Say what this process serves of a graph, and what loading it took."""
    labels = (graph, report.version, report.provider, report.precision)
    before = _described.setdefault(graph, labels)
    if before != labels:  # one model at a time: the series of another would say that versions differ
        REPLICA_MODEL.remove(*before)
        _described[graph] = labels
    REPLICA_MODEL.labels(*labels).set(1)
    REPLICA_LOAD.labels(graph).set(report.load_s)
    REPLICA_DEVICE_BYTES.labels(graph).set(report.device_bytes)
    replica(graph)  # its counters exist from the start: one that appears with its first run would miss it
