"""The catalogue is complete, and what it says can be read by a stranger."""

from typing import Any, NamedTuple

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.vae.v1 import vae_pb2 as pb
from serving import errors
from serving.gateway import statuses
from tests.serving.test_errors import EXAMPLES

CALL_ERRORS = [error for error in EXAMPLES if not isinstance(error, errors.StartupError)]
MAX_TRAILERS_BYTES = 8 * 1024
"""What gRPC lets through by default: more metadata ends a call as RESOURCE_EXHAUSTED."""


class Ended(NamedTuple):
    """A failed call as `grpc_status` wants to see it."""

    status: statuses.Status

    def trailing_metadata(self) -> tuple[tuple[str, str | bytes], ...]:
        """Return the trailers."""
        return self.status.trailers

    def code(self) -> grpc.StatusCode:
        """Return the code."""
        return self.status.code

    def details(self) -> str:
        """Return the text."""
        return self.status.message


def _details(status: statuses.Status) -> dict[str, Any]:
    rich = rpc_status.from_call(Ended(status))  # type: ignore[arg-type]  # it is read like a call
    assert rich is not None
    assert rich.code == status.code.value[0]
    found: dict[str, Any] = {}
    for detail in rich.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if detail.Unpack(message):
                found[kind.__name__] = message
    assert len(found) == len(rich.details)
    return found


def test_the_catalogue_is_complete() -> None:
    """Each error that a call can raise has its status; those of the start have none."""
    assert set(statuses.CATALOGUE) == {type(error) for error in CALL_ERRORS}


def test_each_reason_is_used_once() -> None:
    """A program can tell all errors apart; INTERNAL is for what the catalogue does not know."""
    reasons = [number for _, number in statuses.CATALOGUE.values()]
    unused = {pb.ERROR_REASON_UNSPECIFIED, pb.ERROR_REASON_INTERNAL}
    assert sorted(reasons) == sorted(set(pb.ErrorReason.values()) - unused)


def test_codes_follow_who_must_act() -> None:
    """Bad input is INVALID_ARGUMENT; no error of ours is UNKNOWN or INTERNAL."""
    for kind, (code, _) in statuses.CATALOGUE.items():
        assert (code is grpc.StatusCode.INVALID_ARGUMENT) == issubclass(kind, errors.InvalidRequest)
        assert code not in {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.OK}


@pytest.mark.parametrize("error", CALL_ERRORS, ids=lambda error: type(error).__name__)
def test_a_stranger_can_read_the_details(error: errors.ServingError) -> None:
    """`grpc_status` parses code, text, reason and domain; bad input also has its field."""
    status = statuses.of(error)
    details = _details(status)
    reason = pb.ErrorReason.Name(statuses.CATALOGUE[type(error)][1]).removeprefix("ERROR_REASON_")
    assert (details["ErrorInfo"].reason, details["ErrorInfo"].domain) == (reason, "vae.v1")
    assert status.message == str(error)
    assert dict(status.trailers)["vae-error-reason"] == reason
    assert ("BadRequest" in details) == isinstance(error, errors.InvalidRequest)
    if isinstance(error, errors.InvalidRequest):
        (violation,) = details["BadRequest"].field_violations
        assert violation.field == dict(status.trailers)["vae-error-field"] == error.field
        assert f"{violation.field}: {violation.description}" == status.message


@pytest.mark.parametrize(
    "error",
    [errors.QueueFull(retry_after_s=1.25), errors.RateLimited(retry_after_s=1.25, limit="10 rows per second")],
    ids=lambda error: type(error).__name__,
)
def test_who_is_busy_says_when_to_return(error: errors.Busy) -> None:
    """The delay is there for programs (RetryInfo) and for gRPC itself (pushback)."""
    status = statuses.of(error)
    delay = _details(status)["RetryInfo"].retry_delay
    assert delay.ToMilliseconds() == 1250
    assert dict(status.trailers)["grpc-retry-pushback-ms"] == "1250"


def test_only_who_is_busy_gives_a_delay() -> None:
    """Nothing else tells a client to come back; too much metadata tells it not to."""
    for error in CALL_ERRORS:
        status = statuses.of(error)
        assert ("RetryInfo" in _details(status)) == isinstance(error, errors.Busy)
        pushback = dict(status.trailers).get("grpc-retry-pushback-ms")
        if isinstance(error, errors.MetadataTooLarge):
            assert pushback == "-1"
        else:
            assert (pushback is not None) == isinstance(error, errors.Busy)


def test_the_unexpected_shows_an_id_alone() -> None:
    """INTERNAL holds the id for the operator, and nothing else."""
    status = statuses.internal("abc123")
    assert status.code is grpc.StatusCode.INTERNAL
    assert status.message == "internal error abc123; tell the operator this id"
    details = _details(status)
    assert list(details) == ["ErrorInfo"]
    assert details["ErrorInfo"].reason == "INTERNAL"
    assert dict(details["ErrorInfo"].metadata) == {"error_id": "abc123"}


@pytest.mark.parametrize(
    "error",
    [
        errors.UnknownModelVersion(asked="\N{PILE OF POO}" * 100_000, loaded="a" * 12),
        errors.OutOfRange("f" * 60, expected="e" * 100_000, actual="a" * 100_000),
        errors.ShapeMismatch("data.shape", expected="(rows, 1) " * 10_000, actual=[2**63 - 1] * 100_000),
    ],
    ids=lambda error: type(error).__name__,
)
def test_trailers_stay_small(error: errors.ServingError) -> None:
    """However long the text, code, message and trailers arrive: the limit of gRPC is 8 KiB."""
    status = statuses.of(error)
    values = [value if isinstance(value, bytes) else value.encode() for _, value in status.trailers]
    # Bytes travel as base64, text outside ASCII as three characters a byte.
    size = sum(len(key) + 4 * len(value) // 3 for (key, _), value in zip(status.trailers, values, strict=True))
    size += 3 * len(status.message.encode()) if not status.message.isascii() else len(status.message)
    assert size < MAX_TRAILERS_BYTES


def test_an_error_of_the_start_has_no_status() -> None:
    """What must not come out of a call is left to INTERNAL."""
    with pytest.raises(KeyError, match="PortTaken"):
        statuses.of(errors.PortTaken(address="x"))
