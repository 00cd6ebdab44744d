"""The event loop of the service in one process."""

import asyncio
import signal
import subprocess
import sys

import pytest
import uvloop

from serving import event_loop


async def _kind() -> type[asyncio.AbstractEventLoop]:
    return type(asyncio.get_running_loop())


def test_uvloop_runs_the_service_where_it_is_installed() -> None:
    """The faster loop is taken without being asked for."""
    assert event_loop.run(_kind()) is uvloop.Loop


def test_without_uvloop_asyncio_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """The service does not need it."""
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert event_loop.factory() is None
    assert issubclass(event_loop.run(_kind()), asyncio.SelectorEventLoop)


def test_an_interrupt_reaches_the_coroutine() -> None:
    """Ctrl-C cancels what runs, so that it can drain, and then ends the process as an interrupt."""
    script = """
import asyncio, signal
from serving import event_loop
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin with it ignored
async def main():
    print("ready", flush=True)
    try:
        await asyncio.sleep(60)
    finally:
        print("drained", flush=True)
event_loop.run(main())
"""
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert output == "drained\n"
    assert "KeyboardInterrupt" in errors
