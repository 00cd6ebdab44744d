"""Comparable servers beside ours: the same graphs, the same load, one after the other in every round.

    python -m tests.benchmarks.peers [--quick] [--rounds 3] [--seconds 0.5] [--only NAME ...] [--out FOLDER]

Writes peers.md, peers.json and peers.svg. `make serving-peers` makes the environments of MLServer and PyTriton; a
peer that is not here is named and left out. A full run takes less than ten minutes on an idle machine.
"""

import argparse
import os
import platform
import shlex
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console

from tests.benchmarks.engines import DATA_SHAPE, HIDDEN, LATENT_DIM, cpu_name
from tests.benchmarks.peers import load
from tests.benchmarks.peers.calls import TOLERANCE, WORKLOADS, Calls, Series
from tests.benchmarks.peers.contestants import Contestant, contestants, running
from tests.benchmarks.peers.report import TARGETS, Cells, Key, Report, as_markdown, dumps, plot
from tests.bundles import small_bundle

CONCURRENCIES: Final = (1, 16, 128)
BRIEF_CONCURRENCIES: Final = (1, 128)
OPEN_SHARE: Final = 0.7
"""Of the slowest peer's throughput: offered to everybody in the open loop."""

OPEN_WINDOWS: Final = 2
"""In each round after the first, which finds the rates."""


class Plan(NamedTuple):
    """How long and how often."""

    rounds: int
    seconds: float
    """Of one window, closed loop; the open loop's are twice as long."""


class Run:
    """One comparison.

    Args:
        servers: Who takes part.
        bundle: Folder of the graphs.
        plan: How long and how often.
        console: Where to tell what happens.
    """

    def __init__(self, servers: list[Contestant], bundle: Path, plan: Plan, console: Console) -> None:
        self._servers, self._bundle, self._plan, self._console = servers, bundle, plan, console
        self._cells = Cells()
        self._rates: dict[str, float] = {}
        self.failures: dict[str, str] = {}
        """Servers that did not start, and what they said."""

    def everything(self) -> tuple[Cells, dict[str, float]]:
        """Measure all rounds; return the cells, and the rates of the open loop by workload."""
        for number in range(self._plan.rounds):
            self._find_rates(is_first=number == 0)
            offset = number % len(self._servers)
            for contestant in (*self._servers[offset:], *self._servers[:offset]):
                if contestant.name not in self.failures:
                    self._one(contestant, number)
        return self._cells, self._rates

    def _one(self, contestant: Contestant, number: int) -> None:
        began = time.monotonic()
        try:
            with running(contestant, self._bundle) as port:
                started_s = time.monotonic() - began
                for series in contestant.series:
                    self._series(port, series, number)
        except RuntimeError as error:
            self.failures[contestant.name] = str(error)
            self._console.print(str(error), style="red", markup=False)
            return
        took_s = time.monotonic() - began
        self._console.print(
            f"round {number + 1}/{self._plan.rounds}: {contestant.name}, {took_s:.0f} s, {started_s:.0f} to start",
            highlight=False,
        )

    def _series(self, port: int, series: Series, number: int) -> None:
        seconds = self._plan.seconds
        for workload in WORKLOADS:
            calls = Calls(self._bundle, series, workload)
            for concurrency in BRIEF_CONCURRENCIES if series.is_brief else CONCURRENCIES:
                closed = load.closed_loop(port, series, calls, concurrency=concurrency, seconds=seconds)
                self._cells.add(Key(workload.name, series.name, "closed", concurrency), load.run(closed))
            is_open = workload.name in self._rates and not series.is_brief
            for repeat in range(OPEN_WINDOWS if is_open else 0):
                opened = load.open_loop(
                    port,
                    series,
                    calls,
                    rate=self._rates[workload.name],
                    seconds=2 * seconds,
                    seed=number * OPEN_WINDOWS + repeat,
                )
                self._cells.add(Key(workload.name, series.name, "open", 0), load.run(opened))

    def _find_rates(self, *, is_first: bool) -> None:
        """Set the rates of the open loop once, after the first round: they must be the same in all others."""
        peers = [
            series.name
            for contestant in self._servers
            for series in contestant.series
            if series.name in TARGETS and contestant.name not in self.failures  # not our own, not the floor
        ]
        if is_first or self._rates or not peers:
            return
        rates = {workload.name: OPEN_SHARE * self._cells.slowest(workload, peers) for workload in WORKLOADS}
        self._rates = {name: rate for name, rate in rates.items() if rate > 0}


def _machine() -> dict[str, object]:
    return {
        "processors": os.cpu_count(),
        "model": cpu_name(),
        "python": platform.python_version(),
        "load_average": os.getloadavg()[0],
    }


def measure(plan: Plan, only: list[str], console: Console) -> Report:
    """Run the comparison; return the report.

    Raises:
        SystemExit: If nobody is left to compare.
    """
    chosen = [each for each in contestants() if not only or each.name in only]
    here = [each for each in chosen if each.is_here]
    absent = {each.name: each.how_to_get for each in chosen if not each.is_here}
    for name, how in absent.items():
        console.print(f"{name} is not here and is left out: {how}", style="yellow", markup=False)
    if not here:
        raise SystemExit(f"nobody to compare; known: {'; '.join(each.name for each in contestants())}")
    machine, date = _machine(), datetime.now(UTC).date().isoformat()
    with tempfile.TemporaryDirectory() as folder:
        bundle = small_bundle(Path(folder) / "bundle", data_shape=DATA_SHAPE, latent_dim=LATENT_DIM, hidden=HIDDEN)
        run = Run(here, bundle, plan, console)
        cells, rates = run.everything()
    failed = {name: f"it did not serve ({text.splitlines()[0]})" for name, text in run.failures.items()}
    took_part = [each for each in here if each.name not in failed]
    return {
        "command": shlex.join(["python", "-m", "tests.benchmarks.peers", *sys.argv[1:]]),
        "date": date,
        "machine": machine,
        "model": f"{DATA_SHAPE[-1] ** 2}-{'-'.join(map(str, HIDDEN))}-{LATENT_DIM} MLP",
        "rounds": plan.rounds,
        "seconds": plan.seconds,
        "tolerance": TOLERANCE,
        "concurrencies": CONCURRENCIES,
        "open_share": OPEN_SHARE,
        "rates": rates,
        "absent": absent | failed,
        "settings": {each.name: each.settings for each in took_part},
        "series": [series.name for each in took_part for series in each.series],
        "cells": cells.as_json(),
    }


def main() -> None:
    """Compare, and write the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two rounds of short windows: whether it works")
    parser.add_argument("--rounds", type=int, default=3, help="rounds; medians are shown")
    parser.add_argument("--seconds", type=float, default=0.5, help="length of one window")
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="names of servers, all by default")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1], help="folder of the report")
    arguments = parser.parse_args()
    plan = Plan(2, 0.2) if arguments.quick else Plan(arguments.rounds, arguments.seconds)
    report = measure(plan, arguments.only, Console())
    markdown = as_markdown(report)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "peers.json").write_text(dumps(report))
    (arguments.out / "peers.md").write_text(markdown)
    plot(report, arguments.out / "peers.svg")
    sys.stdout.write(markdown)


if __name__ == "__main__":
    main()
