"""One line for each call: who, what, how it ended, how large it was and where its time went. No payloads.

Lines are gathered for a tenth of a second and written together: a system call for each would cost more than the
line. A process that is killed loses that tenth of a second.
"""

import asyncio
import functools
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final, TextIO

import grpc

from serving.config import AccessLogMode
from serving.gateway.calls import Call

_FLUSH_AFTER_S: Final = 0.1
_MAX_LINES: Final = 2000
"""Lines that are written at once, whatever the time."""

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
        self._stream = stream or sys.stderr
        self._format = _json if (not self._stream.isatty() if as_json is None else as_json) else _text
        self._lines: list[str] = []
        self._is_scheduled = False

    def write(self, call: Call, total_s: float) -> None:
        """Write a line about a call that took so many seconds."""
        if self._mode == "none" or (self._mode == "errors" and call.code is grpc.StatusCode.OK):
            return
        self._lines.append(self._format(call, total_s, self._wall_clock()))
        if len(self._lines) >= _MAX_LINES:
            self.flush()
        elif not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_later(_FLUSH_AFTER_S, self.flush)

    def flush(self) -> None:
        """Write what has been gathered."""
        self._is_scheduled = False
        lines, self._lines = self._lines, []
        if lines:
            try:
                self._stream.write("\n".join(lines) + "\n")
                self._stream.flush()
            except (OSError, ValueError):  # a pipe that nobody reads any more must not end calls
                self._mode = "none"


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
    return "  ".join([*parts, f"client={_quoted(call.client)}", f"id={call.request_id}"])
