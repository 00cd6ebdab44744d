"""Contexts, what is noted of a call, and the run that a task works for."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import spans
from serving.spans import CallTrace, RunTrace, TraceContext, Visit, new_context

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
CONTEXTS = st.builds(
    TraceContext,
    trace_id=st.integers(1, 2**128 - 1),
    span_id=st.integers(1, 2**64 - 1),
    state=st.sampled_from(["", "a=1", "congo=t61rcWkgMzE,rojo=00f0 67aa", "k@v=;%20"]),
    is_sampled=st.booleans(),
)


@given(context=CONTEXTS)
def test_a_context_survives_the_way_to_another_process(context: TraceContext) -> None:
    """As one token, that is text without spaces."""
    assert spans.from_token(context.token) == context
    assert " " not in context.token


@given(context=CONTEXTS)
def test_a_context_survives_headers(context: TraceContext) -> None:
    """As `traceparent` and `tracestate`, 55 characters of the first."""
    assert spans.parse(context.parent_text, context.state) == context
    assert len(context.parent_text) == 55


@pytest.mark.parametrize(
    "parent",
    [
        "",
        "hello",
        b"bytes",
        f"00-{TRACE}-{SPAN}",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE}-{SPAN}-01-more",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0x",
        f" 00-{TRACE}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01\n",
    ],
)
def test_what_is_no_traceparent_is_ignored(parent: str | bytes) -> None:
    """W3C Trace Context, section 3.2.2: a caller's mistake begins a new trace, and is no error."""
    assert spans.parse(parent) is None


@pytest.mark.parametrize(
    ("parent", "is_sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"cc-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-comes", True),
    ],
)
def test_flags_and_later_versions_are_read(parent: str, *, is_sampled: bool) -> None:
    """The lowest bit of the flags decides; a later version is read as far as it is known."""
    context = spans.parse(parent)
    assert context is not None
    assert (context.trace_name, f"{context.span_id:016x}", context.is_sampled) == (TRACE, SPAN, is_sampled)


def test_a_state_that_is_too_long_is_dropped() -> None:
    """It would travel with every span; the trace goes on without it."""
    context = spans.parse(f"00-{TRACE}-{SPAN}-01", "a=" + "x" * 511)
    assert context is not None
    assert context.state == ""


def test_children_share_the_trace_and_nothing_else() -> None:
    """A thousand of them have a thousand ids."""
    context = new_context()._replace(state="a=1")
    children = [context.child() for _ in range(1000)]
    assert {(child.trace_id, child.state) for child in children} == {(context.trace_id, "a=1")}
    assert len({child.span_id for child in children} | {context.span_id}) == 1001


def test_a_stream_is_noted_up_to_a_bound() -> None:
    """What comes after is counted."""
    trace = CallTrace(new_context())
    visits = [trace.visit("decoder", arrived_at=0.0, num_rows=1) for _ in range(spans.MAX_VISITS + 3)]
    assert trace.num_left_out == visits.count(None) == 3
    assert len(trace.visits) == spans.MAX_VISITS


def test_the_first_to_arrive_waited_longest() -> None:
    """Whatever the order in the run."""
    late, early = (Visit(new_context(), "encoder", arrived_at=at, num_rows=1) for at in (2.0, 1.0))
    assert spans.longest_waiting([late, early]) is early


async def test_a_run_is_known_where_it_is_worked_for_and_nowhere_else() -> None:
    """Inside, in tasks that begin inside, and not in a task beside it."""
    run = RunTrace(new_context())

    async def ask() -> RunTrace | None:
        await asyncio.sleep(0)
        return spans.current_run()

    beside = asyncio.create_task(ask())
    with spans.running(run):
        assert await asyncio.create_task(ask()) is run
    assert await beside is None
    assert spans.current_run() is None


async def test_a_run_that_a_gateway_told_of_is_the_current_one() -> None:
    """In the task that answers it; text that is no token is no run."""
    context = new_context()

    async def hear(token: str) -> RunTrace | None:
        spans.continue_run(token)
        return spans.current_run()

    heard = await asyncio.create_task(hear(context.token))
    assert heard is not None
    assert heard.context == context
    assert await asyncio.create_task(hear("nonsense")) is None
    assert spans.current_run() is None
