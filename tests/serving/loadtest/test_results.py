"""The report of a load test as a file: what is written is read, and nothing else is taken for one."""

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from serving.loadtest.errors import ReportError
from serving.loadtest.results import Counts, LoadReport
from tests.serving.loadtest.synthetic import report


def test_what_is_written_is_read(tmp_path: Path) -> None:
    """Every field survives; folders on the way are made."""
    written = report((200.0,))
    path = tmp_path / "deep" / "report.json"
    written.write(path)
    assert LoadReport.read(path) == written


def test_a_ledger_that_does_not_balance_is_no_ledger() -> None:
    """What was sent is what ended, in one of the four ways."""
    with pytest.raises(ValidationError, match="3 sent, but 2 ended"):
        Counts(sent=3, right=1, refused=1, lost=0, wrong=0)


def test_ledgers_add_up() -> None:
    """The sum of ledgers is a ledger."""
    parts = [
        Counts(sent=3, right=1, refused=1, lost=1, wrong=0),
        Counts(sent=2, right=1, refused=0, lost=0, wrong=1),
    ]
    assert Counts.total(parts) == Counts(sent=5, right=2, refused=1, lost=1, wrong=1)
    assert Counts.total([]).sent == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"version": 2}'])
def test_another_file_is_refused_by_name(tmp_path: Path, content: str) -> None:
    """The error names the file and what was expected."""
    path = tmp_path / "other.json"
    path.write_text(content)
    with pytest.raises(ReportError, match=r"other\.json: .*`vae-serve load --json` wrote"):
        LoadReport.read(path)


def test_an_absent_file_is_refused_by_name(tmp_path: Path) -> None:
    """So is one that is not there."""
    with pytest.raises(ReportError, match=r"none\.json: No such file"):
        LoadReport.read(tmp_path / "none.json")


def test_a_key_that_nobody_knows_is_refused(tmp_path: Path) -> None:
    """A report of a later release is not read as if it were of this one."""
    path = tmp_path / "later.json"
    path.write_text(json.dumps(json.loads(report((200.0,)).model_dump_json()) | {"new": 1}))
    with pytest.raises(ReportError, match="new: Extra inputs are not permitted"):
        LoadReport.read(path)
