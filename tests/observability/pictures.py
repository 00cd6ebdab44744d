"""Record the pictures of the dashboards: `python -m tests.observability.pictures`, about three minutes.

Runs the service on Ray beside a Prometheus, drives it through a growth, a flood, wrong requests and the death of a
replica, and draws what was scraped into deploy/observability/pictures.
"""

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np

from deploy.observability import render
from serving.client import VaeClient, VaeError
from serving.demo import free_port
from tests.bundles import DATA_SHAPE, small_bundle
from tests.end_to_end.service import running
from tests.observability.prometheus import OBSERVABILITY, prometheus

HIDDEN: Final = (1024, 1024, 1024)
SETTINGS: Final = (
    "encoder.max_replicas=2",
    "encoder.scaling.down_after_s=20",
    "decoder.min_replicas=2",
    "decoder.max_replicas=2",
    "batching.max_queue_rows=4096",
)
NUM_CALLERS: Final = 4
QUIET_S, BUSY_S, FLOOD_S, LATE_S = 25.0, 55.0, 20.0, 45.0
RATE_S: Final = 25
"""Window of rates: Ray's own numbers change each ten seconds."""


def main() -> None:
    """Run, drive, draw."""
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        os.environ.pop(name, None)
    os.environ["RAY_AUTH_MODE"] = "token"
    with tempfile.TemporaryDirectory() as name:
        folder, port = Path(name), free_port()
        options = [part for setting in SETTINGS for part in ("--set", setting)]
        bundle = small_bundle(folder / "bundle", hidden=HIDDEN)
        with (
            running(bundle, "--metrics-port", str(port), *options) as service,
            prometheus(folder, port) as watcher,
        ):
            began = time.time()
            with _callers(service.target, _mixed, 1):
                time.sleep(QUIET_S)
                with _callers(service.target, _encode, NUM_CALLERS):
                    time.sleep(BUSY_S)
                with _callers(service.target, _flood, 2 * NUM_CALLERS):
                    time.sleep(FLOOD_S)
                service.replica("Decoder").kill()
                time.sleep(LATE_S)
            span = render.Span(began, time.time(), RATE_S)
            for file, picture in render.render(render.fetcher(watcher.url), span).items():
                (OBSERVABILITY / "pictures" / file).write_bytes(picture)
            service.stop()


@contextlib.contextmanager
def _callers(target: str, call: Callable[[VaeClient, int], object], number: int) -> Iterator[None]:
    is_over = threading.Event()

    def work(seed: int) -> None:
        with VaeClient(target, timeout_s=10) as client:
            while not is_over.is_set():
                with contextlib.suppress(VaeError):
                    call(client, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(number)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        is_over.set()
        for thread in threads:
            thread.join()


def _mixed(client: VaeClient, seed: int) -> None:
    """Call each method once, and one of them wrongly, then rest."""
    images = np.random.default_rng(seed).integers(0, 256, (16, *DATA_SHAPE), np.uint8)
    client.get_model()
    latents = client.encode(images).mean
    client.decode(latents)
    client.sample(32, seed=seed)
    client.reconstruct(images)
    client.score(images, num_latents=4)
    client.interpolate(images[:4], images[4:8], 8)
    time.sleep(0.1)
    with contextlib.suppress(VaeError):
        client.encode(np.zeros((1, 3, 3), np.uint8))


def _encode(client: VaeClient, seed: int) -> None:
    client.encode(np.full((512, *DATA_SHAPE), seed, np.uint8))


def _flood(client: VaeClient, seed: int) -> None:
    client.sample(2048, seed=seed)


if __name__ == "__main__":
    main()
