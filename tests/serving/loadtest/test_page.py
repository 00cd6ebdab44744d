"""The frame of a page is whole and asks for nothing."""

from serving.loadtest.page import Verdict, page, table, verdict_box


def test_a_page_holds_its_own_style_and_asks_for_nothing() -> None:
    """No address, no script, both colour schemes, a width for telephones."""
    text = page("a < b", "<p>content</p>")
    assert "<title>a &lt; b</title>" in text
    assert "<p>content</p>" in text
    assert "prefers-color-scheme:dark" in text
    assert "width=device-width" in text
    assert "http" not in text
    assert "<script" not in text


def test_a_table_names_its_rows_and_columns() -> None:
    """Readers of a screen hear the heading of a cell; whoever has a keyboard can scroll."""
    text = table("a & b", ["load", "p99"], [["c1", "2"], ["c2", '<td class="bad-cell">3</td>']])
    assert text.count('<th scope="col">') == 2
    assert text.count('<th scope="row">') == 2
    assert '<td class="bad-cell">3</td>' in text
    assert "<td><td" not in text
    assert "<caption>a &amp; b</caption>" in text
    assert 'tabindex="0" role="region"' in text


def test_a_verdict_is_text() -> None:
    """Whatever a server or a note says."""
    text = verdict_box(Verdict("bad", "<lost>", ["a & b"]))
    assert "&lt;lost&gt;" in text
    assert "<li>a &amp; b</li>" in text
