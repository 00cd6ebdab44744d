"""A run records what is needed to repeat it."""

import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from training import environment

from .conftest import CPU


def test_record_names_versions_seed_and_device() -> None:
    """The versions are those that are installed."""
    record = json.loads(environment.environment_json(seed=7, device=CPU))
    assert record["tool_versions"]["torch"] == metadata.version("torch")
    assert (record["seed"], record["device"]) == (7, "cpu")
    assert record["num_threads"] >= 1


def test_absent_git_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """In an image without git, or outside a repository, there is no commit to record."""

    def absent(*_: object, **__: object) -> None:
        raise FileNotFoundError("git")

    monkeypatch.setattr(subprocess, "run", absent)
    assert environment.git_commit() is None


def test_hardware_names_the_processor_and_how_much_of_it_is_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The model as the system tells it; the architecture where it does not."""
    told = tmp_path / "cpuinfo"
    told.write_text("processor : 0\nmodel name\t: Example 9000\nmodel name\t: Example 9000\n")
    monkeypatch.setattr(environment, "_CPU_INFO", told)
    assert environment.hardware(CPU) == f"Example 9000, 1 of {os.cpu_count()} cores"
    monkeypatch.setattr(environment, "_CPU_INFO", tmp_path / "absent")
    assert environment.hardware(CPU).startswith(platform.machine())
