"""Several processes that make the load together, and the pipes between them and the command."""

import asyncio
import contextlib
import gc
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import connection, get_context
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any, Final, NamedTuple, Self

import numpy as np

from serving.loadtest.arrivals import Schedule
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.errors import GeneratorDied, ServiceNotReady
from serving.loadtest.generator import ClosedLoop, Generator, Part, Settings, new_event_loop
from serving.loadtest.ledger import Ledger
from serving.loadtest.summary import Records, read_lines

_SPAWN: Final = get_context("spawn")  # gRPC does not survive a fork
_FLUSH_S: Final = 0.25
_START_DELAY_S: Final = 0.2
"""From the order to the first request: all processes have read it by then."""

_POLL_S: Final = 0.1
_READY_TIMEOUT_S: Final = 60.0
_END_TIMEOUT_S: Final = 5.0


class Connect(NamedTuple):
    """Where the next order is carried out."""

    endpoint: Endpoint
    is_echo: bool
    """Whether that is a server that only echoes."""


class Order(NamedTuple):
    """What a process shall do next."""

    plan: Schedule | ClosedLoop
    start_s: float
    """Monotonic time, which all processes of a machine share."""


class Ready(NamedTuple):
    """The process waits for an order."""


class Failed(NamedTuple):
    """The service could not be reached."""

    problem: str


class Lines(NamedTuple):
    """What happened since the last lines."""

    lines: bytes
    at_s: float
    """Since the start of the plan."""

    cpu_s: float
    """Processor time that the process has used."""

    num_in_flight: int
    is_last: bool


class Stop(NamedTuple):
    """Send no more; what was sent still gets its end."""


class Course(NamedTuple):
    """What came of one plan."""

    records: Records
    cpu: list[list[tuple[float, float]]]
    """Per process: time since the start, and processor time used until then."""

    stopped_s: float | None
    """When it was cut short, since its start; None if it was not."""

    def cpu_share(self, begin_s: float, end_s: float) -> float:
        """Return the processor time per second and process between two times."""
        shares = []
        for samples in self.cpu:
            at, used = (np.array(column) for column in zip(*samples, strict=True))
            begin, end = np.interp([begin_s, end_s], at, used)
            shares.append(float(end - begin) / max(end_s - begin_s, 1e-9))
        return sum(shares) / len(shares)


class Progress(NamedTuple):
    """What a plan has come to so far."""

    at_s: float
    lines: Records
    """What ended since the last time."""

    num_in_flight: int


class Fleet:
    """Processes that make load; use it as a context, which ends them.

    Args:
        settings: Of the load test.
        num_processes: How many.
    """

    def __init__(self, settings: Settings, num_processes: int) -> None:
        self._settings, self._count = settings, num_processes
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []

    @property
    def num_processes(self) -> int:
        """How many there are."""
        return self._count

    def __enter__(self) -> Self:
        with _ignoring_interrupts():  # they inherit it: Ctrl-C reaches the whole group, and only we act on it
            for index in range(self._count):
                ours, theirs = _SPAWN.Pipe()
                process = _SPAWN.Process(
                    target=_main, args=(theirs, self._settings, Part(index, self._count)), daemon=True
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._pipes.append(ours)
        try:
            for pipe in self._pipes:
                self._receive(pipe, _READY_TIMEOUT_S)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end()

    def run(
        self,
        endpoints: Sequence[Endpoint],
        plan: Schedule | ClosedLoop,
        *,
        is_echo: bool = False,
        is_stopped: Callable[[], bool] = lambda: False,
        on_progress: Callable[[Progress], None] = lambda _: None,
    ) -> Course:
        """Carry out a plan.

        Args:
            endpoints: Where each process sends.
            plan: What is due.
            is_echo: Whether the endpoints only echo.
            is_stopped: Asked often; once true, nothing more is sent.
            on_progress: Told what happened, several times a second.

        Raises:
            ServiceNotReady: If a process cannot connect.
            GeneratorDied: If a process ends by itself.
        """
        # Connections first: a plan begins when all processes have theirs.
        for pipe, endpoint in zip(self._pipes, endpoints, strict=True):
            pipe.send(Connect(endpoint, is_echo))
        for pipe, endpoint in zip(self._pipes, endpoints, strict=True):
            if isinstance(answer := self._receive(pipe, _READY_TIMEOUT_S), Failed):
                raise ServiceNotReady(target=endpoint.target, problem=answer.problem)
        start_s = time.monotonic() + _START_DELAY_S
        for pipe in self._pipes:
            pipe.send(Order(plan, start_s))
        return self._collect(start_s, is_stopped, on_progress)

    def _collect(
        self, start_s: float, is_stopped: Callable[[], bool], on_progress: Callable[[Progress], None]
    ) -> Course:
        parts: list[bytes] = []
        cpu: list[list[tuple[float, float]]] = [[] for _ in self._pipes]
        in_flight = [0] * self._count
        running = set(self._pipes)
        stopped_s: float | None = None
        while running:
            if stopped_s is None and is_stopped():
                stopped_s = max(0.0, time.monotonic() - start_s)
                for pipe in running:
                    pipe.send(Stop())
            fresh: list[bytes] = []
            ready = connection.wait(list(running), _POLL_S)
            for index, pipe in enumerate(self._pipes):
                if pipe not in ready:
                    continue
                message: Lines = self._receive(pipe, 0)
                fresh.append(message.lines)
                cpu[index].append((message.at_s, message.cpu_s))
                in_flight[index] = message.num_in_flight
                if message.is_last:
                    running.discard(pipe)
            parts += fresh
            on_progress(Progress(time.monotonic() - start_s, read_lines(b"".join(fresh)), sum(in_flight)))
        return Course(read_lines(b"".join(parts)), cpu, stopped_s)

    def _receive(self, pipe: Connection, timeout_s: float) -> Any:  # noqa: ANN401 - one of the messages above
        try:
            if not pipe.poll(timeout_s):
                raise GeneratorDied(exit_code=None)
            return pipe.recv()
        except (EOFError, OSError):
            process = self._processes[self._pipes.index(pipe)]
            process.join(_END_TIMEOUT_S)
            raise GeneratorDied(exit_code=process.exitcode) from None

    def _end(self) -> None:
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send(None)
            pipe.close()
        for process in self._processes:
            process.join(_END_TIMEOUT_S)
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def _ignoring_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _main(pipe: Connection, settings: Settings, part: Part) -> None:
    """Carry out orders until there are no more."""
    gc.collect()
    gc.freeze()  # what was prepared stays: the collector need not look at it, which would delay requests
    with asyncio.Runner(loop_factory=new_event_loop) as runner, contextlib.suppress(EOFError, BrokenPipeError):
        runner.run(_obey(pipe, settings, part))


async def _obey(pipe: Connection, settings: Settings, part: Part) -> None:
    inbox: asyncio.Queue[Any] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def read() -> None:
        try:
            inbox.put_nowait(pipe.recv())
        except (EOFError, OSError):  # the command is gone
            loop.remove_reader(pipe.fileno())
            inbox.put_nowait(None)

    loop.add_reader(pipe.fileno(), read)
    await asyncio.to_thread(pipe.send, Ready())
    while (message := await inbox.get()) is not None:
        if not isinstance(message, Connect):  # it was to stop, and had ended before
            continue
        ledger = Ledger()
        generator = Generator(settings.for_echo() if message.is_echo else settings, message.endpoint, ledger)
        try:
            await generator.open()
        except (TimeoutError, OSError, ValueError) as error:
            await generator.close()
            await asyncio.to_thread(pipe.send, Failed(f"no connection within seconds ({type(error).__name__})"))
            continue
        await asyncio.to_thread(pipe.send, Ready())
        order = await inbox.get()
        if order is None:
            return
        await _carry_out(order, generator, ledger, part, pipe=pipe, inbox=inbox)
        await generator.close()


async def _carry_out(
    order: Order,
    generator: Generator,
    ledger: Ledger,
    part: Part,
    *,
    pipe: Connection,
    inbox: asyncio.Queue[Any],
) -> None:
    """Carry out one order; tell what happened several times a second, and whether to stop is asked."""
    run = asyncio.create_task(generator.run(order.plan, part, start_s=order.start_s))

    async def tell(*, is_last: bool) -> None:
        at_s = time.monotonic() - order.start_s
        lines = Lines(ledger.take(), at_s, time.process_time(), generator.num_in_flight, is_last)
        await asyncio.to_thread(pipe.send, lines)  # a full pipe must not keep requests back

    async def listen() -> None:
        message = await inbox.get()
        generator.stop()
        if message is None:
            inbox.put_nowait(None)  # for the loop that gives orders

    listener = asyncio.create_task(listen())
    await tell(is_last=False)
    while not run.done():
        await asyncio.wait({run}, timeout=_FLUSH_S)
        if not run.done():
            await tell(is_last=False)
    listener.cancel()
    run.result()
    await tell(is_last=True)
