"""The page of a load test says first what was found, shows every number, and reads well in a browser."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import pytest
from playwright.sync_api import Browser, Page

from serving.loadtest.report import statuses_of, verdict, write_html
from serving.loadtest.results import GeneratorLimits
from tests.serving.loadtest.synthetic import report
from tests.training.study.browser import chromium


class Screen(NamedTuple):
    """How a reader looks at the page."""

    width: int
    height: int
    scheme: Literal["light", "dark"]


SCREENS = (
    Screen(1280, 900, "light"),
    Screen(1280, 900, "dark"),
    Screen(390, 844, "light"),
    Screen(390, 844, "dark"),
)
MIN_CONTRAST = 4.5
"""WCAG 2.2, criterion 1.4.3, for text."""


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of a run that lost and was wrong; do not write into its folder."""
    path = tmp_path_factory.mktemp("load") / "report.html"
    write_html(report(num_lost=3, num_wrong=2, label="<b>demo</b>", notes=["interrupted & short"]), path)
    return path


def test_a_clean_run_says_so_with_its_bound() -> None:
    """Nothing lost or wrong is a statement about so many requests, not about all."""
    run = report()
    found = verdict(run)
    assert found.mood == "good"
    assert found.headline == f"None of {run.counts.sent:,} requests lost or wrong"
    assert any(f"fewer than one in {run.counts.sent // 3:,}" in detail for detail in found.details)
    assert any("between 1,100 and 1,300 requests/s" in detail for detail in found.details)
    assert any("not the limit" in detail for detail in found.details)


def test_one_wrong_answer_is_the_headline() -> None:
    """However good the rest."""
    found = verdict(report(num_wrong=1))
    assert found.mood == "bad"
    assert "1 wrong" in found.headline


def test_a_generator_at_its_limit_is_a_warning_with_its_reason() -> None:
    """Else its numbers are taken for the server's."""
    limits = GeneratorLimits(
        num_processes=1, calls_per_s=900, echo_p50_ms=1, is_limiting=True, reason="1,600/s is"
    )
    found = verdict(report(limits=limits))
    assert found.mood == "warn"
    assert found.headline.endswith("the generator may be the limit")
    assert "The generator may be the limit: 1,600/s is." in found.details
    assert any("not measured" in detail for detail in verdict(report(limits=None)).details)


@pytest.mark.parametrize(
    ("rates", "words"),
    [([200.0, 400.0], "the knee is above"), ([1600.0, 2000.0], "No load was good"), ([200.0], "None of")],
)
def test_a_knee_that_was_not_found_is_not_made_up(rates: list[float], words: str) -> None:
    """All good, none good, or not searched."""
    found = verdict(report(rates))
    assert words in " ".join([found.headline, *found.details])


def test_a_run_that_sent_nothing_has_a_page(tmp_path: Path) -> None:
    """Interrupted at once."""
    empty = report([200.0])
    nothing = empty.counts.model_copy(update=dict.fromkeys(("sent", "right", "refused"), 0))
    write_html(report([200.0], stages=[], counts=nothing, knee=None), tmp_path / "deep" / "report.html")
    assert "Nothing was sent" in (tmp_path / "deep" / "report.html").read_text()


def test_statuses_of_a_stage_balance() -> None:
    """Every request that was sent has one."""
    for stage in report(num_lost=2).stages:
        assert sum(statuses_of(stage).values()) == stage.counts.sent


def test_every_stage_and_operation_is_in_the_tables(written: Path) -> None:
    """Six stages, three operations each, and what was run."""
    text = written.read_text()
    assert text.count("<caption>Operations at") == 6
    for name in ("encode:1", "sample:64", "decode:16"):
        assert text.count(f'<th scope="row">{name}</th>') == 6
    for fact in (
        "vae-serve load",
        "digits 4444a250293f",
        "interrupted &amp; short",
        "bit by bit",
        "LOST_AFTER_DEADLINE",
    ):
        assert fact in text
    assert "<b>demo" not in text


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Start one browser for all screens."""
    with chromium() as started:
        yield started


@pytest.fixture(scope="module", params=SCREENS, ids=lambda screen: f"{screen.width}-{screen.scheme}")
def opened(request: pytest.FixtureRequest, browser: Browser, written: Path) -> Iterator[Page]:
    """Open the page in a browser; it must not ask the network for anything, nor complain."""
    screen: Screen = request.param
    asked: list[str] = []
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": screen.width, "height": screen.height}, color_scheme=screen.scheme)
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(written.as_uri())
    yield page
    assert [url for url in asked if not url.startswith("data:")] == [written.as_uri()]
    assert complaints == []
    page.close()


def test_the_page_fits_its_screen(opened: Page) -> None:
    """Nobody has to scroll sideways, also with everything unfolded; wide tables scroll in themselves."""
    opened.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
    assert opened.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    boxes = opened.evaluate(
        "[...document.querySelectorAll('figure > svg')].map(s => s.getBoundingClientRect().width)"
    )
    assert len(boxes) == 6
    assert min(boxes) > 300


def test_words_in_a_chart_do_not_cover_each_other(opened: Page) -> None:
    """Ticks and labels each have their own room."""
    overlaps = opened.evaluate("""[...document.querySelectorAll('figure > svg')].flatMap(svg => {
        const boxes = [...svg.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
        return boxes.flatMap(([name, a], i) => boxes.slice(i + 1).filter(([, b]) =>
            a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3
        ).map(([other]) => [name, other]));
    })""")
    assert overlaps == []


def test_text_stands_out_from_its_ground(opened: Page) -> None:
    """In both colour schemes, as the accessibility guidelines ask: contrast of at least 4.5."""
    colours = opened.evaluate("""['body', '.muted', '.verdict strong', '.facts dt', 'figcaption', 'dl.run dt'].map(
        selector => getComputedStyle(document.querySelector(selector)).color)""")
    grounds = opened.evaluate("""['body', '.facts div'].map(
        selector => getComputedStyle(document.querySelector(selector)).backgroundColor)""")
    for colour in colours:
        for ground in grounds:
            assert _contrast(colour, ground) >= MIN_CONTRAST, (colour, ground)


def _contrast(one: str, other: str) -> float:
    """Return the contrast ratio of two colours, WCAG 2.2."""
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
