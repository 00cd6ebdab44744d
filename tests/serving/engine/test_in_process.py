"""The in-process engine gives what the runtime gives, without blocking the event loop."""

import asyncio
from pathlib import Path

import numpy as np

from serving.bundle import Bundle
from serving.config import ServingConfig
from serving.engine.in_process import InProcessEngine
from serving.runtime import GraphRuntime


async def test_answers_are_those_of_the_runtime(small: Bundle, bundle_dir: Path) -> None:
    """Posteriors and means come from the two graphs, in this order."""
    engine = InProcessEngine(small, ServingConfig(bundle=str(bundle_dir)))
    data = np.arange(32, dtype=np.uint8).reshape(2, 1, 4, 4)
    encoder = GraphRuntime(small, "encoder", device="cpu", threads=1)
    decoder = GraphRuntime(small, "decoder", device="cpu", threads=1)
    posterior = await engine.encode(data, 60.0)
    np.testing.assert_array_equal(posterior.mean, encoder.run(data, ["mean"])[0])
    np.testing.assert_array_equal(posterior.log_var, encoder.run(data, ["log_var"])[0])
    np.testing.assert_array_equal(
        await engine.decode(posterior.mean, 60.0), decoder.run(posterior.mean, ["mean"])[0]
    )
    await engine.close()


async def test_the_event_loop_turns_while_a_graph_runs(small: Bundle, bundle_dir: Path) -> None:
    """A run is in a thread: other calls are parsed meanwhile."""
    engine = InProcessEngine(small, ServingConfig(bundle=str(bundle_dir)))
    run = asyncio.ensure_future(engine.encode(np.zeros((4096, 1, 4, 4), np.uint8), 60.0))
    num_turns = 0
    while not run.done():
        await asyncio.sleep(0)
        num_turns += 1
    assert num_turns > 1
    assert (await engine.check()).encoder == "CPUExecutionProvider"
    await engine.close()
