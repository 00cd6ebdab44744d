"""Several gateways on one port: they share the callers, and none is lost when one dies or all are replaced."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import grpc
import psutil
import pytest

from protos.vae.v1 import vae_pb2 as pb
from serving.client import VaeClient, VaeError
from serving.demo import free_port
from tests.bundles import small_bundle
from tests.end_to_end.service import ROOT, Service, running, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

NUM_GATEWAYS = 2
NUM_CALLERS = 8
NUM_ROWS = 3
TIMEOUT_S = 30.0
OWN_CONNECTION = [("grpc.use_local_subchannel_pool", 1)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small bundle: what is served does not matter here."""
    return small_bundle(tmp_path_factory.mktemp("bundles") / "small")


class Ledger:
    """Calls from several threads with a connection each; every call ends right, wrong or lost.

    The clients are configured as we publish it: with retries, and with the health of their server watched.
    """

    def __init__(self, port: int) -> None:
        self.num_right = 0
        self.wrong: list[str] = []
        self.lost: list[str] = []
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._call, args=(port, seed)) for seed in range(NUM_CALLERS)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: self.num_right > 10 * NUM_CALLERS, "the first calls are answered")
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=2 * TIMEOUT_S)

    def wait_for(self, number: int) -> None:
        """Return after so many more right answers."""
        goal = self.num_right + number
        wait_until(lambda: self.num_right > goal, "calls go on being answered")

    def _call(self, port: int, seed: int) -> None:
        with VaeClient(f"127.0.0.1:{port}", timeout_s=TIMEOUT_S, options=OWN_CONNECTION) as client:
            expected = client.sample(NUM_ROWS, seed=seed).samples.tobytes()
            while not self._is_over.is_set():
                try:
                    answer = client.sample(NUM_ROWS, seed=seed).samples.tobytes()
                except VaeError as error:
                    self.lost.append(str(error))
                    continue
                if answer != expected:
                    self.wrong.append(f"seed {seed}")
                with self._lock:
                    self.num_right += answer == expected


def gateways(service: Service) -> list[psutil.Process]:
    """Return the processes of the gateways."""
    return [
        process
        for process in service.process.children(recursive=True)
        if "ServeReplica:vae:Gateway" in " ".join(process.cmdline())
    ]


def listens(process: psutil.Process, port: int) -> bool:
    """Return whether a gateway has come so far."""
    return any(
        connection.laddr.port == port and connection.status == psutil.CONN_LISTEN
        for connection in process.net_connections("tcp")
    )


def connections(process: psutil.Process, port: int) -> int:
    """Return how many clients a gateway has."""
    return sum(
        connection.laddr.port == port and connection.status == psutil.CONN_ESTABLISHED
        for connection in process.net_connections("tcp")
    )


@pytest.fixture
def shared(bundle: Path) -> Iterator[Service]:
    """Run two gateways on one port."""
    sharing = ("--set", f"gateway.num_replicas={NUM_GATEWAYS}", "--set", "gateway.share_port=true")
    with running(bundle, *sharing) as service:
        yield service


def test_gateways_share_a_port_and_their_callers(shared: Service) -> None:
    """Connections spread over both; killing one loses no call; stopping under load drains both."""
    wait_until(lambda: all(listens(process, shared.port) for process in gateways(shared)), "both listen")
    assert len(gateways(shared)) == NUM_GATEWAYS
    request = pb.SampleRequest(num_samples=2, seed=5).SerializeToString()
    channels = [grpc.insecure_channel(shared.target, OWN_CONNECTION) for _ in range(32)]
    calls: list[Any] = [channel.unary_unary("/vae.v1.VaeService/Sample") for channel in channels]
    answers = {call(request, timeout=TIMEOUT_S) for call in calls}
    assert len(answers) == 1
    # 32 connections all on one of two gateways: a chance of 2 in 2^32.
    assert min(connections(process, shared.port) for process in gateways(shared)) > 0
    for channel in channels:
        channel.close()
    with Ledger(shared.port) as ledger:
        victim = gateways(shared)[0]
        victim.kill()
        ledger.wait_for(50)
        wait_until(
            lambda: len(gateways(shared)) == NUM_GATEWAYS and victim not in gateways(shared), "it is replaced"
        )
        ledger.wait_for(50)
    assert not ledger.wrong
    assert not ledger.lost
    assert shared.stop() == 0


def test_a_rolling_upgrade_loses_nothing(bundle: Path) -> None:
    """Every replica is replaced, gateways and graphs, while eight callers go on."""
    port = free_port()
    command = [sys.executable, "-m", "tests.end_to_end.upgrade", str(bundle), str(port), str(NUM_GATEWAYS)]
    environment = os.environ | {"RAY_AUTH_MODE": "token"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == "serving\n"
        family = psutil.Process(process.pid)
        before = {
            child.pid for child in family.children(recursive=True) if "ServeReplica" in " ".join(child.cmdline())
        }
        with Ledger(port) as ledger:
            process.stdin.write("upgrade\n")
            process.stdin.flush()
            assert process.stdout.readline() == "upgraded\n"
            ledger.wait_for(50)
        alive = {child.pid for child in family.children(recursive=True) if child.status() != psutil.STATUS_ZOMBIE}
        assert before
        assert not before & alive, "every replica was replaced"
        process.stdin.close()
        assert process.wait(timeout=60) == 0
    assert not ledger.wrong
    assert not ledger.lost
