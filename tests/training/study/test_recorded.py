"""The full study that is checked in: complete, passed, with its pictures, of the claims that the code makes."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

import training
from training.study.chapters import PLANS

FOLDER = Path(training.__file__).parent / "recorded" / "study"


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """The checks as a program reads them."""
    content: dict[str, Any] = json.loads((FOLDER / "study.json").read_text())
    return content


def test_every_check_passed(record: dict[str, Any]) -> None:
    """No check failed, and there are hundreds."""
    assert record["num_failed"] == 0
    assert [check["name"] for check in record["checks"] if not check["passed"]] == []
    assert len(record["checks"]) > 250


def test_every_row_of_the_article_is_shown() -> None:
    """All 29 rows."""
    assert "29 of the 29 rows of the article shown" in (FOLDER / "study.md").read_text()


def test_it_was_the_full_one(record: dict[str, Any]) -> None:
    """On MNIST and Fashion-MNIST, by the command that anybody can repeat."""
    assert "--full" in record["setting"]["command"]
    assert record["setting"]["data"] == "MNIST and Fashion-MNIST"


def test_its_sections_are_those_of_the_code(record: dict[str, Any]) -> None:
    """A section that was added, or taken away, asks for a new record."""
    headings = re.findall(r"^### (.+)$", (FOLDER / "study.md").read_text(), re.MULTILINE)
    assert len(headings) == sum(len(plan.experiments) for plan in PLANS)
    assert {check["section"] for check in record["checks"]} <= set(headings)


def test_every_picture_is_there() -> None:
    """The text shows no picture that is missing, and none lies there unused."""
    shown = set(re.findall(r"\(figures/([^)]+\.png)\)", (FOLDER / "study.md").read_text()))
    assert shown == {path.name for path in (FOLDER / "figures").iterdir()}
    assert len(shown) > 40
