"""The log format: one event a line, readable on a terminal, JSON elsewhere."""

import json
import logging
import sys
from typing import Final

_STANDARD: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_MAX_TEXT: Final = 512


def configure(*, as_json: bool | None = None, level: int = logging.INFO) -> None:
    """Send the log of this package to standard error.

    Args:
        as_json: Whether lines are JSON. By default they are unless standard error is a terminal.
        level: Least severe level that is written.
    """
    handler = logging.StreamHandler(sys.stderr)
    is_json = not sys.stderr.isatty() if as_json is None else as_json
    handler.setFormatter(JsonFormatter() if is_json else TextFormatter("%(asctime)s %(levelname)s %(message)s"))
    root = logging.getLogger("serving")
    root.handlers, root.propagate = [handler], False
    root.setLevel(level)


class JsonFormatter(logging.Formatter):
    """Writes a record and its extras as one JSON object; text is cut, control characters are escaped."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line."""
        event = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            event["exception"] = self.formatException(record.exc_info)
        return json.dumps(event, default=str)


class TextFormatter(logging.Formatter):
    """Writes a record with its extras as key=value."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's own name
        """Return the event's line; the stack of an exception follows below it."""
        extras = " ".join(f"{key}={value!r}" for key, value in _extras(record).items())
        return f"{super().formatMessage(record)} {extras}".rstrip()


def _extras(record: logging.LogRecord) -> dict[str, object]:
    extras = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    return {key: value[:_MAX_TEXT] if isinstance(value, str) else value for key, value in extras.items()}
