"""A real Prometheus on a free port: Debian's package, scraping each second what a gateway lists."""

import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

from serving.demo import free_port
from tests.end_to_end.service import wait_until

OBSERVABILITY = Path(__file__).parents[2] / "deploy/observability"
START_TIMEOUT_S = 30
SCRAPE_TIMEOUT_S = 30
STOP_TIMEOUT_S = 20


def program(name: str) -> str:
    """Return the path of a program of the package; skip the test where there is none."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"no {name} here; install Debian's package prometheus (.ci/debian does, as root)")
    return path


class Prometheus(NamedTuple):
    """A running Prometheus."""

    port: int

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.port}"

    def ask(self, path: str, **parameters: str) -> Any:  # noqa: ANN401 - JSON
        """Return the data that the HTTP API answers with."""
        query = urllib.parse.urlencode(parameters)
        try:
            with urllib.request.urlopen(
                f"http://127.0.0.1:{self.port}/api/v1/{path}?{query}", timeout=10
            ) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None
        return answer["data"]

    def series(self, expr: str) -> list[tuple[dict[str, str], float]]:
        """Return labels and value of each series of an expression now."""
        data = self.ask("query", query=expr)
        assert data["resultType"] == "vector", f"{expr}: expected a vector, got a {data['resultType']}"
        return [(entry["metric"], float(entry["value"][1])) for entry in data["result"]]

    def values(self, expr: str, *labels: str) -> dict[tuple[str, ...], float]:
        """Return the values of an expression by those labels."""
        found = [(tuple(metric.get(label, "") for label in labels), value) for metric, value in self.series(expr)]
        assert len(dict(found)) == len(found), f"{expr}: several series with the same {labels}"
        return dict(found)

    def value(self, expr: str) -> float:
        """Return the value of an expression that has exactly one series; NaN if it has none."""
        found = self.series(expr)
        assert len(found) <= 1, f"{expr}: {len(found)} series"
        return found[0][1] if found else float("nan")

    def wait_for_scrapes(self) -> None:
        """Return once every target has been scraped, and has answered, after now."""
        now = time.time()

        def is_done() -> bool:
            return self.value('min(timestamp(up{job="vae"}))') > now and self.value('min(up{job="vae"})') == 1

        wait_until(is_done, "every target is scraped again", timeout_s=SCRAPE_TIMEOUT_S)


def config_for(metrics_port: int, rules: Path) -> dict[str, Any]:
    """Return the configuration that we ship, in a hurry, and for another port."""
    shipped: dict[str, Any] = yaml.safe_load((OBSERVABILITY / "prometheus.yaml").read_text())
    shipped["global"] = {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"}
    shipped["rule_files"] = [str(rules)]
    (scrape,) = shipped["scrape_configs"]
    (found,) = scrape["http_sd_configs"]
    found["url"] = found["url"].replace("9090", str(metrics_port))
    found["refresh_interval"] = "1s"
    return shipped


@contextlib.contextmanager
def prometheus(folder: Path, metrics_port: int) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes a service and evaluates our rules; end it."""
    command, port = program("prometheus"), free_port()
    config = folder / "prometheus.yaml"
    config.write_text(yaml.safe_dump(config_for(metrics_port, OBSERVABILITY / "rules.yaml")))
    options = [
        f"--config.file={config}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=warn",
    ]
    with (folder / "prometheus.log").open("w") as log:
        process = subprocess.Popen([command, *options], stdout=log, stderr=log)
        running = Prometheus(port)
        try:
            wait_until(lambda: _is_ready(running, process), "Prometheus is ready", timeout_s=START_TIMEOUT_S)
            assert process.poll() is None, (folder / "prometheus.log").read_text()
            wait_until(
                lambda: running.value('max(vae_ready{job="vae"})') == 1,
                "Prometheus has scraped the gateway",
                timeout_s=SCRAPE_TIMEOUT_S,
            )
            yield running
        finally:
            process.terminate()
            process.wait(timeout=STOP_TIMEOUT_S)


def _is_ready(running: Prometheus, process: "subprocess.Popen[bytes]") -> bool:
    if process.poll() is not None:
        return True
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{running.port}/-/ready", timeout=2):
            return True
    except OSError:
        return False
