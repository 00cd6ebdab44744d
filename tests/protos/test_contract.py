"""The wire contract: stubs are fresh, comments are complete, nothing old breaks."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
PROTO = "protos/vae/v1/vae.proto"
PROTOS = (PROTO, "protos/inference/inference.proto")
STUBS = ("_pb2.py", "_pb2.pyi", "_pb2_grpc.py", "_pb2_grpc.pyi")


def _run(*command: object, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("proto", PROTOS)
def test_the_stubs_are_fresh(tmp_path: Path, proto: str) -> None:
    """Generating again changes no byte: nobody edited a stub, or forgot one."""
    outputs = [f"--{kind}_out={tmp_path}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")]
    # protoc finds its plugins on the path; those of this environment are the pinned ones.
    plugins = [f"--plugin={name}={BIN / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")]
    result = _run(sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *plugins, *outputs, proto)
    assert result.returncode == 0, result.stderr
    for ending in STUBS:
        name = proto.removesuffix(".proto") + ending
        assert (tmp_path / name).read_text() == (ROOT / name).read_text(), f"{name} is stale: run `make protos`"


def test_the_proto_is_clean() -> None:
    """`buf lint` holds: standard names, and a comment on every service, rpc, message, field and value."""
    result = _run(BIN / "buf", "lint", cwd=ROOT / "protos")
    assert result.returncode == 0, result.stdout + result.stderr


def test_nothing_breaks_old_clients() -> None:
    """Compared with the main branch, no field is renumbered, retyped or gone."""
    known = _run("git", "cat-file", "-e", f"main:{PROTO}")
    if known.returncode:
        pytest.skip(f"no {PROTO} on a main branch here: {known.stderr.strip()[:100]}")
    result = _run(BIN / "buf", "breaking", "protos", "--against", ".git#branch=main,subdir=protos")
    assert result.returncode == 0, result.stdout + result.stderr


def test_a_missing_comment_would_be_found(tmp_path: Path) -> None:
    """The lint that is relied on sees a field without a comment."""
    source = (ROOT / PROTO).read_text()
    damaged = source.replace("  // Posterior means, shape (rows, latent_dim).\n", "")
    assert damaged != source
    (tmp_path / "vae/v1").mkdir(parents=True)
    (tmp_path / "vae/v1/vae.proto").write_text(damaged)
    (tmp_path / "buf.yaml").write_text((ROOT / "protos/buf.yaml").read_text())
    result = _run(BIN / "buf", "lint", cwd=tmp_path)
    assert result.returncode != 0
    assert "comment" in result.stdout
