"""One connection: frames in turn, a question and its answer, never two at a time.

Frames are received into memory made for them, so that arrays are views of what the system wrote; asyncio's streams
would copy three times, and gRPC costs two milliseconds of processor time for the 0.8 MB of 256 MNIST images.
"""

import asyncio
from collections.abc import Callable
from typing import Any, Final

import numpy as np

from serving.direct.frames import LENGTH, Buffer

MAX_FRAME_BYTES: Final = 512 * 2**20
"""Largest frame. Memory is taken as soon as a length is read, by then from somebody with the token."""


class FrameProtocol(asyncio.BufferedProtocol):
    """Receives frames; tells of each, and of the end.

    Args:
        on_frame: Told every frame, without its length.
        on_end: Told once that the connection has ended, whoever ended it.
        is_preamble: Whether bytes are what must come before any frame; nothing must if None.
        preamble_bytes: How many they are.
    """

    def __init__(
        self,
        on_frame: Callable[["FrameProtocol", Buffer], None],
        on_end: Callable[["FrameProtocol"], None],
        *,
        is_preamble: Callable[[bytes], bool] | None = None,
        preamble_bytes: int = 0,
    ) -> None:
        self._on_frame, self._on_end = on_frame, on_end
        self._is_preamble = is_preamble
        self._transport: asyncio.Transport | None = None
        self._head = bytearray(preamble_bytes or LENGTH.size)
        self._target: memoryview = memoryview(self._head)
        self._frame: np.ndarray[Any, np.dtype[np.uint8]] | None = None
        self._num_read = 0
        self.is_trusted = is_preamble is None
        """Whether the preamble has come, or none is needed."""

    @property
    def is_open(self) -> bool:
        """Whether frames can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, parts: list[Buffer]) -> None:
        """Send a frame. Large parts are taken by the system at once, or copied if it has no room."""
        assert self._transport is not None  # noqa: S101 - for the type checker: nobody sends before it is open
        for part in parts:
            self._transport.write(part)

    def close(self) -> None:
        """End the connection after what was sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection at once."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = transport  # type: ignore[assignment]  # uvloop's is no asyncio.Transport

    def connection_lost(self, _error: Exception | None) -> None:
        """Tell the end."""
        self._on_end(self)

    def get_buffer(self, _size_hint: int) -> memoryview:
        """Return where the next bytes go."""
        return self._target[self._num_read :]

    def buffer_updated(self, num_bytes: int) -> None:
        """Go on when what was waited for is there."""
        self._num_read += num_bytes
        if self._num_read < len(self._target):
            return
        self._num_read = 0
        if not self.is_trusted:
            self._check_preamble()
        elif self._frame is None:
            self._begin_frame()
        else:
            frame, self._frame = self._frame, None
            self._target = memoryview(self._head)
            self._on_frame(self, frame.data)

    def _check_preamble(self) -> None:
        if self._is_preamble is not None and self._is_preamble(bytes(self._head)):
            self.is_trusted = True
            self._head = bytearray(LENGTH.size)
            self._target = memoryview(self._head)
        else:
            self.abort()

    def _begin_frame(self) -> None:
        (length,) = LENGTH.unpack(self._head)
        if not 0 < length <= MAX_FRAME_BYTES:
            self.abort()
            return
        self._frame = np.empty(length, np.uint8)  # not zeroed: every byte is received before it is read
        self._target = self._frame.data
