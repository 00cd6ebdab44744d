"""What a client knows of its calls: how many, how they ended, and how large their messages were."""

import contextlib
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from protos.vae.v1 import vae_pb2_grpc

NO_RETRIES = [("grpc.enable_retries", 0)]
"""Options of a channel on which one call of the client is one call of the service."""

BEFORE_THE_BODY = frozenset({"UNAUTHENTICATED", "RATE_LIMITED", "METADATA_TOO_LARGE"})
"""Reasons for which a call is ended before its body is read."""


class Ledger(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Counts what goes through a channel. Any number of threads may call."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.calls: Counter[tuple[str, str]] = Counter()
        """By method and code."""
        self.errors: Counter[tuple[str, str]] = Counter()
        """By method and reason."""
        self.request_bytes: Counter[tuple[str, ...]] = Counter()
        """By method, of requests that were read."""
        self.response_bytes: Counter[tuple[str, ...]] = Counter()
        """By method."""

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Count what clients that are made meanwhile call."""
        original = vae_pb2_grpc.VaeServiceStub

        def stub(channel: grpc.Channel) -> object:
            return original(grpc.intercept_channel(channel, self))

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vae_pb2_grpc, "VaeServiceStub", stub)
            yield

    @property
    def by_method(self) -> Counter[tuple[str, ...]]:
        """Calls by method."""
        counted: Counter[tuple[str, ...]] = Counter()
        for (method, _), number in self.calls.items():
            counted[method,] += number
        return counted

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401 - of gRPC
        """Count a call that answers once."""
        outcome = continuation(details, request)
        size = outcome.result().ByteSize() if outcome.code() is grpc.StatusCode.OK else 0
        self._count(details.method, outcome, request.ByteSize(), size)
        return outcome

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:  # noqa: ANN401 - as above
        """Count a call that answers with a stream, when it has ended."""
        return _Stream(self, continuation(details, request), details.method, request.ByteSize())

    def _count(self, path: str, outcome: Any, request_bytes: int, response_bytes: int) -> None:  # noqa: ANN401
        method = path.rpartition("/")[2]
        trailers = dict(outcome.trailing_metadata() or ())
        reason = str(trailers.get("vae-error-reason", ""))
        with self._lock:
            self.calls[method, outcome.code().name] += 1
            if reason:
                self.errors[method, reason] += 1
            if reason not in BEFORE_THE_BODY:
                self.request_bytes[method,] += request_bytes
            if response_bytes:
                self.response_bytes[method,] += response_bytes


class _Stream:
    """A stream whose messages are measured as they are read to the end."""

    def __init__(self, ledger: Ledger, call: Any, path: str, request_bytes: int) -> None:  # noqa: ANN401 - of gRPC
        self._ledger, self._call, self._path, self._request_bytes = ledger, call, path, request_bytes

    def __iter__(self) -> Iterator[Any]:
        size = 0
        try:
            for response in self._call:
                size += response.ByteSize()
                yield response
        finally:
            self._ledger._count(self._path, self._call, self._request_bytes, size)  # noqa: SLF001 - its part

    def cancel(self) -> None:
        """Let go of the call."""
        self._call.cancel()
