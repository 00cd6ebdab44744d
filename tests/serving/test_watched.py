"""Files are read again when they change, and only what is fit is taken."""

import logging
import os
from pathlib import Path

import pytest

from serving import watched
from serving.errors import CredentialsError
from serving.watched import Watched


def _number(content: bytes) -> int:
    return int(content)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Return a file that holds a number."""
    path = tmp_path / "number"
    path.write_text("1")
    return path


def test_a_change_is_seen(file: Path) -> None:
    """A file that was written again is read again, and one that was not is not."""
    number = Watched([str(file)], _number)
    assert not number.is_stale()
    assert not number.refresh()
    file.write_text("22")
    assert number.refresh()
    assert number.value == 22
    assert not number.refresh()


def test_a_replacement_of_the_same_size_and_time_is_seen(file: Path) -> None:
    """A file put in the place of another is another, even if size and time are the same."""
    number = Watched([str(file)], _number)
    other = file.with_name("other")
    other.write_text("2")
    stamp = file.stat()
    os.utime(other, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    other.replace(file)
    assert number.refresh()
    assert number.value == 2


def test_what_is_not_fit_is_logged_once_and_ignored(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file that does not parse, or is gone, leaves the old value in use and one warning each."""
    number = Watched([str(file)], _number)
    file.write_text("not a number")
    for _ in range(3):
        assert not number.refresh()
    file.unlink()
    for _ in range(3):
        assert not number.refresh()
    assert number.value == 1
    assert [record.levelno for record in caplog.records] == [logging.WARNING] * 2
    file.write_text("333")
    assert number.refresh()
    assert number.value == 333


def test_what_was_not_fit_is_tried_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may become fit without a change of its own, such as a certificate on its first day."""
    monkeypatch.setattr(watched, "_RETRY_S", 0.0)
    is_fit = True

    def parse(content: bytes) -> int:
        if not is_fit:
            raise ValueError("not yet")
        return int(content)

    number = Watched([str(file)], parse)
    is_fit = False
    file.write_text("22")
    assert not number.refresh()
    is_fit = True
    assert number.refresh()
    assert number.value == 22
    assert not number.is_stale()


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_text("x"), "invalid literal"),
        (lambda path: path.write_bytes(b"1" * (watched.MAX_BYTES + 1)), "larger than"),
    ],
)
def test_the_first_reading_must_succeed(file: Path, make: object, expected: str) -> None:
    """At the start a bad file is an error that names it."""
    assert callable(make)
    make(file)
    with pytest.raises(CredentialsError, match=expected) as caught:
        Watched([str(file)], _number)
    assert str(file) in str(caught.value)
