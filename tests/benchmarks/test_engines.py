"""The benchmark of the engines: what it concludes from figures, and that its bare loop and its echo run."""

import json
from pathlib import Path

import pytest

from tests.benchmarks import engines
from tests.benchmarks.engines import Result, Workload
from tests.bundles import small_bundle

DECODE = Workload("Decode", 64, 128)


def report_of(own: float, ray: float, bare: float) -> dict[str, dict[str, dict[str, float]]]:
    """Return a report with one workload, in which the echo makes 100 calls per second."""
    results = {
        (DECODE.name, "echo"): [Result(100.0, 1.0)],
        (DECODE.name, "in-process"): [Result(own, 1.0)],
        (DECODE.name, "ray"): [Result(ray, 2.0)],
    }
    return {"ratios": {DECODE.name: engines.ratios(results, DECODE, [bare])}}


def test_ratios_are_of_the_same_round() -> None:
    """Calls per second divide, rows of the bare loop count as rows, and a latency is the other's multiple."""
    assert report_of(own=50.0, ray=40.0, bare=6400.0)["ratios"][DECODE.name] == {
        "in-process / echo": 0.5,
        "ray / in-process": 0.8,
        "p50 ray / in-process": 2.0,
        "in-process / bare": 0.5,
    }


def test_what_is_wanted_is_said_to_be_reached_or_not() -> None:
    """A ratio above its goal is reached, one below is not."""
    lines = engines.goals(report_of(own=95.0, ray=40.0, bare=6400.0))
    assert any("in-process / bare" in line and "| reached |" in line for line in lines)
    assert any("ray / in-process" in line and "not reached" in line for line in lines)


def test_a_regression_is_named_and_noise_is_not() -> None:
    """Below 0.85 of the recorded ratio it is worse; above, it is not."""
    recorded = report_of(own=100.0, ray=90.0, bare=6400.0)
    assert engines.compare(report_of(own=100.0, ray=85.0, bare=6400.0), recorded) == []
    worse = engines.compare(report_of(own=100.0, ray=60.0, bare=6400.0), recorded)
    assert worse == ["Decode 64 c128: ray / in-process is 0.60, recorded was 0.90"]


def test_a_latency_that_grows_is_a_regression() -> None:
    """Of a latency more is worse."""
    recorded = {"ratios": {DECODE.name: {"p50 ray / in-process": 1.0}}}
    assert engines.compare({"ratios": {DECODE.name: {"p50 ray / in-process": 1.5}}}, recorded)
    assert not engines.compare({"ratios": {DECODE.name: {"p50 ray / in-process": 0.5}}}, recorded)


def test_the_bare_loop_runs_the_decoder(tmp_path: Path) -> None:
    """It reports rows per second of the bundle's own graph."""
    bundle = small_bundle(
        tmp_path, data_shape=engines.DATA_SHAPE, latent_dim=engines.LATENT_DIM, hidden=engines.HIDDEN
    )
    assert engines.measure_bare(bundle, 0.05) > 64


def test_requests_differ() -> None:
    """No two requests of a workload are the same, so an answer to another one would be seen."""
    for workload in engines.WORKLOADS:
        assert len(set(engines.requests(workload))) == engines.NUM_REQUESTS


@pytest.mark.skipif(not engines.RECORD.exists(), reason="no run of `make bench` is recorded yet")
def test_the_readme_shows_what_is_recorded() -> None:
    """The table and what was wanted are those of the record, line for line."""
    report = json.loads(engines.RECORD.read_text())
    readme = engines.RECORD.with_name("README.md").read_text()
    assert engines.table(report) in readme
    assert all(line in readme for line in engines.goals(report))
