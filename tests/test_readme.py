"""The README says what is true: its commands are run, and the output that it shows is the real one."""

import re
import subprocess
from pathlib import Path

import pytest

from tests.end_to_end.service import running

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def shown_output(command: str) -> list[str]:
    """Return the lines that the README shows below a command."""
    block = re.search(rf"```console\n\$ {re.escape(command)}\n(.*?)```", README, re.DOTALL)
    assert block, f"the README does not show `{command}`"
    return block[1].strip().splitlines()


def shape_of(lines: list[str]) -> list[str]:
    """Return lines without what differs from run to run: figures, versions, which epoch was best, widths."""
    plain = [re.sub(r"\b[0-9a-f]{12}\b", "VERSION", line) for line in lines]
    plain = [re.sub(r"-?\d[\d.,]*(e-\d+)?", "N", line) for line in plain]
    plain = [re.sub(r"[━─]+", "-", line) for line in plain]
    return [re.sub(r"\s+", " ", line).removesuffix(" best").strip() for line in plain]


def is_setup(line: str) -> bool:
    """Return whether a line belongs to the making of the environment, which a second run leaves out."""
    return "-m venv" in line or line.startswith("installing")


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Run `make demo` into a folder of its own; return the folder and what was printed."""
    folder = tmp_path_factory.mktemp("readme") / "demo"
    done = subprocess.run(
        ["make", "--no-print-directory", "demo", f"DEMO={folder}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return folder, done.stdout.replace(str(folder), "demo").strip().splitlines()


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(700)
def test_make_demo_prints_what_the_readme_shows(demo: tuple[Path, list[str]]) -> None:
    """Line by line, but for figures and for the making of the environment."""
    folder, printed = demo
    expected = [line for line in shown_output("make demo") if not is_setup(line)]
    assert shape_of([line for line in printed if not is_setup(line)]) == shape_of(expected)
    for name in ("reconstructions.png", "samples.png", "interpolation.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_the_example_in_python_runs_as_it_stands(demo: tuple[Path, list[str]]) -> None:
    """Only the port is another."""
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    with running(demo[0] / "bundle", "--engine", "in-process") as service:
        names: dict[str, object] = {}
        exec(code.replace("localhost:50051", service.target), names)  # noqa: S102 - our own README
        assert getattr(names["samples"], "shape", None) == (16, 1, 8, 8)
        assert getattr(names["path"], "shape", None) == (1, 8, 1, 8, 8)
        assert service.stop() == 0


def test_every_link_of_a_readme_leads_somewhere() -> None:
    """Files and folders that the READMEs name are there."""
    for readme in [ROOT / "README.md", *ROOT.glob("[a-z]*/README.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", readme.read_text()):
            assert (readme.parent / target).exists(), f"{readme.relative_to(ROOT)}: {target}"


def test_every_target_that_the_readme_names_exists() -> None:
    """`make x` in prose is a target."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)`", README)) <= targets
