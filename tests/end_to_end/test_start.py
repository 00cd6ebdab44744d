"""How the service starts, and how it does not: on a cluster, without room, with bad input."""

import hashlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from serving.client import DeadlineExceeded, Unauthenticated, Unavailable, VaeClient
from tests.bundles import small_bundle
from tests.certificates import Authority, ServerFiles
from tests.end_to_end.conftest import command
from tests.end_to_end.service import launched, running, wait_until

pytestmark = [pytest.mark.ray, pytest.mark.slow]

GATEWAY_AND_ENCODER_CPUS = 2
DECODER_CPUS = 3
API_KEY = "vae_end-to-end-0123456789abcdefghijklmnopqr"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small bundle: what is served does not matter here."""
    return small_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture
def cluster() -> Iterator["subprocess.Popen[str]"]:
    """Run a Ray cluster with room for gateway and encoder; a line on its input adds room for the decoder."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.end_to_end.cluster", str(GATEWAY_AND_ENCODER_CPUS), str(DECODER_CPUS)],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "e2e-" + "0" * 60},
    )
    yield process
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    assert process.wait(timeout=60) == 0
    process.stdout.close()


def test_health_serves_only_when_both_models_are_loaded(bundle: Path, cluster: "subprocess.Popen[str]") -> None:
    """With no room for the decoder, the gateway listens and says NOT_SERVING; with room it serves.

    It asks for the API key that the starter's environment names: the cluster's own environment does not have it.
    """
    assert cluster.stdout is not None
    assert cluster.stdin is not None
    address = cluster.stdout.readline().strip()
    environment = {"RAY_ADDRESS": address, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "e2e-" + "0" * 60}
    environment["VAE_API_KEYS"] = f"operator:{hashlib.sha256(API_KEY.encode()).hexdigest()}"
    room = f"decoder.num_cpus={DECODER_CPUS}"
    with launched(bundle, "--set", room, environment=environment) as service:

        def listens() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", service.port)) == 0

        wait_until(listens, "the gateway listens")
        for _ in range(20):
            assert not service.is_serving()
            assert not service.is_serving("")
        cluster.stdin.write("more room\n")
        cluster.stdin.flush()
        wait_until(service.is_serving, "both models are loaded")
        assert service.is_serving("")
        with VaeClient(service.target, api_key=API_KEY) as client:
            assert client.sample(3, seed=1).samples.shape == (3, 1, 4, 4)
        with VaeClient(service.target) as stranger, pytest.raises(Unauthenticated):
            stranger.sample(3, seed=1)
        assert service.stop() == 0


def test_mutual_tls_is_spoken_by_a_gateway_on_ray(bundle: Path, tmp_path: Path) -> None:
    """Certificates reach the replica: who has one is served, who has none, or speaks plaintext, is not."""
    authority, clients = Authority(), Authority("clients")
    files = ServerFiles.write(tmp_path, authority.issue("localhost"), clients)
    settings = {"certificate": files.certificate, "private_key": files.private_key, "client_ca": files.client_ca}
    arguments = [part for name, path in settings.items() for part in ("--set", f"gateway.tls.{name}={path}")]
    name = [("grpc.ssl_target_name_override", "localhost")]
    with launched(bundle, *arguments) as service:
        known = authority.trust(clients.issue("reader"))
        with VaeClient(service.target, credentials=known, options=name, timeout_s=90) as client:
            assert client.sample(3, seed=1).samples.shape == (3, 1, 4, 4)
        with (
            VaeClient(service.target, credentials=authority.trust(), options=name, timeout_s=1) as nameless,
            pytest.raises((Unavailable, DeadlineExceeded)),
        ):
            nameless.sample(1)
        with VaeClient(service.target, timeout_s=1) as plain, pytest.raises((Unavailable, DeadlineExceeded)):
            plain.sample(1)
        assert service.stop() == 0


def test_own_colour_images_are_served(tmp_path: Path) -> None:
    """From a folder of pictures to samples of the same shape, drawn in colour by the command line."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (30, 9, 7, 3), dtype=np.uint8)):
        Image.fromarray(pixels).save(pictures / f"{index}.png")
    run, exported = tmp_path / "run", tmp_path / "bundle"
    own = ("--data", str(pictures), "--image-size", "8", "--batch-size", "8")
    assert command("training", "fit", "smoke", *own, "--output-dir", str(run)).returncode == 0
    assert command("training", "export", str(run), str(exported)).returncode == 0
    drawn = tmp_path / "samples.png"
    with running(exported, "--engine", "in-process") as service:
        done = command("serving", "sample", "--num", "4", "--out", str(drawn), "--target", service.target)
        assert done.returncode == 0, done.stderr
        with VaeClient(service.target) as client:
            assert client.sample(2, seed=1).samples.shape == (2, 3, 8, 8)
        assert service.stop() == 0
    with Image.open(drawn) as picture:
        assert picture.mode == "RGB"


def our_ray_processes() -> set[int]:
    """Return the Ray processes below this one."""
    return {
        process.pid
        for process in psutil.Process().children(recursive=True)
        if process.status() != psutil.STATUS_ZOMBIE and "ray" in " ".join(process.cmdline()[:1]).lower()
    }


def refused(bundle: Path, *arguments: str) -> str:
    """Start a service that must not start; return its one line of complaint."""
    before = our_ray_processes()
    done = command("serving", "up", "--bundle", str(bundle), *arguments)
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert our_ray_processes() <= before
    return line


def test_a_taken_port_is_refused_before_anything_starts(bundle: Path) -> None:
    """The line names the address and the way out."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        assert f"127.0.0.1:{port}" in refused(bundle, "--port", str(port))


def test_plaintext_to_others_is_refused_before_anything_starts(bundle: Path) -> None:
    """The line names both ways out."""
    line = refused(bundle, "--host", "0.0.0.0")  # noqa: S104 - it must be refused
    assert "gateway.tls.certificate" in line
    assert "gateway.allow_plaintext" in line


def test_a_missing_key_file_is_refused_before_anything_starts(bundle: Path, tmp_path: Path) -> None:
    """The line names the file."""
    assert "none.yaml" in refused(bundle, "--set", f"gateway.auth.api_keys_file={tmp_path / 'none.yaml'}")


def test_a_gpu_that_is_not_there_is_refused_and_nothing_is_left(bundle: Path) -> None:
    """Asking for CUDA on a machine without it never falls back to the processor."""
    if Path("/dev/nvidia0").exists():
        pytest.skip("this machine has a GPU")
    assert "CUDAExecutionProvider was asked for" in refused(bundle, "--device", "cuda")


def test_a_tampered_bundle_is_refused_before_anything_starts(tmp_path: Path) -> None:
    """One flipped byte is enough, and the line names the file."""
    copy = small_bundle(tmp_path / "copy")
    content = bytearray((copy / "decoder.onnx").read_bytes())
    content[-1] ^= 1
    (copy / "decoder.onnx").write_bytes(content)
    assert "decoder.onnx" in refused(copy)
