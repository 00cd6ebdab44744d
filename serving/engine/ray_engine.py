"""The graphs as Ray Serve deployments: who runs which rows, a time limit per attempt, a second try elsewhere.

A run is pure, so it may be repeated. Serve's handle says once a second which replicas there are; runs go to them
over connections of their own, which take a tenth of the time of a handle call. Where there is none, the handle
runs the rows, by value: by reference a cancelled call runs to its end, and each one costs twice as much.
"""

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import grpc
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from serving.bundle import DecoderOutput, Graph, Manifest
from serving.config import ReplicasConfig, ServingConfig
from serving.direct.client import LaneLost, Lanes
from serving.direct.security import Security
from serving.direct.server import Address
from serving.engine.protocol import GRAPHS, Posterior, Providers, Rows
from serving.errors import DeadlineExceeded, EngineUnavailable
from serving.exporter import Target
from serving.runtime import LoadReport
from serving.spans import Event, current_run

logger = logging.getLogger(__name__)

_SURVEY_TIMEOUT_S: Final = 2.0
"""Time for all replicas to say what they serve, seconds; after it one that answers is enough."""

_AVOID_S: Final = 5.0
"""Time for which a replica that lost a run gets none over a connection, seconds: then Serve knows if it lives."""

_LOST: Final = (RayActorError, DeploymentUnavailableError, grpc.aio.AioRpcError, TimeoutError)
"""What says that the replica, not the rows, was the trouble. ActorDiedError and ActorUnavailableError are
RayActorErrors; an AioRpcError is the transport of a by-value call."""


class ReplicaReport(NamedTuple):
    """What a replica says of itself."""

    load: LoadReport
    address: Address | None
    """Where it takes runs over connections; None if it does not, or no longer."""

    target: Target | None = None
    """Where its metrics are; None if it has none."""


class _Deployment:
    """What is known of a graph's replicas."""

    __slots__ = ("config", "handle", "has_failed", "lanes", "num_replicas", "report", "targets")

    def __init__(self, handle: DeploymentHandle[Any], config: ReplicasConfig) -> None:
        self.handle, self.config = _by_value(handle), config
        self.lanes = Lanes(Security.from_environment())
        self.num_replicas = 1
        self.report: LoadReport | None = None
        """What one of them last said."""
        self.targets: list[Target] = []
        """Where the metrics are of those that answered last."""
        self.has_failed = False
        """Whether a run has failed for want of a replica, and nothing was answered since."""

    @property
    def may_sleep(self) -> bool:
        """Whether no replica is as it should be, when there is no work."""
        return self.config.min_replicas == 0

    def was_seen(self, num_replicas: int) -> None:
        """Take how many replicas answered."""
        self.num_replicas = num_replicas
        if num_replicas:
            self.has_failed = False


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
        self._deployments: dict[Graph, _Deployment] = {
            "encoder": _Deployment(encoder, config.encoder),
            "decoder": _Deployment(decoder, config.decoder),
        }
        self._id = secrets.token_hex(8)
        self.count_waiting: Callable[[Graph], int] = lambda _: 0
        """Tells the rows that wait for a graph. Each run brings the replica's part of them along, for scaling."""

    @property
    def num_slots(self) -> int:
        """One: a call costs milliseconds whatever its size, so rows had better gather while one is on its way.

        Two slots gave 0.63 of the throughput of one, at 128 calls of one row in flight on two cores. Full batches
        go out beyond it, and keep several replicas busy.
        """
        return 1

    def num_replicas(self, graph: Graph) -> int:
        """Return how many replicas of a graph answered the last check; 0 if it sleeps for want of work."""
        deployment = self._deployments[graph]
        return max(deployment.num_replicas, 0 if deployment.may_sleep else 1)

    def num_answering(self, graph: Graph) -> int:
        """Return how many replicas of a graph answered the last check, or a run since."""
        return self._deployments[graph].num_replicas

    def targets(self) -> list[Target]:
        """Return where the metrics of the replicas are that answered the last check."""
        return [target for deployment in self._deployments.values() for target in deployment.targets]

    async def encode(self, data: Rows, timeout_s: float) -> Posterior:
        """Return posteriors of data."""
        return Posterior(*await self._run("encoder", data, timeout_s, ("mean", "log_var")))

    async def decode(
        self, latents: Rows, timeout_s: float, outputs: Sequence[DecoderOutput] = ("mean",)
    ) -> tuple[Rows, ...]:
        """Return outputs of the decoder."""
        return await self._run("decoder", latents, timeout_s, tuple(outputs))

    async def check(self) -> Providers:
        """Ask all replicas of both graphs what they serve. A graph that sleeps is not woken.

        Raises:
            EngineUnavailable: If none of a graph answers, or one serves another version.
        """
        reports = await asyncio.gather(*(self._survey(graph) for graph in GRAPHS))
        return Providers(*(report.provider for report in reports))

    async def close(self) -> None:
        """Close the connections; the deployments belong to Serve."""
        for deployment in self._deployments.values():
            deployment.lanes.close()

    async def _survey(self, graph: Graph) -> LoadReport:
        """Count the replicas of a graph; return what they say.

        A broadcast reaches those that run, and unlike a call it neither waits for one nor makes Serve start one.
        """
        deployment = self._deployments[graph]
        try:
            asked = deployment.handle.broadcast("describe")
            found = await asked.results_async(timeout_s=_SURVEY_TIMEOUT_S, return_exceptions=True)
        except DeploymentUnavailableError:
            found = []
        except TimeoutError:  # one of them hangs: the others may do, until Serve replaces it
            return await self._describe(graph)
        reports: list[ReplicaReport] = [report for report in found if not isinstance(report, BaseException)]
        deployment.was_seen(len(reports))
        deployment.targets = [report.target for report in reports if report.target]
        for report in reports:
            deployment.report = self._checked(graph, report.load)
            if report.address:
                deployment.lanes.confirm(report.address)
        if deployment.report and (reports or (deployment.may_sleep and not deployment.has_failed)):
            return deployment.report
        if deployment.may_sleep:  # nobody has seen it run, or it did not when it was needed
            return await self._describe(graph)
        detail = next((type(error).__name__ for error in found), "no replica runs")
        raise EngineUnavailable(graph=graph, detail=detail)

    async def _describe(self, graph: Graph) -> LoadReport:
        """Ask one replica, which is started if there is none."""
        deployment = self._deployments[graph]
        try:
            report = self._checked(graph, (await deployment.handle.describe.remote()).load)
        except _LOST as error:
            raise EngineUnavailable(graph=graph, detail=type(error).__name__) from error
        deployment.was_seen(max(1, deployment.num_replicas))
        deployment.report = report
        return report

    def _checked(self, graph: Graph, report: LoadReport) -> LoadReport:
        if report.version != self._version:
            detail = f"serves version {report.version}, expected {self._version}"
            raise EngineUnavailable(graph=graph, detail=detail)
        return report

    async def _run(self, graph: Graph, rows: Rows, timeout_s: float, outputs: tuple[str, ...]) -> tuple[Rows, ...]:
        deployment, trouble = self._deployments[graph], ""
        config = deployment.config
        expires_at = time.monotonic() + timeout_s
        num_attempts, trace = 0, current_run()
        told = (trace.context.token,) if trace else ()  # nothing more on the wire without a trace
        while num_attempts < config.max_attempts:
            left_s = expires_at - time.monotonic()
            if left_s <= 0:
                raise DeadlineExceeded
            # Who sleeps may take all the time there is to wake up.
            attempt_s = min(config.attempt_timeout_s, left_s) if self.num_replicas(graph) else left_s
            backlog = self._id, self.count_waiting(graph) / max(1, deployment.num_replicas)
            lane = deployment.lanes.choose()
            try:
                if lane is not None:
                    version, _, values = await lane.run(rows, outputs, attempt_s, backlog, *told)
                else:
                    async with asyncio.timeout(attempt_s):
                        # Seconds that are left, not a time: the clocks of two machines differ.
                        version, values = await deployment.handle.run.remote(rows, outputs, left_s, backlog, *told)
            except DeadlineExceeded:
                raise DeadlineExceeded from None  # without what Ray puts around it
            except (LaneLost, *_LOST) as error:
                if time.monotonic() > expires_at:
                    raise DeadlineExceeded from None
                trouble = type(error).__name__
                if isinstance(error, LaneLost) and lane is not None:
                    # What cannot have reached a replica is no attempt: rows that kill it are sent to few.
                    num_attempts += error.may_have_run
                    trouble = error.reason
                    deployment.lanes.drop(lane, avoid_s=_AVOID_S)
                else:
                    num_attempts += 1
                extra = {"graph": graph, "attempt": num_attempts, "reason": trouble}
                logger.warning("a run was lost with its replica", extra=extra)
                if trace:
                    trace.events.append(Event(time.monotonic(), "replica lost", extra))
                continue
            if version != self._version:
                raise EngineUnavailable(graph=graph, detail=f"served by version {version}")
            deployment.was_seen(max(1, deployment.num_replicas))
            result: tuple[Rows, ...] = values
            return result
        deployment.has_failed = True
        raise EngineUnavailable(graph=graph, detail=f"{config.max_attempts} attempts, last {trouble}")


def _by_value(handle: DeploymentHandle[Any]) -> DeploymentHandle[Any]:
    # pickle rather than cloudpickle: only arrays and tuples travel.
    return handle.options(_by_reference=False, request_serialization="pickle", response_serialization="pickle")
