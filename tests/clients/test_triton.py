"""tritonclient, unmodified and in a process of its own, against a service in this one."""

import asyncio
import json
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from serving.client import AsyncVaeClient
from serving.gateway.server import GatewayServer

ROOT: Final = Path(__file__).parents[2]
PYTHON: Final = ROOT / ".venv/clients/bin/python"
SCRIPT: Final = Path(__file__).with_name("triton.py")
CHECKS: Final = {
    "async_infer",
    "asyncio",
    "errors",
    "health_and_metadata",
    "infer",
    "prior",
    "statistics_and_index",
    "stream",
    "types",
}
SEED: Final = 7


@pytest.mark.skipif(not PYTHON.exists(), reason="no environment for tritonclient here: run `make clients`")
async def test_tritonclient_works_unmodified(
    service: GatewayServer, client: AsyncVaeClient, tmp_path: Path, seed: int
) -> None:
    """Calls, callbacks, streams and asyncio get the bytes of the typed API; errors have Triton's words."""
    random = np.random.default_rng(seed)
    data = random.random((5, 1, 4, 4), dtype=np.float32)
    latents = random.standard_normal((5, 2)).astype(np.float32)
    encoded = await client.encode(data)
    answers = {
        "data": data,
        "mean": encoded.mean,
        "log_var": encoded.log_var,
        "latents": latents,
        "reconstruction": (await client.decode(latents)).reconstruction,
        "row": np.arange(5, dtype=np.uint64)[:, None],
        "samples": (await client.sample(5, seed=SEED)).samples,
    }
    np.savez(tmp_path / "answers.npz", allow_pickle=False, **answers)
    process = await asyncio.create_subprocess_exec(
        PYTHON,
        SCRIPT,
        f"127.0.0.1:{service.port}",
        tmp_path / "answers.npz",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    stdout, stderr = await process.communicate()
    assert process.returncode == 0, stderr.decode()
    report = json.loads(stdout)
    failed = {name: problem for name, problem in report.items() if problem}
    assert not failed, "\n".join(failed.values())
    assert set(report) == CHECKS
