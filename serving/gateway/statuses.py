"""The catalogue of errors: class -> status code, reason, retry hint, and what the caller may read."""

import math
from typing import Final, Literal, NamedTuple

import grpc
from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2

from protos.vae.v1 import vae_pb2
from serving import errors

DOMAIN: Final = "vae.v1"
DETAILS_KEY: Final = "grpc-status-details-bin"
PUSHBACK_KEY: Final = "grpc-retry-pushback-ms"
REASON_KEY: Final = "vae-error-reason"
FIELD_KEY: Final = "vae-error-field"
_NEVER: Final = "-1"
"""Pushback that tells a client not to repeat a call whose code is otherwise worth it."""

_PREFIX: Final = "ERROR_REASON_"
_MAX_MESSAGE: Final = 512
"""Longest text, characters: all trailers together must stay below 8 KB."""

CATALOGUE: Final[dict[type[errors.ServingError], tuple[grpc.StatusCode, vae_pb2.ErrorReason.ValueType]]] = {
    errors.MalformedMessage: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_MALFORMED_MESSAGE),
    errors.MissingField: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_MISSING_FIELD),
    errors.ShapeMismatch: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_SHAPE_MISMATCH),
    errors.UnsupportedType: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_UNSUPPORTED_TYPE),
    errors.SizeMismatch: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_SIZE_MISMATCH),
    errors.NotFinite: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_NOT_FINITE),
    errors.OutOfRange: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_OUT_OF_RANGE),
    errors.TooManyRows: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_TOO_MANY_ROWS),
    errors.UnknownTensor: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_UNKNOWN_TENSOR),
    errors.MixedContents: (grpc.StatusCode.INVALID_ARGUMENT, vae_pb2.ERROR_REASON_MIXED_CONTENTS),
    errors.UnknownModel: (grpc.StatusCode.NOT_FOUND, vae_pb2.ERROR_REASON_UNKNOWN_MODEL),
    errors.UnknownModelVersion: (grpc.StatusCode.NOT_FOUND, vae_pb2.ERROR_REASON_UNKNOWN_MODEL_VERSION),
    errors.Unauthenticated: (grpc.StatusCode.UNAUTHENTICATED, vae_pb2.ERROR_REASON_UNAUTHENTICATED),
    errors.MetadataTooLarge: (grpc.StatusCode.RESOURCE_EXHAUSTED, vae_pb2.ERROR_REASON_METADATA_TOO_LARGE),
    errors.PermissionDenied: (grpc.StatusCode.PERMISSION_DENIED, vae_pb2.ERROR_REASON_PERMISSION_DENIED),
    errors.MethodDisabled: (grpc.StatusCode.UNIMPLEMENTED, vae_pb2.ERROR_REASON_METHOD_DISABLED),
    errors.QueueFull: (grpc.StatusCode.RESOURCE_EXHAUSTED, vae_pb2.ERROR_REASON_QUEUE_FULL),
    errors.RateLimited: (grpc.StatusCode.RESOURCE_EXHAUSTED, vae_pb2.ERROR_REASON_RATE_LIMITED),
    errors.ModelUnloaded: (grpc.StatusCode.UNAVAILABLE, vae_pb2.ERROR_REASON_MODEL_UNLOADED),
    errors.Draining: (grpc.StatusCode.UNAVAILABLE, vae_pb2.ERROR_REASON_DRAINING),
    errors.EngineUnavailable: (grpc.StatusCode.UNAVAILABLE, vae_pb2.ERROR_REASON_ENGINE_UNAVAILABLE),
    errors.DeadlineExceeded: (grpc.StatusCode.DEADLINE_EXCEEDED, vae_pb2.ERROR_REASON_DEADLINE_EXCEEDED),
    errors.DeadlineTooShort: (grpc.StatusCode.DEADLINE_EXCEEDED, vae_pb2.ERROR_REASON_DEADLINE_TOO_SHORT),
    errors.RequestStalled: (grpc.StatusCode.DEADLINE_EXCEEDED, vae_pb2.ERROR_REASON_REQUEST_STALLED),
    errors.ResponseStalled: (grpc.StatusCode.DEADLINE_EXCEEDED, vae_pb2.ERROR_REASON_RESPONSE_STALLED),
}


class Status(NamedTuple):
    """How a call ends: code, text and trailing metadata."""

    code: grpc.StatusCode
    message: str
    trailers: tuple[tuple[str, str | bytes], ...]
    reason: str
    """Name of the reason, from `vae.v1.ErrorReason`."""


def of(error: errors.ServingError) -> Status:
    """Return the status of an error; what the catalogue does not know is for `internal`.

    Raises:
        KeyError: If the catalogue does not know the class.
    """
    code, number = CATALOGUE[type(error)]
    reason = vae_pb2.ErrorReason.Name(number).removeprefix(_PREFIX)
    details: list[Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)]
    trailers: list[tuple[str, str]] = []
    if isinstance(error, errors.InvalidRequest):
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=error.field, description=error.problem[:_MAX_MESSAGE]
        )
        details.append(error_details_pb2.BadRequest(field_violations=[violation]))
        trailers.append((FIELD_KEY, error.field))
    if isinstance(error, errors.Busy):
        delay, wait_ms = Duration(), math.ceil(error.retry_after_s * 1000)  # not earlier than there is room
        delay.FromMilliseconds(wait_ms)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
        trailers.append((PUSHBACK_KEY, str(wait_ms)))
    if isinstance(error, errors.MetadataTooLarge):
        trailers.append((PUSHBACK_KEY, _NEVER))
    return _status(code, reason, str(error)[:_MAX_MESSAGE], details, trailers)


def internal(error_id: str) -> Status:
    """Return the status of an unexpected exception: an id for the operator and nothing else."""
    reason = vae_pb2.ErrorReason.Name(vae_pb2.ERROR_REASON_INTERNAL).removeprefix(_PREFIX)
    details: list[Message] = [
        error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata={"error_id": error_id})
    ]
    message = f"internal error {error_id}; tell the operator this id"
    return _status(grpc.StatusCode.INTERNAL, reason, message, details, [])


Blame = Literal["client", "load", "service"]

_OF_LOAD: Final = frozenset({"QUEUE_FULL", "RATE_LIMITED", "DEADLINE_EXCEEDED", "DEADLINE_TOO_SHORT"})
_OF_SERVICE: Final = frozenset({"DRAINING", "ENGINE_UNAVAILABLE", "INTERNAL", "MODEL_UNLOADED"})


def blame(reason: str) -> Blame:
    """Return who must act on an error: its caller; whoever sends more than there is room for; or we."""
    if reason in _OF_SERVICE:
        return "service"
    return "load" if reason in _OF_LOAD else "client"


def _status(
    code: grpc.StatusCode, reason: str, message: str, details: list[Message], trailers: list[tuple[str, str]]
) -> Status:
    rich = status_pb2.Status(code=code.value[0], message=message)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        rich.details.append(packed)
    own = (REASON_KEY, reason)
    return Status(code, message, (own, *trailers, (DETAILS_KEY, rich.SerializeToString())), reason)
