"""The ledger: what becomes of each request, how it is written down, and that it balances.

A request has one end: right, refused, lost or wrong (`Outcome`). The requests of a load test are all valid, and
each was answered alone before the load. So only three statuses can be true refusals of one of them:
RESOURCE_EXHAUSTED, UNAVAILABLE with a reason, and DEADLINE_EXCEEDED. Any other error, INVALID_ARGUMENT or
UNAUTHENTICATED for instance, is clear but not true, and counts as lost, as an end outside the contract does.
UNAVAILABLE without a word from the service is what gRPC makes of a broken connection, and is lost too.
"""

import struct
from typing import Final, NamedTuple

import grpc
import numpy as np

from serving.loadtest.results import Outcome

GRACE_S: Final = 1.0
"""Time after the deadline within which a call must have ended."""

OUTCOMES: Final = tuple(Outcome)

AFTER_DEADLINE: Final = "LOST_AFTER_DEADLINE"
NO_REASON: Final = "UNAVAILABLE_NO_REASON"
STATUSES: Final = (*(code.name for code in grpc.StatusCode), AFTER_DEADLINE, NO_REASON)
"""Names of ends: those of gRPC and ours."""

_REFUSALS: Final = frozenset(
    {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED}
)
_OUTCOME_INDEX: Final = {outcome: index for index, outcome in enumerate(OUTCOMES)}
_STATUS_INDEX: Final = {name: index for index, name in enumerate(STATUSES)}


class End(NamedTuple):
    """How a request ended."""

    outcome: Outcome
    status: str


def end_of_answer(*, is_right: bool, seconds: float, deadline_s: float) -> End:
    """Return the end of a call that was answered.

    Args:
        is_right: Whether the content is the right one.
        seconds: From sending to the answer.
        deadline_s: What the service was given.
    """
    if not is_right:
        return End(Outcome.WRONG, grpc.StatusCode.OK.name)
    if seconds > deadline_s + GRACE_S:
        return End(Outcome.LOST, AFTER_DEADLINE)
    if seconds > deadline_s:  # nobody waits any more: to a caller the deadline was exceeded
        return End(Outcome.REFUSED, grpc.StatusCode.DEADLINE_EXCEEDED.name)
    return End(Outcome.RIGHT, grpc.StatusCode.OK.name)


def end_of_failure(code: grpc.StatusCode | None, *, has_reason: bool, seconds: float, deadline_s: float) -> End:
    """Return the end of a call that failed.

    Args:
        code: Its status; None if there was none, and the generator gave it up.
        has_reason: Whether the service said something beside the status: trailing metadata.
        seconds: From sending to the end.
        deadline_s: What the service was given.
    """
    if code is None or seconds > deadline_s + GRACE_S:
        return End(Outcome.LOST, AFTER_DEADLINE)
    if code is grpc.StatusCode.UNAVAILABLE and not has_reason:
        return End(Outcome.LOST, NO_REASON)
    return End(Outcome.REFUSED if code in _REFUSALS else Outcome.LOST, code.name)


RECORD: Final = np.dtype(
    [
        ("due_s", "<f8"),
        ("response_us", "<u4"),
        ("service_us", "<u4"),
        ("lag_us", "<u4"),
        ("request_bytes", "<u4"),
        ("response_bytes", "<u4"),
        ("operation", "u1"),
        ("status", "u1"),
        ("outcome", "u1"),
        ("padding", "u1"),
    ]
)
"""One line of the ledger. Times are microseconds; `due_s` counts from the start of the schedule."""

_PACK: Final = struct.Struct("<dIIIIIBBBx").pack
_MAX_US: Final = 2**32 - 1
_PER_S: Final = 1e6


class Ledger:
    """Lines of finished requests, 32 bytes each, until somebody takes them."""

    def __init__(self) -> None:
        self._lines = bytearray()

    def add(
        self,
        operation: int,
        end: End,
        *,
        due_s: float,
        sent_s: float,
        ended_s: float,
        request_bytes: int,
        response_bytes: int,
    ) -> None:
        """Write down a request; times count from the start of the schedule."""
        self._lines += _PACK(
            due_s,
            min(max(0, round((ended_s - due_s) * _PER_S)), _MAX_US),
            min(max(0, round((ended_s - sent_s) * _PER_S)), _MAX_US),
            min(max(0, round((sent_s - due_s) * _PER_S)), _MAX_US),
            request_bytes,
            response_bytes,
            operation,
            _STATUS_INDEX[end.status],
            _OUTCOME_INDEX[end.outcome],
        )

    def take(self) -> bytes:
        """Return the lines since the last time."""
        lines = bytes(self._lines)
        self._lines.clear()
        return lines
