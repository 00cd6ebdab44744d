"""Encoder and Decoder on a real Ray grow apart with their own load, shrink without losing a call, and sleep."""

import contextlib
import re
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, NamedTuple, Self

import numpy as np
import psutil
import pytest
from numpy.typing import NDArray

from serving.client import VaeClient, VaeError
from serving.demo import free_port
from tests.bundles import DATA_SHAPE, small_bundle
from tests.end_to_end.service import Service, running, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

Graph = Literal["encoder", "decoder"]

HIDDEN = (1024, 1024, 1024)
"""Two million multiplications a row on 128 bytes of message: a few callers keep a replica busy, and neither the
gateway nor the callers."""

NUM_ROWS = 512
NUM_CALLERS = 4
TIMEOUT_S = 30.0
UP_S = 60.0
"""Time in which a second replica must answer, seconds. The aim is 8 on free processors; the time is printed."""

DOWN_S = 60.0


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a bundle that is slow to run for its size."""
    return small_bundle(tmp_path_factory.mktemp("bundles") / "wide", hidden=HIDDEN)


def report(line: str) -> None:
    """Say how long something took, for whoever runs these tests with `-s`."""
    print(line)  # noqa: T201 - as said


class Scaled(NamedTuple):
    """A service whose replicas can be counted."""

    service: Service
    metrics_port: int

    def num_replicas(self, graph: Graph) -> int:
        """Return how many replicas of a graph answer, as the gateway's metrics say."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=10) as answer:
            found = re.search(rf'^vae_replicas{{graph="{graph}"}} (\S+)$', answer.read().decode(), re.MULTILINE)
        assert found, "the gateway exposes vae_replicas"
        return round(float(found[1]))


@contextlib.contextmanager
def scaled(bundle: Path, *settings: str) -> Iterator[Scaled]:
    """Run a service whose graphs scale, and stop it."""
    port = free_port()
    options = [part for setting in settings for part in ("--set", setting)]
    with running(bundle, "--metrics-port", str(port), *options) as service:
        yield Scaled(service, port)
        assert service.stop() == 0


class Load:
    """Closed loops of one kind of call; every answer is compared with the one of the same call made alone."""

    def __init__(
        self,
        target: str,
        kind: Literal["encode", "sample"],
        num_callers: int,
        *,
        num_rows: int = NUM_ROWS,
        pause_s: float = 0.0,
    ) -> None:
        self._target, self._kind, self._num_rows, self._pause_s = target, kind, num_rows, pause_s
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self.num_right = 0
        self.wrong: list[str] = []
        self.lost: list[str] = []
        self._threads = [threading.Thread(target=self._call, args=(seed,)) for seed in range(num_callers)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join(timeout=2 * TIMEOUT_S)

    def check(self) -> None:
        """Fail if an answer was not right."""
        assert not self.wrong
        assert not self.lost
        assert self.num_right > 0

    def _call(self, seed: int) -> None:
        with VaeClient(self._target, timeout_s=TIMEOUT_S) as client:
            images = np.random.default_rng(seed).integers(0, 256, (self._num_rows, *DATA_SHAPE), np.uint8)
            calls: dict[str, Callable[[], NDArray[np.float32]]] = {
                "encode": lambda: client.encode(images).mean,
                "sample": lambda: client.sample(self._num_rows, seed=seed).samples,
            }
            call = calls[self._kind]
            expected = call().tobytes()
            while not self._is_over.wait(self._pause_s):
                try:
                    answer = call().tobytes()
                except VaeError as error:
                    self.lost.append(str(error))
                    continue
                with self._lock:
                    self.num_right += answer == expected
                if answer != expected:
                    self.wrong.append(f"seed {seed}")


@pytest.fixture(scope="module")
def growing(bundle: Path) -> Iterator[Scaled]:
    """Run a service with one to two replicas of each graph, which shrinks soon."""
    settings = [
        f"{graph}.{key}"
        for graph in ("encoder", "decoder")
        for key in ("max_replicas=2", "scaling.down_after_s=4")
    ]
    with scaled(bundle, *settings) as service:
        yield service


@pytest.mark.parametrize(
    ("kind", "loaded", "idle"), [("sample", "decoder", "encoder"), ("encode", "encoder", "decoder")]
)
def test_only_the_loaded_graph_grows_and_then_shrinks(
    growing: Scaled, kind: Literal["encode", "sample"], loaded: Graph, idle: Graph
) -> None:
    """A load on one graph leaves the other alone; a light load goes on while it shrinks; each answer is right."""
    target = growing.service.target
    wait_until(lambda: growing.num_replicas(loaded) == growing.num_replicas(idle) == 1, "both have one replica")
    began = time.monotonic()
    with Load(target, kind, NUM_CALLERS) as load:
        wait_until(lambda: growing.num_replicas(loaded) == 2, f"the {loaded} grows", timeout_s=UP_S)
        report(f"{loaded}: 2 replicas answer {time.monotonic() - began:.1f} s after the load began")
        num_right = load.num_right
        wait_until(lambda: load.num_right > num_right + 20, "calls go on being answered")
        assert growing.num_replicas(idle) == 1
    load.check()
    began = time.monotonic()
    with Load(target, kind, 1, pause_s=0.2) as light:
        wait_until(lambda: growing.num_replicas(loaded) == 1, f"the {loaded} shrinks", timeout_s=DOWN_S)
        report(f"{loaded}: 1 replica {time.monotonic() - began:.1f} s after the load became light")
        num_right = light.num_right
        wait_until(lambda: light.num_right > num_right + 10, "calls go on being answered")
        assert growing.num_replicas(idle) == 1
    light.check()


def test_a_graph_without_work_sleeps_and_the_next_call_wakes_it(bundle: Path) -> None:
    """Asleep is not ill: health serves and the model is described, neither wakes it; a call waits and is right."""
    settings = ("decoder.min_replicas=0", "decoder.scaling.zero_after_s=2")
    with scaled(bundle, *settings) as sleeper, VaeClient(sleeper.service.target, timeout_s=TIMEOUT_S) as client:
        expected = client.sample(NUM_ROWS, seed=1).samples
        wait_until(lambda: sleeper.num_replicas("decoder") == 0, "the decoder sleeps", timeout_s=DOWN_S)
        asleep_until = time.monotonic() + 8
        images = np.zeros((2, *DATA_SHAPE), np.uint8)
        while time.monotonic() < asleep_until:
            assert sleeper.service.is_serving()
            assert client.get_model().decoder_provider == "CPUExecutionProvider"
            assert client.encode(images).mean.shape[0] == 2
            assert sleeper.num_replicas("decoder") == 0
            time.sleep(0.2)
        began = time.monotonic()
        np.testing.assert_array_equal(client.sample(NUM_ROWS, seed=1).samples, expected)
        report(f"asleep: the first call was answered after {time.monotonic() - began:.1f} s")
        wait_until(lambda: sleeper.num_replicas("decoder") == 1, "it is seen awake", timeout_s=10)
        assert sleeper.num_replicas("encoder") == 1


def test_a_replica_that_dies_under_load_loses_no_call(bundle: Path) -> None:
    """It answers nothing and so looks idle, but does not draw the calls of others to it; another replaces it."""
    with scaled(bundle, "decoder.min_replicas=2", "decoder.max_replicas=2") as fixed:
        wait_until(lambda: fixed.num_replicas("decoder") == 2, "both replicas answer")
        victim = fixed.service.replica("Decoder")
        with Load(fixed.service.target, "sample", NUM_CALLERS) as load:
            wait_until(lambda: load.num_right > 20, "calls are answered")
            victim.kill()
            num_right = load.num_right
            wait_until(lambda: load.num_right > num_right + 50, "calls go on being answered")
            wait_until(lambda: victim not in fixed.service.replicas("Decoder"), "it is gone")
            wait_until(lambda: fixed.num_replicas("decoder") == 2, "it is replaced", timeout_s=UP_S)
        load.check()


def test_gateways_follow_the_processor_time_they_use(bundle: Path) -> None:
    """Many small calls start a second gateway on the port; it goes when they end, and no call is lost."""
    settings = (
        "gateway.share_port=true",
        "gateway.max_replicas=2",
        "gateway.scaling.target_load=0.1",  # these callers share the processors with what they call
        "gateway.scaling.down_after_s=4",
    )
    options = [part for setting in settings for part in ("--set", setting)]
    with running(bundle, *options) as service:
        assert len(service.replicas("Gateway")) == 1
        with Load(service.target, "sample", 2 * NUM_CALLERS, num_rows=1) as load:
            wait_until(lambda: len(service.replicas("Gateway")) == 2, "a second gateway", timeout_s=UP_S)
            first, second = service.replicas("Gateway")
            wait_until(
                lambda: min(listens(first, service), listens(second, service)), "both listen", timeout_s=UP_S
            )
        load.check()
        with Load(service.target, "sample", 1, num_rows=1, pause_s=0.2) as light:
            wait_until(lambda: len(service.replicas("Gateway")) == 1, "one gateway", timeout_s=DOWN_S)
        light.check()
        assert service.stop() == 0


def listens(process: psutil.Process, service: Service) -> bool:
    """Return whether a process has the service's port."""
    connections = process.net_connections("tcp")
    return any(c.laddr.port == service.port and c.status == psutil.CONN_LISTEN for c in connections)
