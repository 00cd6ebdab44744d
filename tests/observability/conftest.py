"""A service in one process, a load with known counts, and a Prometheus that has scraped both: made once."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from serving.demo import free_port
from tests.end_to_end.service import Service, running
from tests.observability.load import Driven, drive, write_config
from tests.observability.prometheus import Prometheus, program, prometheus

SETTLE_S = 6.0
"""Time after the load in which rates over four scrapes, and rules over them, have values, seconds."""


class Watched(NamedTuple):
    """A service that was called and is scraped."""

    service: Service
    prometheus: Prometheus
    driven: Driven


@pytest.fixture(scope="session")
def watched(bundle_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    """Run the in-process service beside a Prometheus, and call it; skip where there is no Prometheus."""
    program("prometheus")
    folder, port = tmp_path_factory.mktemp("watched"), free_port()
    options = ("--engine", "in-process", "--config", str(write_config(folder)), "--metrics-port", str(port))
    with running(bundle_dir, *options) as service, prometheus(folder, port) as watcher:
        watcher.wait_for_scrapes()  # once before the load: from here on a rate sees all of it
        driven = drive(service.target, pause=watcher.wait_for_scrapes)
        time.sleep(SETTLE_S)
        watcher.wait_for_scrapes()
        yield Watched(service, watcher, driven)
        assert service.stop() == 0
