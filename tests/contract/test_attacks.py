"""What strangers do to a server on purpose: each ends in time and in the open, and a canary feels nothing.

The canary (see conftest) calls Encode and Sample twenty times a second through all of it; one wrong, refused or
late answer fails the run, and so does memory that is not let go.
"""

import os
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from protos.inference import inference_pb2 as oip
from protos.vae.v1 import vae_pb2 as pb
from serving.tensors import to_message
from tests.bundles import DATA_SHAPE
from tests.contract.conftest import ALICE, BODY_TIMEOUT_S, HANDSHAKE_TIMEOUT_S, MAX_REQUEST_BYTES
from tests.contract.wire import Answer, Headers, RawClient, message
from tests.end_to_end.service import Service, wait_until

INVALID_ARGUMENT, DEADLINE_EXCEEDED, RESOURCE_EXHAUSTED, UNIMPLEMENTED, UNAUTHENTICATED = 3, 4, 8, 12, 16
ENCODE = "vae.v1.VaeService/Encode"
SAMPLE = "vae.v1.VaeService/Sample"
STREAM = "vae.v1.VaeService/SampleStream"
INFER = "inference.GRPCInferenceService/ModelInfer"
WITH_KEY: Headers = [("authorization", f"Bearer {ALICE}")]
SLACK_S = 3.0
"""What a busy machine may add to a time limit."""

NUM_BOMBS = 50
NUM_SLOW = 100
NUM_RESETS = 2000


def one_image() -> bytes:
    """Return a good Encode request."""
    return pb.EncodeRequest(data=to_message(np.zeros((1, *DATA_SHAPE), np.uint8))).SerializeToString()


def open_files(service: Service) -> int:
    """Return the file descriptors of the service."""
    return int(service.process.num_fds())


def test_a_good_call_by_raw_frames_is_answered(port: int) -> None:
    """The attacker's own tool works: what it is refused below is refused for its own sake."""
    with RawClient(port) as client:
        answer = client.call(ENCODE, one_image(), WITH_KEY)
    assert answer.status == 0
    assert pb.EncodeResponse.FromString(answer.body[5:]).mean.shape == [1, 2]


@pytest.mark.parametrize("path", [ENCODE, SAMPLE, STREAM, INFER])
@pytest.mark.parametrize(
    "part", [b"", b"\0", b"\0\0\0\x01", message(b"x" * 1000)[:500]], ids=["none", "flag", "prefix", "half"]
)
def test_a_body_that_does_not_arrive_is_timed_out(port: int, path: str, part: bytes) -> None:
    """Headers and half a body hold a call for the body's time limit, not for ever."""
    with RawClient(port) as client:
        stream = client.open(path, WITH_KEY)
        if part:
            client.send(stream, part, end=False)
        answer = client.answer(stream)
    assert answer.status == DEADLINE_EXCEEDED, answer
    assert answer.trailers["vae-error-reason"] == "REQUEST_STALLED"
    assert answer.seconds < BODY_TIMEOUT_S + SLACK_S


def test_strangers_are_refused_before_their_body(port: int) -> None:
    """Without credentials the answer comes at once, while the body is still awaited."""
    with RawClient(port) as client:
        stream = client.open(ENCODE)
        answer = client.answer(stream)
    assert answer.status == UNAUTHENTICATED
    assert answer.seconds < BODY_TIMEOUT_S / 2


@pytest.mark.parametrize("path", [ENCODE, SAMPLE, STREAM])
def test_a_body_that_ends_without_a_message_is_malformed(port: int, path: str) -> None:
    """The end of the stream instead of a message is bad input."""
    with RawClient(port) as client:
        stream = client.open(path, WITH_KEY, end=True)
        answer = client.answer(stream)
    assert answer.status == INVALID_ARGUMENT, answer


def test_a_body_that_breaks_off_ends_the_call(port: int) -> None:
    """A stream that ends in the middle of a message is refused, not computed."""
    with RawClient(port) as client:
        stream = client.open(ENCODE, WITH_KEY)
        client.send(stream, message(one_image())[:-3], end=True)
        answer = client.answer(stream)
    assert answer.status not in {0, None} or answer.reset is not None, answer


def test_a_length_beyond_the_limit_is_refused_unread(port: int) -> None:
    """A prefix that promises 4 GiB is refused when it is read."""
    with RawClient(port) as client:
        stream = client.open(ENCODE, WITH_KEY)
        client.send(stream, struct.pack(">BI", 0, 2**32 - 1), end=False)
        answer = client.answer(stream)
    assert answer.status == RESOURCE_EXHAUSTED, answer
    assert answer.seconds < BODY_TIMEOUT_S


def test_bombs_do_not_go_off(guarded: Service) -> None:
    """Fifty gzip bombs of 64 MiB each are refused as compressed, and leave no memory behind."""
    bomb = message(bytes(64 * 2**20), compressed=True)
    before = guarded.process.memory_info().rss

    def throw(_: int) -> Answer:
        with RawClient(guarded.port) as client:
            stream = client.open(ENCODE, [*WITH_KEY, ("grpc-encoding", "gzip")])
            client.send(stream, bomb)
            return client.answer(stream)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(throw, range(NUM_BOMBS)))
    assert {answer.status for answer in answers} <= {UNIMPLEMENTED, RESOURCE_EXHAUSTED}
    assert (guarded.process.memory_info().rss - before) / 2**20 < 50


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "snappy", "x" * 100])
def test_a_compression_that_is_not_offered_is_unimplemented(port: int, encoding: str) -> None:
    """Compressed messages are not in the contract unless the operator says so."""
    with RawClient(port) as client:
        stream = client.open(ENCODE, [*WITH_KEY, ("grpc-encoding", encoding)])
        client.send(stream, message(one_image(), compressed=True))
        answer = client.answer(stream)
    assert answer.status in {UNIMPLEMENTED, 13}, answer


def test_a_parse_bomb_stays_small(guarded: Service) -> None:
    """Requests of a hundred thousand empty submessages each, eight at a time, do not fill the memory."""
    tensors = oip.ModelInferRequest(
        model_name="decoder", inputs=[oip.ModelInferRequest.InferInputTensor()] * (MAX_REQUEST_BYTES // 2 - 64)
    )
    body = tensors.SerializeToString()
    assert len(body) < MAX_REQUEST_BYTES
    before = guarded.process.memory_info().rss

    def throw(_: int) -> Answer:
        with RawClient(guarded.port) as client:
            return client.call(INFER, body, WITH_KEY)

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(throw, range(40)))
    assert {answer.status for answer in answers} <= {INVALID_ARGUMENT, RESOURCE_EXHAUSTED}
    assert (guarded.process.memory_info().rss - before) / 2**20 < 100


@pytest.mark.parametrize(
    "headers",
    [
        [("x-a", "y" * 6000), ("x-b", "y" * 6000), ("x-c", "y" * 12_000)],
        [(f"x-{number}", "y" * 100) for number in range(400)],
        [("x-request-id", "y" * 40_000)],
    ],
    ids=["long", "many", "request id"],
)
def test_a_flood_of_metadata_is_refused(port: int, headers: Headers) -> None:
    """More than twice the metadata limit never reaches a method, though gRPC's own limit needs consent."""
    with RawClient(port) as client:
        stream = client.open(ENCODE, WITH_KEY + headers)
        client.send(stream, message(one_image()))
        answer = client.answer(stream)
    assert answer.status == RESOURCE_EXHAUSTED, answer
    assert answer.trailers["vae-error-reason"] == "METADATA_TOO_LARGE"
    assert answer.trailers["grpc-retry-pushback-ms"] == "-1"


@pytest.mark.parametrize(
    "value", ["a b", "\x7f\x80\xff", "1" * 65, "../../etc/passwd", "${jndi:ldap://x}", '"},{"a":"b'], ids=range(6)
)
def test_a_bad_request_id_is_replaced(port: int, value: str) -> None:
    """Ids that are not well formed are ignored; the call is answered."""
    with RawClient(port) as client:
        answer = client.call(ENCODE, one_image(), [*WITH_KEY, ("x-request-id", value)])
    assert answer.status == 0 or answer.reset is not None


@pytest.mark.parametrize("timeout", ["1n", "0u", "99999999H", "5", "x", "-1S", "1" * 9 + "S"])
def test_strange_deadlines_end_in_the_open(port: int, timeout: str) -> None:
    """Any deadline header gives an answer, a deadline or a refusal, and soon."""
    with RawClient(port) as client:
        stream = client.open(ENCODE, [*WITH_KEY, ("grpc-timeout", timeout)])
        client.send(stream, message(one_image()))
        answer = client.answer(stream)
    assert answer.status in {0, 3, DEADLINE_EXCEEDED, 8, 13} or answer.reset is not None, answer
    assert answer.seconds < SLACK_S


def test_silent_connections_are_closed(guarded: Service) -> None:
    """A hundred sockets that say nothing are gone after the handshake's time limit."""
    before = open_files(guarded)
    sockets = [socket.create_connection(("127.0.0.1", guarded.port)) for _ in range(NUM_SLOW)]
    try:
        deadline = time.monotonic() + HANDSHAKE_TIMEOUT_S + 2 * SLACK_S
        for silent in sockets:
            silent.settimeout(max(0.1, deadline - time.monotonic()))
            while silent.recv(4096):  # the server's own settings, then the end
                pass
    finally:
        for silent in sockets:
            silent.close()
    wait_until(lambda: open_files(guarded) < before + 10, "the descriptors are free", timeout_s=20)


def test_many_half_bodies_are_all_let_go(guarded: Service) -> None:
    """A hundred calls that stop in the middle of their bodies end together, each with its status."""
    clients = [RawClient(guarded.port) for _ in range(NUM_SLOW)]
    try:
        streams = []
        for client in clients:
            stream = client.open(ENCODE, WITH_KEY)
            client.send(stream, message(one_image())[:20], end=False)
            streams.append(stream)
        answers = [client.answer(stream) for client, stream in zip(clients, streams, strict=True)]
    finally:
        for client in clients:
            client.__exit__(None, None, None)
    assert {answer.status for answer in answers} == {DEADLINE_EXCEEDED}


def test_a_reader_that_stops_reading_stops_the_work(port: int) -> None:
    """A stream whose reader takes nothing is bounded by flow control; the connection's end is the stream's."""
    request = pb.SampleStreamRequest(num_samples=100_000, seed=1, include_latents=True)
    clients = [RawClient(port) for _ in range(20)]
    for client in clients:
        stream = client.open(STREAM, WITH_KEY)
        client.send(stream, message(request.SerializeToString()))
    for client in clients:
        client.__exit__(None, None, None)


def test_rapid_resets_do_not_starve_others(port: int) -> None:
    """Two thousand calls that are opened and reset (CVE-2023-44487) end in a closed connection at worst."""
    with RawClient(port) as client:
        connection = client.connection
        try:
            for _ in range(NUM_RESETS):
                stream = client.open(ENCODE, WITH_KEY)
                connection.reset_stream(stream, 8)
            client.flush()
        except (ConnectionError, TimeoutError):
            pass  # the server had enough: as good as serving on


def test_pings_in_plenty_close_the_connection(port: int) -> None:
    """A client that pings without calling is sent away."""
    with RawClient(port) as client:
        for number in range(20):
            try:
                client.connection.ping(struct.pack(">Q", number))
                client.flush()
            except ConnectionError:
                break
        assert client.wait_closed(SLACK_S + 5) < SLACK_S + 5


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 64,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 32,
        os.urandom(4096),
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0" + (b"\0\0\6\4\0\0\0\0\0\0\3\0\0\0\1") * 3000,
    ],
    ids=["http/1.1", "bad frame", "tls", "random", "settings"],
)
def test_what_is_not_grpc_ends_the_connection_or_nothing(port: int, garbage: bytes) -> None:
    """Bytes of another protocol are answered by a closed connection, or ignored, in time."""
    with socket.create_connection(("127.0.0.1", port), timeout=HANDSHAKE_TIMEOUT_S + SLACK_S) as stranger:
        try:
            stranger.sendall(garbage)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(65_536):
                pass
        except ConnectionError:
            pass


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
@pytest.mark.parametrize("content_type", ["application/grpc", "text/html"])
def test_other_http_is_refused(port: int, method: str, content_type: str) -> None:
    """Only POST of application/grpc is a call."""
    with RawClient(port) as client:
        stream = int(client.connection.get_next_available_stream_id())
        headers = [
            (":method", method), (":scheme", "http"), (":path", f"/{ENCODE}"), (":authority", "x"),
            ("content-type", content_type), *WITH_KEY,
        ]  # fmt: skip
        client.connection.send_headers(stream, headers, end_stream=False)
        client.flush()
        client.send(stream, message(one_image()))
        answer = client.answer(stream)
    assert answer.status != 0 or content_type == "text/html", answer
