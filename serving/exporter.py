"""What Prometheus and probes ask for over HTTP, on one port of each process.

`/metrics` are the numbers of this process. `/targets` of a gateway lists every process that has numbers, in the
form of Prometheus's HTTP service discovery, so that one address is all that must be configured on one machine:
replicas come and go, and several share a node, so their ports cannot be known beforehand. `/livez` says whether
the event loop turns, `/readyz` whether both graphs answer.

Ray's own exporter was the alternative: one port on each node, without discovery. It shows numbers up to ten
seconds late, sums of histograms from the middles of buckets, and keeps the series of dead replicas for ever.
"""

import asyncio
import json
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple
from wsgiref.types import StartResponse, WSGIEnvironment

from prometheus_client import REGISTRY, Gauge, make_wsgi_app, start_http_server

logger = logging.getLogger(__name__)

_LOOP_TIMEOUT_S: Final = 5.0
"""Silence of the event loop after which it is not alive, seconds."""

_DISCOVERY_TIMEOUT_S: Final = 3.0

LOOP_LAG: Final = Gauge(
    "vae_event_loop_lag_seconds", "Time until the event loop took notice of the scrape that asked for this."
)


class Target(NamedTuple):
    """A process that has numbers."""

    address: str
    """Host and port."""

    labels: Mapping[str, str]
    """What Prometheus adds to each of its series: `role`, and `replica` where there are several."""


Discover = Callable[[], Awaitable[list[Target]]]


async def nobody_else() -> list[Target]:
    """Return no target: the process is alone."""
    return []


class Exporter:
    """Answers over HTTP, in threads of its own, for the event loop that made it.

    Args:
        role: What the process is: gateway, encoder or decoder.
        replica: Its name among those of its role; empty where it is the only one.
        is_ready: Whether it can do its work.
        discover: Finds the other processes; asked on the event loop when somebody reads `/targets`.
    """

    def __init__(
        self,
        role: str,
        *,
        replica: str = "",
        is_ready: Callable[[], bool] = lambda: True,
        discover: Discover = nobody_else,
    ) -> None:
        self._labels = {"role": role} | ({"replica": replica} if replica else {})
        self._is_ready, self._discover = is_ready, discover
        self._loop = asyncio.get_running_loop()
        self._host = ""
        self._metrics = make_wsgi_app(REGISTRY)
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self.port: int | None = None
        """Port that is listened on, or was."""

    @property
    def target(self) -> Target | None:
        """This process, if it listens."""
        return Target(_join(self._host, self.port), self._labels) if self._server is not None else None

    def start(self, host: str, port: int, *, num_ports: int = 1) -> None:
        """Listen; a failure is logged and stops nothing.

        Args:
            host: Address to listen on.
            port: First port to try; 0 lets the system choose.
            num_ports: How many ports to try from there on, before the system chooses one.
        """
        self._host = host.strip("[]")
        ports = [*range(port, port + num_ports), 0] if port else [0]
        for candidate in ports:
            try:
                self._server, self._thread = start_http_server(candidate, addr=self._host)
            except OSError as error:
                reason = error.strerror
                continue
            self._server.set_app(self._answer)
            self.port = self._server.server_port
            if candidate != ports[0]:
                extra = {"asked": port, "port": self.port, "found_by": "/targets of a gateway"}
                logger.warning("metrics are on another port", extra=extra)
            return
        logger.warning("metrics are not exposed", extra={"port": port, "reason": reason})

    def close(self) -> None:
        """Stop to listen."""
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.server_close()
            self._thread.join()
            self._server = None

    def _answer(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        path = environ.get("PATH_INFO", "")
        if path in {"/metrics", "/"}:
            self._measure_lag()
            answer: Iterable[bytes] = self._metrics(environ, start_response)
            return answer
        if path == "/livez":
            return self._say(start_response, is_so=self._measure_lag() is not None)
        if path == "/readyz":
            return self._say(start_response, is_so=self._measure_lag() is not None and self._is_ready())
        if path == "/targets":
            return _respond(start_response, "200 OK", "application/json", self._targets())
        known = "expected /metrics, /targets, /livez or /readyz\n"
        return _respond(start_response, "404 Not Found", "text/plain", known)

    @staticmethod
    def _say(start_response: StartResponse, *, is_so: bool) -> Iterable[bytes]:
        status = "200 OK" if is_so else "503 Service Unavailable"
        return _respond(start_response, status, "text/plain", "yes\n" if is_so else "no\n")

    def _measure_lag(self) -> float | None:
        """Return, and keep, the time until the event loop takes notice, seconds; None if it does not in time."""
        noticed, asked_at = threading.Event(), time.monotonic()
        try:
            self._loop.call_soon_threadsafe(noticed.set)
        except RuntimeError:  # the loop is closed
            return None
        is_alive = noticed.wait(_LOOP_TIMEOUT_S)
        lag_s = time.monotonic() - asked_at
        LOOP_LAG.set(lag_s)
        return lag_s if is_alive else None

    def _targets(self) -> str:
        """Return this process and the others, as Prometheus's HTTP service discovery has it."""
        found = [self.target] if self.target else []
        asked = asyncio.run_coroutine_threadsafe(self._find(), self._loop)
        try:
            found += asked.result(_DISCOVERY_TIMEOUT_S)
        except Exception as error:  # noqa: BLE001 - the own numbers must be had whatever the others do
            asked.cancel()
            logger.warning("the other targets are not known", extra={"reason": type(error).__name__})
        unique = {target.address: target for target in reversed(found)}
        groups = [{"targets": [address], "labels": dict(target.labels)} for address, target in unique.items()]
        return json.dumps(groups[::-1], indent=1) + "\n"

    async def _find(self) -> list[Target]:
        return await self._discover()


def _respond(start_response: StartResponse, status: str, kind: str, text: str) -> Iterable[bytes]:
    body = text.encode()
    start_response(status, [("Content-Type", f"{kind}; charset=utf-8"), ("Content-Length", str(len(body)))])
    return [body]


def _join(host: str, port: int | None) -> str:
    shown = host
    if host in {"0.0.0.0", "::", ""}:  # noqa: S104 - compared, not bound
        shown = socket.gethostbyname(socket.gethostname())
    return f"[{shown}]:{port}" if ":" in shown else f"{shown}:{port}"
