"""The demonstration: start the service, call every method, write pictures, stop what was started."""

import asyncio
import contextlib
import random
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from serving import pictures
from serving.client import VaeClient
from serving.config import ServingConfig
from serving.errors import PortTaken
from serving.gateway.server import check_port

T = TypeVar("T")

NUM_IMAGES: Final = 12
NUM_SAMPLES: Final = 48
NUM_STREAMED: Final = 10_000
NUM_PATHS: Final = 4
SEED: Final = 1


def free_port() -> int:
    """Return a port of the loopback interface that nobody uses now.

    Below the range from which systems give out ports of their own (32768 or 49152 up), and above Ray's workers
    (10002 to 19999): no process that is started meanwhile is given it.

    Raises:
        PortTaken: If none of a hundred is free.
    """
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(PortTaken):
            check_port("127.0.0.1", port)
            return port
    raise PortTaken(address="127.0.0.1:20000-32000")


def run(config: ServingConfig, data: NDArray[Any], out_dir: Path, *, console: Console) -> None:
    """Run the service, call its methods through the client and write what came back.

    Args:
        config: The service's configuration.
        data: Rows of data, (n, *data_shape), at least twelve.
        out_dir: Folder of the pictures.
        console: Where to tell what happens.

    Raises:
        StartupError: If the service does not start.
        VaeError: If a call fails.
    """
    table = Table(title="what happened", title_justify="left")
    for heading in ("call", "sent", "received", "milliseconds"):
        table.add_column(heading, justify="right" if heading == "milliseconds" else "left")
    started = time.monotonic()
    with _service(config, console) as port, VaeClient(f"127.0.0.1:{port}", timeout_s=60) as client:
        console.print(f"service healthy after {time.monotonic() - started:.1f} s, calling it on port {port}")
        written = _call_everything(client, data, out_dir, table)
        console.print(table)
        for path in written:
            console.print(f"wrote {path}", highlight=False)
    console.print("stopped everything that was started")


def _call_everything(client: VaeClient, data: NDArray[Any], out_dir: Path, table: Table) -> list[Path]:
    def timed(call: str, sent: object, function: Callable[[], T], shape: Callable[[T], object]) -> T:
        began = time.monotonic()
        result = function()
        elapsed_ms = (time.monotonic() - began) * 1000
        table.add_row(call, str(sent), str(shape(result)), f"{elapsed_ms:.1f}")
        return result

    images, (start, end) = data[:NUM_IMAGES], (data[:NUM_PATHS], data[NUM_PATHS : 2 * NUM_PATHS])
    model = timed("GetModel", "", client.get_model, lambda m: f"{m.name} {m.model_version}")
    encoded = timed(
        "Encode", images.shape, lambda: client.encode(images), lambda e: f"mean, log_var {e.mean.shape}"
    )
    timed("Decode", encoded.mean.shape, lambda: client.decode(encoded.mean), lambda d: d.reconstruction.shape)
    reconstructed = timed(
        "Reconstruct", images.shape, lambda: client.reconstruct(images), lambda d: d.reconstruction.shape
    )
    sampled = timed(
        "Sample",
        f"{NUM_SAMPLES}, seed {SEED}",
        lambda: client.sample(NUM_SAMPLES, seed=SEED),
        lambda s: s.samples.shape,
    )
    timed(
        "SampleStream",
        f"{NUM_STREAMED}, seed {SEED}",
        lambda: [chunk.samples for chunk in client.sample_stream(NUM_STREAMED, seed=SEED)],
        lambda chunks: f"{len(chunks)} chunks {np.concatenate(chunks).shape}",
    )
    timed("Score", images.shape, lambda: client.score(images, seed=SEED), lambda s: f"ELBO {s.score.shape}")
    paths = timed(
        "Interpolate",
        f"{NUM_PATHS} pairs, {NUM_IMAGES} steps",
        lambda: client.interpolate(start, end, NUM_IMAGES, interpolation="spherical"),
        lambda i: i.observations.shape,
    )
    if not pictures.are_images(model.data_shape):
        return []
    names = ("reconstructions.png", "samples.png", "interpolation.png")
    written = [out_dir / name for name in names]
    pictures.save_grid(written[0], [("input", images), ("reconstruction", reconstructed.reconstruction)])
    rows = np.split(sampled.samples, range(NUM_IMAGES, NUM_SAMPLES, NUM_IMAGES))
    label = f"means of p(x | z), z drawn from the prior with seed {SEED}"
    pictures.save_grid(written[1], [(label if not i else "", row) for i, row in enumerate(rows)])
    label = "spherical interpolation between two inputs each"
    pictures.save_grid(written[2], [(label if not i else "", row) for i, row in enumerate(paths.observations)])
    return written


@contextlib.contextmanager
def _service(config: ServingConfig, console: Console) -> Iterator[int]:
    from serving import app  # noqa: PLC0415 - Ray takes a second to import, and `cli` imports this module

    if config.engine == "ray":
        with console.status("starting Ray and three deployments"), contextlib.ExitStack() as stack:
            port = stack.enter_context(app.on_ray(config, tell=lambda line: console.print(line, highlight=False)))
            leave = stack.pop_all()
        with leave:
            yield port
        return
    with _in_thread(config) as port:
        yield port


@contextlib.contextmanager
def _in_thread(config: ServingConfig) -> Iterator[int]:
    """Run the in-process engine on an event loop of its own, beside the client that blocks."""
    from serving.standalone import in_process  # noqa: PLC0415 - as above

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    service = in_process(config)

    def wait(coroutine: Any) -> Any:  # noqa: ANN401 - the result of whatever is awaited
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    try:
        server = wait(service.__aenter__())
        try:
            yield server.port
        finally:
            wait(service.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
