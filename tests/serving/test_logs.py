"""One event a line, whatever is in it."""

import json
import logging
import sys

import pytest

from serving import logs

NASTY = ["two\nlines", "\x1b[31mred\x1b[0m", "tab\t", "\u202egnp.exe", "\x00", '"quote"', "\u2028separator"]


@pytest.fixture
def root() -> logging.Logger:
    """Return the logger of the package."""
    return logging.getLogger("serving")


def _record(message: str = "event", *, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    return logging.getLogger("serving.x").makeRecord(
        "serving.x", level, __file__, 1, message, (), None, extra=extra
    )


def _with_stack() -> logging.LogRecord:
    record = _record("call failed", error_id="abc")
    try:
        int("inside")
    except ValueError:
        record.exc_info = sys.exc_info()
    return record


@pytest.mark.parametrize("text", NASTY)
def test_a_json_line_is_one_line_and_reads_back(text: str) -> None:
    """Control characters are escaped, so that a caller can forge no line; the value survives."""
    line = logs.JsonFormatter().format(_record(method="Encode", value=text))
    assert line.isascii()
    assert line.isprintable()
    event = json.loads(line)
    assert (event["event"], event["level"], event["logger"]) == ("event", "info", "serving.x")
    assert (event["method"], event["value"]) == ("Encode", text)


@pytest.mark.parametrize("text", NASTY[:5])
def test_a_text_line_is_one_line(text: str) -> None:
    """On a terminal, control characters are escaped too."""
    line = logs.TextFormatter("%(levelname)s %(message)s").format(_record(value=text))
    assert line.startswith("INFO event value=")
    assert line.isprintable()


def test_a_long_text_is_cut() -> None:
    """A megabyte of a caller's text makes a short line."""
    record = _record(value="x" * 2**20)
    assert len(logs.JsonFormatter().format(record)) < 1000
    assert len(logs.TextFormatter("%(message)s").format(record)) < 1000


def test_what_json_does_not_know_is_written_as_text() -> None:
    """No value of an extra makes logging fail."""
    event = json.loads(logs.JsonFormatter().format(_record(value={1, 2}, kind=ValueError)))
    assert event["value"] == "{1, 2}"
    assert "ValueError" in event["kind"]


def test_the_stack_of_an_exception_is_inside_the_json_line() -> None:
    """One event is one line also when something broke."""
    line = logs.JsonFormatter().format(_with_stack())
    assert "\n" not in line
    assert "ValueError: invalid literal" in json.loads(line)["exception"]


def test_the_stack_of_an_exception_is_below_the_text_line() -> None:
    """The first line has the event and its extras; the stack is what follows."""
    first, *rest = logs.TextFormatter("%(levelname)s %(message)s").format(_with_stack()).splitlines()
    assert first == "INFO call failed error_id='abc'"
    assert rest[-1].startswith("ValueError: invalid literal")


def test_only_this_package_is_configured(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """Events go to standard error once, JSON where it is no terminal; twice configured is once written."""
    logs.configure()
    logs.configure()
    logging.getLogger("serving.gateway").info("gateway listens", extra={"port": 1})
    logging.getLogger("serving.gateway").debug("too much")
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert json.loads(line)["port"] == 1
    assert not root.propagate


def test_the_format_and_the_level_may_be_chosen(root: logging.Logger, capsys: pytest.CaptureFixture[str]) -> None:
    """Text and debug are there for those who ask."""
    logs.configure(as_json=False, level=logging.DEBUG)
    root.debug("fine", extra={"rows": 3})
    assert capsys.readouterr().err.rstrip().endswith("DEBUG fine rows=3")
