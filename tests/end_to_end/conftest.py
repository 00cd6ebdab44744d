"""A trained model and a running service, made once for the tests of the whole path."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def command(*arguments: str, timeout_s: float = 240) -> "subprocess.CompletedProcess[str]":
    """Run one of our commands from the repository's root, as a user would; return what it printed."""
    line = [sys.executable, "-m", *arguments]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="session")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a brief training run on digits."""
    folder = tmp_path_factory.mktemp("training") / "run"
    done = command("training", "fit", "smoke", "--output-dir", str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def trained_bundle(run_dir: Path) -> Path:
    """Return the bundle exported from it."""
    folder = run_dir.parent / "bundle"
    done = command("training", "export", str(run_dir), str(folder))
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(autouse=True)
def _ray_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Ray of these tests is a local one that asks for a token of its own."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
