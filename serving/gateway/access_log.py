"""One line for each call: who, what, how it ended, how large it was and where its time went. No payloads.

Lines are gathered for a tenth of a second and written together, by a thread: a system call for each would cost
more than the line, and whoever reads the log and stops must not stop the service. A process that is killed loses
that tenth of a second; to a reader who is too slow, the log says how many lines it has missed.
"""

import asyncio
import contextlib
import functools
import json
import struct
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, TextIO

import grpc

from serving.config import AccessLogMode
from serving.gateway.calls import Call

if sys.platform == "linux":
    import fcntl
    import termios

_FLUSH_AFTER_S: Final = 0.1
_MAX_LINES: Final = 50_000
"""Lines that wait to be written, some 16 MB; more are left out."""

_CHUNK: Final = 16_384
"""Characters that are written at once: a quarter of a pipe."""

_POLL_S: Final = (0.0005, 0.05)
"""Shortest and longest time between two looks at a pipe that its reader has not emptied, seconds."""

_MAX_TEXT: Final = 128
"""Longest text that a caller has chosen, characters."""


class AccessLog:
    """Writes what is known of a call that has ended.

    Args:
        mode: Which calls: all, those with another code than OK, or none.
        stream: Where to.
        as_json: Whether lines are JSON; by default unless the stream is a terminal.
        wall_clock: Seconds since 1970.
    """

    def __init__(
        self,
        mode: AccessLogMode,
        *,
        stream: TextIO | None = None,
        as_json: bool | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._mode, self._wall_clock = mode, wall_clock
        stream = stream or sys.stderr
        self._format = _json if (not stream.isatty() if as_json is None else as_json) else _text
        self._lines: list[str] = []
        self._is_scheduled = False
        self._writer = _Writer(stream)

    def write(self, call: Call, total_s: float) -> None:
        """Write a line about a call that took so many seconds."""
        if self._mode == "none" or (self._mode == "errors" and call.code is grpc.StatusCode.OK):
            return
        self._lines.append(self._format(call, total_s, self._wall_clock()))
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_later(_FLUSH_AFTER_S, self._hand_over)

    def flush(self, timeout_s: float = 1.0) -> None:
        """Return when what has been gathered is written, or its reader does not take it in time."""
        self._hand_over()
        self._writer.wait(timeout_s)

    def _hand_over(self) -> None:
        self._is_scheduled = False
        lines, self._lines = self._lines, []
        if lines:
            self._writer.put(lines)


class _Writer:
    """Writes lines in a thread, which begins with the first.

    A pipe is filled by half at most: the service's other lines, few as they are, come from its event loop.

    Args:
        stream: Where to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._waiting: deque[str] = deque()
        self._num_left_out = 0
        self._wake, self._is_idle = threading.Event(), threading.Event()
        self._is_idle.set()
        self._thread: threading.Thread | None = None
        self._is_over = False

    def put(self, lines: list[str]) -> None:
        """Let lines be written, as many as have room."""
        if self._is_over:
            return
        room = _MAX_LINES - len(self._waiting)
        self._num_left_out += max(0, len(lines) - room)
        self._waiting.extend(lines[:room] if room > 0 else ())
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="access log", daemon=True)
            self._thread.start()
        self._is_idle.clear()
        self._wake.set()

    def wait(self, timeout_s: float) -> None:
        """Return when nothing waits, or after the time."""
        self._is_idle.wait(timeout_s)

    def _work(self) -> None:
        while not self._is_over:
            self._wake.wait()
            self._wake.clear()
            try:
                self._write_all()
            except (OSError, ValueError):  # a pipe that nobody reads any more must not end calls
                self._is_over = True
            if self._is_over or not self._waiting:
                self._is_idle.set()

    def _write_all(self) -> None:
        while self._waiting:
            pause_s = _POLL_S[0]
            while not _has_room(self._stream):
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _POLL_S[1])
            lines, size = list[str](), 0
            while self._waiting and size < _CHUNK:
                lines.append(self._waiting.popleft())
                size += len(lines[-1])
            if self._num_left_out:
                left_out, self._num_left_out = self._num_left_out, 0
                lines.append(
                    json.dumps({"logger": "serving.access", "event": "lines left out", "number": left_out})
                )
            self._stream.write("\n".join(lines) + "\n")
            self._stream.flush()


def _has_room(stream: TextIO) -> bool:
    """Return whether a pipe is less than half full; what is no pipe has room, or keeps its writer waiting."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, ValueError):
            number = stream.fileno()
            capacity = fcntl.fcntl(number, fcntl.F_GETPIPE_SZ)
            (unread,) = struct.unpack("i", fcntl.ioctl(number, termios.FIONREAD, b"\0" * 4))
            return bool(unread < capacity / 2)
    return True


@functools.lru_cache(maxsize=4096)
def _quoted(text: str) -> str:
    """Return what a caller has chosen as JSON, cut: control characters cannot end the line."""
    return json.dumps(text[:_MAX_TEXT])


@functools.lru_cache(maxsize=2)
def _second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).strftime("%Y-%m-%dT%H:%M:%S")


def _clock(now: float) -> str:
    """Return a time of the wall, in milliseconds."""
    second = int(now)
    return f"{_second(second)}.{int((now - second) * 1000):03d}"


def _json(call: Call, total_s: float, now: float) -> str:
    """Return a line of JSON. Put together by hand: `json.dumps` of a dictionary would take four times as long."""
    line = (
        f'{{"time": "{_clock(now)}Z", "level": "info", "logger": "serving.access", "event": "call", "request_id": '
        f'"{call.request_id}", "client": {_quoted(call.client)}, "method": "{call.path}", "code": '
        f'"{call.code.name}", "total_us": {total_s * 1e6:.0f}, "request_bytes": {call.request_bytes}, '
        f'"response_bytes": {call.response_bytes}'
    )
    if trace_id := call.trace_id:
        line += f', "trace_id": "{trace_id}"'
    if call.reason:
        line += f', "reason": "{call.reason}"'
    taken = call.taken
    if taken is None:
        return line + "}"
    if taken.num_rows:
        line += (
            f', "rows": {taken.num_rows}, "queue_us": {taken.queue_s * 1e6:.0f}, "engine_us": '
            f'{taken.run_s * 1e6:.0f}, "batch_rows": {taken.batch_rows}'
        )
    return line + "}" if taken.seed is None else f'{line}, "seed": {taken.seed}}}'


def _text(call: Call, total_s: float, now: float) -> str:
    """Return a line to read: what a caller has chosen is quoted, so that it cannot pretend to be a line."""
    parts = [_clock(now)[11:], call.code.name, call.method, f"{total_s * 1000:.2f} ms"]
    taken = call.taken
    if taken is not None and taken.num_rows:
        parts.append(
            f"{taken.num_rows} rows (waited {taken.queue_s * 1000:.2f} ms, ran {taken.run_s * 1000:.2f} ms,"
            f" in a batch of {taken.batch_rows})"
        )
    if call.reason:
        parts.append(call.reason)
    parts += [f"client={_quoted(call.client)}", f"id={call.request_id}"]
    if trace_id := call.trace_id:
        parts.append(f"trace={trace_id}")
    return "  ".join(parts)
