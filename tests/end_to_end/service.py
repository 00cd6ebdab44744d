"""The service as an operator starts it: a process of its own, watched and stopped from outside."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc

from serving.client import SERVICE
from serving.demo import free_port

ROOT = Path(__file__).parents[2]
START_TIMEOUT_S = 120
STOP_TIMEOUT_S = 60


class Service(NamedTuple):
    """A running service."""

    port: int
    process: psutil.Popen

    @property
    def target(self) -> str:
        """Its address."""
        return f"127.0.0.1:{self.port}"

    def replicas(self, deployment: str) -> list[psutil.Process]:
        """Return the processes of a deployment's replicas."""
        found = []
        for process in self.process.children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if f"ServeReplica:vae:{deployment}" in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def replica(self, deployment: str) -> psutil.Process:
        """Return the process of a deployment's replica."""
        found = self.replicas(deployment)
        assert found, f"no replica of {deployment}"
        return found[0]

    def is_serving(self, name: str = SERVICE) -> bool:
        """Ask grpc.health.v1; False also when nothing listens."""
        request = health_pb2.HealthCheckRequest(service=name)
        with grpc.insecure_channel(self.target) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            try:
                answer = stub.Check(request, timeout=2)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def stop(self) -> int:
        """Stop it as an operator does; return its exit code once all of its processes are gone."""
        family = [self.process, *self.process.children(recursive=True)]
        self.process.send_signal(signal.SIGTERM)
        code: int = self.process.wait(timeout=STOP_TIMEOUT_S)
        _, alive = psutil.wait_procs(family[1:], timeout=20)
        assert not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
        return code


def wait_until(fact: Callable[[], bool], what: str, timeout_s: float = START_TIMEOUT_S) -> None:
    """Return once something is so; fail with what it was after the time."""
    deadline = time.monotonic() + timeout_s
    while not fact():
        assert time.monotonic() < deadline, f"not in {timeout_s} s: {what}"
        time.sleep(0.05)


@contextlib.contextmanager
def launched(bundle: Path, *arguments: str, environment: dict[str, str] | None = None) -> Iterator[Service]:
    """Start the service, healthy or not; kill what is left of it at the end."""
    port = free_port()
    command = [sys.executable, "-m", "serving", "up", "--bundle", str(bundle), "--port", str(port), *arguments]
    process = psutil.Popen(command, cwd=ROOT, env=os.environ | (environment or {}), stdout=subprocess.DEVNULL)
    try:
        yield Service(port, process)
    finally:
        if process.is_running():
            for child in [*process.children(recursive=True), process]:
                with contextlib.suppress(psutil.Error):
                    child.kill()
        process.wait(timeout=STOP_TIMEOUT_S)


@contextlib.contextmanager
def running(bundle: Path, *arguments: str) -> Iterator[Service]:
    """Start the service and wait until it is healthy."""
    with launched(bundle, *arguments) as service:
        wait_until(lambda: service.is_serving() or service.process.poll() is not None, "the service is healthy")
        assert service.process.poll() is None, "the service ended instead of serving"
        yield service
