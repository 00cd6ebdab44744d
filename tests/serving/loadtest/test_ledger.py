"""The ledger: each request has one end, and the lines say what happened."""

import grpc
import pytest

from serving.loadtest.ledger import (
    AFTER_DEADLINE,
    GRACE_S,
    NO_REASON,
    OUTCOMES,
    RECORD,
    STATUSES,
    End,
    Ledger,
    end_of_answer,
    end_of_failure,
)
from serving.loadtest.results import Outcome
from serving.loadtest.summary import read_lines

DEADLINE_S = 2.0
IN_TIME = 1.0
LATE = DEADLINE_S + GRACE_S / 2
TOO_LATE = DEADLINE_S + GRACE_S + 0.1
TRUE_REFUSALS = {"RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"}


@pytest.mark.parametrize(
    ("is_right", "seconds", "expected"),
    [
        (True, IN_TIME, End(Outcome.RIGHT, "OK")),
        (False, IN_TIME, End(Outcome.WRONG, "OK")),
        (True, LATE, End(Outcome.REFUSED, "DEADLINE_EXCEEDED")),
        (False, LATE, End(Outcome.WRONG, "OK")),
        (True, TOO_LATE, End(Outcome.LOST, AFTER_DEADLINE)),
        (False, TOO_LATE, End(Outcome.WRONG, "OK")),
    ],
)
def test_answers(is_right: bool, seconds: float, expected: End) -> None:  # noqa: FBT001 - a row of the table
    """Wrong content is wrong at any time; right content counts in time only."""
    assert end_of_answer(is_right=is_right, seconds=seconds, deadline_s=DEADLINE_S) == expected


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code is not grpc.StatusCode.OK])
def test_failures_with_a_reason(code: grpc.StatusCode) -> None:
    """For a valid request three statuses are true refusals; every other error of the service is a loss."""
    expected = Outcome.REFUSED if code.name in TRUE_REFUSALS else Outcome.LOST
    for seconds in (IN_TIME, LATE):
        end = end_of_failure(code, has_reason=True, seconds=seconds, deadline_s=DEADLINE_S)
        assert end == End(expected, code.name)
    late = end_of_failure(code, has_reason=True, seconds=TOO_LATE, deadline_s=DEADLINE_S)
    assert late == End(Outcome.LOST, AFTER_DEADLINE)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (grpc.StatusCode.UNAVAILABLE, End(Outcome.LOST, NO_REASON)),  # a connection broke
        (grpc.StatusCode.RESOURCE_EXHAUSTED, End(Outcome.REFUSED, "RESOURCE_EXHAUSTED")),
        (grpc.StatusCode.DEADLINE_EXCEEDED, End(Outcome.REFUSED, "DEADLINE_EXCEEDED")),
        (grpc.StatusCode.UNKNOWN, End(Outcome.LOST, "UNKNOWN")),
        (None, End(Outcome.LOST, AFTER_DEADLINE)),
    ],
)
def test_failures_without_a_reason(code: grpc.StatusCode | None, expected: End) -> None:
    """What gRPC makes of a broken connection is no refusal, though its status is one of the contract."""
    assert end_of_failure(code, has_reason=False, seconds=IN_TIME, deadline_s=DEADLINE_S) == expected


def test_lines_say_what_was_written() -> None:
    """Each column of a line comes back, times in microseconds; taking the lines empties the ledger."""
    ledger = Ledger()
    ledger.add(
        3, End(Outcome.LOST, NO_REASON), due_s=1.5, sent_s=1.501, ended_s=1.751, request_bytes=7, response_bytes=9
    )
    (line,) = read_lines(ledger.take())
    assert line["due_s"] == 1.5
    assert (line["lag_us"], line["service_us"], line["response_us"]) == (1000, 250_000, 251_000)
    assert (line["operation"], line["request_bytes"], line["response_bytes"]) == (3, 7, 9)
    assert (OUTCOMES[line["outcome"]], STATUSES[line["status"]]) == (Outcome.LOST, NO_REASON)
    assert ledger.take() == b""


def test_times_out_of_range_are_cut() -> None:
    """A request that was sent early by a rounding, or ended after more than an hour, does not break the ledger."""
    ledger = Ledger()
    ledger.add(
        0, End(Outcome.RIGHT, "OK"), due_s=1.0, sent_s=0.999, ended_s=1e5, request_bytes=0, response_bytes=0
    )
    (line,) = read_lines(ledger.take())
    assert line["lag_us"] == 0
    assert line["response_us"] == 2**32 - 1
    assert RECORD.itemsize == 32  # as the module promises
