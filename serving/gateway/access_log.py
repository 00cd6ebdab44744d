"""One line for each call: who, what, how it ended, how large it was and where its time went. No payloads.

Lines are gathered for a tenth of a second and written together: a line costs some 10 microseconds of the event
loop's time, as a record of `logging` it would be 40. A process that is killed loses that tenth of a second.
"""

import asyncio
import json
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Final, TextIO

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
        self._lines.append(self._format(_facts(call, total_s, self._wall_clock())))
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


def _facts(call: Call, total_s: float, now: float) -> dict[str, Any]:
    taken = call.taken
    facts: dict[str, Any] = {
        "time": datetime.fromtimestamp(now, UTC).isoformat(timespec="milliseconds"),
        "level": "info",
        "logger": "serving.access",
        "event": "call",
        "request_id": call.request_id,
        "client": call.client[:_MAX_TEXT],
        "method": call.path,
        "code": call.code.name,
        "total_us": round(total_s * 1e6),
        "request_bytes": call.request_bytes,
        "response_bytes": call.response_bytes,
    }
    if trace_id := call.trace_id:
        facts["trace_id"] = trace_id
    if call.reason:
        facts["reason"] = call.reason
    if taken is not None and taken.num_rows:
        facts["rows"] = taken.num_rows
        facts["queue_us"] = round(taken.queue_s * 1e6)
        facts["engine_us"] = round(taken.run_s * 1e6)
        facts["batch_rows"] = taken.batch_rows
    if taken is not None and taken.seed is not None:
        facts["seed"] = taken.seed
    return facts


def _json(facts: dict[str, Any]) -> str:
    return json.dumps(facts)


def _text(facts: dict[str, Any]) -> str:
    """Return a line to read: what a caller has chosen is quoted, so that it cannot pretend to be a line."""
    method = facts["method"].rpartition("/")[2]
    parts = [facts["time"][11:23], facts["code"], method, f"{facts['total_us'] / 1000:.2f} ms"]
    if "rows" in facts:
        parts.append(
            f"{facts['rows']} rows (waited {facts['queue_us'] / 1000:.2f} ms, ran"
            f" {facts['engine_us'] / 1000:.2f} ms, in a batch of {facts['batch_rows']})"
        )
    parts += [facts[name] for name in ("reason",) if name in facts]
    parts += [f"client={json.dumps(facts['client'])}", f"id={facts['request_id']}"]
    if "trace_id" in facts:
        parts.append(f"trace={facts['trace_id']}")
    return "  ".join(parts)
