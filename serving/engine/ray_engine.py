"""The graphs as Ray Serve deployments: one handle call per run, a time limit per attempt, a second try elsewhere.

A run is pure, so it may be repeated. Calls go by value: by reference a cancelled call runs to its end, and each
one costs twice as much.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from typing import Any, Final, Literal

import grpc
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serving.bundle import DecoderOutput, Manifest
from serving.config import ReplicasConfig, ServingConfig
from serving.engine.protocol import Posterior, Providers, Rows
from serving.errors import DeadlineExceeded, EngineUnavailable
from serving.runtime import LoadReport

logger = logging.getLogger(__name__)

Graph = Literal["encoder", "decoder"]
_LOST: Final = (RayActorError, DeploymentUnavailableError, grpc.aio.AioRpcError, TimeoutError)
"""What says that the replica, not the rows, was the trouble. ActorDiedError and ActorUnavailableError are
RayActorErrors; an AioRpcError is the transport of a by-value call."""


class RayEngine:
    """Runs the graphs through handles.

    Args:
        encoder: Handle of the encoder's deployment.
        decoder: Handle of the decoder's deployment.
        manifest: The version that both must serve.
        config: Time limits and attempts.
    """

    def __init__(
        self,
        encoder: DeploymentHandle[Any],
        decoder: DeploymentHandle[Any],
        manifest: Manifest,
        config: ServingConfig,
    ) -> None:
        self._version = manifest.version
        self._handles = {"encoder": _by_value(encoder), "decoder": _by_value(decoder)}
        self._configs: dict[str, ReplicasConfig] = {"encoder": config.encoder, "decoder": config.decoder}

    @property
    def num_slots(self) -> int:
        """One: a call costs milliseconds whatever its size, so rows had better gather while one is on its way.

        Two slots gave 0.63 of the throughput of one, at 128 calls of one row in flight on two cores. Full batches
        go out beyond it, and keep several replicas busy.
        """
        return 1

    async def encode(self, data: Rows, timeout_s: float) -> Posterior:
        """Return posteriors of data."""
        return Posterior(*await self._run("encoder", data, timeout_s, ("mean", "log_var")))

    async def decode(
        self, latents: Rows, timeout_s: float, outputs: Sequence[DecoderOutput] = ("mean",)
    ) -> tuple[Rows, ...]:
        """Return outputs of the decoder."""
        return await self._run("decoder", latents, timeout_s, tuple(outputs))

    async def check(self) -> Providers:
        """Ask one replica of each graph what it serves.

        Raises:
            EngineUnavailable: If one does not answer, or serves another version.
        """
        reports = await asyncio.gather(self._describe("encoder"), self._describe("decoder"))
        return Providers(*(report.provider for report in reports))

    async def close(self) -> None:
        """Do nothing: the deployments belong to Serve."""

    async def _describe(self, graph: Graph) -> LoadReport:
        try:
            report: LoadReport = await self._handles[graph].describe.remote()
        except _LOST as error:
            raise EngineUnavailable(graph=graph, detail=type(error).__name__) from error
        if report.version != self._version:
            detail = f"serves version {report.version}, expected {self._version}"
            raise EngineUnavailable(graph=graph, detail=detail)
        return report

    async def _run(self, graph: Graph, rows: Rows, timeout_s: float, outputs: tuple[str, ...]) -> tuple[Rows, ...]:
        config, trouble = self._configs[graph], ""
        expires_at = time.monotonic() + timeout_s
        for attempt in range(1, config.max_attempts + 1):
            left_s = expires_at - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded
            try:
                async with asyncio.timeout(min(config.attempt_timeout_s, left_s)):
                    # Seconds that are left, not a time: the clocks of two machines differ.
                    version, values = await self._handles[graph].run.remote(rows, outputs, left_s)
            except DeadlineExceeded:
                raise DeadlineExceeded from None  # without what Ray puts around it
            except _LOST as error:
                if time.monotonic() > expires_at:
                    raise DeadlineExceeded from None
                trouble = type(error).__name__
                extra = {"graph": graph, "attempt": attempt, "reason": trouble}
                logger.warning("a run was lost with its replica", extra=extra)
                continue
            if version != self._version:
                raise EngineUnavailable(graph=graph, detail=f"served by version {version}")
            result: tuple[Rows, ...] = values
            return result
        raise EngineUnavailable(graph=graph, detail=f"{config.max_attempts} attempts, last {trouble}")


def _by_value(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    # pickle rather than cloudpickle: only arrays and tuples travel.
    return handle.options(_by_reference=False, request_serialization="pickle", response_serialization="pickle")
