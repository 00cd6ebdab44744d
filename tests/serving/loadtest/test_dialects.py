"""The bytes of requests, read by the service's own parsers. The rest of the dialects: test_oracle.py."""

import numpy as np
import pytest

from protos.inference import inference_pb2
from protos.vae.v1 import vae_pb2
from serving.gateway.inference_tensors import TensorSpec, read_rows
from serving.loadtest.dialects import DIALECTS
from serving.loadtest.workload import ModelFacts, Operation, contents
from serving.tensors import from_message

FACTS = ModelFacts("small", "v", (1, 4, 4), 2, None)


def test_every_method_has_its_path_and_its_request() -> None:
    """A request of vae.v1 holds the contents, as bytes that its message parses."""
    operation = Operation("sample", 3)
    asked = contents(operation, FACTS, seed=1, index=0)
    dialect = DIALECTS["vae"]
    assert dialect.path(operation) == "/vae.v1.VaeService/Sample"
    request = vae_pb2.SampleRequest.FromString(dialect.body(operation, asked))
    assert (request.num_samples, request.seed, request.first_row) == (3, asked.seed, asked.first_row)
    encode = vae_pb2.EncodeRequest.FromString(dialect.body(Operation("encode", 3), asked))
    np.testing.assert_array_equal(from_message(encode.data, field="data"), asked.data)


@pytest.mark.parametrize(
    ("method", "spec"),
    [
        ("encode", TensorSpec("data", (1, 4, 4), ("FP32", "UINT8"))),
        ("decode", TensorSpec("latents", (2,), ("FP32",))),
        ("sample", TensorSpec("row", (1,), ("UINT64",))),
    ],
)
def test_open_inference_requests_have_raw_contents(method: str, spec: TensorSpec) -> None:
    """The service's own parser gives the rows back."""
    operation = Operation.parse(f"{method}:3")
    asked = contents(operation, FACTS, seed=1, index=0)
    body = DIALECTS["oip"].body(operation, asked)
    request = inference_pb2.ModelInferRequest.FromString(body)
    assert request.raw_input_contents
    rows = read_rows(request, spec, max_rows=3)
    expected = {"encode": asked.data, "decode": asked.latents}.get(
        method, np.arange(3, dtype=np.uint64)[:, None] + np.uint64(asked.first_row)
    )
    np.testing.assert_array_equal(rows, expected)
