"""Connections: frames arrive whole however they are cut, and strangers and giants do not."""

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from serving.direct import connection
from serving.direct.connection import FrameProtocol
from serving.direct.frames import LENGTH, Buffer, pack, unpack


class Received:
    """What one end was told."""

    def __init__(self) -> None:
        self.frames: list[bytes] = []
        self.num_ends = 0

    def on_frame(self, _: FrameProtocol, frame: Buffer) -> None:
        """Keep a frame."""
        self.frames.append(bytes(frame))

    def on_end(self, _: FrameProtocol) -> None:
        """Count an end."""
        self.num_ends += 1


def feed(protocol: FrameProtocol, content: bytes, step: int) -> None:
    """Hand over bytes as a transport does, at most `step` at a time."""
    while content:
        buffer = protocol.get_buffer(-1)
        piece = content[: min(step, len(buffer))]
        buffer[: len(piece)] = piece
        protocol.buffer_updated(len(piece))
        content = content[len(piece) :]


@pytest.mark.parametrize("step", [1, 7, 8, 9, 100_000])
def test_frames_arrive_whole_however_they_are_cut(step: int) -> None:
    """Two frames in one stream of bytes are two frames, for any sizes of the pieces."""
    received = Received()
    protocol = FrameProtocol(received.on_frame, received.on_end)
    values: list[Any] = [np.arange(10, dtype=np.float32), np.arange(300, dtype=np.uint8)]
    feed(protocol, b"".join(part for value in values for part in pack("x", [value])), step)
    assert [unpack(frame)[1][0].tobytes() for frame in received.frames] == [value.tobytes() for value in values]


def test_no_frame_is_read_before_the_preamble() -> None:
    """Only what follows the right preamble is a frame."""
    received = Received()
    protocol = FrameProtocol(
        received.on_frame, received.on_end, is_preamble=lambda given: given == b"open", preamble_bytes=4
    )
    feed(protocol, b"open" + b"".join(pack("x", [])), 3)
    assert len(received.frames) == 1
    assert protocol.is_trusted


async def talk(is_preamble: Callable[[bytes], bool], content: bytes) -> tuple[Received, bytes]:
    """Send bytes to a listening protocol over a real socket; return what it received and what came back."""
    received = Received()
    loop = asyncio.get_running_loop()

    def make() -> FrameProtocol:
        return FrameProtocol(received.on_frame, received.on_end, is_preamble=is_preamble, preamble_bytes=4)

    server = await loop.create_server(make, "127.0.0.1", 0)
    try:
        reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname()[:2])
        writer.write(content)
        answer: Any = b""
        with contextlib.suppress(ConnectionResetError):
            answer = await asyncio.wait_for(reader.read(), 5)
        writer.close()
    finally:
        server.close()
    return received, answer


async def test_a_stranger_is_cut_off_at_once() -> None:
    """Whoever begins with other bytes gets no answer, no frame of theirs is read, and the connection ends."""
    received, answer = await talk(lambda given: given == b"open", b"shut" + b"".join(pack("x", [])))
    assert (received.frames, received.num_ends, answer) == ([], 1, b"")


@pytest.mark.parametrize("length", [0, connection.MAX_FRAME_BYTES + 1, 2**64 - 1])
async def test_no_memory_is_taken_for_an_absurd_length(length: int) -> None:
    """A frame of no bytes, or of more than the limit, ends the connection."""
    received, answer = await talk(lambda _: True, b"open" + LENGTH.pack(length))
    assert (received.frames, received.num_ends, answer) == ([], 1, b"")
