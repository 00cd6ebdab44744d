"""The report of a study: Markdown with pictures beside it, one self-contained HTML page, and the checks as JSON.

All three are made from the same blocks. The page needs no network and no script: formulas are MathML, pictures
are inside.
"""

import base64
import json
import re
from collections.abc import Iterator
from html import escape
from importlib import resources
from pathlib import Path
from typing import Final, NamedTuple

from latex2mathml.converter import convert
from markdown_it import MarkdownIt
from mdit_py_plugins.dollarmath import dollarmath_plugin

from training.checkpoint import write_atomically
from training.study.claims import ROWS, Block, Check, Checks, Correction, Figure, Section, Table, as_text

TITLE: Final = "Latent variable models and variational inference, shown by numbers"

_INTRODUCTION: Final = """\
Data such as images are *observed*; what explains them, such as which digit was written and how slanted, is not. A
**latent variable model** writes the unseen explanation as a random variable $z$ and says how it makes the data,
$p(x) = \\int p(x \\mid z) \\, p(z) \\, dz$. The integral is the price: it can seldom be computed. **Variational
inference** replaces it by an optimisation, and the **variational autoencoder** (VAE) makes that optimisation cheap
enough for millions of images.

This page builds both from nothing. It follows an article on the subject row by row and *runs* every claim: each
number below was computed when this page was made, and stands beside the exact or published value that it must
agree with. Where the article errs or says too much, a note says what is so. All logarithms are natural, so that
information is counted in *nats*.
"""


class Chapter(NamedTuple):
    """Sections under one heading, with a sentence or two before them."""

    title: str
    introduction: str
    sections: tuple[Section, ...]


class Report(NamedTuple):
    """Everything that a study found."""

    chapters: tuple[Chapter, ...]
    setting: tuple[tuple[str, str], ...]
    """How it was made: size, seed, versions, hardware, time."""

    @property
    def sections(self) -> tuple[Section, ...]:
        """All sections in order."""
        return tuple(section for chapter in self.chapters for section in chapter.sections)

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks in order."""
        return tuple(check for section in self.sections for check in section.checks)

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that do not hold."""
        return tuple(check for check in self.checks if not check.passed)


def write(report: Report, folder: Path) -> Path:
    """Write study.html, study.md, figures/*.png and study.json; return the path of the page."""
    for section in report.sections:
        for block in section.blocks:
            if isinstance(block, Figure):
                write_atomically(folder / "figures" / f"{block.name}.png", block.png)
    write_atomically(folder / "study.json", as_json(report).encode())
    write_atomically(folder / "study.md", as_markdown(report).encode())
    page = folder / "study.html"
    write_atomically(page, as_html(report).encode())
    return page


def as_json(report: Report) -> str:
    """Return every check for a program: name, value, requirement, verdict, rows."""
    checks = [
        {**vars(check), "section": section.title, "rows": section.rows}
        for section in report.sections
        for check in section.checks
    ]
    content = {"setting": dict(report.setting), "num_failed": len(report.failed), "checks": checks}
    return json.dumps(content, indent=1) + "\n"


# --- Markdown ---------------------------------------------------------------------------------------------------


def as_markdown(report: Report) -> str:
    """Return the report for readers of the repository; pictures are files in figures/."""
    return "\n".join(_markdown_lines(report)) + "\n"


def _markdown_lines(report: Report) -> Iterator[str]:
    yield from (f"# {TITLE}", "", _INTRODUCTION, _summary(report), "")
    yield from _markdown_table(("how this was made", ""), report.setting)
    yield from _markdown_table(
        ("row", "of the article", "shown in", "checks"),
        tuple((str(row), title, shown, verdict) for row, title, shown, verdict in _checklist(report)),
    )
    for number, chapter in enumerate(report.chapters, start=1):
        yield from (f"## {number}. {chapter.title}", "", chapter.introduction, "")
        for section in chapter.sections:
            yield from (f"### {section.title}", "", f"*{_rows(section)}*", "")
            for block in section.blocks:
                yield from _markdown_block(block)
    yield from (f"## {len(report.chapters) + 1}. Where the article errs", "")
    for _, correction in _corrections(report):
        yield f"- **It says:** {correction.article} **It is so:** {correction.right}"


def _markdown_block(block: Block) -> Iterator[str]:
    match block:
        case str():
            yield from (block.strip(), "")
        case Checks():
            rows = tuple((*_cells(check), "PASS" if check.passed else "**FAIL**") for check in block.items)
            yield from _markdown_table(_CHECK_COLUMNS, rows)
        case Table():
            yield from _markdown_table(block.columns, block.rows)
            if block.caption:
                yield from (f"*{block.caption}*", "")
        case Figure():
            yield from (f"![{_plain(block.caption)}](figures/{block.name}.png)", "", f"*{block.caption}*", "")
        case Correction():
            yield from (f"> **The article says:** {block.article}", ">", f"> **It is so:** {block.right}", "")


def _markdown_table(columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...]) -> Iterator[str]:
    yield f"| {' | '.join(columns)} |"
    yield f"|{'---|' * len(columns)}"
    for row in rows:
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |"
    yield ""


# --- HTML -------------------------------------------------------------------------------------------------------


def as_html(report: Report) -> str:
    """Return the page: everything inside, nothing loaded, no script."""
    return "".join(_html_parts(report))


def _html_parts(report: Report) -> Iterator[str]:
    yield f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(TITLE)}</title>'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<style>{_style()}</style></head><body>"
    yield from _navigation(report)
    yield f"<main><h1>{escape(TITLE)}</h1>{_render(_INTRODUCTION)}"
    yield f'<p class="summary {"bad" if report.failed else "good"}">{_inline(_summary(report))}</p>'
    yield from _checklist_table(report)
    for number, chapter in enumerate(report.chapters, start=1):
        yield f'<h2 id="chapter-{number}">{number}. {_inline(chapter.title)}</h2>{_render(chapter.introduction)}'
        for section in chapter.sections:
            yield f'<section id="{_anchor(section)}"><h3>{_inline(section.title)}</h3>'
            yield f'<p class="rows">{escape(_rows(section))}</p>'
            for block in section.blocks:
                yield from _html_block(block)
            yield "</section>"
    number = len(report.chapters) + 1
    yield f'<h2 id="chapter-{number}">{number}. Where the article errs</h2><ol class="corrections">'
    for section, correction in _corrections(report):
        yield f"<li><p><b>It says:</b> {_inline(correction.article)}</p><p><b>It is so:</b> "
        yield f'{_inline(correction.right)} <a href="#{_anchor(section)}">Shown here.</a></p></li>'
    yield '</ol><h2 id="setting">How this page was made</h2>'
    yield from _html_table(("", ""), report.setting, kind="setting")
    yield "</main></body></html>\n"


def _navigation(report: Report) -> Iterator[str]:
    yield '<nav aria-label="Contents"><b>Contents</b><ol>'
    for number, chapter in enumerate(report.chapters, start=1):
        yield f'<li><a href="#chapter-{number}">{_inline(chapter.title)}</a><ul>'
        for section in chapter.sections:
            mark = "" if all(check.passed for check in section.checks) else ' <span class="fail">FAIL</span>'
            yield f'<li><a href="#{_anchor(section)}">{_inline(section.title)}</a>{mark}</li>'
        yield "</ul></li>"
    yield f'<li><a href="#chapter-{len(report.chapters) + 1}">Where the article errs</a></li>'
    yield '</ol><a href="#setting">How this page was made</a></nav>'


def _checklist_table(report: Report) -> Iterator[str]:
    yield "<details><summary>The article, row by row</summary>"
    anchors = {section.title: _anchor(section) for section in report.sections}
    yield '<div class="scroll"><table><thead><tr><th>row<th>of the article<th>shown in<th>checks</tr></thead>'
    yield "<tbody>"
    for row, title, shown, verdict in _checklist(report):
        links = "; ".join(
            f'<a href="#{anchors[name]}">{_inline(name)}</a>' if name in anchors else escape(name)
            for name in shown.split("; ")
        )
        yield f"<tr><td>{row}<td>{escape(title)}<td>{links}<td>{escape(verdict)}</tr>"
    yield "</tbody></table></div></details>"


def _html_block(block: Block) -> Iterator[str]:
    match block:
        case str():
            yield _render(block)
        case Checks():
            yield from _html_checks(block)
        case Table():
            yield from _html_table(block.columns, block.rows, caption=block.caption)
        case Figure():
            data = base64.b64encode(block.png).decode()
            alternative = escape(_plain(block.caption), quote=True)
            yield f'<figure><img alt="{alternative}" src="data:image/png;base64,{data}">'
            yield f"<figcaption>{_inline(block.caption)}</figcaption></figure>"
        case Correction():
            yield f'<aside class="correction"><p><b>The article says:</b> {_inline(block.article)}</p>'
            yield f"<p><b>It is so:</b> {_inline(block.right)}</p></aside>"


_CHECK_COLUMNS: Final = ("measured here", "value", "must be", "because", "")


def _html_checks(block: Checks) -> Iterator[str]:
    yield '<div class="scroll"><table class="checks"><thead><tr>'
    yield from (f"<th>{column}</th>" for column in _CHECK_COLUMNS)
    yield "</tr></thead><tbody>"
    for check in block.items:
        name, value, requirement, source = _cells(check)
        verdict = '<td class="pass">PASS</td>' if check.passed else '<td class="fail">FAIL</td>'
        yield f'<tr><td>{_inline(name)}</td><td class="number">{escape(value)}</td>'
        yield f'<td class="number">{escape(requirement)}</td><td>{_inline(source)}</td>{verdict}</tr>'
    yield "</tbody></table></div>"


def _html_table(
    columns: tuple[str, ...], rows: tuple[tuple[str, ...], ...], *, caption: str = "", kind: str = "numbers"
) -> Iterator[str]:
    yield f'<div class="scroll"><table class="{kind}">'
    if caption:
        yield f"<caption>{_inline(caption)}</caption>"
    if any(columns):
        yield "<thead><tr>"
        yield from (f"<th>{_inline(column)}</th>" for column in columns)
        yield "</tr></thead>"
    yield "<tbody>"
    for row in rows:
        yield "<tr>"
        yield from (f"<td>{_inline(cell)}</td>" for cell in row)
        yield "</tr>"
    yield "</tbody></table></div>"


# --- what both say ----------------------------------------------------------------------------------------------


def _summary(report: Report) -> str:
    num_checks, num_failed = len(report.checks), len(report.failed)
    shown = {row for section in report.sections for row in section.rows}
    verdict = "all pass" if not num_failed else f"**{num_failed} FAIL**"
    return (
        f"{len(shown & set(ROWS))} of the {len(ROWS)} rows of the article shown; {num_checks} checks, {verdict}."
    )


def _checklist(report: Report) -> Iterator[tuple[int, str, str, str]]:
    for row, title in ROWS.items():
        sections = [section for section in report.sections if row in section.rows]
        checks = [check for section in sections for check in section.checks]
        num_passed = sum(check.passed for check in checks)
        verdict = f"{num_passed} of {len(checks)}" if checks else ("text" if sections else "not in this study")
        yield row, title, "; ".join(section.title for section in sections) or "not in this study", verdict


def _corrections(report: Report) -> Iterator[tuple[Section, Correction]]:
    for section in report.sections:
        for block in section.blocks:
            if isinstance(block, Correction):
                yield section, block


def _cells(check: Check) -> tuple[str, str, str, str]:
    if check.requirement == "true":
        return check.name, "true" if check.value else "false", "true", check.source
    unit = f" {check.unit}" if check.unit else ""
    return check.name, f"{as_text(check.value)}{unit}", check.requirement, check.source


def _rows(section: Section) -> str:
    word = "row" if len(section.rows) == 1 else "rows"
    return f"{word} {', '.join(map(str, section.rows))} of the article"


def _anchor(section: Section) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in section.title.lower()).strip("-")


def _plain(markdown: str) -> str:
    """Return text for where no markup can be shown."""
    return markdown.replace("$", "").replace("*", "").replace("\\", "").replace("\n", " ")


def _style() -> str:
    return resources.files("training.study").joinpath("report.css").read_text()


_FUNCTION: Final = re.compile(r"\\(log|exp|sin|cos|min|max)(?=\s*[a-zA-Z\\])")


def _mathml(latex: str, options: dict[str, bool]) -> str:
    # MathML puts no space between the name of a function and a letter after it.
    spaced = _FUNCTION.sub(r"\\\1\\,", latex)
    return convert(spaced, display="block" if options["display_mode"] else "inline")


_MARKDOWN: Final = (
    MarkdownIt("commonmark", {"html": False})
    .enable("table")
    .use(dollarmath_plugin, renderer=_mathml, double_inline=True)
)


def _render(markdown: str) -> str:
    return str(_MARKDOWN.render(markdown))


def _inline(markdown: str) -> str:
    return str(_MARKDOWN.renderInline(markdown))
