"""What every section of the study must be."""

from latex2mathml.converter import convert

from training.study.claims import Checks, Correction, Figure, Section, Table

_PNG = b"\x89PNG\r\n\x1a\n"


def assert_shown(section: Section, *rows: int) -> None:
    """Require a section to cover rows of the checklist, to pass its checks, and to be fit for the report."""
    assert section.rows == rows
    assert section.checks
    assert not [check for check in section.checks if not check.passed]
    for text in _texts(section):
        # Every second piece is a formula; an odd number of pieces means that all dollar signs are paired.
        pieces = text.replace("$$", "$").split("$")
        assert len(pieces) % 2 == 1, text
        for formula in pieces[1::2]:
            assert "<merror" not in convert(formula)
    for block in section.blocks:
        if isinstance(block, Figure):
            assert block.png.startswith(_PNG)
        if isinstance(block, Table):
            assert all(len(row) == len(block.columns) for row in block.rows)


def _texts(section: Section) -> list[str]:
    texts = []
    for block in section.blocks:
        match block:
            case str():
                texts.append(block)
            case Figure(caption=caption):
                texts.append(caption)
            case Correction(article=article, right=right):
                texts += [article, right]
            case Table(columns=columns, rows=rows, caption=caption):
                texts += [*columns, *(cell for row in rows for cell in row), caption]
            case Checks(items=items):
                texts += [text for item in items for text in (item.name, item.source)]
    return texts
