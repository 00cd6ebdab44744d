"""The rendered serve.yaml on a real Ray with labelled nodes: placed and grown by role, whole after a loss."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from serving.client import VaeClient, VaeError
from serving.demo import free_port
from tests.bundles import small_bundle
from tests.deploy.rendering import ray_service
from tests.end_to_end.service import ROOT, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

TOKEN = "ab" * 32
STOP_TIMEOUT_S = 60
NODES = ("gateway", "encoder", "decoder")


class Placed:
    """The application on its cluster: two processes of an operator, watched from outside."""

    def __init__(self, cluster: "subprocess.Popen[str]", port: int, proxy_port: int) -> None:
        self._cluster = cluster
        self.target = f"127.0.0.1:{port}"
        self._proxy_port = proxy_port

    def tell(self, line: str) -> Any:  # noqa: ANN401 - whatever is answered
        """Send the cluster a line; return its answer."""
        assert self._cluster.stdin
        self._cluster.stdin.write(f"{line}\n")
        self._cluster.stdin.flush()
        return answer(self._cluster)

    def where(self) -> dict[str, list[str]]:
        """Return the roles of the nodes on which replicas run."""
        found: dict[str, list[str]] = self.tell("where")
        return found

    def answers(self) -> bool:
        """Return whether both graphs answer a call."""
        try:
            with VaeClient(self.target, timeout_s=5) as client:
                samples = client.sample(2, seed=1).samples
                return bool(client.encode(samples).mean.shape[0] == 2)
        except VaeError:
            return False

    def is_probed_healthy(self) -> bool:
        """Ask what KubeRay's readiness probe asks."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._proxy_port}/-/healthz", timeout=5) as reply:
            return bool(reply.status == 200)


def answer(process: "subprocess.Popen[str]") -> Any:  # noqa: ANN401 - as above
    """Return the next line of JSON that a process prints; what Ray prints besides is passed over."""
    assert process.stdout
    for line in process.stdout:
        with contextlib.suppress(ValueError):
            return json.loads(line)
    raise AssertionError("the cluster ended")


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Placed]:
    """Run the cpu overlay's serve.yaml, as its README says, on a node for each role."""
    folder = tmp_path_factory.mktemp("placement")
    port, proxy_port = free_port(), free_port()
    # Only what one machine cannot have twice, and what would make a test wait, differs from the pods' variables.
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": TOKEN,
        "VAE__BUNDLE": str(small_bundle(folder / "bundle")),
        "VAE__GATEWAY__PORT": str(port),
        "VAE__GATEWAY__METRICS_PORT": "0",
        "VAE__GATEWAY__DRAIN_NOTICE_S": "0.1",
        "VAE__DECODER__MAX_REPLICAS": "2",
        "VAE__DECODER__MIN_REPLICAS": "2",
    }
    environment.pop("RAY_ADDRESS", None)
    file = folder / "serve.yaml"
    text = ray_service("cpu")["spec"]["serveConfigV2"]
    assert "port: 8000" in text
    file.write_text(text.replace("port: 8000", f"port: {proxy_port}"))
    with ended(_start(environment, "-m", "tests.end_to_end.labelled_cluster", *NODES)) as cluster:
        environment["RAY_ADDRESS"] = answer(cluster)
        run = [str(Path(sys.executable).parent / "serve"), "run", str(file)]
        with ended(psutil.Popen(run, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)) as serving:
            service = Placed(cluster, port, proxy_port)
            wait_until(lambda: service.answers() or serving.poll() is not None, "the application answers")
            assert serving.poll() is None, "serve run ended"
            yield service


def test_it_is_placed_grown_and_whole_again_by_role(placed: Placed) -> None:
    """One story, for a cluster takes long to start.

    Each deployment runs on nodes of its role and nowhere else. A second replica of the decoder waits, however many
    encoder's nodes there are, until there is a decoder's. The rest survives the loss of a decoder's node, which is
    made good when another comes.
    """
    only = {"Gateway": ["gateway"], "Encoder": ["encoder"], "Decoder": ["decoder"]}
    assert placed.where() == only
    assert placed.is_probed_healthy()
    placed.tell("add encoder")
    assert placed.answers()
    assert placed.where() == only
    placed.tell("add decoder")
    wait_until(lambda: placed.where() == only | {"Decoder": ["decoder", "decoder"]}, "the decoder has grown")
    placed.tell("lose decoder")
    wait_until(lambda: placed.where() == only, "the loss is noticed")
    wait_until(placed.answers, "what is left answers")
    placed.tell("add decoder")
    wait_until(lambda: placed.where() == only | {"Decoder": ["decoder", "decoder"]}, "the loss is made good")
    assert placed.answers()


def _start(environment: dict[str, str], *arguments: str) -> Any:  # noqa: ANN401 - psutil's Popen is untyped
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return psutil.Popen([sys.executable, *arguments], cwd=ROOT, env=environment, **pipes)


@contextlib.contextmanager
def ended(process: Any) -> Iterator[Any]:  # noqa: ANN401 - as above
    """Stop a process and all that it started, at the end: as asked, or by force."""
    try:
        yield process
    finally:
        family = process.children(recursive=True) if process.is_running() else []
        if process.stdin:
            process.stdin.close()
        else:
            process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
        for child in family:
            with contextlib.suppress(psutil.Error):
                child.kill()
        if process.stdout:
            process.stdout.close()
