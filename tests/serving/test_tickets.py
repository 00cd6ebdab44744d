"""What travels with rows: nobody gets ahead by asking, and a part never outlives the whole."""

import math

import pytest

from serving.spans import CallTrace, new_context
from serving.tickets import GENERATION, HIGHEST, LOWEST, Ticket


@pytest.mark.parametrize("own", [HIGHEST, GENERATION, LOWEST])
@pytest.mark.parametrize("asked", [-(2**70), -1, 0, 1, 2, 3, 4, 2**70])
def test_a_caller_may_step_back_and_never_ahead(own: int, asked: int) -> None:
    """Whatever is asked for, the priority is the lower of the two and one that exists."""
    ticket = Ticket(math.inf, priority=own)
    ticket.demote(asked)
    assert ticket.priority == min(max(own, asked), LOWEST)
    assert own <= ticket.priority <= LOWEST


@pytest.mark.parametrize(("asked", "expected"), [(50.0, 50.0), (150.0, 100.0), (math.inf, 100.0)])
def test_a_part_expires_no_later_than_the_whole(asked: float, expected: float) -> None:
    """A chunk of a stream has its own deadline inside that of the stream, for the same client and as urgent."""
    part = Ticket(100.0, client="key:a", priority=GENERATION).part(asked)
    assert (part.expires_at, part.client, part.priority) == (expected, "key:a", GENERATION)


def test_a_part_is_noted_where_the_whole_is() -> None:
    """Chunks of a traced stream are in the trace of their call."""
    ticket = Ticket(math.inf)
    assert ticket.part(math.inf).trace is None
    ticket.trace = CallTrace(new_context())
    assert ticket.part(math.inf).trace is ticket.trace


def test_the_whole_counts_what_its_parts_took() -> None:
    """Rows, times and runs of the parts add up, and a part begins at zero."""
    whole = Ticket(math.inf)
    for number in (1, 2):
        part = whole.part(math.inf)
        assert (part.num_rows, part.queue_s, part.run_s, part.run_share) == (0, 0, 0, 0)
        part.num_rows, part.queue_s, part.run_s, part.run_share = number, 0.25, 0.5 * number, 0.125
        whole.add(part)
    assert (whole.num_rows, whole.queue_s, whole.run_s, whole.run_share) == (3, 0.5, 1.5, 0.25)
