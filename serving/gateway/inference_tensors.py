"""Tensors of the Open Inference Protocol and their arrays, with every check made before memory is taken."""

import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from protos.inference import inference_pb2 as pb
from serving.errors import (
    MissingField,
    MixedContents,
    OutOfRange,
    ShapeMismatch,
    SizeMismatch,
    TooManyRows,
    UnknownTensor,
    UnsupportedType,
)
from serving.tensors import little_endian

Array = NDArray[Any]

FIELD: Final = "inputs[0]"
"""Path of the input: every model has one."""

_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "FP32": np.dtype("<f4"),
    "FP16": np.dtype("<f2"),
    "UINT8": np.dtype("u1"),
    "UINT64": np.dtype("<u8"),
    "INT64": np.dtype("<i8"),
}
_DATATYPES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_TYPED: Final = {
    "FP32": "fp32_contents",
    "UINT8": "uint_contents",
    "UINT64": "uint64_contents",
    "INT64": "int64_contents",
}
"""Where typed contents are. FP16 has no such field."""

_MAX_NAMED: Final = 16
"""Inputs of a request above which they are not looked at one by one."""

_UINT8_MAX: Final = 255
_SHARED_MEMORY: Final = "shared_memory_region"
_CLASSIFICATION: Final = "classification"

_NUM_SHOWN: Final = 8
_repr: Final = reprlib.Repr()
_repr.maxstring, _repr.maxlist = 64, 4


class TensorSpec(NamedTuple):
    """An input or output of a model."""

    name: str

    row_shape: tuple[int, ...]
    """Shape of one row."""

    datatypes: tuple[str, ...]
    """Types that are accepted; the first is the one that metadata names."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape with any number of rows."""
        return (-1, *self.row_shape)


def read_rows(request: pb.ModelInferRequest, spec: TensorSpec, *, max_rows: int) -> Array:
    """Return the rows of a request's only input, read-only.

    Args:
        request: The request.
        spec: The input of the model.
        max_rows: Most rows of a request.

    Returns:
        Shape (n, *row_shape): uint8, float32 (of FP16 too) or uint64 (of INT64 too).

    Raises:
        InvalidRequest: If the request does not have exactly this input, with as many bytes or elements as its type
            and shape need.
    """
    tensor = _only_input(request, spec)
    if tensor.datatype not in spec.datatypes:
        raise UnsupportedType(
            f"{FIELD}.datatype", expected=_either(spec.datatypes), actual=_shown(tensor.datatype)
        )
    shape = tuple(tensor.shape[: len(spec.shape) + 1])  # a megabyte of dimensions is not copied
    if len(shape) != len(spec.shape) or shape[1:] != spec.row_shape:
        actual = tensor.shape[: _NUM_SHOWN + 1]
        raise ShapeMismatch(f"{FIELD}.shape", expected=_brackets(spec.shape), actual=actual)
    if shape[0] < 1:
        raise OutOfRange(f"{FIELD}.shape", expected="at least 1 row", actual=str(shape[0]))
    if shape[0] > max_rows:
        raise TooManyRows(f"{FIELD}.shape", limit=max_rows, actual=shape[0])
    dtype = _DTYPES[tensor.datatype]
    num_elements = math.prod(shape)  # Python integers: no overflow, no memory
    if request.raw_input_contents:
        values = _raw(request, tensor, dtype, num_elements)
    else:
        values = _typed(tensor, dtype, num_elements, f"data for input tensor '{spec.name}'")
    return _widen(values).reshape(shape)


def _only_input(request: pb.ModelInferRequest, spec: TensorSpec) -> pb.ModelInferRequest.InferInputTensor:
    if len(request.inputs) != 1 or request.inputs[0].name != spec.name:
        _refuse_inputs(request, spec)
    tensor = request.inputs[0]
    if tensor.parameters and _SHARED_MEMORY in tensor.parameters:
        text = "shared memory is not served; send the contents in the request"
        raise MixedContents(f"{FIELD}.parameters.{_SHARED_MEMORY}", text=text)
    return tensor


def _refuse_inputs(request: pb.ModelInferRequest, spec: TensorSpec) -> NoReturn:
    """Say what is wrong with the names of the inputs. Only the first are looked at: there may be millions."""
    model, count = request.model_name, len(request.inputs)
    names = [tensor.name for tensor in request.inputs[:_NUM_SHOWN]]
    if spec.name not in names:
        text = (
            f"expected 1 inputs but got {count} inputs for model '{model}'. "
            f"Got input(s) {_shown(names)}, but missing required input(s) ['{spec.name}']."
        )
        raise UnknownTensor("inputs", text=text)
    index = next((index for index, name in enumerate(names) if name != spec.name), None)
    if index is not None:
        text = f"unexpected inference input {_shown(names[index])} for model '{model}'"
        raise UnknownTensor(f"inputs[{index}].name", text=text)
    raise UnknownTensor("inputs[1].name", text=f"input '{spec.name}' is given twice for model '{model}'")


def _raw(
    request: pb.ModelInferRequest,
    tensor: pb.ModelInferRequest.InferInputTensor,
    dtype: np.dtype[Any],
    num_elements: int,
) -> Array:
    """Return the elements of bytes, without a copy."""
    if tensor.HasField("contents"):
        text = (
            "contents field must not be specified when using raw_input_contents "
            f"for '{tensor.name}' for model '{request.model_name}'"
        )
        raise MixedContents(f"{FIELD}.contents", text=text)
    if (count := len(request.raw_input_contents)) > 1:
        raise MixedContents("raw_input_contents[1]", text=f"expected 1 entry, one for each input, got {count}")
    content = request.raw_input_contents[0]
    expected_bytes = num_elements * dtype.itemsize
    if len(content) != expected_bytes:
        raise SizeMismatch("raw_input_contents[0]", expected_bytes=expected_bytes, actual_bytes=len(content))
    return np.frombuffer(content, dtype)


def _typed(
    tensor: pb.ModelInferRequest.InferInputTensor, dtype: np.dtype[Any], num_elements: int, what: str
) -> Array:
    """Return the elements of numbers."""
    if not tensor.HasField("contents"):
        raise MissingField(FIELD, expected=what)
    own = _TYPED.get(tensor.datatype, "")
    given = [descriptor.name for descriptor, _ in tensor.contents.ListFields()]
    for name in given:
        if name != own:
            text = f"{tensor.datatype} belongs in {own or 'raw_input_contents'}"
            raise MixedContents(f"{FIELD}.contents.{name}", text=text)
    if not own or not given:
        raise MissingField(f"{FIELD}.contents", expected=what)
    numbers = getattr(tensor.contents, own)
    if len(numbers) != num_elements:
        sizes = [count * dtype.itemsize for count in (num_elements, len(numbers))]
        raise SizeMismatch(f"{FIELD}.contents.{own}", expected_bytes=sizes[0], actual_bytes=sizes[1])
    if own == "fp32_contents":
        # Packed floats are their bytes on the wire: a hundredth of the time that number by number takes.
        alone = pb.InferTensorContents(fp32_contents=numbers)
        return np.frombuffer(alone.SerializeToString()[-4 * num_elements :], dtype)
    if own == "uint_contents":
        wide = np.fromiter(numbers, np.uint32, num_elements)
        if (largest := int(wide.max())) > _UINT8_MAX:
            actual = str(largest)
            raise OutOfRange(f"{FIELD}.contents.{own}", expected=f"at most {_UINT8_MAX}", actual=actual)
        return wide.astype(np.uint8)
    return np.fromiter(numbers, dtype, num_elements)


def _widen(values: Array) -> Array:
    """Return float16 as float32 and int64 as uint64."""
    if values.dtype == np.float16:
        return values.astype(np.float32)
    if values.dtype == np.int64:
        if (smallest := int(values.min())) < 0:
            raise OutOfRange(f"{FIELD}.data", expected="at least 0", actual=str(smallest))
        return values.view(np.uint64)
    return values


def read_outputs(request: pb.ModelInferRequest, specs: Sequence[TensorSpec]) -> list[str]:
    """Return the names of the outputs that a request wants, in its order; all of them if it names none.

    Raises:
        InvalidRequest: If the model does not have an output, one is named twice, or wanted in a way that is not
            served.
    """
    known = [spec.name for spec in specs]
    if not request.outputs:
        return known
    wanted: list[str] = []
    for index, output in enumerate(request.outputs):
        field = f"outputs[{index}]"
        if output.name not in known:
            text = f"unexpected inference output {_shown(output.name)} for model '{request.model_name}'"
            raise UnknownTensor(f"{field}.name", text=text)
        if output.name in wanted:
            text = f"output '{output.name}' is asked for twice for model '{request.model_name}'"
            raise UnknownTensor(f"{field}.name", text=text)
        if output.parameters:
            _check_output(output.parameters, f"{field}.parameters")
        wanted.append(output.name)
    return wanted


def _check_output(parameters: Mapping[str, pb.InferParameter], field: str) -> None:
    if _SHARED_MEMORY in parameters:
        text = "shared memory is not served; outputs are returned in the response"
        raise MixedContents(f"{field}.{_SHARED_MEMORY}", text=text)
    if _CLASSIFICATION in parameters:
        raise UnsupportedType(f"{field}.{_CLASSIFICATION}", expected="an output as it is", actual="classification")


def add_output(response: pb.ModelInferResponse, name: str, values: Array) -> None:
    """Add an output to a response: its description, and its elements as bytes."""
    little = little_endian(values)
    response.outputs.add(name=name, datatype=_DATATYPES[little.dtype], shape=little.shape)
    response.raw_output_contents.append(little.tobytes())


def _brackets(shape: Sequence[int]) -> str:
    return f"[{','.join(map(str, shape))}]"


def _either(names: Sequence[str]) -> str:
    return " or ".join(names)


def _shown(names: str | list[str]) -> str:
    """Return names that a stranger chose, quoted and cut."""
    return _repr.repr(names)
