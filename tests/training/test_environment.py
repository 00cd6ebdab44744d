"""A run records what is needed to repeat it."""

import json
import subprocess
from importlib import metadata

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
