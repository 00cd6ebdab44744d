"""The command `vae-serve load`, as people use it, against real services."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from serving import api_keys, cli
from serving.load_command import default_processes, parse_duration
from serving.loadtest.errors import BadWorkload
from serving.loadtest.results import LoadReport
from tests.bundles import small_bundle
from tests.certificates import Authority, ServerFiles
from tests.serving.test_cli import KEY, Command, Result, _up, _wrong

ROOT = Path(__file__).parents[2]
QUICK = ("--duration", "0.5s", "--warm-up", "0.1s", "--processes", 1, "--no-limits")
ALL = "encode:2,decode:1,sample:3,reconstruct:1,score:1,interpolate:3"


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Return a function that runs the command line in this process."""
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["vae-serve", *map(str, arguments)])
        capsys.readouterr()
        code = cli.run()
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def target(bundle_dir: Path) -> Iterator[str]:
    """Run `vae-serve up`; return its address."""
    with _up(bundle_dir, "--port", 0) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        try:
            yield first.split()[2]
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)


def test_every_method_is_checked_against_the_bundle(
    command: Command, target: str, bundle_dir: Path, tmp_path: Path
) -> None:
    """All answers are right bit by bit; the table, the ledger and both files are written."""
    page, report_file = tmp_path / "load.html", tmp_path / "load.json"
    result = command(
        *("load", "--target", target, "--bundle", bundle_dir, "--mix", ALL, "--rate", 60, *QUICK),
        *("--label", "first", "--html", page, "--json", report_file),
    )
    assert result.code == 0, result
    report = LoadReport.read(report_file)
    assert report.counts.right == report.counts.sent > 0
    assert "bundle's own graphs" in report.checks
    assert report.command.startswith("vae-serve load --target ")
    assert {operation.name for operation in report.stages[0].operations} == set(ALL.split(","))
    assert result.out.startswith("first: small ")
    assert f"ledger: {report.counts.sent} sent = {report.counts.right} right + 0 refused + 0 lost" in result.out
    assert "<html" in page.read_text()


def test_the_open_inference_protocol(command: Command, target: str, bundle_dir: Path, tmp_path: Path) -> None:
    """The same graphs by the other protocol, in a closed loop."""
    report_file = tmp_path / "load.json"
    result = command(
        *("load", "--target", target, "--protocol", "oip", "--mix", "encode:1,decode:2,sample:3"),
        *("--concurrency", "1,4", "--bundle", bundle_dir, "--json", report_file, *QUICK),
    )
    assert result.code == 0, result
    report = LoadReport.read(report_file)
    assert [stage.concurrency for stage in report.stages] == [1, 4]
    assert report.counts.right == report.counts.sent > 0
    assert "4 callers" in result.out


def test_tls_and_a_key(command: Command, bundle_dir: Path, tmp_path: Path) -> None:
    """The options of the other commands reach every process; without the key the test does not begin."""
    authority = Authority()
    files = ServerFiles.write(tmp_path, authority.issue(), authority)
    ca, key = tmp_path / "ca.pem", tmp_path / "key.txt"
    ca.write_bytes(authority.certificate)
    key.write_text(KEY)
    settings = (
        *("--set", f"gateway.tls.certificate={files.certificate}"),
        *("--set", f"gateway.tls.private_key={files.private_key}"),
    )
    keys = {"VAE_API_KEYS": f"team:{api_keys.digest_of(KEY)}"}
    with _up(bundle_dir, "--port", 0, *settings, environment=keys) as process:
        assert process.stdout is not None
        address = process.stdout.readline().split()[2]
        try:
            right = command("load", "--target", address, "--ca", ca, "--api-key-file", key, "--rate", 40, *QUICK)
            without = command("load", "--target", address, "--ca", ca, *QUICK)
            plain = command("load", "--target", address, "--api-key-file", key, *QUICK)
        finally:
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=60)
    assert right.code == 0, right
    assert "right + 0 refused + 0 lost + 0 wrong" in right.out
    assert KEY not in right.out + right.err
    assert without.code == 1
    assert "UNAUTHENTICATED" in without.err
    assert plain.code == 1


def test_another_bundle_than_the_served_one(command: Command, target: str, tmp_path: Path) -> None:
    """It would know other answers: both versions are named."""
    other = small_bundle(tmp_path / "other", seed=5)
    result = command("load", "--target", target, "--bundle", other, *QUICK)
    assert result.code == 2
    assert "expected the bundle that is served, version " in result.err


def test_no_service_is_an_error_within_seconds(command: Command) -> None:
    """Exit code 1 and a line that names the address."""
    result = command("load", "--target", "127.0.0.1:1", *QUICK)
    assert (result.code, result.out) == (1, "")
    assert "127.0.0.1:1: UNAVAILABLE" in result.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mix", "train:1"], "--mix train:1: expected method:rows=share"),
        (["--rate", "0"], "--rate 0: expected requests per second"),
        (["--rate", "5", "--concurrency", "1"], "--rate --concurrency together: expected one of them"),
        (["--find-knee", "--steps", "5x1"], "--find-knee with --steps: expected --rate at most"),
        (["--duration", "soon"], "--duration soon: expected a time"),
        (["--duration", "0s"], "--duration 0s: expected more than zero"),
        (["--json", "/nowhere/a.json"], "there is no folder /nowhere"),
        (["--bundle", "/nowhere"], "there is no manifest.json"),
        (["--cert", "x.pem"], "--cert and --key go together"),
        (["--replay", "/nowhere.csv"], "/nowhere.csv"),
    ],
)
def test_wrong_commands(command: Command, target: str, arguments: list[str], message: str) -> None:
    """Exit code 2 and a reason, before any load."""
    result = command("load", "--target", target, *arguments)
    assert result.code == 2
    assert message in result.err
    if "--bundle" not in arguments:
        assert message in _wrong(result)


def test_ctrl_c_ends_the_stage_and_writes_the_report(target: str, tmp_path: Path) -> None:
    """As at a terminal, where the signal reaches every process of the group; exit code 130."""
    report_file = tmp_path / "load.json"
    arguments = [
        *("load", "--target", target, "--rate", "50", "--duration", "60s", "--warm-up", "0.2s", "--no-limits"),
        *("--processes", "2", "--json", str(report_file)),
    ]
    with subprocess.Popen(
        [sys.executable, "-m", "serving", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        seen: list[str] = []
        while not any(line.startswith("50/s: ") for line in seen):
            line = process.stderr.readline()
            assert line, seen
            seen.append(line)
        time.sleep(2.0)
        os.killpg(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, (out, err, seen)
    report = LoadReport.read(report_file)
    assert report.counts.right == report.counts.sent > 20
    assert any(note.startswith("interrupted") for note in report.notes)
    assert "note: interrupted" in out
    assert "Traceback" not in err


def test_two_reports_are_compared(command: Command, target: str, tmp_path: Path) -> None:
    """What one run wrote is what load-compare reads; a file that is none is named."""
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file in files:
        assert command("load", "--target", target, "--rate", 40, "--json", file, *QUICK).code == 0
    page = tmp_path / "compare.html"
    result = command("load-compare", *files, "--threshold", 0.01, "--html", page)
    assert result.code == 0, result
    assert result.out
    assert "<svg" in page.read_text()
    files[0].write_text(json.dumps({"version": 1}))
    bad = command("load-compare", *files)
    assert bad.code == 2
    assert "expected a JSON file that `vae-serve load --json` wrote" in bad.err


@pytest.mark.parametrize(
    ("text", "seconds"), [("50ms", 0.05), ("2s", 2), ("1.5m", 90), ("1h", 3600), ("0.5", 0.5)]
)
def test_durations(text: str, seconds: float) -> None:
    """Numbers are seconds unless they have a unit."""
    assert parse_duration("--x", text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1d", "1 2", "nan", "1e3"])
def test_bad_durations(text: str) -> None:
    """The option is named."""
    with pytest.raises(BadWorkload, match=r"^--x "):
        parse_duration("--x", text)


def test_processes_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half the cores, so that a service on the same machine has the others; four at most."""
    expected: list[tuple[int | None, int]] = [(None, 1), (1, 1), (2, 1), (4, 2), (64, 4)]
    for cores, number in expected:
        monkeypatch.setattr(os, "cpu_count", _returning(cores))
        assert default_processes() == number


def _returning(value: int | None) -> Callable[[], int | None]:
    return lambda: value
