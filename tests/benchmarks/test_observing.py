"""The benchmark of being observed: that it measures what it says."""

import io

from rich.console import Console

from tests.benchmarks.observing import KINDS, WORKLOADS, Result, _summary, run, table


def test_ratios_are_of_the_same_round() -> None:
    """A machine that slows down between rounds does not show in them."""
    (workload, *_) = WORKLOADS
    parts = {"bare": 100.0, "metrics": 102.0, "log": 112.2}
    results = {
        (workload.name, kind): [Result(1000 / slow, parts[kind] * slow) for slow in (1, 3, 2)] for kind in KINDS
    }
    summary = _summary(workload, results)
    assert summary["cpu metrics / bare"] == 1.02
    assert summary["cpu log / metrics"] == 1.1
    assert summary["cpu_us_bare"] == 200.0


def test_each_kind_is_what_it_says() -> None:
    """One short round on real services: all answer right, and a table comes out."""
    report = run(1, 0.2, Console(file=io.StringIO()))
    assert all(found["cpu_us_bare"] > 0 for found in report["workloads"].values())
    assert table(report).count("\n") == 1 + len(WORKLOADS)
