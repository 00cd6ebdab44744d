"""Every RPC with every bad input: its code, its reason, its field, and nothing of the inside."""

import re
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from protos.inference import inference_pb2 as oip
from protos.vae.v1 import vae_pb2 as pb
from tests.bundles import DATA_SHAPE
from tests.contract.cases import CASES, OIP, STREAMS, UNARY, VAE, Case, floats, infer
from tests.contract.conftest import ALICE, BOB, MAX_REQUEST_BYTES, key

INVALID = grpc.StatusCode.INVALID_ARGUMENT
TIMEOUT_S = 10.0
MAX_TRAILERS_BYTES = 8 * 1024
Metadata = tuple[tuple[str, str], ...]
AS_ALICE = key(ALICE)

INSIDE = re.compile(
    r"Traceback|File \"|\.py\b|site-packages|/(home|root|tmp|usr|work)/|0x[0-9a-f]{6,}|object at|<class|"
    r"\b\d{1,3}(\.\d{1,3}){3}\b|Exception|Error\b|numpy|onnxruntime|protobuf|asyncio|errno",
    re.IGNORECASE,
)
"""What a stranger must never read: stacks, files, classes, addresses, libraries."""

OK = {
    grpc.StatusCode.INVALID_ARGUMENT,
    grpc.StatusCode.NOT_FOUND,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.UNAUTHENTICATED,
    grpc.StatusCode.PERMISSION_DENIED,
    grpc.StatusCode.UNIMPLEMENTED,
}
"""The codes that a bad request may end with."""


def failure(
    channel: grpc.Channel, method: str, request: Message | bytes, metadata: Metadata = AS_ALICE
) -> grpc.RpcError:
    """Return the error of a call that must fail."""
    body = request if isinstance(request, bytes) else request.SerializeToString()
    try:
        if method in STREAMS:
            stream: Any = channel.stream_stream(f"/{method}")
            list(stream(iter([body]), metadata=metadata, timeout=TIMEOUT_S))
        else:
            unary: Any = channel.unary_unary(f"/{method}")
            unary(body, metadata=metadata, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"{method} answered what it must refuse")


def trailers_of(error: grpc.RpcError) -> dict[str, str | bytes]:
    """Return the trailing metadata of a failed call."""
    pairs: Any = error.trailing_metadata() or ()
    return dict(pairs)


def details_of(error: grpc.RpcError) -> dict[str, Any]:
    """Return the details of an error by their type; each may come once."""
    rich = rpc_status.from_call(error)  # type: ignore[arg-type]  # an error is a call too
    assert rich is not None, "no details"
    found: dict[str, Any] = {}
    for detail in rich.details:
        for kind in (error_details_pb2.ErrorInfo, error_details_pb2.BadRequest, error_details_pb2.RetryInfo):
            message = kind()
            if detail.Unpack(message):
                assert kind.__name__ not in found
                found[kind.__name__] = message
    assert len(found) == len(rich.details), "a detail of another type"
    return found


def check_nothing_leaks(error: grpc.RpcError) -> None:
    """Assert that what a stranger reads is fit to be read, and small."""
    trailers = trailers_of(error)
    texts = [error.details() or "", *(value for value in trailers.values() if isinstance(value, str))]
    for text in texts:
        assert not INSIDE.search(text), text
        assert len(text) <= 512
    size = sum(len(key_) + len(value) for key_, value in trailers.items()) + len(error.details() or "")
    assert size < MAX_TRAILERS_BYTES


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.method.rpartition('/')[2]}: {case.why}")
def test_bad_input_ends_as_the_contract_says(channel: grpc.Channel, case: Case) -> None:
    """Code, reason and field are what the contract says; the trailers say the same as the details."""
    error = failure(channel, case.method, case.request)
    assert error.code() is case.code, error.details()
    details = details_of(error)
    reason = details["ErrorInfo"].reason
    assert details["ErrorInfo"].domain == "vae.v1"
    assert f"ERROR_REASON_{reason}" in pb.ErrorReason.keys()  # noqa: SIM118 - an enum wrapper
    trailers = trailers_of(error)
    assert trailers["vae-error-reason"] == reason
    if case.reason:
        assert reason == case.reason, error.details()
    if case.code is INVALID:
        (violation,) = details["BadRequest"].field_violations
        assert violation.description
        assert trailers["vae-error-field"] == violation.field
        if case.field:
            assert violation.field.startswith(case.field)
    check_nothing_leaks(error)


@pytest.mark.parametrize("method", [*UNARY, *STREAMS])
@pytest.mark.parametrize(
    "metadata",
    [
        (),
        (("authorization", "Bearer nonsense"),),
        (("authorization", ALICE),),
        (("authorization", f"Basic {ALICE}"),),
        (("authorization", f"Bearer {ALICE}x"),),
        (("authorization", f"Bearer {ALICE.upper()}"),),
        (("authorization", "Bearer "),),
        (("x-api-key", "wrong"),),
        (("x-api-key", ""),),
        (("authorization", "Bearer eyJhbGciOiJub25lIn0.eyJzdWIiOiJhIn0."),),
        (("authorization", f"Bearer {ALICE}"), ("x-api-key", "wrong")),
    ],
    ids=[
        "none",
        "nonsense",
        "no scheme",
        "basic",
        "longer",
        "capitals",
        "empty",
        "wrong",
        "blank",
        "alg none",
        "two",
    ],
)
def test_without_credentials_nothing_is_answered(
    channel: grpc.Channel, method: str, metadata: tuple[tuple[str, str], ...]
) -> None:
    """Every method refuses strangers in the same words, whatever they bring."""
    error = failure(channel, method, b"", metadata)
    assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert details_of(error)["ErrorInfo"].reason == "UNAUTHENTICATED"
    check_nothing_leaks(error)
    for _, value in metadata:
        assert not value or value not in (error.details() or "")


@pytest.mark.parametrize("method", [*UNARY, *STREAMS])
def test_a_client_calls_what_it_was_granted(channel: grpc.Channel, method: str) -> None:
    """Bob may call Encode and nothing else."""
    if method == f"{VAE}/Encode":
        request = pb.EncodeRequest(data=floats(1, *DATA_SHAPE)).SerializeToString()
        call: Any = channel.unary_unary(f"/{method}")
        call(request, metadata=key(BOB), timeout=TIMEOUT_S)
        return
    error = failure(channel, method, b"", key(BOB))
    assert error.code() is grpc.StatusCode.PERMISSION_DENIED
    assert details_of(error)["ErrorInfo"].reason == "PERMISSION_DENIED"
    check_nothing_leaks(error)


@pytest.mark.parametrize(
    "method", [f"{VAE}/Train", f"{VAE}/", "vae.v2.VaeService/Encode", "x/y", f"{OIP}/TraceSetting"]
)
def test_an_unknown_method_is_unimplemented(channel: grpc.Channel, method: str) -> None:
    """What does not exist says so, to strangers too."""
    error = failure(channel, method, b"")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    check_nothing_leaks(error)


@pytest.mark.parametrize("method", [*UNARY, *STREAMS])
def test_a_message_above_the_limit_is_refused(channel: grpc.Channel, method: str) -> None:
    """The transport refuses what is larger than the largest request, whatever the method."""
    error = failure(channel, method, bytes(MAX_REQUEST_BYTES + 128 * 1024))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    check_nothing_leaks(error)


def test_errors_of_a_stream_leave_it_open(channel: grpc.Channel) -> None:
    """ModelStreamInfer answers a bad request with a text, and the next one with its result."""
    requests = [infer(id="bad", model_version="7"), infer(id="good")]
    call = channel.stream_stream(
        f"/{OIP}/ModelStreamInfer",
        request_serializer=oip.ModelInferRequest.SerializeToString,
        response_deserializer=oip.ModelStreamInferResponse.FromString,
    )
    bad, good = call(iter(requests), metadata=key(ALICE), timeout=TIMEOUT_S)
    assert "not found" in bad.error_message
    assert not INSIDE.search(bad.error_message)
    assert bad.infer_response.id == "bad"
    assert not good.error_message
    assert good.infer_response.id == "good"


def test_every_code_is_of_the_contract() -> None:
    """The table expects no code that callers are promised never to see."""
    assert {case.code for case in CASES} <= OK
