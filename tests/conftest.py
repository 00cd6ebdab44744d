"""A small bundle, a service on it in this process, and a client: shared by all tests of serving."""

import logging
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from serving import bundle
from serving.bundle import Bundle
from serving.client import AsyncVaeClient
from serving.config import ServingConfig
from serving.gateway.server import GatewayServer
from serving.standalone import in_process
from tests.bundles import small_bundle
from tests.serving.harness import settings

# Small nets gain nothing from a second thread, and lose much where other programs use the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _log_as_before() -> Iterator[None]:
    """Put the log of the package back as it was: the command line sends it to a stream that a test then closes."""
    logger = logging.getLogger("serving")
    before = logger.handlers, logger.propagate, logger.level
    yield
    logger.handlers, logger.propagate = before[0], before[1]
    logger.setLevel(before[2])


@pytest.fixture
def seed() -> int:
    """Return the seed of whatever a test draws."""
    return 1312


@pytest.fixture(scope="session")
def bundle_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the small bundle; do not write into it."""
    return small_bundle(tmp_path_factory.mktemp("bundles") / "small")


@pytest.fixture(scope="session")
def small(bundle_dir: Path) -> Bundle:
    """Return the small bundle, verified."""
    return bundle.read(str(bundle_dir))


@pytest.fixture
def config(bundle_dir: Path) -> ServingConfig:
    """Return the configuration of an in-process service that stops quickly."""
    return settings(bundle_dir)


@pytest.fixture
async def service(config: ServingConfig) -> AsyncIterator[GatewayServer]:
    """Run the service on a free port of this process."""
    async with in_process(config) as server:
        yield server


@pytest.fixture
async def client(service: GatewayServer) -> AsyncIterator[AsyncVaeClient]:
    """Return a client of the service."""
    async with AsyncVaeClient(f"127.0.0.1:{service.port}") as connected:
        yield connected
