"""Parameters of the Open Inference Protocol: types, ranges, defaults."""

import pytest

from protos.inference import inference_pb2 as pb
from protos.vae.v1 import vae_pb2
from serving.errors import OutOfRange
from serving.gateway.inference_parameters import DEFAULTS, read_parameters

KINDS = ("int64_param", "uint64_param")


def test_without_parameters_all_is_as_it_is() -> None:
    """No parameters, or only unknown ones of any type, are the defaults."""
    assert read_parameters({}) == DEFAULTS
    unknown = {"triton_x": pb.InferParameter(bool_param=True), "other": pb.InferParameter()}
    assert read_parameters(unknown) == DEFAULTS


@pytest.mark.parametrize("kind", KINDS)
def test_whole_numbers_come_in_two_types(kind: str) -> None:
    """Signed or unsigned, a number is the same; a timeout of zero is none."""
    given = {
        name: pb.InferParameter(**{kind: value})  # type: ignore[arg-type]  # a name of a field
        for name, value in {"seed": 7, "priority": 2, "timeout": 1500, "temperature": 3}.items()
    }
    read = read_parameters(given)
    assert (read.seed, read.priority, read.timeout_s, read.temperature) == (7, 2, 0.0015, 3.0)
    zero = pb.InferParameter(**{kind: 0})  # type: ignore[arg-type]  # as above
    assert read_parameters({"timeout": zero, "seed": zero}) == DEFAULTS._replace(seed=0)


def test_reading_leaves_the_request_as_it_is() -> None:
    """Looking for parameters adds none to the map of a message."""
    request = pb.ModelInferRequest()
    request.parameters["observation"].string_param = "sample"
    before = request.SerializeToString()
    assert read_parameters(request.parameters).observes
    assert request.SerializeToString() == before


def test_the_outputs_of_a_model_bound_the_type() -> None:
    """A type that the model's outputs cannot have is refused with those that they can."""
    given = {"output_datatype": pb.InferParameter(string_param="UINT8")}
    assert read_parameters(given).output_type == vae_pb2.DATA_TYPE_UINT8
    with pytest.raises(OutOfRange, match="expected FP32 or FP16, got 'UINT8'"):
        read_parameters(given, output_types=("FP32", "FP16"))
