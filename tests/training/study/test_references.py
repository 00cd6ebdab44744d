"""The list of references: what the article cites is there, and every link leads to arxiv.org."""

import re
from pathlib import Path

from training.study.claims import Table
from training.study.references import references
from training.study.setup import Study


def test_the_references_of_the_article_are_cited(tmp_path: Path) -> None:
    """Five texts, two of which have numbers at arxiv.org, in the article's order."""
    section = references(Study(tmp_path))
    assert section.rows == (29,)
    first, second = (block for block in section.blocks if isinstance(block, Table))
    cited = " ".join(cell for row in first.rows for cell in row)
    places = [cited.index(name) for name in ("1906.02691", "CS 285", "1606.05908", "book 1", "book 2")]
    assert places == sorted(places)
    links = [row[1] for row in (*first.rows, *second.rows) if row[1]]
    assert len(links) > 10
    for link in links:
        matched = re.fullmatch(r"\[(.+)\]\(https://arxiv\.org/abs/(.+)\)", link)
        assert matched
        assert matched[1] == matched[2]
        assert re.fullmatch(r"\d{4}\.\d{4,5}|physics/\d{7}", matched[1])
    assert len(set(links)) == len(links)
