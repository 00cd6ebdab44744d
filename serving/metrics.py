"""Every metric of the service. Labels come from closed sets only: method, code, graph."""

import functools
import logging
from collections.abc import Callable
from typing import Final, NamedTuple

from prometheus_client import Counter, Gauge, Histogram, Info, start_http_server

logger = logging.getLogger(__name__)

_LATENCY_BUCKETS: Final = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
_ROW_BUCKETS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)

CALLS: Final = Counter("vae_calls", "Calls that ended.", ["method", "code"])
CALL_LATENCY: Final = Histogram(
    "vae_call_latency_seconds", "Time from a call's arrival to its end.", ["method"], buckets=_LATENCY_BUCKETS
)
CALLS_IN_FLIGHT: Final = Gauge("vae_calls_in_flight", "Calls that have begun and not ended.")
BATCH_ROWS: Final = Histogram("vae_batch_rows", "Rows in one run of a graph.", ["graph"], buckets=_ROW_BUCKETS)
BATCH_WAIT: Final = Histogram(
    "vae_batch_wait_seconds", "Longest wait of a row before its run.", ["graph"], buckets=_LATENCY_BUCKETS
)
BATCH_RUN: Final = Histogram(
    "vae_batch_run_seconds", "Time of one run, transport included.", ["graph"], buckets=_LATENCY_BUCKETS
)
QUEUE_ROWS: Final = Gauge("vae_queue_rows", "Rows that wait or run.", ["graph"])
REPLICAS: Final = Gauge("vae_replicas", "Replicas that answered the last check.", ["graph"])
MODEL: Final = Info("vae_model", "The loaded model.")


@functools.cache
def calls(method: str, code: str) -> Counter:
    """Return the counter of the calls of a method that end with a code; found once, for it is asked often."""
    return CALLS.labels(method, code)


@functools.cache
def call_latency(method: str) -> Histogram:
    """Return the latency of a method, found once."""
    return CALL_LATENCY.labels(method)


@functools.cache
def batch(graph: str) -> tuple[Histogram, Histogram, Histogram]:
    """Return rows, wait and run of a graph's runs, found once."""
    return BATCH_ROWS.labels(graph), BATCH_WAIT.labels(graph), BATCH_RUN.labels(graph)


class Endpoint(NamedTuple):
    """The metrics over HTTP."""

    port: int
    close: Callable[[], None]


def expose(host: str, port: int) -> Endpoint | None:
    """Serve the metrics over HTTP; return None if the bind fails, which stops nothing."""
    try:
        server, thread = start_http_server(port, addr=host.strip("[]"))
    except OSError as error:
        logger.warning("metrics are not exposed", extra={"port": port, "reason": error.strerror})
        return None

    def close() -> None:
        server.shutdown()
        server.server_close()
        thread.join()

    return Endpoint(server.server_port, close)
