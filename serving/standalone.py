"""The whole service in one process, without Ray: for laptops, tests, and as the baseline of the benchmarks."""

import contextlib
from collections.abc import AsyncIterator

from serving import bundle
from serving.config import ServingConfig
from serving.engine.in_process import InProcessEngine
from serving.errors import ServiceFailed
from serving.gateway.server import GatewayServer


@contextlib.asynccontextmanager
async def in_process(config: ServingConfig) -> AsyncIterator[GatewayServer]:
    """Run the service in this process; yield its server once it is healthy; then drain.

    Raises:
        StartupError: If the bundle does not verify, the device cannot be used, the port is taken, or the graphs
            do not answer in time.
    """
    verified = bundle.read(config.bundle, sha256=config.bundle_sha256)
    server = GatewayServer(InProcessEngine(verified, config), verified.manifest, config)
    try:
        await server.start()
        try:
            await server.health.wait_until_ready(config.start_timeout_s)
        except TimeoutError:
            reason = f"the service was not healthy in {config.start_timeout_s:g} s"
            raise ServiceFailed(reason=reason) from None
        yield server
    finally:
        await server.drain()
