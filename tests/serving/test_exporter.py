"""Metrics, discovery and probes over HTTP: found, honest, and never in the way."""

import asyncio
import json
import logging
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from serving.exporter import Exporter, Target, nobody_else
from serving.metrics import CALLS

HOST = "127.0.0.1"


def fetch(port: int | None, path: str) -> tuple[int, str]:
    """Return status and text."""
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@asynccontextmanager
async def listening(exporter: Exporter, port: int = 0, num_ports: int = 1) -> AsyncIterator[Exporter]:
    """Start an exporter; stop it at the end, not on the loop that its probes ask."""
    exporter.start(HOST, port, num_ports=num_ports)
    try:
        yield exporter
    finally:
        await asyncio.to_thread(exporter.close)


async def test_metrics_are_scraped_and_the_port_is_free_afterwards() -> None:
    """A free port is chosen and told, answers with the families, and nothing listens after the end."""
    CALLS.labels("Encode", "OK").inc(0)
    async with listening(Exporter("gateway")) as exporter:
        status, text = await asyncio.to_thread(fetch, exporter.port, "/metrics")
        assert status == 200
        assert "# HELP vae_calls_total" in text
        assert "vae_event_loop_lag_seconds" in text
        assert exporter.target == Target(f"{HOST}:{exporter.port}", {"role": "gateway"})
    assert exporter.target is None
    with socket.socket() as probe:
        assert probe.connect_ex((HOST, exporter.port or 0)) != 0


async def test_targets_are_this_process_and_the_others() -> None:
    """In the form of Prometheus's HTTP discovery, each address once, this process first."""

    async def others() -> list[Target]:
        return [
            Target("10.0.0.1:9091", {"role": "encoder", "replica": "a"}),
            Target("10.0.0.1:9092", {"role": "encoder", "replica": "b"}),
            Target("10.0.0.1:9092", {"role": "encoder", "replica": "b"}),
        ]

    async with listening(Exporter("gateway", replica="x", discover=others)) as exporter:
        status, text = await asyncio.to_thread(fetch, exporter.port, "/targets")
    assert status == 200
    assert json.loads(text) == [
        {"targets": [f"{HOST}:{exporter.port}"], "labels": {"role": "gateway", "replica": "x"}},
        {"targets": ["10.0.0.1:9091"], "labels": {"role": "encoder", "replica": "a"}},
        {"targets": ["10.0.0.1:9092"], "labels": {"role": "encoder", "replica": "b"}},
    ]


async def test_a_discovery_that_fails_leaves_the_own_numbers(caplog: pytest.LogCaptureFixture) -> None:
    """Whoever scrapes must not lose the gateway because a replica does not answer."""

    async def broken() -> list[Target]:
        raise ConnectionError

    with caplog.at_level(logging.WARNING, logger="serving.exporter"):
        async with listening(Exporter("gateway", discover=broken)) as exporter:
            _, text = await asyncio.to_thread(fetch, exporter.port, "/targets")
    assert [group["targets"] for group in json.loads(text)] == [[f"{HOST}:{exporter.port}"]]
    assert "the other targets are not known" in caplog.text


async def test_liveness_is_that_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 while the loop turns; 503 when it does not in time, which the metrics survive."""
    monkeypatch.setattr("serving.exporter._LOOP_TIMEOUT_S", 0.2)
    async with listening(Exporter("gateway")) as exporter:
        assert await asyncio.to_thread(fetch, exporter.port, "/livez") == (200, "yes\n")
        hangs = threading.Event()

        def ask(path: str) -> tuple[int, str]:
            hangs.wait()
            return fetch(exporter.port, path)

        paths = ("/livez", "/readyz", "/metrics")
        tasks = [asyncio.create_task(asyncio.to_thread(ask, path)) for path in paths]
        await asyncio.sleep(0.05)  # the threads are there
        hangs.set()
        time.sleep(1.0)  # noqa: ASYNC251 - a loop that hangs is the subject
        live, ready, metrics = await asyncio.gather(*tasks)
    assert live == ready == (503, "no\n")
    assert metrics[0] == 200


@pytest.mark.parametrize("is_ready", [True, False])
async def test_readiness_is_what_it_is_told(*, is_ready: bool) -> None:
    """503 while the graphs do not answer."""
    async with listening(Exporter("gateway", is_ready=lambda: is_ready)) as exporter:
        status, _ = await asyncio.to_thread(fetch, exporter.port, "/readyz")
    assert status == (200 if is_ready else 503)


async def test_an_unknown_path_says_what_there_is() -> None:
    """404 with the known paths."""
    async with listening(Exporter("gateway")) as exporter:
        status, text = await asyncio.to_thread(fetch, exporter.port, "/metric")
    assert status == 404
    assert "/metrics" in text
    assert "/targets" in text


async def test_a_taken_port_is_replaced_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Of several processes on a machine each has a port; the one that was asked for is in the log."""
    with caplog.at_level(logging.WARNING, logger="serving.exporter"):
        async with listening(Exporter("gateway")) as first, listening(Exporter("x"), first.port or 0) as second:
            assert second.port not in {None, first.port}
    (record,) = caplog.records
    assert record.message == "metrics are on another port"
    assert vars(record)["asked"] == first.port


async def test_the_ports_after_a_taken_one_are_tried_first() -> None:
    """Replicas of one node stay in a range that a firewall can know."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        async with listening(Exporter("encoder"), port, num_ports=20) as exporter:
            assert exporter.port is not None
            assert port < exporter.port < port + 20


async def test_an_address_that_is_not_ours_stops_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """A failed bind is a warning; there is no target then."""
    exporter = Exporter("gateway")
    with caplog.at_level(logging.WARNING, logger="serving.exporter"):
        exporter.start("192.0.2.1", 0)
    assert exporter.target is None
    assert "metrics are not exposed" in caplog.text
    exporter.close()


async def test_alone_there_is_nobody_else() -> None:
    """The default finds no other process."""
    assert await nobody_else() == []
