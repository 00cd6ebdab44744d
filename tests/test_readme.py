"""The README says what is true: its commands are run, and the output that it shows is the real one."""

import asyncio
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import api_keys
from serving.client import AsyncVaeClient
from serving.gateway.server import GatewayServer
from serving.standalone import in_process
from tests.certificates import Authority, ServerFiles
from tests.end_to_end.service import running
from tests.serving.harness import settings

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
TRITON = ROOT / ".venv/clients/bin/python"
KEY = "vae_a-key-of-a-test"


def shown_output(command: str) -> list[str]:
    """Return the lines that the README shows below a command."""
    block = re.search(rf"```console\n\$ {re.escape(command)}\n(.*?)```", README, re.DOTALL)
    assert block, f"the README does not show `{command}`"
    return block[1].strip().splitlines()


def example(text: str) -> str:
    """Return the example in Python that holds a text."""
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in code]
    return str(code)


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
    code = example("client.interpolate")
    with running(demo[0] / "bundle", "--engine", "in-process") as service:
        names: dict[str, object] = {}
        exec(code.replace("localhost:50051", service.target), names)  # noqa: S102 - our own README
        assert getattr(names["samples"], "shape", None) == (16, 1, 8, 8)
        assert getattr(names["path"], "shape", None) == (1, 8, 1, 8, 8)
        assert getattr(names["elbo"], "shape", None) == (16,)
        assert service.stop() == 0


async def test_the_secured_example_runs_as_it_stands(
    bundle_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Only the address is another: TLS, a key, a stream."""
    authority = Authority()
    files = ServerFiles.write(tmp_path, authority.issue(), authority)
    (tmp_path / "ca.pem").write_bytes(authority.certificate)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VAE_API_KEYS", f"alice:{api_keys.digest_of(KEY)}")
    monkeypatch.setenv("VAE_API_KEY", KEY)
    tls = (f"gateway.tls.certificate={files.certificate}", f"gateway.tls.private_key={files.private_key}")
    async with in_process(settings(bundle_dir, *tls)) as server:
        code = example("sample_stream").replace("vae.example:50051", f"localhost:{server.port}")
        names: dict[str, Any] = {}
        await asyncio.to_thread(exec, code, names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("0 (")
    assert names["chunk"].first_row + len(names["chunk"].samples) == 100_000


@pytest.mark.skipif(not TRITON.exists(), reason="no environment for tritonclient here: run `make clients`")
async def test_the_example_of_tritonclient_gets_the_same_samples(
    service: GatewayServer, client: AsyncVaeClient, tmp_path: Path
) -> None:
    """In an environment of its own, and only the port is another."""
    code = example("tritonclient").replace("localhost:50051", f"127.0.0.1:{service.port}")
    code += f"\nnp.save({str(tmp_path / 'samples.npy')!r}, samples)"
    process = await asyncio.create_subprocess_exec(TRITON, "-c", code)
    assert await process.wait() == 0
    expected = await client.sample(16, seed=1)
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), expected.samples)


def test_every_link_of_a_readme_leads_somewhere() -> None:
    """Files and folders that the READMEs name are there."""
    for readme in [ROOT / "README.md", *ROOT.glob("[a-z]*/README.md")]:
        for target in re.findall(r"\]\((?!https:)([^)#]+)[^)]*\)", readme.read_text()):
            assert (readme.parent / target).exists(), f"{readme.relative_to(ROOT)}: {target}"


def test_every_target_that_the_readme_names_exists() -> None:
    """`make x` in prose is a target."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"`make ([a-z]+)`", README)) <= targets
