"""The in-process engine gives what the runtime gives, without blocking the event loop."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from serving.bundle import Bundle
from serving.config import ServingConfig
from serving.engine.in_process import InProcessEngine
from serving.errors import DeadlineExceeded
from serving.runtime import GraphRuntime
from serving.spans import RunTrace, new_context, running


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
        (await engine.decode(posterior.mean, 60.0))[0], decoder.run(posterior.mean, ["mean"])[0]
    )
    await engine.close()


async def test_logits_belong_to_the_means(small: Bundle, bundle_dir: Path) -> None:
    """The decoder gives either output on request: the mean is the logistic function of the logits."""
    engine = InProcessEngine(small, ServingConfig(bundle=str(bundle_dir)))
    latents = np.linspace(-3, 3, 10, dtype=np.float32).reshape(5, 2)
    (mean,), (logits,) = await engine.decode(latents, 60.0), await engine.decode(latents, 60.0, ("logits",))
    both = await engine.decode(latents, 60.0, ("logits", "mean"))
    assert [values.tobytes() for values in both] == [logits.tobytes(), mean.tobytes()]
    np.testing.assert_allclose(mean, 1 / (1 + np.exp(-logits.astype(np.float64))), rtol=0, atol=2e-7)
    await engine.close()


async def test_rows_that_waited_too_long_for_a_thread_are_not_run(small: Bundle, bundle_dir: Path) -> None:
    """A run whose time is over when its turn comes ends as DEADLINE_EXCEEDED; the next one is served."""
    engine = InProcessEngine(small, ServingConfig(bundle=str(bundle_dir)))
    data, latents = np.zeros((2, 1, 4, 4), np.uint8), np.zeros((2, 2), np.float32)
    calls = engine.encode(data, -1.0), engine.decode(latents, -1.0), engine.decode(latents, -1.0, ("logits",))
    for late in calls:
        with pytest.raises(DeadlineExceeded, match="the deadline passed"):
            await late
    assert len((await engine.encode(data, 60.0)).mean) == 2
    await engine.close()


async def test_a_traced_run_is_told_what_was_computed(small: Bundle, bundle_dir: Path) -> None:
    """Graph, rows, provider and version; a run that came too late names its error."""
    engine = InProcessEngine(small, ServingConfig(bundle=str(bundle_dir)))
    done, late = RunTrace(new_context()), RunTrace(new_context())
    with running(done):
        await engine.decode(np.zeros((3, 2), np.float32), 60.0)
    with running(late), pytest.raises(DeadlineExceeded, match="the deadline passed"):
        await engine.decode(np.zeros((3, 2), np.float32), -1.0)
    await engine.close()
    assert done.computed is not None
    assert late.computed is not None
    assert (done.computed.graph, done.computed.num_rows, done.computed.error) == ("decoder", 3, "")
    assert (done.computed.provider, done.computed.version) == ("CPUExecutionProvider", small.manifest.version)
    assert done.computed.began_at < done.computed.ended_at
    assert late.computed.error == "DeadlineExceeded"


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
