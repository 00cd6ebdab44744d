"""The pieces of a page: its frame, its tables, its verdict. No script, no network, one file."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Final, Literal, NamedTuple

_STYLE: Final = Path(__file__).with_name("report.css")

Mood = Literal["good", "bad", "warn"]


class Verdict(NamedTuple):
    """What a load test says, in words."""

    mood: Mood
    headline: str
    details: list[str]


def page(title: str, content: str) -> str:
    """Return a whole page around content, with the style sheet inside."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<link rel="icon" href="data:,">'  # or a browser asks for one
        f"<title>{escape(title)}</title><style>{_STYLE.read_text()}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>\n{content}\n</main></body></html>\n"
    )


def verdict_box(found: Verdict) -> str:
    """Return a verdict as a box of the page."""
    items = "".join(f"<li>{escape(detail)}</li>" for detail in found.details)
    return f'<div class="verdict {found.mood}"><strong>{escape(found.headline)}</strong><ul>{items}</ul></div>'


def table(caption: str, headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table that scrolls in itself; the first cell of a row is its heading. Cells are HTML already."""
    head = "".join(f'<th scope="col">{escape(heading)}</th>' for heading in headings)
    body = "".join(
        f'<tr><th scope="row">{cells[0]}</th>{"".join(_cell(cell) for cell in cells[1:])}</tr>' for cells in rows
    )
    label = escape(caption, quote=True)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table>'
        f"<caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _cell(content: str) -> str:
    return content if content.startswith("<td") else f"<td>{content}</td>"
