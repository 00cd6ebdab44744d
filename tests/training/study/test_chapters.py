"""The study as a whole: every row is shown, every number is as it must be, the page reads well in a browser."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from playwright.sync_api import Page

from tests.training.study.browser import chromium
from training.errors import ChecksFailed
from training.study import chapters, claims
from training.study.chapters import PLANS, Plan
from training.study.claims import Checks, Section
from training.study.setup import Study

ROOT = Path(__file__).parents[3]
SCREENS = {"desktop": (1280, 900), "telephone": (390, 844)}


def fine(study: Study) -> Section:
    """Return a section that passes."""
    return Section(f"seed {study.seed}", (1,), (Checks((claims.at_least("x", 1.0, 0.0, source="law"),)),))


def broken(study: Study) -> Section:
    """Return a section with a check that fails."""
    return Section(f"not {study.seed}", (2,), (Checks((claims.at_least("y", -1.0, 0.0, source="law"),)),))


def test_every_experiment_has_one_place() -> None:
    """None is run twice, none is left out of a chapter by accident."""
    experiments = [experiment for plan in PLANS for experiment in plan.experiments]
    assert len(experiments) == len(set(experiments))
    assert all(plan.title and plan.introduction for plan in PLANS)


def test_a_study_runs_its_experiments_in_order_and_tells(tmp_path: Path) -> None:
    """A line for each, with its verdict; failures are counted."""
    said: list[str] = []
    study = Study(tmp_path, seed=5, say=said.append)
    report = chapters.run(study, (Plan("First", "One.", (fine,)), Plan("Second", "Two.", (broken,))))
    assert [chapter.title for chapter in report.chapters] == ["First", "Second"]
    assert [section.title for section in report.sections] == ["seed 5", "not 5"]
    assert [check.name for check in report.failed] == ["y"]
    assert "[1/2] seed 5: 1 checks, pass" in said[0]
    assert "[2/2] not 5: 1 checks, 1 FAILED" in said[1]
    assert dict(report.setting)["command"] == "`vae-train study --quick --seed 5`"


def test_a_failed_check_ends_the_command_with_its_name() -> None:
    """Exit code 3, as every gate."""
    error = ChecksFailed(["first", "second"], page="study/study.html")
    assert error.exit_code == 3
    assert "2 checks of the study fail: first; second; see study/study.html" in str(error)


class Finished(NamedTuple):
    """A quick study that has run."""

    folder: Path
    result: dict[str, Any]
    log: str


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Run the quick study as a user does; do not write into its folder."""
    folder = tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "training", "study", "--quick", "--output-dir", str(folder), "--json"]
    environment = os.environ | {"OMP_NUM_THREADS": str(os.cpu_count())}
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return Finished(folder, json.loads(done.stdout), done.stderr)


@pytest.mark.slow
@pytest.mark.timeout(1600)
def test_the_quick_study_shows_every_row_and_every_check_passes(finished: Finished) -> None:
    """29 rows; exact, published and lawful numbers all as they must be."""
    assert finished.result["num_failed"] == 0
    titles = re.findall(r"^### (.*)$", (finished.folder / "study.md").read_text(), flags=re.MULTILINE)
    assert len(titles) == len(set(titles))  # they are the anchors of the page
    shown = {row for check in finished.result["checks"] for row in check["rows"]}
    assert shown | {29} == set(claims.ROWS)  # the last row is the list of references, which has nothing to measure
    assert "29 of the 29 rows" in (finished.folder / "study.md").read_text()


@pytest.mark.slow
def test_the_study_shows_its_progress(finished: Finished) -> None:
    """Each experiment says what it found as soon as it has."""
    num_experiments = sum(len(plan.experiments) for plan in PLANS)
    assert len(re.findall(rf"^\[\d+/{num_experiments}\] ", finished.log, flags=re.MULTILINE)) == num_experiments


@pytest.mark.slow
def test_the_markdown_refers_to_pictures_that_are_there(finished: Finished) -> None:
    """The same study for readers of a repository."""
    pictures = re.findall(r"\]\((figures/[^)]+)\)", (finished.folder / "study.md").read_text())
    assert len(pictures) == len(set(pictures)) > 10
    assert all((finished.folder / picture).read_bytes().startswith(b"\x89PNG") for picture in pictures)


@pytest.fixture(params=SCREENS)
def page(request: pytest.FixtureRequest, finished: Finished) -> Iterator[Page]:
    """Open the page in a browser; it must not ask the network for anything, nor complain."""
    width, height = SCREENS[request.param]
    asked: list[str] = []
    complaints: list[str] = []
    with chromium() as browser:
        page = browser.new_page(viewport={"width": width, "height": height})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto((finished.folder / "study.html").as_uri())
        yield page
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert complaints == []


@pytest.mark.slow
def test_the_page_fits_its_screen(page: Page) -> None:
    """Nobody has to scroll sideways, on a desktop or a telephone; wide tables scroll in themselves."""
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


@pytest.mark.slow
def test_pictures_and_formulas_are_drawn(page: Page) -> None:
    """Every picture has loaded and every formula takes up room."""
    broken = page.evaluate("[...document.images].filter(image => !image.complete || !image.naturalWidth).length")
    assert broken == 0
    assert page.locator("img").count() > 10
    sizes = page.evaluate("[...document.querySelectorAll('main math')].map(m => m.getBoundingClientRect().width)")
    hidden = page.evaluate("document.querySelectorAll('details:not([open]) math').length")
    assert len(sizes) > 50
    assert sum(size == 0 for size in sizes) <= hidden
    assert page.locator("merror").count() == 0


@pytest.mark.slow
def test_no_markup_is_left_in_the_text(page: Page) -> None:
    """What a reader sees has no dollar sign, backslash or star that was meant as markup."""
    text = page.locator("main").inner_text()
    assert "$" not in text
    assert "**" not in text
    assert not re.findall(r"\\[a-zA-Z]+", text)


@pytest.mark.slow
def test_the_contents_lead_to_the_sections(page: Page) -> None:
    """Each link of the contents has a heading to go to."""
    targets = page.evaluate("[...document.querySelectorAll('nav a')].map(a => a.getAttribute('href').slice(1))")
    assert len(targets) > 10
    assert page.evaluate("ids => ids.filter(id => !document.getElementById(id))", targets) == []
