"""A service with keys and small limits, as a process of its own; and a canary that must not feel the tests."""

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import psutil
import pytest

from protos.vae.v1 import vae_pb2 as pb
from serving.tensors import to_message
from tests.bundles import DATA_SHAPE, small_bundle
from tests.end_to_end.service import Service, launched, wait_until

ALICE = "vae_alice-may-call-everything-0123456789abcdef"
BOB = "vae_bob-may-only-encode-0123456789abcdefghijk"
MAX_ROWS = 64
MAX_REQUEST_BYTES = 256 * 1024
BODY_TIMEOUT_S = 1.0
HANDSHAKE_TIMEOUT_S = 1.0
CANARY_PERIOD_S = 0.05
CANARY_TIMEOUT_S = 5.0
MAX_GROWTH_MIB = 150
"""Growth of memory over all attacks together. Their bodies, were they kept or inflated, are many times that."""


def key(secret: str) -> tuple[tuple[str, str], ...]:
    """Return the metadata that presents a key."""
    return (("authorization", f"Bearer {secret}"),)


class Canary(threading.Thread):
    """Calls Encode and Sample all the time, and compares every answer with the first."""

    def __init__(self, port: int) -> None:
        super().__init__(daemon=True)
        self._port = port
        self._is_over = threading.Event()
        self.num_right = 0
        self.troubles: list[str] = []
        self.seconds: list[float] = []

    def run(self) -> None:
        """Call until stopped."""
        data = np.linspace(0, 255, 3 * int(np.prod(DATA_SHAPE))).astype(np.uint8).reshape(3, *DATA_SHAPE)
        requests = {
            "Encode": pb.EncodeRequest(data=to_message(data)).SerializeToString(),
            "Sample": pb.SampleRequest(num_samples=3, seed=11).SerializeToString(),
        }
        expected: dict[str, bytes] = {}
        with grpc.insecure_channel(f"127.0.0.1:{self._port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            while not self._is_over.wait(CANARY_PERIOD_S):
                for method, request in requests.items():
                    began = time.monotonic()
                    try:
                        call: Any = channel.unary_unary(f"/vae.v1.VaeService/{method}")
                        answer = call(request, metadata=key(ALICE), timeout=CANARY_TIMEOUT_S)
                    except grpc.RpcError as error:
                        during = os.environ.get("PYTEST_CURRENT_TEST", "")
                        self.troubles.append(f"{method}: {error.code().name} {error.details()} during {during}")
                        continue
                    self.seconds.append(time.monotonic() - began)
                    if expected.setdefault(method, answer) == answer:
                        self.num_right += 1
                    else:
                        self.troubles.append(f"{method}: a wrong answer")

    def stop(self) -> None:
        """End it."""
        self._is_over.set()
        self.join(timeout=2 * CANARY_TIMEOUT_S)


@pytest.fixture(scope="package")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run the service; the canary calls it all the while, and at the end must have had right answers alone."""
    folder = tmp_path_factory.mktemp("contract")
    bundle = small_bundle(folder / "bundle")
    keys = ",".join(f"{name}:{_digest(secret)}" for name, secret in (("alice", ALICE), ("bob", BOB)))
    settings = folder / "serve.yaml"
    settings.write_text(_SETTINGS)
    arguments = ("--engine", "in-process", "--config", str(settings))
    with launched(bundle, *arguments, environment={"VAE_API_KEYS": keys}) as service:
        wait_until(lambda: service.is_serving() or service.process.poll() is not None, "the service is healthy")
        assert service.process.poll() is None, "the service ended instead of serving"
        canary = Canary(service.port)
        canary.start()
        wait_until(lambda: canary.num_right > 10, "the canary has its first answers")
        before = _memory_mib(service.process)
        yield service
        canary.stop()
        assert not canary.troubles, canary.troubles[:5]
        assert canary.num_right > 10
        wait_until(
            lambda: _memory_mib(service.process) - before < MAX_GROWTH_MIB, "the memory is let go", timeout_s=30
        )
        assert service.stop() == 0


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def _memory_mib(process: psutil.Popen) -> float:
    return float(process.memory_info().rss) / 2**20


@pytest.fixture
def port(guarded: Service) -> int:
    """Return the port of the service."""
    return guarded.port


@pytest.fixture
def channel(guarded: Service) -> Iterator[grpc.Channel]:
    """Return a channel that neither retries nor limits."""
    options = [
        ("grpc.enable_retries", 0),
        ("grpc.max_send_message_length", -1),
        ("grpc.max_receive_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    with grpc.insecure_channel(guarded.target, options) as opened:
        yield opened


_SETTINGS = f"""
limits:
  max_rows: {MAX_ROWS}
  max_request_bytes: {MAX_REQUEST_BYTES}
  max_latents_per_row: 16
  max_stream_rows: 100000
gateway:
  auth:
    grants:
      - clients: ["key:alice"]
        methods: ["*"]
      - clients: ["key:bob"]
        methods: ["vae.v1.VaeService/Encode"]
  transport:
    body_timeout_s: {BODY_TIMEOUT_S}
    handshake_timeout_s: {HANDSHAKE_TIMEOUT_S}
"""
