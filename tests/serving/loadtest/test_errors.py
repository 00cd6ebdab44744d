"""The errors of a load test: a tree that is drawn, and texts that say what to do."""

import inspect
import re

import pytest

from serving.loadtest import errors
from serving.loadtest.errors import (
    BadArrivals,
    BadWorkload,
    ContentDiffers,
    GeneratorDied,
    LoadTestError,
    ReportError,
    ServiceNotReady,
)


def test_the_tree_is_the_one_that_is_drawn() -> None:
    """Every class of the module is in its docstring, and nothing else is."""
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    drawn = set(re.findall(r"\b[A-Z]\w+(?=\s{2,}the|\s{2,}this|$)", errors.__doc__ or "", re.MULTILINE))
    assert drawn == classes


@pytest.mark.parametrize(
    ("error", "text", "is_callers_fault"),
    [
        (BadWorkload("--mix", given="x", expected="y"), "--mix x: expected y", True),
        (BadArrivals(path="a.csv", line=3, problem="no"), "a.csv, line 3: no", True),
        (ReportError(path="r.json", problem="no"), "report r.json: no; expected a JSON file", True),
        (ServiceNotReady(target="a:1", problem="away"), "a:1: away", False),
        (ContentDiffers(operation="encode:1", problem="off"), "encode:1: off, without any load", False),
        (GeneratorDied(exit_code=-9), "exit code -9", False),
    ],
)
def test_texts_name_what_was_wrong(error: LoadTestError, text: str, is_callers_fault: bool) -> None:  # noqa: FBT001 - a row of the table
    """And who must act, which decides the exit code."""
    assert text in str(error)
    assert error.is_callers_fault == is_callers_fault
