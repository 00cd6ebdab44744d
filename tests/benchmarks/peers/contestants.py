"""The servers that are compared: how each is started, with which settings, and how to get it."""

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import psutil

from serving.config import BatchingConfig
from serving.demo import free_port
from tests.benchmarks.peers import load
from tests.benchmarks.peers.calls import WORKLOADS, Calls, Series

ROOT: Final = Path(__file__).parents[3]
ENVIRONMENTS: Final = ROOT / ".venv/serving-peers"
MAX_BATCH_ROWS: Final = BatchingConfig().max_batch_rows
"""Most rows in one run, for every server that counts rows."""

MLSERVER_BATCH_REQUESTS: Final = 128
MLSERVER_BATCH_S: Final = 0.005
DELAY_US: Final = 500
"""Longest time that rows gather, for the servers that wait for more: with 0, 100 and 2,000, PyTriton answered
fewer calls of one row."""

START_TIMEOUT_S: Final = 180
STOP_TIMEOUT_S: Final = 60

_RAY_SERVE_TUNING: Final = {
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",
    "RAY_SERVE_LOG_TO_STDERR": "0",
    "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
}
_SCRIPTS: Final = Path(__file__).parent / "servers"
_OURS: Final = "default settings"
_RUN: Final = "one thread per session, one instance per graph"


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One server."""

    name: str

    series: tuple[Series, ...]
    """The interfaces through which it is measured."""

    command: Callable[[Path, int], list[str]]
    """Returns the command that serves a bundle on a port."""

    settings: str
    """What was set, for the report."""

    python: Path = Path(sys.executable)
    """The interpreter of its environment."""

    environment: dict[str, str] = field(default_factory=dict)
    """Variables beside those of this process."""

    how_to_get: str = ""
    stop_signal: signal.Signals = signal.SIGTERM

    @property
    def is_here(self) -> bool:
        """Whether its environment exists."""
        return self.python.exists()


def contestants() -> list[Contestant]:
    """Return every server, ours first."""
    mlservers = [_mlserver(is_batching=False), _mlserver(is_batching=True)]
    ray_serves = [_ray_serve(is_tuned=False), _ray_serve(is_tuned=True)]
    return [_ours("in-process"), _ours("ray"), _pytriton(), *mlservers, *ray_serves, _bare()]


@contextlib.contextmanager
def running(contestant: Contestant, bundle: Path) -> Iterator[int]:
    """Start a server; yield its port once both graphs answer rightly; stop it and what it started at the end.

    Raises:
        RuntimeError: If it does not answer rightly in time. The text holds the end of what it printed.
    """
    port = free_port()
    with tempfile.TemporaryFile() as output:
        process = psutil.Popen(
            contestant.command(bundle, port),
            cwd=ROOT,
            env=_environment(contestant),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait(contestant, bundle, port, process)
            yield port
        except RuntimeError as error:
            output.seek(0)
            tail = output.read().decode(errors="replace").strip().splitlines()[-10:]
            raise RuntimeError("\n".join([f"{contestant.name}: {error}", *tail])) from error
        finally:
            _stop(process, contestant.stop_signal)


def _environment(contestant: Contestant) -> dict[str, str]:
    """Return this process's environment for a server: no cluster and no keys but its own, one thread."""
    strangers = ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH", "VAE_API_KEYS")
    inherited = {name: value for name, value in os.environ.items() if name not in strangers}
    return inherited | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "token"} | contestant.environment


def _wait(contestant: Contestant, bundle: Path, port: int, process: psutil.Popen) -> None:
    for series in contestant.series:
        for workload in WORKLOADS:
            calls = Calls(bundle, series, workload)
            load.run(
                load.until_right(
                    port, series, calls, is_alive=lambda: process.poll() is None, timeout_s=START_TIMEOUT_S
                )
            )


def _stop(process: psutil.Popen, stop_signal: signal.Signals) -> None:
    family: list[psutil.Process] = [process]
    with contextlib.suppress(psutil.NoSuchProcess):
        family += process.children(recursive=True)
        process.send_signal(stop_signal)
    with contextlib.suppress(psutil.TimeoutExpired):
        process.wait(timeout=STOP_TIMEOUT_S)
    _, alive = psutil.wait_procs(family, timeout=5)
    for survivor in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            survivor.kill()
    psutil.wait_procs(alive, timeout=5)


def _ours(engine: str) -> Contestant:
    def command(bundle: Path, port: int) -> list[str]:
        up = [sys.executable, "-m", "serving", "up", "--bundle", str(bundle), "--engine", engine]
        return [*up, "--port", str(port)]

    name = f"ours, {engine}"
    return Contestant(
        name=name,
        series=(Series(name, "vae.v1", is_ours=True), Series(name, "OIP", is_ours=True, is_brief=True)),
        command=command,
        settings=f"`vae-serve up --engine {engine}`, {_OURS}: at most {MAX_BATCH_ROWS} rows in a run, {_RUN}",
    )


def _pytriton() -> Contestant:
    python = ENVIRONMENTS / "pytriton/bin/python"

    def command(bundle: Path, port: int) -> list[str]:
        script = [str(python), str(_SCRIPTS / "run_pytriton.py"), str(bundle)]
        return [*script, str(port), str(free_port()), str(MAX_BATCH_ROWS), str(DELAY_US)]

    return Contestant(
        name="PyTriton",
        series=(Series("PyTriton"),),
        command=command,
        settings=(
            f"0.7.0 (Triton 2.51): `DynamicBatcher(max_queue_delay_microseconds={DELAY_US})`, "
            f"`max_batch_size={MAX_BATCH_ROWS}`, `strict=False`, metrics off, {_RUN}"
        ),
        python=python,
        how_to_get="run `make serving-peers`; it needs Python 3.11 below 3.11.7, such as Debian 12's own",
        stop_signal=signal.SIGINT,
    )


def _mlserver(*, is_batching: bool) -> Contestant:
    """Return MLServer as it is fastest: for few calls and large ones without batches, for many small ones with.

    It turns numbers into Python lists and joins those, so that batches cost more than they save on 64 rows.
    """
    python = ENVIRONMENTS / "mlserver/bin/python"

    def command(bundle: Path, port: int) -> list[str]:
        script = [str(python), str(_SCRIPTS / "run_mlserver.py"), str(bundle), str(port), str(free_port())]
        return [*script, str(max_requests), str(max_batch_s)]

    name = "MLServer, batches" if is_batching else "MLServer"
    max_requests, max_batch_s = (MLSERVER_BATCH_REQUESTS, MLSERVER_BATCH_S) if is_batching else (0, 0.0)
    return Contestant(
        name=name,
        series=(Series(name, is_brief=is_batching),),
        command=command,
        settings=(
            f"1.7.1: `max_batch_size={max_requests}` (it counts requests), `max_batch_time={max_batch_s:g}`, "
            f"`parallel_workers=0`, uvloop, access log and metrics off, {_RUN}"
        ),
        python=python,
        how_to_get="run `make serving-peers`",
    )


def _ray_serve(*, is_tuned: bool) -> Contestant:
    """Return plain Ray Serve as it comes, or with what its `RAY_SERVE_THROUGHPUT_OPTIMIZED` sets.

    All of it but direct ingress, which goes around the proxy that is the subject here.
    """

    def command(bundle: Path, port: int) -> list[str]:
        script = [sys.executable, "-m", "tests.benchmarks.peers.servers.run_serve", str(bundle)]
        return [*script, str(port), str(free_port()), str(MAX_BATCH_ROWS), str(DELAY_US / 1e6)]

    name = "Ray Serve, tuned" if is_tuned else "Ray Serve"
    tuning = _RAY_SERVE_TUNING if is_tuned else {}
    variables = "".join(f", `{variable}={value}`" for variable, value in tuning.items())
    return Contestant(
        name=name,
        series=(Series(name, names_application=True, is_brief=is_tuned),),
        environment={"RAY_AUTH_TOKEN": secrets.token_hex(32), **tuning},
        command=command,
        settings=(
            "2.60.0: its own gRPC proxy, an application per graph, "
            f"`@serve.batch(max_batch_size={MAX_BATCH_ROWS}, batch_wait_timeout_s={DELAY_US / 1e6})` counting "
            f"rows, `max_ongoing_requests=256`, access log off, {_RUN}{variables}"
        ),
    )


def _bare() -> Contestant:
    def command(bundle: Path, port: int) -> list[str]:
        return [sys.executable, "-m", "tests.benchmarks.peers.servers.run_bare", str(bundle), str(port)]

    return Contestant(
        name="bare grpc.aio",
        series=(Series("bare grpc.aio", is_brief=True),),
        command=command,
        settings="grpc.aio around `session.run` in one process, the floor: a run per call, no batches, no checks",
    )
