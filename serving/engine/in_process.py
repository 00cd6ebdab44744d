"""ONNX Runtime in this process: for laptops and tests, and as the baseline of the benchmarks. No Ray."""

import asyncio
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from serving.bundle import Bundle, DecoderOutput, Graph
from serving.config import ServingConfig, session_threads
from serving.engine.protocol import GRAPHS, Posterior, Providers, Rows
from serving.observed_runs import ObservedGraph
from serving.runtime import GraphRuntime
from serving.spans import current_run


class InProcessEngine:
    """Runs both graphs in a thread pool made for them.

    Args:
        bundle: A verified bundle.
        config: Device and processors.

    Raises:
        StartupError: If a graph cannot be loaded or does not reproduce its known answers.
    """

    def __init__(self, bundle: Bundle, config: ServingConfig) -> None:
        threads = session_threads(config.encoder.num_cpus), session_threads(config.decoder.num_cpus)
        gpu = config.bucketed_accelerator()
        self._encoder, self._decoder = (
            ObservedGraph(name, GraphRuntime(bundle, name, device=config.device, threads=number, accelerator=gpu))
            for name, number in zip(GRAPHS, threads, strict=True)
        )
        self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="onnxruntime")

    @property
    def num_slots(self) -> int:
        """One: a second run would only take processor time from the first and from the event loop."""
        return 1

    def num_replicas(self, _graph: Graph) -> int:
        """One: this process."""
        return 1

    def num_answering(self, _graph: Graph) -> int:
        """One: this process."""
        return 1

    async def encode(self, data: Rows, timeout_s: float) -> Posterior:
        """Return posteriors of data."""
        return Posterior(*await self._run(self._encoder, data, timeout_s, "mean", "log_var"))

    async def decode(
        self, latents: Rows, timeout_s: float, outputs: Sequence[DecoderOutput] = ("mean",)
    ) -> tuple[Rows, ...]:
        """Return outputs of the decoder."""
        return tuple(await self._run(self._decoder, latents, timeout_s, *outputs))

    async def check(self) -> Providers:
        """Return the providers: graphs in this process are there from the start."""
        return Providers(self._encoder.report.provider, self._decoder.report.provider)

    async def close(self) -> None:
        """End the thread pool after its running work."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    async def _run(self, graph: ObservedGraph, rows: Rows, timeout_s: float, *outputs: str) -> list[Rows]:
        expires_at = time.monotonic() + timeout_s
        # `InferenceSession.run` lets go of the interpreter lock, so the event loop goes on and gathers rows. Small
        # runs in the loop itself gave 1,055 calls per second, threads 2,031, at 128 in flight.
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._pool, graph.run_until, expires_at, rows, outputs, current_run())
