"""A client that may do what gRPC libraries refuse to: half bodies, bombs, floods. HTTP/2 frames by `h2`."""

import gzip
import socket
import struct
import time
from types import TracebackType
from typing import Final, NamedTuple, Self
from urllib.parse import unquote

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions

Headers = list[tuple[str, str]]

CHUNK: Final = 2**16


class Answer(NamedTuple):
    """How a call ended."""

    status: int | None
    """gRPC status code; None if the stream or the connection ended without one."""

    message: str
    trailers: dict[str, str]
    body: bytes
    seconds: float
    reset: int | None
    """HTTP/2 error code of a reset stream."""


class RawClient:
    """One connection.

    Args:
        port: On loopback.
        timeout_s: Longest wait for anything.
    """

    def __init__(self, port: int, *, timeout_s: float = 10.0) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout_s)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # Outbound checks are off: what is wrong is sent on purpose.
        config = h2.config.H2Configuration(
            client_side=True, validate_outbound_headers=False, normalize_outbound_headers=False
        )
        self.connection = h2.connection.H2Connection(config)
        self.connection.initiate_connection()
        self.flush()
        self.is_closed = False
        self._events: list[h2.events.Event] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def flush(self) -> None:
        """Send what is ready."""
        self._socket.sendall(self.connection.data_to_send())

    def open(self, path: str, headers: Headers | None = None, *, end: bool = False) -> int:
        """Begin a call; return its stream."""
        stream = int(self.connection.get_next_available_stream_id())
        base = [
            (":method", "POST"),
            (":scheme", "http"),
            (":path", f"/{path}"),
            (":authority", "localhost"),
            ("te", "trailers"),
            ("content-type", "application/grpc"),
        ]
        self.connection.send_headers(stream, base + (headers or []), end_stream=end)
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = True) -> None:
        """Send bytes of a body as flow control lets them go."""
        while data or end:
            room = min(self.connection.local_flow_control_window(stream), self.connection.max_outbound_frame_size)
            part, data = data[:room], data[room:]
            if data and not part:
                if not self._receive():
                    return
                continue
            self.connection.send_data(stream, part, end_stream=end and not data)
            self.flush()
            if not data:
                return

    def answer(self, stream: int) -> Answer:
        """Wait for the end of a call."""
        began = time.monotonic()
        headers: dict[str, str] = {}
        body, seen, reset = bytearray(), 0, None
        while True:
            while seen < len(self._events):
                event = self._events[seen]
                seen += 1
                if getattr(event, "stream_id", None) != stream:
                    continue
                if isinstance(event, h2.events.ResponseReceived | h2.events.TrailersReceived):
                    headers |= {key.decode(): value.decode() for key, value in event.headers or ()}
                elif isinstance(event, h2.events.DataReceived):
                    body += event.data or b""
                elif isinstance(event, h2.events.StreamReset):
                    reset = int(event.error_code or 0)
                if isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                    return _answer(headers, bytes(body), time.monotonic() - began, reset)
            if not self._receive():
                return _answer(headers, bytes(body), time.monotonic() - began, reset)

    def call(self, path: str, body: bytes, headers: Headers | None = None) -> Answer:
        """Make a whole call with one message."""
        stream = self.open(path, headers)
        self.send(stream, message(body))
        return self.answer(stream)

    def wait_closed(self, timeout_s: float) -> float:
        """Return after how many seconds the server ended the connection.

        Raises:
            TimeoutError: If it did not.
        """
        began = time.monotonic()
        self._socket.settimeout(timeout_s)
        while not self.is_closed:
            if time.monotonic() - began > timeout_s:
                raise TimeoutError
            self._receive()
        return time.monotonic() - began

    def _receive(self) -> bool:
        """Take what comes; return False when the connection has ended."""
        try:
            data = self._socket.recv(CHUNK)
        except ConnectionError:
            data = b""
        if not data:
            self.is_closed = True
            return False
        try:
            events = self.connection.receive_data(data)
        except h2.exceptions.ProtocolError:  # a ping after the server's goodbye, for which h2 is too strict
            self.is_closed = True
            return False
        for event in events:
            if isinstance(event, h2.events.DataReceived):
                self.connection.acknowledge_received_data(event.flow_controlled_length or 0, event.stream_id or 0)
            if isinstance(event, h2.events.ConnectionTerminated):
                self.is_closed = True
            self._events.append(event)
        try:
            self.flush()
        except ConnectionError:
            self.is_closed = True
        return True


def message(body: bytes, *, compressed: bool = False) -> bytes:
    """Return a gRPC message: a flag, a length, the bytes."""
    content = gzip.compress(body) if compressed else body
    return struct.pack(">BI", compressed, len(content)) + content


def _answer(headers: dict[str, str], body: bytes, seconds: float, reset: int | None) -> Answer:
    status = headers.get("grpc-status")
    return Answer(
        status=int(status) if status is not None else None,
        message=unquote(headers.get("grpc-message", "")),
        trailers=headers,
        body=body,
        seconds=seconds,
        reset=reset,
    )
