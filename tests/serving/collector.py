"""An OpenTelemetry collector for tests: a real HTTP server that takes OTLP and keeps what it was sent."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.common.v1.common_pb2 import KeyValue
from opentelemetry.proto.trace.v1 import trace_pb2

Value = str | int | float | bool


class Received(NamedTuple):
    """A span as it arrived."""

    process: dict[str, Value]
    """Attributes of the resource."""
    name: str
    trace: str
    id: str
    parent: str
    """Id of the parent, empty if there is none."""
    began: int
    ended: int
    attributes: dict[str, Value]
    links: list[tuple[str, str]]
    """Trace and span of each."""
    proto: trace_pb2.Span

    @property
    def failed(self) -> bool:
        """Whether its status is an error."""
        return self.proto.status.code == trace_pb2.Status.STATUS_CODE_ERROR


class Collector:
    """What has arrived."""

    def __init__(self) -> None:
        self.spans: list[Received] = []
        self.num_requests = 0
        self.paths: set[str] = set()
        self.status = 200
        self.endpoint = ""

    def named(self, name: str) -> list[Received]:
        """Return the spans of a name, in the order of their beginning."""
        return sorted((span for span in self.spans if span.name == name), key=lambda span: span.began)

    def one(self, name: str) -> Received:
        """Return the only span of a name."""
        (span,) = self.named(name)
        return span

    def below(self, parent: Received) -> list[Received]:
        """Return the children of a span, in the order of their beginning."""
        own = [span for span in self.spans if span.parent == parent.id and span.trace == parent.trace]
        return sorted(own, key=lambda span: (span.began, span.ended))

    def wait_for(self, fact: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Return once something is so."""
        deadline = time.monotonic() + timeout_s
        while not fact():
            assert time.monotonic() < deadline, (
                f"not in {timeout_s} s; spans: {[span.name for span in self.spans]}"
            )
            time.sleep(0.02)

    def take(self, path: str, body: bytes) -> int:
        """Keep the spans of a request; return the HTTP status."""
        self.num_requests += 1
        self.paths.add(path)
        if self.status == 200:
            for group in ExportTraceServiceRequest.FromString(body).resource_spans:
                process = _plain(group.resource.attributes)
                self.spans += [_received(process, span) for scope in group.scope_spans for span in scope.spans]
        return self.status


@contextlib.contextmanager
def collecting() -> Iterator[Collector]:
    """Run a collector on a free port."""
    collector = Collector()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            self.send_response(collector.take(self.path, body))
            answer = ExportTraceServiceResponse().SerializeToString()
            self.send_header("content-length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    collector.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield collector
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _received(process: dict[str, Value], span: trace_pb2.Span) -> Received:
    return Received(
        process,
        span.name,
        span.trace_id.hex(),
        span.span_id.hex(),
        span.parent_span_id.hex(),
        span.start_time_unix_nano,
        span.end_time_unix_nano,
        _plain(span.attributes),
        [(link.trace_id.hex(), link.span_id.hex()) for link in span.links],
        span,
    )


def _plain(pairs: Iterable[KeyValue]) -> dict[str, Value]:
    return {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in pairs}
