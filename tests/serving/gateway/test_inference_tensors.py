"""Tensors of the Open Inference Protocol: typed contents mean what raw ones mean, and lies cost no memory."""

import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from protos.inference import inference_pb2 as pb
from serving.errors import InvalidRequest, MixedContents, SizeMismatch, TooManyRows
from serving.gateway.inference_tensors import TensorSpec, add_output, read_outputs, read_rows

DATATYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "uint64": "UINT64", "int64": "INT64"}
FIELDS = {
    "float32": "fp32_contents",
    "uint8": "uint_contents",
    "uint64": "uint64_contents",
    "int64": "int64_contents",
}
ANY = TensorSpec("x", (3,), tuple(DATATYPES.values()))


def _request(rows: NDArray[Any], *, is_typed: bool = False) -> pb.ModelInferRequest:
    tensor = pb.ModelInferRequest.InferInputTensor(name="x", datatype=DATATYPES[rows.dtype.name], shape=rows.shape)
    if is_typed:
        getattr(tensor.contents, FIELDS[rows.dtype.name]).extend(rows.ravel().tolist())
        return pb.ModelInferRequest(model_name="m", inputs=[tensor])
    return pb.ModelInferRequest(model_name="m", inputs=[tensor], raw_input_contents=[rows.tobytes()])


def _arrays(*dtypes: str, elements: Any = None) -> Any:  # noqa: ANN401 - a strategy
    shapes = st.integers(1, 5).map(lambda rows: (rows, 3))
    return st.sampled_from(dtypes).flatmap(lambda dtype: hnp.arrays(np.dtype(dtype), shapes, elements=elements))


@given(rows=_arrays("float32", "uint8", "uint64") | _arrays("int64", elements=st.integers(0, 2**63 - 1)))
def test_typed_contents_are_raw_contents(rows: NDArray[Any]) -> None:
    """Whatever the numbers, and NaN too, both ways give the same bytes, read-only where nothing was copied."""
    raw = read_rows(_request(rows), ANY, max_rows=5)
    typed = read_rows(_request(rows, is_typed=True), ANY, max_rows=5)
    assert raw.tobytes() == typed.tobytes() == rows.tobytes()
    assert raw.dtype == typed.dtype == (np.uint64 if rows.dtype == np.int64 else rows.dtype)
    assert raw.shape == typed.shape == rows.shape


@given(rows=_arrays("float16"))
def test_halves_become_floats(rows: NDArray[np.float16]) -> None:
    """FP16 is widened exactly."""
    values = read_rows(_request(rows), ANY, max_rows=5)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.astype(np.float16), rows)


@given(values=_arrays("float32", "float16", "uint8"))
def test_an_output_is_its_bytes(values: NDArray[Any]) -> None:
    """An output says type and shape, and carries the elements row by row, whatever the memory looks like."""
    response = pb.ModelInferResponse()
    turned = np.asfortranarray(values)
    add_output(response, "y", turned.astype(turned.dtype.newbyteorder(">")))
    (output,) = response.outputs
    assert (output.name, output.datatype, tuple(output.shape)) == ("y", DATATYPES[values.dtype.name], values.shape)
    assert response.raw_output_contents[0] == values.tobytes()


def test_an_unknown_field_is_not_data() -> None:
    """Bytes that this version of the protocol does not know are no part of typed contents."""
    rows = np.arange(6, dtype=np.float32).reshape(2, 3)
    request = _request(rows, is_typed=True)
    unknown = b"\xfa\x7f\x04abcd"  # field 2047, four bytes
    request.inputs[0].contents.MergeFromString(unknown)
    assert unknown in request.SerializeToString()
    assert read_rows(request, ANY, max_rows=5).tobytes() == rows.tobytes()


@pytest.mark.parametrize(
    ("shape", "error"), [([2**20, 3], TooManyRows), ([2**62, 3], TooManyRows), ([1000, 3], SizeMismatch)]
)
def test_a_lie_about_the_size_costs_nothing(shape: list[int], error: type[InvalidRequest]) -> None:
    """What a shape promises is compared with what came before any memory is taken."""
    request = _request(np.zeros((1, 3), np.float32))
    request.inputs[0].shape[:] = shape
    tracemalloc.start()
    try:
        with pytest.raises(error, match="expected"):
            read_rows(request, ANY, max_rows=1000)
        assert tracemalloc.get_traced_memory()[1] < 10_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("field", ["inputs", "outputs", "shape"])
def test_a_million_of_anything_is_refused_by_its_first(field: str) -> None:
    """Repeated fields, which cost their sender two bytes each, are neither copied nor walked through."""
    request = _request(np.zeros((1, 3), np.float32))
    if field == "shape":
        request.inputs[0].shape.extend([1] * 1_000_000)
    else:
        tag = {"inputs": b"\x2a\x00", "outputs": b"\x32\x00"}[field]
        request.MergeFromString(tag * 1_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="expected") as caught:
            read_outputs(request, [ANY]) and read_rows(request, ANY, max_rows=5)
        assert tracemalloc.get_traced_memory()[1] < 50_000
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 300


def test_halves_have_no_numbers() -> None:
    """FP16 with contents of any kind says where it belongs."""
    request = _request(np.zeros((1, 3), np.float32), is_typed=True)
    request.inputs[0].datatype = "FP16"
    with pytest.raises(MixedContents, match="FP16 belongs in raw_input_contents"):
        read_rows(request, ANY, max_rows=5)


def test_all_outputs_are_wanted_unless_some_are_named() -> None:
    """The order is the model's, or the caller's."""
    specs = [TensorSpec(name, (1,), ("FP32",)) for name in ("a", "b", "c")]
    request = pb.ModelInferRequest(model_name="m")
    assert read_outputs(request, specs) == ["a", "b", "c"]
    for name in ("c", "a"):
        request.outputs.add(name=name)
    assert read_outputs(request, specs) == ["c", "a"]
