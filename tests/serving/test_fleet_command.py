"""`vae-serve top`: tables that can be read, JSON that can be parsed, an error when nobody is there."""

import asyncio
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from serving.client import Unavailable, VaeClient
from serving.fleet import GraphRow, MethodRow, ProcessRow, Summary
from serving.fleet_command import as_tables, as_text, summary_of_now, top
from serving.standalone import in_process
from tests.serving.harness import settings

NAN = float("nan")
SUMMARY = Summary(
    is_ready=True,
    num_calls=3.0,
    methods=[MethodRow("Encode", 1234.5, 0.5, 1.25, NAN)],
    graphs=[GraphRow("encoder", 2, ("aaa", "bbb"), 4000.0, 12.5, 7.0, 0.25, 1.0)],
    processes=[ProcessRow("encoder", "r1", "127.0.0.1:9091", "aaa CPU", 2000.0, 0.75, 0.9, 250.0)],
    unreachable={"127.0.0.1:9": "refused"},
)


def shown(summary: Summary) -> str:
    """Return the tables as text."""
    console = Console(file=io.StringIO(), width=140)
    console.print(as_tables(summary))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_tables_show_all_that_is_known() -> None:
    """Rates with separators, unknown quantiles as dashes, versions that differ, processes that are lost."""
    text = shown(SUMMARY)
    for part in (
        "READY",
        "3 calls in flight",
        "1,234.5",
        "1.25",
        "-",
        "aaa bbb  versions differ",
        "4,000",
        "0.250",
    ):
        assert part in text
    assert "not read: 127.0.0.1:9: refused" in text


def test_a_service_that_is_not_ready_says_so_first() -> None:
    """Before any table."""
    assert shown(SUMMARY._replace(is_ready=False)).startswith("NOT READY")


def test_json_has_null_for_what_is_not_known() -> None:
    """NaN is no JSON."""
    parsed = json.loads(as_text(SUMMARY))
    assert parsed["methods"][0]["p99_ms"] is None
    assert parsed["methods"][0]["calls_per_s"] == 1234.5
    assert parsed["graphs"][0]["versions"] == ["aaa", "bbb"]


async def test_one_table_is_of_now(bundle_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two looks at a real service, and calls between them."""
    async with in_process(settings(bundle_dir, "gateway.metrics_port=0")) as server:
        url = f"http://127.0.0.1:{server.metrics_port}"

        def call(_seconds: float) -> None:
            with VaeClient(f"127.0.0.1:{server.port}") as client:
                client.sample(4)

        summary = await asyncio.to_thread(summary_of_now, url, sleep=call)
        await asyncio.to_thread(top, url, as_json=True)
    assert sum(row.calls_per_s for row in summary.methods) > 0
    assert json.loads(capsys.readouterr().out)["is_ready"] is True


def test_nobody_there_is_an_error_with_advice() -> None:
    """No stack; what to check."""
    with pytest.raises(Unavailable, match="is the service up with a metrics port"):
        top("http://127.0.0.1:9", once=True)
