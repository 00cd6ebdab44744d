"""What runs of a bundle's graphs take on this machine."""

import time
from collections.abc import Callable, Sequence
from typing import Final, Literal

import numpy as np

from serving.bundle import Bundle, Graph
from serving.runtime import GraphRuntime

SIZES: Final = (1, 8, 64, 256, 512)
"""Rows of the runs that are timed, up to the default of `batching.max_batch_rows`."""


def of_graph(
    bundle: Bundle, graph: Graph, *, device: Literal["cpu", "cuda"], threads: int, seconds: float
) -> dict[int, float]:
    """Return the median time of a run by its rows, seconds.

    A graph on one thread of a CPU is timed by the processor's clock, which leaves out what else the machine does.

    Raises:
        StartupError: If the device cannot be used, or the graph does not give its known answers here.
    """
    runtime = GraphRuntime(bundle, graph, device=device, threads=threads)
    manifest = bundle.manifest
    shape = manifest.data_shape if graph == "encoder" else (manifest.latent_dim,)
    rows = {size: np.zeros((size, *shape), np.float32) for size in SIZES}
    outputs = ("mean", "log_var") if graph == "encoder" else ("mean",)
    clock = time.thread_time if device == "cpu" and threads == 1 else time.perf_counter
    return measure_run(lambda size: runtime.run(rows[size], outputs), SIZES, seconds=seconds, clock=clock)


def measure_run(
    run: Callable[[int], object],
    sizes: Sequence[int],
    *,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[int, float]:
    """Return the median time of a run of each size, seconds.

    Sizes take turns, so that what else the machine does meets all alike.

    Args:
        run: Runs the graph on so many rows.
        sizes: Numbers of rows.
        seconds: How long to measure in all; each size at least thrice.
        clock: Seconds of the clock, or of the processor.
    """
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for size in sizes:
        run(size)
    stop_at = time.monotonic() + seconds
    while time.monotonic() < stop_at or len(times[sizes[-1]]) < 3:  # noqa: PLR2004 - a median of three
        for size in sizes:
            began = clock()
            run(size)
            times[size].append(clock() - began)
    return {size: float(np.median(values)) for size, values in times.items()}
