"""What Ray is told through its environment, before it is imported."""

import os

import pytest

from serving.ray_environment import MAX_HANDLE_MESSAGE_BYTES, WORKER_NICENESS, prepare

NICENESS = "RAY_worker_niceness"  # Ray spells it so
NAMES = (
    "RAY_ADDRESS",
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH",
    NICENESS,
)


@pytest.fixture(autouse=True)
def _nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Begin with none of the names set, and put them back afterwards."""
    for name in NAMES:
        monkeypatch.setenv(name, "")  # remembers what was there, even if nothing was
        monkeypatch.delenv(name)


def test_a_local_cluster_asks_for_a_token_that_nobody_knows() -> None:
    """Two starts choose different tokens of 256 bits."""
    prepare()
    first = os.environ.pop("RAY_AUTH_TOKEN")
    prepare()
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert len(first) == len(os.environ["RAY_AUTH_TOKEN"]) == 64
    assert first != os.environ["RAY_AUTH_TOKEN"]


@pytest.mark.parametrize("name", ["RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"])
def test_a_token_that_was_given_is_kept(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Whoever brings a token, or its file, is not overruled."""
    monkeypatch.setenv(name, "given")
    prepare()
    assert os.environ[name] == "given"
    assert ("RAY_AUTH_TOKEN" in os.environ) == (name == "RAY_AUTH_TOKEN")


def test_a_cluster_of_others_brings_its_own_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    """With RAY_ADDRESS set, authentication is that cluster's affair."""
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    prepare()
    assert "RAY_AUTH_MODE" not in os.environ
    assert "RAY_AUTH_TOKEN" not in os.environ


def test_large_batches_fit_into_a_handle_call() -> None:
    """Serve's own limit of 4 MiB would refuse a full batch of large rows."""
    prepare()
    assert int(os.environ["RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH"]) == MAX_HANDLE_MESSAGE_BYTES


def test_replicas_get_the_processor_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray starts its workers with a niceness of 15; what the operator sets stays."""
    prepare()
    assert os.environ[NICENESS] == str(WORKER_NICENESS)
    monkeypatch.setenv(NICENESS, "5")
    prepare()
    assert os.environ[NICENESS] == "5"
