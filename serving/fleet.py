"""All processes of a service as their metrics show them: found through one gateway, read side by side.

Rates and quantiles are of the time between two looks; a single look shows the whole life of each process.
"""

import json
import math
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from prometheus_client.parser import text_string_to_metric_families

_TIMEOUT_S: Final = 5.0
_MAX_TARGETS: Final = 16
"""Processes that are read at a time."""

Labels = tuple[tuple[str, str], ...]
Samples = dict[tuple[str, Labels], float]


class Unreachable(Exception):
    """Metrics cannot be read."""


class Process(NamedTuple):
    """One process at one time."""

    address: str
    role: str
    replica: str
    samples: Samples

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples of a name that have these labels."""
        wanted = labels.items()
        return sum(
            value for (found, own), value in self.samples.items() if found == name and wanted <= dict(own).items()
        )

    def labels(self, name: str) -> list[dict[str, str]]:
        """Return the labels of each sample of a name."""
        return [dict(own) for found, own in self.samples if found == name]


class Look(NamedTuple):
    """All processes at one time."""

    at: float
    """Monotonic seconds."""

    processes: list[Process]
    unreachable: dict[str, str]
    """Address and reason of those that could not be read."""


def look(url: str) -> Look:
    """Read the metrics of all processes of a service.

    Args:
        url: Of one gateway's metrics, such as http://127.0.0.1:9090.

    Raises:
        Unreachable: If that gateway does not answer, or is none.
    """
    groups = json.loads(_fetch(f"{url.rstrip('/')}/targets"))
    targets = [
        (address, group["labels"])
        for group in groups
        for address in group["targets"]
        if group["labels"].get("role") != "ray"
    ]
    at = time.monotonic()
    with ThreadPoolExecutor(max_workers=_MAX_TARGETS) as pool:
        read = list(pool.map(_read, targets))
    processes = [process for process in read if isinstance(process, Process)]
    unreachable = {
        address: str(error)
        for (address, _), error in zip(targets, read, strict=True)
        if not isinstance(error, Process)
    }
    return Look(at, processes, unreachable)


class MethodRow(NamedTuple):
    """What came of the calls of one method."""

    method: str
    calls_per_s: float
    errors_per_s: float
    p50_ms: float
    p99_ms: float


class GraphRow(NamedTuple):
    """What gateways and replicas show of one graph."""

    graph: str
    num_replicas: int
    versions: tuple[str, ...]
    rows_per_s: float
    rows_per_run: float
    num_waiting: float
    oldest_s: float
    num_running: float


class ProcessRow(NamedTuple):
    """What one process shows of itself."""

    role: str
    replica: str
    address: str
    serves: str
    rows_per_s: float
    run_ms: float
    cpu: float
    memory_mib: float


class Summary(NamedTuple):
    """The service at a time, as tables show it."""

    is_ready: bool
    num_calls: float
    methods: list[MethodRow]
    graphs: list[GraphRow]
    processes: list[ProcessRow]
    unreachable: dict[str, str]


def summarise(now: Look, before: Look | None = None) -> Summary:
    """Return what happened between two looks; or since each process began, if there is only one."""
    earlier = {(process.role, process.address): process for process in before.processes} if before else {}
    changes = [
        _Change(process, earlier.get((process.role, process.address)), now, before) for process in now.processes
    ]
    gateways = [change for change in changes if change.now.role == "gateway"]
    return Summary(
        is_ready=bool(gateways) and all(change.now.value("vae_ready") == 1 for change in gateways),
        num_calls=sum(change.now.value("vae_calls_in_flight") for change in gateways),
        methods=_methods(gateways),
        graphs=[_graph(graph, gateways, changes) for graph in ("encoder", "decoder")],
        processes=[_process(change) for change in changes],
        unreachable=now.unreachable,
    )


class _Change:
    """A process between two looks."""

    def __init__(self, now: Process, before: Process | None, look_now: Look, look_before: Look | None) -> None:
        self.now = now
        began = now.value("process_start_time_seconds")
        if before is not None and before.value("process_start_time_seconds") != began:
            before = None  # another process at the same address
        self._before = before
        alive_s = max(time.time() - began, 1e-3) if began else math.inf
        between_s = look_now.at - look_before.at if look_before else math.inf
        self.seconds = max(between_s if before is not None else min(alive_s, between_s), 1e-3)

    def value(self, name: str, **labels: str) -> float:
        """Return how much a counter grew."""
        return self.now.value(name, **labels) - (self._before.value(name, **labels) if self._before else 0.0)

    def rate(self, name: str, **labels: str) -> float:
        """Return how much a counter grew in a second."""
        return self.value(name, **labels) / self.seconds

    def buckets(self, name: str, **labels: str) -> dict[float, float]:
        """Return the counts of a histogram below each bound."""
        bounds = {own["le"] for own in self.now.labels(f"{name}_bucket")}
        return {float(bound): self.value(f"{name}_bucket", **labels, le=bound) for bound in bounds}


def quantile(share: float, below: Mapping[float, float]) -> float:
    """Return the quantile of a histogram, linear inside of a bucket as Prometheus has it; NaN without values.

    Args:
        share: In [0, 1].
        below: Number of values at most each bound, infinity included.

    Example:
        >>> quantile(0.5, {1.0: 2.0, 2.0: 4.0, math.inf: 4.0})
        1.0
    """
    bounds = sorted(below)
    total = below[bounds[-1]] if bounds else 0.0
    if not total:
        return math.nan
    wanted, low, under = share * total, 0.0, 0.0
    for bound in bounds:
        if below[bound] >= wanted and below[bound] > under:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (wanted - under) / (below[bound] - under)
        low, under = bound, below[bound]
    return low


def _methods(gateways: Iterable["_Change"]) -> list[MethodRow]:
    changes = list(gateways)
    names = sorted({own["method"] for change in changes for own in change.now.labels("vae_calls_total")})
    rows = []
    for name in names:
        below: defaultdict[float, float] = defaultdict(float)
        for change in changes:
            for bound, count in change.buckets("vae_call_latency_seconds", method=name).items():
                below[bound] += count
        calls = sum(change.rate("vae_calls_total", method=name) for change in changes)
        right = sum(change.rate("vae_calls_total", method=name, code="OK") for change in changes)
        p50, p99 = (1000 * quantile(share, below) for share in (0.5, 0.99))
        rows.append(MethodRow(name, calls, calls - right, p50, p99))
    return rows


def _graph(graph: str, gateways: Iterable["_Change"], changes: Iterable["_Change"]) -> GraphRow:
    fronts = list(gateways)
    models = [own for change in changes for own in change.now.labels("vae_replica_model") if own["graph"] == graph]
    runs = sum(change.value("vae_batch_rows_count", graph=graph) for change in fronts)
    rows = sum(change.value("vae_batch_rows_sum", graph=graph) for change in fronts)
    return GraphRow(
        graph=graph,
        num_replicas=len(models),
        versions=tuple(sorted({own["version"] for own in models})),
        rows_per_s=sum(change.rate("vae_batch_rows_sum", graph=graph) for change in fronts),
        rows_per_run=rows / runs if runs else math.nan,
        num_waiting=sum(change.now.value("vae_queue_waiting_rows", graph=graph) for change in fronts),
        oldest_s=max((change.now.value("vae_queue_age_seconds", graph=graph) for change in fronts), default=0.0),
        num_running=sum(change.now.value("vae_batches_in_flight", graph=graph) for change in fronts),
    )


def _process(change: "_Change") -> ProcessRow:
    now = change.now
    runs = change.value("vae_replica_run_seconds_count")
    run_s = change.value("vae_replica_run_seconds_sum")
    models = now.labels("vae_replica_model") or now.labels("vae_model_info")
    serves = " ".join(sorted({own["version"] for own in models}))
    providers = " ".join(sorted({own.get("provider", "").removesuffix("ExecutionProvider") for own in models}))
    return ProcessRow(
        role=now.role,
        replica=now.replica,
        address=now.address,
        serves=f"{serves} {providers}".strip(),
        rows_per_s=change.rate("vae_replica_rows_total"),
        run_ms=1000 * run_s / runs if runs else math.nan,
        cpu=change.rate("process_cpu_seconds_total"),
        memory_mib=now.value("process_resident_memory_bytes") / 2**20,
    )


def _read(target: tuple[str, Mapping[str, str]]) -> Process | Unreachable:
    address, labels = target
    try:
        text = _fetch(f"http://{address}/metrics")
    except Unreachable as error:
        return error
    samples: Samples = {
        (sample.name, tuple(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return Process(address, labels.get("role", ""), labels.get("replica", ""), samples)


def _fetch(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise Unreachable(f"{url}: expected the address of a gateway's metrics, such as http://127.0.0.1:9090")
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT_S) as response:  # noqa: S310 - the scheme is checked above
            text: str = response.read().decode()
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        raise Unreachable(f"{url}: {reason}; is the service up with a metrics port?") from None
    return text
