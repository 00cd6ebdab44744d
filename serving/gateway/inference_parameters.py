"""Parameters of a request of the Open Inference Protocol: names, types and ranges."""

from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from protos.inference import inference_pb2 as pb
from protos.vae.v1 import vae_pb2
from serving import noise
from serving.errors import OutOfRange, UnsupportedType
from serving.gateway.operations import check_temperature

_MICROSECONDS: Final = 1e6
_OUTPUT_TYPES: Final = {
    "FP32": vae_pb2.DATA_TYPE_FLOAT32,
    "FP16": vae_pb2.DATA_TYPE_FLOAT16,
    "UINT8": vae_pb2.DATA_TYPE_UINT8,
}
_OBSERVATIONS: Final = {"mean": False, "sample": True}


class Parameters(NamedTuple):
    """What a request says beside its tensors."""

    seed: int | None = None
    """Of what is drawn; chosen by the service if None."""

    temperature: float = 1.0
    """Standard deviation of the latents."""

    observes: bool = False
    """Whether observations are drawn from p(x | z) rather than its mean returned."""

    output_type: int = vae_pb2.DATA_TYPE_FLOAT32
    """Type of the outputs, as the typed API numbers them."""

    priority: int = 0
    """1 is the highest; 0 as the model has it."""

    timeout_s: float | None = None
    """Shortens the deadline; None does not."""


DEFAULTS: Final = Parameters()


def read_parameters(
    given: Mapping[str, pb.InferParameter], *, output_types: Sequence[str] = tuple(_OUTPUT_TYPES)
) -> Parameters:
    """Return the parameters of a request; unknown ones are ignored, as Triton and others ignore them.

    Args:
        given: By name.
        output_types: Datatypes that the outputs may have.

    Raises:
        UnsupportedType: If one has a type that it cannot have, or the outputs cannot have the type asked for.
        OutOfRange: If one is outside its range.
    """
    if not given:
        return DEFAULTS
    temperature = DEFAULTS.temperature
    if "temperature" in given:
        temperature = _number(given, "temperature")
        check_temperature(temperature, field="parameters.temperature")
    # Indexing a map of messages would create what is absent.
    return Parameters(
        seed=_integer(given, "seed", 0, noise.MAX_SEED) if "seed" in given else None,
        temperature=temperature,
        observes=_OBSERVATIONS[_text(given, "observation", tuple(_OBSERVATIONS))]
        if "observation" in given
        else False,
        output_type=_OUTPUT_TYPES[_text(given, "output_datatype", output_types)]
        if "output_datatype" in given
        else DEFAULTS.output_type,
        priority=_integer(given, "priority", 0, 2**64 - 1) if "priority" in given else 0,
        timeout_s=(_integer(given, "timeout", 0, 2**63 - 1) / _MICROSECONDS or None)
        if "timeout" in given
        else None,
    )


def _integer(given: Mapping[str, pb.InferParameter], name: str, low: int, high: int) -> int:
    parameter, field = given[name], f"parameters.{name}"
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in {"int64_param", "uint64_param"}:
        raise UnsupportedType(field, expected="int64_param or uint64_param", actual=kind or "nothing")
    value = parameter.int64_param if kind == "int64_param" else parameter.uint64_param
    if not low <= value <= high:
        raise OutOfRange(field, expected=f"a number in [{low}, {high}]", actual=str(value))
    return value


def _number(given: Mapping[str, pb.InferParameter], name: str) -> float:
    parameter = given[name]
    kind = parameter.WhichOneof("parameter_choice")
    if kind not in {"double_param", "int64_param", "uint64_param"}:
        raise UnsupportedType(f"parameters.{name}", expected="double_param", actual=kind or "nothing")
    return float(getattr(parameter, kind))


def _text(given: Mapping[str, pb.InferParameter], name: str, values: Sequence[str]) -> str:
    parameter, field = given[name], f"parameters.{name}"
    kind = parameter.WhichOneof("parameter_choice")
    if kind != "string_param":
        raise UnsupportedType(field, expected="string_param", actual=kind or "nothing")
    if parameter.string_param not in values:
        raise OutOfRange(field, expected=" or ".join(values), actual=repr(parameter.string_param[:64]))
    return parameter.string_param
