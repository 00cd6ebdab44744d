"""A comparison finds what became worse, leaves noise alone, and does not compare what is not alike."""

import io
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page
from rich.console import Console

from serving.loadtest.compare import compare, show, write_html_comparison
from serving.loadtest.results import GeneratorLimits, LoadReport
from tests.serving.loadtest.synthetic import MIX, report
from tests.training.study.browser import chromium

RATES = (200.0, 400.0, 800.0)


def printed(before: LoadReport, after: LoadReport, **options: float) -> tuple[str, bool]:
    """Return what is shown, and the verdict."""
    file = io.StringIO()
    is_good = show(before, after, Console(file=file, width=160), **options)
    return file.getvalue(), is_good


def test_a_run_is_no_regression_of_itself() -> None:
    """Every ratio is one."""
    text, is_good = printed(report(RATES), report(RATES))
    assert is_good
    assert "No regression beyond a ratio of 0.9" in text
    found = compare(report(RATES), report(RATES))
    assert {ratio for row in found.rows for ratio in row[2:5]} == {1.0}
    assert len(found.rows) == 3 * (1 + len(MIX))


@pytest.mark.parametrize("other", range(20, 30))
def test_another_draw_of_the_same_system_is_no_regression(other: int) -> None:
    """Only the seed differs: far from the knee ten runs of ten pass."""
    assert compare(report((200.0, 400.0)), report((200.0, 400.0), seed=other), threshold=0.8).problems == []


def test_a_slower_system_is_found_with_its_place() -> None:
    """Half of the capacity: p50 and p99 grow at every load, and the load near the knee is refused."""
    text, is_good = printed(report(RATES), report(RATES, capacity=600.0))
    assert not is_good
    found = compare(report(RATES), report(RATES, capacity=600.0))
    assert any(problem.startswith("all at 800/s: goodput") for problem in found.problems)
    assert any(problem.startswith("all at 200/s: p50") for problem in found.problems)
    assert any("RESOURCE_EXHAUSTED appeared" in problem for problem in found.problems)
    assert "Worse beyond a ratio of 0.9 at 3 of 3 loads" in text
    assert compare(report(RATES, capacity=600.0), report(RATES)).is_good  # the way back is none


def test_the_threshold_decides() -> None:
    """What is a fifth slower passes where a half is allowed."""
    before, after = report((200.0,)), report((200.0,), capacity=1000.0)
    assert not compare(before, after, threshold=0.9).is_good
    assert compare(before, after, threshold=0.5).is_good


def test_few_requests_prove_no_slowness() -> None:
    """A p99 of some twenty requests is one of them, and no regression wherever it is."""
    found = compare(report((2.0,)), report((2.0,), seed=6, capacity=1000.0), threshold=0.99)
    assert not [problem for problem in found.problems if "p99" in problem]


def test_a_tail_that_grows_tenfold_is_found_in_a_few_hundred_requests() -> None:
    """No exact bound of a p99 exists from so few, but requests above the old one can be counted."""
    before, after = report((30.0,)), report((30.0,), capacity=100.0)
    assert any("p99" in problem for problem in compare(before, after).problems)


@pytest.mark.parametrize(("num_lost", "num_wrong", "word"), [(1, 0, "lost 0 to 1"), (0, 1, "wrong 0 to 1")])
def test_one_lost_or_wrong_answer_is_a_regression(num_lost: int, num_wrong: int, word: str) -> None:
    """Whatever the ratios."""
    found = compare(report(RATES), report(RATES, num_lost=num_lost, num_wrong=num_wrong))
    assert any(word in problem for problem in found.problems)
    assert not found.is_good


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": "oip"}, "the protocols differ: vae, then oip"),
        ({"mix": {"encode:1": 1.0}}, "the mixes differ"),
        ({"mode": "closed"}, "the kinds of arrival differ: open, then closed"),
        ({"deadline_s": 9.0}, "the deadlines differ: 1 s, then 9 s"),
    ],
)
def test_different_loads_get_no_verdict(changes: dict[str, Any], words: str) -> None:
    """Ratios are shown, and that they prove nothing is said first."""
    text, is_good = printed(report(RATES), report(RATES, **changes))
    assert not is_good
    assert "No verdict, these are not the same load" in text
    assert words in text


def test_a_search_for_the_knee_is_compared_with_an_open_loop() -> None:
    """Both send on a schedule."""
    assert compare(report(RATES), report(RATES, mode="knee")).is_good


def test_no_load_in_common_is_no_verdict() -> None:
    """Nothing was compared, so nothing passed."""
    text, is_good = printed(report((100.0,)), report((200.0,)))
    assert not is_good
    assert "no load in common" in text


def test_other_differences_are_said_and_do_not_refuse() -> None:
    """Another model, machine, address or kind of check; notes; a generator at its limit; stages left over."""
    limits = GeneratorLimits(num_processes=1, calls_per_s=9, echo_p50_ms=1, is_limiting=True, reason="too slow")
    after = report(
        RATES[:2], model="other 0", target="b:1", checks="none", limits=limits, notes=["cut"], label="b"
    )
    text, is_good = printed(report(RATES), after)
    assert is_good
    for words in ("models differ", "targets differ", "checks of contents differ", "1 stages have no", "b: cut"):
        assert words in text
    assert "In b the generator may be the limit: too slow" in text


def test_loads_match_within_two_per_cent_and_each_stage_once() -> None:
    """A rate that was rounded is the same rate; two stages of one rate are two stages."""
    found = compare(report((200.0, 200.0, 400.0)), report((201.0, 200.0, 420.0)))
    assert [row.load for row in found.rows if row.operation == "all"] == ["200/s", "200/s"]


def test_the_page_compares_each_with_the_first(tmp_path: Path) -> None:
    """Three reports: two tables, two verdicts, three lines in every chart; in a browser without a complaint."""
    path = tmp_path / "comparison.html"
    reports = [
        report(RATES, label="a <1>"),
        report(RATES, seed=6, label="b"),
        report(RATES, num_wrong=1, label="c"),
    ]
    write_html_comparison(reports, path)
    text = path.read_text()
    assert text.count("<table>") == text.count('class="verdict') == 2
    assert "a <1>" not in text
    with chromium() as browser:
        complaints: list[str] = []
        page: Page = browser.new_page(viewport={"width": 390, "height": 844})
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(path.as_uri())
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.locator("figure > svg").count() == 3
        assert complaints == []
