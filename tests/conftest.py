"""A small bundle, a service on it in this process, and a client: shared by all tests of serving."""

from collections.abc import AsyncIterator
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
