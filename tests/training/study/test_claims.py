"""Checks of the study: what passes, what does not, and that nothing passes by accident."""

import math

import pytest

from training.study import claims
from training.study.claims import Check, Checks, Section


@pytest.mark.parametrize(
    ("check", "expected"),
    [
        (claims.close("x", 1.05, 1.0, within=0.1, source="law"), True),
        (claims.close("x", 1.2, 1.0, within=0.1, source="law"), False),
        (claims.at_least("x", 1.0, 1.0, source="law"), True),
        (claims.at_least("x", 0.9, 1.0, source="law"), False),
        (claims.at_most("x", 1.0, 1.0, source="law"), True),
        (claims.at_most("x", 1.1, 1.0, source="law"), False),
        (claims.between("x", 0.5, 0.0, 1.0, source="law"), True),
        (claims.between("x", -0.5, 0.0, 1.0, source="law"), False),
        (claims.between("x", 1.5, 0.0, 1.0, source="law"), False),
        (claims.holds("x", bool("fact"), source="law"), True),
        (claims.holds("x", bool(""), source="law"), False),
    ],
)
def test_a_check_passes_inside_its_requirement_and_fails_outside(check: Check, *, expected: bool) -> None:
    """Each kind of requirement tells the two sides apart, its end belonging to the inside."""
    assert check.passed is expected


@pytest.mark.parametrize(
    "check",
    [
        claims.close("x", math.nan, 1.0, within=0.1, source="law"),
        claims.at_least("x", math.nan, 1.0, source="law"),
        claims.at_most("x", math.nan, 1.0, source="law"),
        claims.between("x", math.nan, 0.0, 1.0, source="law"),
        claims.close("x", 1.0, math.nan, within=0.1, source="law"),
        claims.at_least("x", 1.0, math.nan, source="law"),
    ],
)
def test_not_a_number_never_passes(check: Check) -> None:
    """A computation that broke is a failure, on either side of the comparison."""
    assert not check.passed


def test_requirements_are_readable() -> None:
    """The report shows what was required, not how it was compared."""
    assert claims.close("x", 1.0, -1.5574112, within=1e-12, source="law").requirement == "-1.557411 ± 1.000e-12"
    assert claims.at_least("x", 1.0, -101.0, source="law").requirement == "≥ -101"
    assert claims.between("x", 1.0, 0.5, 2.5e6 + 0.5, source="law").requirement == "0.5 to 2.500e+06"
    assert claims.close("x", 1.0, 3_840_000, within=0, source="law").requirement == "3,840,000 ± 0"


def test_a_section_collects_its_checks_in_order() -> None:
    """Texts between them do not matter."""
    first, second = (claims.at_least(name, 1.0, 0.0, source="law") for name in ("first", "second"))
    section = Section("title", (1,), (Checks((first,)), "text", Checks((second,))))
    assert section.checks == (first, second)


def test_the_checklist_has_every_row_of_the_article() -> None:
    """29 rows, numbered without gaps."""
    assert list(claims.ROWS) == list(range(1, 30))
