"""grpc.health.v1, derived from the engine; NOT_SERVING is the first act of a drain."""

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Final

from grpc_health.v1 import health_pb2
from grpc_health.v1.health import aio as health_aio

from serving.engine.protocol import Engine, Providers
from serving.errors import EngineUnavailable

logger = logging.getLogger(__name__)

OVERALL: Final = ""
"""Name under which tools ask for the whole server. It serves when all of its services do."""

_PERIOD_S: Final = 1.0
_CHECK_TIMEOUT_S: Final = 5.0
_START_PERIOD_S: Final = 0.2


class Health:
    """Keeps grpc.health.v1 true: asks the engine, and says SERVING only when both graphs answer.

    Args:
        engine: Whom to ask.
        services: Names of the services that stand on it.
        is_stalled: Whether rows wait and nothing moves.
        on_ready: Told the providers each time the engine answers.
    """

    def __init__(
        self,
        engine: Engine,
        services: Sequence[str],
        *,
        is_stalled: Callable[[], bool],
        on_ready: Callable[[Providers], None],
    ) -> None:
        self._engine, self._services, self._is_stalled = engine, (OVERALL, *services), is_stalled
        self._on_ready = on_ready
        self.servicer = health_aio.HealthServicer()
        self._is_ready = False
        self._became_ready = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def is_ready(self) -> bool:
        """Whether the last check found both graphs."""
        return self._is_ready

    @property
    def is_alive(self) -> bool:
        """Whether the task that asks still runs."""
        return self._task is not None and not self._task.done()

    async def prepare(self) -> None:
        """Say NOT_SERVING. To be awaited before the first call can come: the servicer's default is SERVING."""
        await self._say(is_ready=False)

    async def start(self) -> None:
        """Begin to ask."""
        self._task = asyncio.get_running_loop().create_task(self._watch())

    async def wait_until_ready(self, timeout_s: float) -> None:
        """Return when both graphs have answered.

        Raises:
            TimeoutError: If they do not in time.
        """
        async with asyncio.timeout(timeout_s):
            await self._became_ready.wait()

    async def enter_drain(self) -> None:
        """Say NOT_SERVING, for good."""
        await self.servicer.enter_graceful_shutdown()
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while True:
            is_ready = await self._ask()
            if is_ready != self._is_ready:
                logger.info("health changed", extra={"is_ready": is_ready})
                await self._say(is_ready=is_ready)
            await asyncio.sleep(_PERIOD_S if is_ready else _START_PERIOD_S)

    async def _ask(self) -> bool:
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_S):
                self._on_ready(await self._engine.check())
        except (EngineUnavailable, TimeoutError) as error:
            logger.debug("engine is not ready", extra={"reason": getattr(error, "detail", "timeout")})
            return False
        except Exception:
            logger.exception("engine check failed")
            return False
        return not self._is_stalled()

    async def _say(self, *, is_ready: bool) -> None:
        self._is_ready = is_ready
        if is_ready:
            self._became_ready.set()
        status = health_pb2.HealthCheckResponse.SERVING if is_ready else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in self._services:
            await self.servicer.set(service, status)
