"""The images are built without a registry, started as a restricted pod is, and called from outside. Opt-in.

`make image-test` sets VAE_IMAGE_TEST=1. It needs root, ten minutes, ten gigabytes of disk, the package index and a
mirror of Debian. What came out is written to the file that VAE_IMAGE_RECORD names.
"""

import asyncio
import contextlib
import datetime as dt
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import yaml

from serving import bundle
from serving.client import VaeClient
from serving.config import ServingConfig
from serving.demo import free_port
from serving.standalone import in_process
from tests.bundles import small_bundle
from tests.deploy import containers
from tests.deploy.containers import IMAGE, Container, Mounted, Workshop
from tests.end_to_end.service import wait_until
from training.bundle_store import Pointer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

if os.environ.get("VAE_IMAGE_TEST") != "1":
    pytest.skip("builds and starts images for ten minutes; set VAE_IMAGE_TEST=1", allow_module_level=True)
if os.geteuid() != 0 or containers.missing():
    programs = ", ".join(containers.missing()) or "root"
    pytest.skip(f"needs {programs}: apt-get install buildah podman crun mmdebstrap", allow_module_level=True)

USER: Final = "10001"
TOOLS: Final = ("cc", "gcc", "g++", "clang", "as", "ld", "make", "pip", "pip3")
"""Programs that must not be found in an image."""

CUDA_LIBRARIES: Final = (
    "libcudnn.so.9", "libcublas.so.13", "libcudart.so.13", "libcufft.so.12", "libnvrtc.so.13", "libcurand.so.10"
)  # fmt: skip
"""What ONNX Runtime's provider for CUDA loads, beside the driver's libcuda."""

START_TIMEOUT_S: Final = 180.0


@pytest.fixture(scope="module")
def record() -> Iterator[dict[str, Any]]:
    """Return what is known of this run; written at the end to the file that VAE_IMAGE_RECORD names."""
    inputs = [*IMAGE.glob("requirements-*.txt"), IMAGE / "Dockerfile", IMAGE / "install-locked"]
    facts: dict[str, Any] = {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{platform.system()} {platform.release()} {platform.machine()}, {os.cpu_count()} processors",
        "tools": {name: _first_line(name, "--version") for name in containers.REQUIRED},
        "inputs_sha256": {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(inputs)},
        "images": {},
    }
    yield facts
    if target := os.environ.get("VAE_IMAGE_RECORD"):
        Path(target).write_text(json.dumps(facts, indent=2) + "\n")


@pytest.fixture(scope="module")
def workshop() -> Iterator[Workshop]:
    """Return a storage of images that goes with this module."""
    with containers.workshop() as made:
        yield made


@pytest.fixture(scope="module")
def base(workshop: Workshop, record: dict[str, Any]) -> str:
    """Return the image of Debian 12 with Python, made from packages."""
    began = time.monotonic()
    name = workshop.build_base()
    record["images"]["base"] = {"build_seconds": _since(began), "size_bytes": workshop.size_bytes(name)}
    return name


def _built(workshop: Workshop, base: str, target: str, record: dict[str, Any]) -> str:
    began = time.monotonic()
    name = workshop.build(target, base=base)
    record["images"][target] = {"build_seconds": _since(began), "size_bytes": workshop.size_bytes(name)}
    return name


@pytest.fixture(scope="module")
def cpu_image(workshop: Workshop, base: str, record: dict[str, Any]) -> str:
    """Return the image of the service."""
    return _built(workshop, base, "cpu", record)


@pytest.fixture(scope="module")
def gpu_image(workshop: Workshop, base: str, record: dict[str, Any]) -> str:
    """Return the image of the service for GPUs."""
    return _built(workshop, base, "gpu", record)


@pytest.fixture(scope="module")
def training_image(workshop: Workshop, base: str, record: dict[str, Any]) -> str:
    """Return the image of training."""
    return _built(workshop, base, "training", record)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of models that others may read."""
    folder = tmp_path_factory.mktemp("models")
    small_bundle(folder / "small")
    for path in (folder, *folder.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return folder


@pytest.fixture(scope="module", params=["ray", "in-process"])
def service(
    request: pytest.FixtureRequest, workshop: Workshop, cpu_image: str, models: Path, record: dict[str, Any]
) -> Iterator[tuple[Container, int]]:
    """Run the service in a container until it is healthy; return it and its port."""
    port, began = free_port(), time.monotonic()
    command = ["vae-serve", "up", "--bundle", "/models/small", "--port", str(port), "--engine", request.param]
    with workshop.container(cpu_image, *command, mounts=[Mounted(models, "/models")]) as container:
        wait_until(
            lambda: _answers(port) or not container.is_running(), "the service answers", timeout_s=START_TIMEOUT_S
        )
        assert container.is_running(), container.logs()
        record["images"]["cpu"][f"seconds_to_first_answer_{request.param}"] = _since(began)
        yield container, port


def _answers(port: int) -> bool:
    command = ["status", "--target", f"127.0.0.1:{port}", "--timeout", "2"]
    return _vae_serve(*command).returncode == 0


def _vae_serve(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the command line of this machine, outside of any container."""
    command = [sys.executable, "-m", "serving", *arguments]
    return subprocess.run(command, cwd=containers.ROOT, capture_output=True, text=True, timeout=120, check=False)


def _first_line(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()[0]


def _since(began: float) -> float:
    return round(time.monotonic() - began, 1)


def test_the_image_lists_what_is_in_it(workshop: Workshop, cpu_image: str, record: dict[str, Any]) -> None:
    """A bill of materials that names every locked package, and what is recorded of it."""
    with workshop.container(cpu_image, "sleep", "600", network="none") as container:
        components = json.loads(container.execute("cat", "/opt/vae/sbom.cdx.json"))["components"]
        versions = {component["name"].lower().replace("_", "-"): component["version"] for component in components}
        for name in ("ray", "grpcio", "onnxruntime", "numpy", "protobuf", "vae-serving"):
            assert name in versions
        python = container.execute("python", "-c", "import platform; print(platform.python_version())").strip()
        debian = container.execute("dpkg-query", "--show", "--showformat", "${Package}\n").split()
    kept = {name: versions[name] for name in ("ray", "grpcio", "onnxruntime", "numpy", "protobuf")}
    counts = {"python_packages": len(components), "debian_packages": len(debian)}
    record["images"]["cpu"] |= {"versions": {"python": python, **kept}, **counts}


def test_the_image_has_no_tools_and_nobody_becomes_root(workshop: Workshop, cpu_image: str) -> None:
    """No compiler, no installer, no program that changes identity; what KubeRay's probes call is there."""
    with workshop.container(cpu_image, "sleep", "600", network="none") as container:
        look = "for tool in " + " ".join(TOOLS) + "; do command -v $tool; done; true"
        assert container.execute("bash", "-c", look) == ""
        look = "find / -xdev -type f -perm /6000 2>/dev/null; true"  # folders of root stay closed to it
        assert container.execute("bash", "-c", look) == ""
        assert container.execute("bash", "-c", "command -v bash wget tini").split() == [
            "/usr/bin/bash",
            "/usr/bin/wget",
            "/usr/bin/tini",
        ]
        config = json.loads(workshop.podman("image", "inspect", cpu_image))[0]["Config"]
        assert config["User"] == f"{USER}:{USER}"
        assert not [text for text in config["Env"] if "pip" in text.lower() or "index" in text.lower()]


def test_the_service_runs_without_rights(service: tuple[Container, int]) -> None:
    """Not root, no capabilities, no new privileges, nothing to write to but /tmp; the init is in front."""
    container, _ = service
    status = dict(
        line.split(":", 1) for line in container.execute("cat", "/proc/1/status").splitlines() if ":" in line
    )
    assert status["Name"].strip() == "tini"
    assert status["Uid"].split() == [USER] * 4
    assert {status[name].strip() for name in ("CapEff", "CapPrm", "CapBnd")} == {"0" * 16}
    assert status["NoNewPrivs"].strip() == "1"
    for folder in ("/", "/opt/vae", "/models", "/usr", "/var"):
        with pytest.raises(containers.Failed, match=r"(?i)read-only|permission denied"):
            container.execute("touch", f"{folder}/file")


async def test_answers_from_the_container_are_those_of_this_machine(
    service: tuple[Container, int], models: Path, tmp_path: Path
) -> None:
    """Encode and Sample by the command line from outside; bit by bit what the same bundle gives here.

    The image has the CPU build of ONNX Runtime and this machine the one for GPUs: the same kernels.
    """
    _, port = service
    rows = bundle.golden_data(bundle.read_manifest(str(models / "small")).data_shape).astype(np.uint8)
    np.save(tmp_path / "rows.npy", rows)
    target = ("--target", f"127.0.0.1:{port}")
    encoded = _vae_serve("encode", str(tmp_path / "rows.npy"), "--out", str(tmp_path / "posterior.npz"), *target)
    assert encoded.returncode == 0, encoded.stderr
    sampled = _vae_serve("sample", "--num", "64", "--seed", "7", "--out", str(tmp_path / "samples.npy"), *target)
    assert sampled.returncode == 0, sampled.stderr
    config = ServingConfig.parse({"bundle": str(models / "small"), "engine": "in-process", "gateway": {"port": 0}})
    async with in_process(config) as server:
        posterior, samples = await _answers_here(server.port, rows)
    with np.load(tmp_path / "posterior.npz") as theirs:
        np.testing.assert_array_equal(theirs["mean"], posterior.mean)
        np.testing.assert_array_equal(theirs["log_var"], posterior.log_var)
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), samples.samples)


async def _answers_here(port: int, rows: "np.ndarray[Any, np.dtype[np.uint8]]") -> Any:  # noqa: ANN401
    def ask() -> Any:  # noqa: ANN401
        with VaeClient(f"127.0.0.1:{port}") as client:
            return client.encode(rows), client.sample(64, seed=7)

    return await asyncio.to_thread(ask)


def test_the_image_says_whether_it_is_healthy(service: tuple[Container, int]) -> None:
    """What HEALTHCHECK runs, from inside."""
    container, port = service
    assert "SERVING" in container.execute("vae-serve", "status", "--target", f"127.0.0.1:{port}")


def test_it_drains_when_it_is_told_to_end(service: tuple[Container, int]) -> None:
    """The signal reaches the service behind the init, and the exit code is 0."""
    container, _ = service
    assert container.stop(grace_s=60) == 0, container.logs()


@contextlib.contextmanager
def _ray_head(
    workshop: Workshop, image: str, *, num_cpus: int, mounts: Sequence[Mounted] = ()
) -> Iterator[Container]:
    """Start Ray as KubeRay does, `bash -c "ray start --head --block"` with a token; wait for its probe to pass."""
    start = f"ray start --head --block --dashboard-host=127.0.0.1 --num-cpus={num_cpus}"
    options = ("--env=RAY_AUTH_MODE=token", f"--env=RAY_AUTH_TOKEN={'ab' * 32}", "--entrypoint=/bin/bash")
    with workshop.container(image, "-c", start, network="none", options=options, mounts=mounts) as container:
        probe = "wget --tries 1 -T 2 -q -O- http://localhost:52365/api/local_raylet_healthz | grep success"

        def is_healthy() -> bool:
            try:
                return "success" in container.execute("bash", "-c", probe)
            except containers.Failed:
                return not container.is_running()

        wait_until(is_healthy, "Ray answers its probe", timeout_s=START_TIMEOUT_S)
        assert container.is_running(), container.logs()
        yield container


def test_ray_starts_as_kuberay_starts_it_and_its_probe_passes(workshop: Workshop, cpu_image: str) -> None:
    """What the readiness probe of every Ray pod asks first, without rights and without a network."""
    with _ray_head(workshop, cpu_image, num_cpus=0) as container:
        assert "ray start" in container.execute("cat", "/proc/1/cmdline").replace("\0", " ")


@pytest.fixture
def volumes(tmp_path: Path) -> dict[str, Path]:
    """Return folders that the image's user may write to, by their place in a container."""
    folders = {place: tmp_path / place.strip("/") for place in ("/runs", "/models", "/scratch")}
    for folder in folders.values():
        folder.mkdir()
        os.chown(folder, int(USER), int(USER))
    return folders


def _writable(volumes: dict[str, Path]) -> list[Mounted]:
    return [Mounted(folder, place, "rw") for place, folder in volumes.items()]


def _check_what_is_current(models: Path) -> None:
    """Verify here what a job published there."""
    pointer = Pointer.parse(json.loads((models / "smoke/current.json").read_text()))
    checked = _vae_serve("check", "--bundle", str(models / pointer.path), "--json")
    assert checked.returncode == 0, checked.stderr
    assert json.loads(checked.stdout)["version"] == pointer.version


def test_the_ray_job_publishes_a_bundle_from_its_image(
    workshop: Workshop, training_image: str, volumes: dict[str, Path]
) -> None:
    """The entry point of deploy/jobs/train-ray, submitted as the operator does, on a cluster of one node."""
    job = yaml.safe_load((containers.ROOT / "deploy/jobs/train-ray/rayjob.yaml").read_text())
    entrypoint = job["spec"]["entrypoint"].replace("fit digits", "fit smoke")
    with _ray_head(workshop, training_image, num_cpus=2, mounts=_writable(volumes)) as container:
        submit = f"ray job submit --address=http://127.0.0.1:8265 -- {entrypoint}"
        assert "succeeded" in container.execute("bash", "-c", submit, timeout_s=600)
    _check_what_is_current(volumes["/models"])


def test_training_publishes_a_bundle_from_its_image(
    workshop: Workshop, training_image: str, volumes: dict[str, Path], record: dict[str, Any]
) -> None:
    """The steps of deploy/jobs/train without any network: fit, export, publish; what came is verified here."""
    began = time.monotonic()
    for line in (
        ["fit", "smoke", "--threads", "1", "--output-dir", "/runs/smoke"],
        ["export", "/runs/smoke", "/scratch/bundle"],
        ["publish", "/scratch/bundle", "/models", "--promote"],
    ):
        with workshop.container(
            training_image, "vae-train", *line, mounts=_writable(volumes), network="none"
        ) as step:
            assert step.wait(timeout_s=600) == 0, step.logs()
    record["images"]["training"]["seconds_of_the_job"] = _since(began)
    _check_what_is_current(volumes["/models"])


def test_the_gpu_image_lacks_nothing_but_the_driver(workshop: Workshop, gpu_image: str, models: Path) -> None:
    """CUDA's libraries load, the graphs run on the processor, and a GPU that is not there is refused by name."""
    load = (
        f"import ctypes, onnxruntime; onnxruntime.preload_dlls(); [ctypes.CDLL(name) for name in {CUDA_LIBRARIES}]"
    )
    check = ("vae-serve", "check", "--bundle", "/models/small")
    with workshop.container(
        gpu_image, "sleep", "600", network="none", mounts=[Mounted(models, "/models")]
    ) as container:
        container.execute("python", "-c", load)
        facts = json.loads(container.execute(*check, "--json"))
        assert facts["providers"] == ["CPUExecutionProvider"] * 2
        assert facts["is_batch_independent"]
        if not Path("/dev/nvidia0").exists():
            with pytest.raises(containers.Failed, match=r"libcuda\.so\.1"):
                container.execute(*check, "--set", "device=cuda")
