"""Every kind of call, right and wrong, with counts that are known beforehand."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np
import pytest
import yaml

from protos.inference import inference_pb2, inference_pb2_grpc
from serving import api_keys
from serving.client import VaeClient, VaeError
from tests.bundles import DATA_SHAPE
from tests.observability.ledger import NO_RETRIES, Ledger

KEY, HASTY_KEY = "vae_a-key-of-a-test", "vae_another-key"
SIZES = (1, 3, 64)
"""Rows of the calls of each method."""

NUM_ROUNDS = 4
NUM_STEPS = 5
NUM_LATENTS = 3
NUM_STREAMED = 20_000


class Driven(NamedTuple):
    """What was sent."""

    ledger: Ledger
    rows: Counter[tuple[str, ...]]
    """Rows that must have been run, by graph."""

    call_rows: Counter[tuple[str, ...]]
    """Rows that must have been run, in both graphs, by method."""


def write_config(folder: Path) -> Path:
    """Write a configuration in which calls can fail for every reason that we can cause; return the file."""
    keys = {"patient": KEY, "hasty": HASTY_KEY}
    gateway = {
        "auth": {"api_keys": ",".join(f"{name}:{api_keys.digest_of(key)}" for name, key in keys.items())},
        "admission": {"clients": {"key:hasty": {"calls_per_s": 0.001, "burst_s": 1000.0}}},
        "repository_control": True,
    }
    path = folder / "serve.yaml"
    path.write_text(yaml.safe_dump({"gateway": gateway}))
    return path


def drive(target: str, *, pause: Callable[[], None]) -> Driven:
    """Call every method, rightly and wrongly; return what must have been counted.

    Args:
        target: Address of the service.
        pause: Called after the first round: a series that appears has no rate until it grows.
    """
    driven = Driven(Ledger(), Counter(), Counter())
    with driven.ledger.watching():
        with VaeClient(target, api_key=KEY, options=NO_RETRIES) as client:
            _call_rightly(client, driven)
            pause()
            for _ in range(NUM_ROUNDS):
                _call_rightly(client, driven)
            _call_wrongly(client)
        _call_as_a_stranger(target)
        _call_too_often(target, driven)
    _call_what_is_unloaded(target, driven)
    return driven


def _call_rightly(client: VaeClient, driven: Driven) -> None:
    client.get_model()
    for num_rows in SIZES:
        images = np.random.default_rng(num_rows).integers(0, 256, (num_rows, *DATA_SHAPE), np.uint8)
        latents = client.encode(images, num_latents=2).mean
        client.decode(latents, output_type="uint8")
        client.sample(num_rows, seed=1)
        client.reconstruct(images, observation="sample")
        client.score(images, num_latents=NUM_LATENTS)
        client.interpolate(images, images[::-1], NUM_STEPS)
        own = {
            "Encode": (num_rows, 0),
            "Decode": (0, num_rows),
            "Sample": (0, num_rows),
            "Reconstruct": (num_rows, num_rows),
            "Score": (num_rows, NUM_LATENTS * num_rows),
            "Interpolate": (2 * num_rows, NUM_STEPS * num_rows),
        }
        for method, rows in own.items():
            _add(driven, method, *rows)
    assert sum(len(chunk.samples) for chunk in client.sample_stream(NUM_STREAMED)) == NUM_STREAMED
    _add(driven, "SampleStream", 0, NUM_STREAMED)


def _add(driven: Driven, method: str, num_encoded: int, num_decoded: int) -> None:
    driven.rows["encoder",] += num_encoded
    driven.rows["decoder",] += num_decoded
    driven.call_rows[method,] += num_encoded + num_decoded


def _call_wrongly(client: VaeClient) -> None:
    image = np.zeros((1, *DATA_SHAPE), np.uint8)
    for _ in range(2):
        with pytest.raises(VaeError, match="shape"):
            client.encode(np.zeros((1, 3, 3), np.uint8))
    with pytest.raises(VaeError, match="not loaded"):
        client.reconstruct(image, model_version="0" * 12)
    with pytest.raises(VaeError, match="at most"):
        client.sample(1_000_000)
    with pytest.raises(VaeError, match="finite"):
        client.decode(np.full((1, 2), np.nan, np.float32))


def _call_as_a_stranger(target: str) -> None:
    with VaeClient(target, options=NO_RETRIES) as client, pytest.raises(VaeError, match="credentials"):
        client.sample(1)


def _call_too_often(target: str, driven: Driven) -> None:
    """Call twice where once in a quarter of an hour is allowed."""
    with VaeClient(target, api_key=HASTY_KEY, options=NO_RETRIES) as client:
        client.sample(2)
        _add(driven, "Sample", 0, 2)
        with pytest.raises(VaeError, match="over the limit"):
            client.sample(2)


def _call_what_is_unloaded(target: str, driven: Driven) -> None:
    """Take a model of the Open Inference Protocol out of service and call it: an error by our doing."""
    ledger = driven.ledger
    metadata = (("authorization", f"Bearer {KEY}"),)
    with grpc.insecure_channel(target, NO_RETRIES) as channel:
        stub = inference_pb2_grpc.GRPCInferenceServiceStub(grpc.intercept_channel(channel, ledger))
        stub.RepositoryModelUnload(
            inference_pb2.RepositoryModelUnloadRequest(model_name="prior"), metadata=metadata
        )
        with pytest.raises(grpc.RpcError, match="no available versions"):
            stub.ModelInfer(inference_pb2.ModelInferRequest(model_name="prior"), metadata=metadata)
        stub.RepositoryModelLoad(inference_pb2.RepositoryModelLoadRequest(model_name="prior"), metadata=metadata)
