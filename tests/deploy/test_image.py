"""The Dockerfile and its locks, as far as text can prove them; `test_image_run.py` builds and starts them."""

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from serving.cli import app as serving_app
from serving.config import GatewayConfig
from training.cli import app as training_app

ROOT = Path(__file__).parents[2]
IMAGE = ROOT / "deploy" / "image"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PLATFORM = {
    "extra": "",
    "platform_machine": "x86_64",
    "python_version": "3.11",
    "python_full_version": "3.11.2",
    "sys_platform": "linux",
}
"""What the locks are for."""

EXTRAS = {"cpu": ["load", "tracing"], "gpu": ["load", "tracing"], "training": ["ray-train"]}
"""Extras of the project that each target holds; `load` holds `serving`, `ray-train` holds `training`."""

BESIDES = {
    "cpu": {"onnxruntime": "onnxruntime-gpu"},
    "gpu": {},
    "training": {"onnxruntime": "onnxruntime-gpu"},
}
"""Packages that stand for another of the tested ones: the same module, built without CUDA."""

COMPILERS = {
    "build-essential",
    "cc",
    "clang",
    "cmake",
    "cpp",
    "g++",
    "gcc",
    "gfortran",
    "make",
    "python3-dev",
    "rustc",
}


class Pin(NamedTuple):
    """One package of a lock."""

    name: str
    version: str
    hashes: list[str]


class Instruction(NamedTuple):
    """One instruction of the Dockerfile and the stage it is in."""

    stage: str
    word: str
    text: str


def pins(lock: str) -> dict[str, Pin]:
    """Return the packages of a lock by name."""
    text = (IMAGE / f"requirements-{lock}.txt").read_text()
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line and not line.lstrip().startswith("#")]
    found = [re.fullmatch(r"([a-z0-9.-]+)==(\S+)((?:\s+--hash=sha256:[0-9a-f]{64})+)\s*", line) for line in lines]
    assert all(found), [line[:80] for line, match in zip(lines, found, strict=True) if match is None]
    return {match[1]: Pin(match[1], match[2], match[3].split()) for match in found if match}


def constraints() -> dict[str, str]:
    """Return the tested versions by name."""
    lines = (ROOT / ".ci/constraints.txt").read_text().splitlines()
    named = [line.partition("==") for line in lines if "==" in line and not line.startswith("#")]
    return {canonicalize_name(name): version for name, _, version in named}


def required(extra: str) -> Iterator[Requirement]:
    """Yield what an extra of the project asks for, with what its extras ask for."""
    for text in PROJECT["optional-dependencies"][extra]:
        requirement = Requirement(text)
        if requirement.name == PROJECT["name"]:
            for inner in requirement.extras:
                yield from required(inner)
        elif requirement.marker is None or requirement.marker.evaluate(PLATFORM):
            yield requirement


def instructions() -> list[Instruction]:
    """Return the instructions of the Dockerfile, comments left out and continued lines joined."""
    lines = [line for line in (IMAGE / "Dockerfile").read_text().splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    stage, found = "", []
    for line in filter(None, joined):
        word, _, text = line.partition(" ")
        if word == "FROM":
            stage = text.partition(" AS ")[2]
        found.append(Instruction(stage, word, text.strip()))
    return found


def lineage(target: str) -> list[Instruction]:
    """Return the instructions that make a target, those of the stages it is built on first."""
    parents = {line.stage: line.text.partition(" AS ")[0] for line in instructions() if line.word == "FROM"}
    own = [line for line in instructions() if line.stage == target]
    return [*(lineage(parents[target]) if parents[target] in parents else []), *own]


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_holds_the_versions_that_are_tested(lock: str) -> None:
    """Every package that CI tests is in the image in that version; a CPU build counts as its release."""
    tested = constraints()
    found = {name: pin.version.partition("+")[0] for name, pin in pins(lock).items()}
    stand_in = BESIDES[lock]
    wrong = {
        name: (version, tested.get(stand_in.get(name, name)))
        for name, version in found.items()
        if version != tested.get(stand_in.get(name, name)) and not name.startswith(("nvidia-", "cuda-"))
    }
    assert wrong == {}
    assert {"ray", "numpy", "protobuf", "pydantic"} <= set(found)


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_has_what_the_extras_ask_for(lock: str) -> None:
    """A dependency that is added to pyproject.toml has to be locked again, by deploy/image/lock."""
    found = pins(lock)
    stand_ins = {original: name for name, original in BESIDES[lock].items()}
    for extra in EXTRAS[lock]:
        for requirement in required(extra):
            name = canonicalize_name(requirement.name)
            pin = found.get(stand_ins.get(name, name))
            assert pin is not None, f"{requirement} is not in requirements-{lock}.txt: run deploy/image/lock"
            assert requirement.specifier.contains(pin.version), f"{requirement} and {pin.version}"


@pytest.mark.parametrize("lock", [*EXTRAS, "build"])
def test_every_package_has_hashes_and_no_index_is_named(lock: str) -> None:
    """What is installed is what was locked, whatever index gives it."""
    text = (IMAGE / f"requirements-{lock}.txt").read_text()
    assert not re.search(r"://|--(extra-)?index-url|--find-links|--trusted-host|@ ", text)
    assert min(len(pin.hashes) for pin in pins(lock).values()) >= 1


def test_the_cpu_images_hold_no_cuda_and_the_gpu_image_holds_the_one_of_its_driver() -> None:
    """CUDA 13.0 runs from driver R580 on; a newer one would ask for a newer driver without saying so."""
    for lock in ("cpu", "training"):
        assert not [name for name in pins(lock) if name.startswith(("nvidia-", "cuda-", "onnxruntime-gpu"))]
    gpu = pins("gpu")
    assert {"nvidia-cublas", "nvidia-cudnn-cu13", "nvidia-cufft", "nvidia-curand", "onnxruntime-gpu"} <= set(gpu)
    for name in ("cuda-toolkit", "nvidia-cuda-runtime", "nvidia-cuda-nvrtc", "nvidia-nvjitlink"):
        assert gpu[name].version.startswith("13.0."), name


def test_ray_in_the_images_has_its_dashboard() -> None:
    """KubeRay submits jobs and asks for health there: what `ray[default]` adds."""
    for lock in EXTRAS:
        assert {"aiohttp", "aiohttp-cors", "colorful", "opencensus", "py-spy", "virtualenv"} <= set(pins(lock)), (
            lock
        )


def test_there_is_no_default_base() -> None:
    """Whoever builds names a base by its digest; the first stage is the only one that comes from outside."""
    arguments = [line.text for line in instructions() if line.word == "ARG"]
    assert "BASE" in arguments
    stages = {line.stage for line in instructions() if line.word == "FROM"}
    sources = {line.text.partition(" AS ")[0] for line in instructions() if line.word == "FROM"}
    assert sources - stages == {"${BASE}"}


@pytest.mark.parametrize("target", EXTRAS)
def test_a_target_runs_as_a_number_that_is_nobody_on_the_host(target: str) -> None:
    """Kubernetes can check `runAsNonRoot` only on a number; nothing becomes root later."""
    users = [line.text for line in lineage(target) if line.word == "USER"]
    assert users
    assert int(users[-1].partition(":")[0]) >= 10_000


@pytest.mark.parametrize("target", EXTRAS)
def test_a_target_takes_from_the_building_stages_the_environment_alone(target: str) -> None:
    """No sources, no pip, no tools: what was built, and where it was built."""
    copies = [line.text for line in lineage(target) if line.word in {"COPY", "ADD"}]
    assert copies == [f"--from=venv-{target} /opt/vae /opt/vae"]


def test_a_stage_is_its_own_lock_and_nothing_of_the_index_stays() -> None:
    """Each environment comes from one lock; where the index is, is a secret of the build."""
    for line in instructions():
        assert line.word != "ADD", "ADD fetches and unpacks; COPY says what it does"
        assert not re.search(r"(?i)(index[-_]url|password|token|://)", line.text.replace("RAY_", "")), line
        if line.stage.startswith("venv-") and line.word == "COPY":
            assert line.text == f"deploy/image/requirements-{line.stage.removeprefix('venv-')}.txt /locks/"
        if "pip install" in line.text:
            assert "--require-hashes --only-binary :all:" in line.text


def test_packages_of_debian_are_few_and_none_is_a_compiler() -> None:
    """Bash and wget for KubeRay's probes, an init, certificates; no lists are left behind."""
    installs = [line for line in instructions() if "apt-get install" in line.text]
    (install,) = installs
    packages = re.search(r"install --yes --no-install-recommends ([a-z0-9 .+-]+?) &&", install.text)
    assert packages
    assert set(packages[1].split()) == {"bash", "ca-certificates", "tini", "wget"}
    assert not set(re.findall(r"[a-z0-9+-]+", install.text)) & COMPILERS
    assert "rm -rf /var/lib/apt/lists/*" in install.text


@pytest.mark.parametrize("target", EXTRAS)
def test_commands_and_entry_points_are_lists(target: str) -> None:
    """Signals reach the program and not a shell around it; a list is also what KubeRay replaces."""
    lines = [line for line in lineage(target) if line.word in {"ENTRYPOINT", "CMD", "HEALTHCHECK"}]
    assert {line.word for line in lines} >= {"ENTRYPOINT", "CMD"}
    assert all(line.text.endswith("]") and "[" in line.text for line in lines)


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_what_the_dockerfile_says_of_the_service_is_true(target: str) -> None:
    """Port, version, and the command that says whether it is healthy."""
    lines = lineage(target)
    assert [line.text for line in lines if line.word == "EXPOSE"] == [str(GatewayConfig().port)]
    assert f"VERSION={PROJECT['version']}" in [line.text for line in lines if line.word == "ARG"]
    (health,) = [line.text for line in lines if line.word == "HEALTHCHECK"]
    assert health.endswith('CMD ["vae-serve", "status"]')
    assert "status" in typer.main.get_command(serving_app).commands  # type: ignore[attr-defined]  # it is a group
    assert "publish" in typer.main.get_command(training_app).commands  # type: ignore[attr-defined]


def test_the_context_is_a_list_of_what_may_enter() -> None:
    """Everything is ignored but what the stages copy."""
    lines = [
        line
        for line in (IMAGE / "Dockerfile.dockerignore").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    assert lines[0] == "*"
    allowed = {line.removeprefix("!") for line in lines if line.startswith("!")}
    copied = [line.text.split() for line in instructions() if line.word == "COPY" and "--from" not in line.text]
    sources = {source for words in copied for source in words[:-1]}
    patterns = {re.sub(r"requirements-[a-z]+\.txt", "requirements-*.txt", source) for source in sources}
    assert patterns == allowed


@pytest.mark.parametrize("script", ["lock", "install-locked"])
def test_scripts_parse_and_end_at_the_first_failure(script: str) -> None:
    """An image is never made from half of a lock."""
    text = (IMAGE / script).read_text()
    assert "set -euo pipefail" in text
    assert (IMAGE / script).stat().st_mode & 0o111
    subprocess.run(["bash", "-n", IMAGE / script], check=True, timeout=10)
