"""The report: one page with everything inside, the same in Markdown and JSON, nothing hidden."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from training.study import claims, figures, report
from training.study.claims import Checks, Correction, Figure, Section, Table
from training.study.report import Chapter, Report


def picture() -> bytes:
    """Return a small figure."""
    drawn = figures.figure(width=2, height=1)
    figures.axes(drawn)[0, 0].plot([0, 1], [0, 1])
    return figures.png(drawn)


@pytest.fixture
def made() -> Report:
    """Return a report with every kind of block, one failing check, and text that HTML must not take for markup."""
    good = claims.close("$L_1$, the *first*", -1.91894, -1.918939, within=1e-4, source="closed form")
    bad = claims.at_least("a <b> & |c|", 0.5, 1.0, source="law")
    section = Section(
        "Bounds <of> everything",
        (9, 10),
        (
            "The bound is $\\mathcal{L} \\le \\log p(x)$ and\n\n$$\\frac{1}{2} \\sum_j \\mu_j^2$$",
            Checks((good, bad)),
            Table(("model", "$\\sigma$"), (("`a|b`", "1"),), caption="a table"),
            Figure("a-line", "A line that *rises* with $x$.", picture()),
            Correction("KL is a distance.", "It is **not** symmetric."),
        ),
    )
    return Report((Chapter("First", "An introduction.", (section,)),), (("seed", "0"), ("time", "3 s")))


class Outline(HTMLParser):
    """Collects what the page refers to, and its anchors; complains about tags that are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.sources: list[str] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note a tag."""
        self.tags.add(tag)
        for name, value in attrs:
            if name == "src":
                self.sources.append(value or "")
            if name == "href":
                self.links.append(value or "")
            if name == "id":
                self.anchors.add(value or "")


def test_the_page_is_whole_in_one_file(made: Report) -> None:
    """Nothing is loaded from anywhere and no script runs: it can be mailed, and read without a network."""
    outline = Outline()
    outline.feed(report.as_html(made))
    assert outline.sources
    assert all(source.startswith("data:image/png;base64,") for source in outline.sources)
    assert all(link.startswith("#") for link in outline.links)
    assert not outline.tags & {"script", "link", "iframe", "object"}


def test_every_link_of_the_page_arrives(made: Report) -> None:
    """Contents, checklist and corrections lead to where the thing is."""
    outline = Outline()
    outline.feed(report.as_html(made))
    assert {link.removeprefix("#") for link in outline.links} <= outline.anchors


def test_formulas_become_mathml(made: Report) -> None:
    """No dollar sign is left in the text of the page, and the fraction is one."""
    page = report.as_html(made)
    assert "<mfrac>" in page
    assert "$" not in re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)


def test_names_with_markup_characters_are_shown_as_they_are(made: Report) -> None:
    """A `<` in a title or a check is text."""
    page = report.as_html(made)
    assert "<of>" not in page
    assert "Bounds &lt;of&gt; everything" in page
    assert "a <b> &" not in page


def test_failures_are_seen_everywhere(made: Report) -> None:
    """One failing check shows in the summary, the contents, its table, the Markdown and the JSON."""
    assert [check.name for check in made.failed] == ["a <b> & |c|"]
    page, text = report.as_html(made), report.as_markdown(made)
    assert "1 FAIL" in page
    assert "1 FAIL" in text
    assert page.count("FAIL") == 3
    assert "**FAIL**" in text
    assert json.loads(report.as_json(made))["num_failed"] == 1


def test_rows_that_no_section_shows_are_named(made: Report) -> None:
    """The checklist does not hide what is missing."""
    text = report.as_markdown(made)
    assert "2 of the 29 rows" in text
    assert "| 12 | KL divergence, its asymmetry | not in this study | not in this study |" in text


def test_corrections_are_collected_at_the_end(made: Report) -> None:
    """A reader finds all errors of the article in one list."""
    text = report.as_markdown(made)
    assert text.rindex("KL is a distance.") > text.index("Where the article errs")


def test_a_bar_in_a_cell_does_not_end_it(made: Report) -> None:
    """Markdown tables keep their number of columns."""
    line = next(line for line in report.as_markdown(made).splitlines() if "law" in line)
    assert len(re.findall(r"(?<!\\)\|", line)) == 6


def test_written_files_agree(made: Report, tmp_path: Path) -> None:
    """The Markdown refers to pictures that are there; the JSON holds the checks."""
    page = report.write(made, tmp_path)
    assert page.read_text() == report.as_html(made)
    (picture_file,) = re.findall(r"\]\((figures/[^)]+)\)", (tmp_path / "study.md").read_text())
    assert (tmp_path / picture_file).read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "study.json").read_text())["checks"]) == 2


def test_the_same_report_gives_the_same_bytes(made: Report) -> None:
    """Neither date nor order of sets gets in."""
    assert report.as_html(made) == report.as_html(made)
    assert picture() == picture()
