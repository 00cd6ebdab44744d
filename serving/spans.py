"""Traces as values: which trace a call belongs to, what is noted on its way, and spans.

Contexts cross processes as W3C Trace Context says, https://www.w3.org/TR/trace-context/. Nothing here knows who
makes spans of what is noted (`tracing`) or sends them (`otlp`), and without a trace nothing here runs.
"""

import contextlib
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from operator import attrgetter
from typing import Final, Literal, NamedTuple
from urllib.parse import quote, unquote

PARENT_KEY: Final = "traceparent"
STATE_KEY: Final = "tracestate"

MAX_VISITS: Final = 64
"""Most visits to graphs that are noted of one call: a stream may make thousands."""

_PARENT: Final = re.compile(
    r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(-.*)?"
)
_SAMPLED: Final = 1
_random: Final = random.Random()  # noqa: S311 - of its own, so that whoever seeds the common one makes no ids equal
_MAX_STATE: Final = 512
"""Longest `tracestate` that is passed on, characters: as much as everybody has to."""

Value = str | int | float | bool
Attributes = Mapping[str, Value]
Kind = Literal["internal", "server", "client"]


class TraceContext(NamedTuple):
    """Names a span, wherever it is made."""

    trace_id: int
    """128 bits, not zero."""

    span_id: int
    """64 bits, not zero."""

    state: str = ""
    """`tracestate` of the caller, passed on as it came."""

    is_sampled: bool = True
    """Whether the span is recorded."""

    @property
    def trace_name(self) -> str:
        """The id of the trace, 32 hexadecimal digits."""
        return f"{self.trace_id:032x}"

    @property
    def parent_text(self) -> str:
        """The `traceparent` of what is done on behalf of this span."""
        return f"00-{self.trace_id:032x}-{self.span_id:016x}-{int(self.is_sampled):02x}"

    @property
    def token(self) -> str:
        """The context as text without spaces."""
        return f"{self.parent_text};{quote(self.state)}" if self.state else self.parent_text

    def child(self) -> "TraceContext":
        """Return the context of a new span of the same trace."""
        return self._replace(span_id=new_id(64))


def new_context() -> TraceContext:
    """Return the context of the first span of a new trace."""
    return TraceContext(new_id(128), new_id(64))


def parse(parent: str | bytes, state: str | bytes = "") -> TraceContext | None:
    """Return the context of a `traceparent` and a `tracestate`; None if there is none, or it is not well formed.

    Example:
        >>> parse("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01").trace_name
        '0af7651916cd43dd8448eb211c80319c'
    """
    found = _PARENT.fullmatch(parent) if isinstance(parent, str) else None
    if found is None or (found[1] == "00" and found[5]):  # only later versions may say more
        return None
    is_good = isinstance(state, str) and len(state) <= _MAX_STATE
    is_sampled = bool(int(found[4], 16) & _SAMPLED)
    return TraceContext(int(found[2], 16), int(found[3], 16), str(state) if is_good else "", is_sampled)


def from_token(token: str) -> TraceContext | None:
    """Return the context of a token; None if it is not one."""
    parent, _, state = token.partition(";")
    return parse(parent, unquote(state))


def new_id(num_bits: int) -> int:
    """Return random bits that name something, never 0, which means none.

    They have to be different, not secret: asking the operating system lets go of the interpreter lock, and to have
    it again took 5 % of a gateway's time beside Ray's threads.
    """
    return _random.getrandbits(num_bits) or 1


class Visit:
    """What is noted of the rows of one traced call at one graph. Times are monotonic, 0 until they come.

    Args:
        call: Context of the call's span.
        graph: Where the rows wait and run.
        arrived_at: When they began to wait.
        num_rows: How many they are.
    """

    __slots__ = (
        "arrived_at", "call", "context", "ended_at", "error", "first_run_at", "graph", "num_rows", "runs"
    )  # fmt: skip

    def __init__(self, call: TraceContext, graph: str, *, arrived_at: float, num_rows: int) -> None:
        self.call, self.graph, self.arrived_at, self.num_rows = call, graph, arrived_at, num_rows
        self.context = call.child()
        """Of the span of the time in which the rows run."""
        self.first_run_at = self.ended_at = 0.0
        self.error = ""
        """Class of the error that they ended with."""
        self.runs: list[TraceContext] = []
        """Runs that they took part in."""


def longest_waiting(visits: Sequence[Visit]) -> Visit:
    """Return the visit whose trace a run belongs to that several take part in."""
    return min(visits, key=attrgetter("arrived_at"))


class CallTrace:
    """What is noted of one traced call.

    Args:
        context: Of its span.
        parent: Of the caller's span, if the caller sent one.
    """

    __slots__ = ("context", "num_left_out", "parent", "visits")

    def __init__(self, context: TraceContext, parent: TraceContext | None = None) -> None:
        self.context, self.parent = context, parent
        self.visits: list[Visit] = []
        self.num_left_out = 0
        """Visits that were not noted, because there were too many."""

    def visit(self, graph: str, *, arrived_at: float, num_rows: int) -> Visit | None:
        """Note that rows arrive at a graph; return what more is to be noted of them, unless it is too much."""
        if len(self.visits) >= MAX_VISITS:
            self.num_left_out += 1
            return None
        visit = Visit(self.context, graph, arrived_at=arrived_at, num_rows=num_rows)
        self.visits.append(visit)
        return visit


class Computed(NamedTuple):
    """A run of ONNX Runtime, noted by whoever made it. Times are monotonic."""

    graph: str
    num_rows: int
    began_at: float
    ended_at: float
    provider: str
    version: str
    error: str = ""
    """Class of the error that it ended with."""


class Event(NamedTuple):
    """Something that happened within a span, at a monotonic time."""

    at: float
    name: str
    attributes: Attributes


class RunTrace:
    """What those who take part in a traced run note of it.

    Args:
        context: Of the span of the run.
    """

    __slots__ = ("computed", "context", "events")

    def __init__(self, context: TraceContext) -> None:
        self.context = context
        self.events: list[Event] = []
        self.computed: Computed | None = None


class BatchTrace(NamedTuple):
    """A traced run that has ended: who took part, when it was, and what was noted. Times are monotonic."""

    run: RunTrace
    graph: str
    visits: Sequence[Visit]
    """Of the traced requests that had rows in it."""
    num_requests: int
    """All that had, traced or not."""
    num_rows: int
    began_at: float
    ended_at: float
    error: str
    """Class of the error that it ended with; empty if it did not."""


class Link(NamedTuple):
    """A span that another one belongs with, beside its parent."""

    context: TraceContext
    attributes: Attributes


class Span(NamedTuple):
    """What is sent to a collector. Times are monotonic."""

    name: str
    context: TraceContext
    parent: TraceContext | None
    began_at: float
    ended_at: float
    attributes: Attributes
    kind: Kind = "internal"
    links: Sequence[Link] = ()
    events: Sequence[Event] = ()
    error: str = ""
    """Why it failed; empty if it did not."""
    is_remote: bool = False
    """Whether the parent is another process's."""


_run: ContextVar[RunTrace | None] = ContextVar("run", default=None)


def current_run() -> RunTrace | None:
    """Return the traced run that this task works for; None if there is none."""
    return _run.get()


@contextlib.contextmanager
def running(run: RunTrace) -> Iterator[None]:
    """Let a run be the current one of this task."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


def received(token: str) -> RunTrace | None:
    """Return the run that a gateway told us of; None if the token does not name one."""
    context = from_token(token)
    return RunTrace(context) if context else None


def continue_run(token: str) -> None:
    """Let the run that a gateway told us of be the current one, until this task ends."""
    _run.set(received(token))
