"""The rendered serve.yaml on a real Ray with labelled nodes: placed and grown by role, whole after a loss."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

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
PLACES = {"Gateway": ["gateway"], "Encoder": ["encoder"], "Decoder": ["decoder"]}
GROWN = PLACES | {"Decoder": ["decoder", "decoder"]}


class Placed:
    """The application on its cluster: two processes of an operator, watched from outside."""

    def __init__(self, cluster: "subprocess.Popen[str]", folder: Path, port: int, proxy_port: int) -> None:
        self._cluster = cluster
        self.folder = folder
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
            service = Placed(cluster, folder, port, proxy_port)
            wait_until(lambda: service.answers() or serving.poll() is not None, "the application answers")
            assert serving.poll() is None, "serve run ended"
            yield service


class Calls:
    """A caller with our published client, and what became of its calls."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._is_over = threading.Event()
        self.num_right = 0
        self.failed: list[str] = []
        self._thread = threading.Thread(target=self._call)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join(timeout=STOP_TIMEOUT_S)

    def _call(self) -> None:
        with VaeClient(self._target, timeout_s=20) as client:
            expected = client.sample(3, seed=5).samples.tobytes()
            while not self._is_over.is_set():
                try:
                    answer = client.sample(3, seed=5).samples.tobytes()
                except VaeError as error:
                    self.failed.append(str(error))
                    continue
                if answer == expected:
                    self.num_right += 1
                else:
                    self.failed.append("another answer")


def test_it_is_placed_and_grows_by_role(placed: Placed) -> None:
    """Each deployment runs on nodes of its role and nowhere else; a second decoder waits for a decoder's node.

    However many encoder's nodes there are.
    """
    assert placed.where() == PLACES
    assert placed.is_probed_healthy()
    placed.tell("add encoder")
    assert placed.answers()
    assert placed.where() == PLACES
    placed.tell("add decoder")
    wait_until(lambda: placed.where() == GROWN, "the decoder has grown")


def test_the_loss_of_a_node_loses_no_call(placed: Placed) -> None:
    """What ran there is run again by the other decoder; another node makes the loss good."""
    wait_until(lambda: placed.where() == GROWN, "the test before has been made good")
    with Calls(placed.target) as calls:
        wait_until(lambda: calls.num_right > 20, "calls are answered")
        placed.tell("lose decoder")
        wait_until(lambda: placed.where() == PLACES, "the loss is noticed")
        before = calls.num_right
        placed.tell("add decoder")
        wait_until(lambda: placed.where() == GROWN, "the loss is made good")
        wait_until(lambda: calls.num_right > before + 20, "calls go on being answered")
    assert not calls.failed


def test_another_bundle_than_was_asked_for_is_refused_and_the_old_goes_on(placed: Placed) -> None:
    """The application of the new configuration is not even built; Serve says why."""
    file = placed.folder / "other.yaml"
    text = (placed.folder / "serve.yaml").read_text()
    file.write_text(text.replace("bundle: /models/vae", f"bundle_sha256: {'f' * 64}"))
    placed.tell(f"deploy {file}")
    wait_until(lambda: placed.tell("status")[0] == "DEPLOY_FAILED", "the configuration is refused")
    assert f"bundle_sha256 asks for {'f' * 64}" in placed.tell("status")[1]
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
            process.terminate()  # SIGINT is ignored by what a background job of a shell starts
        try:
            process.wait(timeout=STOP_TIMEOUT_S)
        except (subprocess.TimeoutExpired, psutil.TimeoutExpired):
            process.kill()
        for child in family:
            with contextlib.suppress(psutil.Error):
                child.kill()
        if process.stdout:
            process.stdout.close()
