"""Arrivals: their laws, that parts are the whole, and files of them."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from serving.loadtest.arrivals import (
    Arrivals,
    Law,
    Paced,
    Recording,
    Schedule,
    Segment,
    choose,
    complete,
    parse_counts,
    parse_rates,
    parse_steps,
    read_recording,
    recorded,
)
from serving.loadtest.errors import BadArrivals, BadWorkload

Z = 4.5
"""Standard errors within which a law is accepted: a right one is refused in one run of 150,000."""


def paced(rate: float, seconds: float, *, law: Law = "poisson", seed: int = 1, stage: int = 0) -> Paced:
    """Return arrivals of two operations at one rate."""
    return Paced(law=law, segments=(Segment(rate, seconds),), shares=(0.25, 0.75), seed=seed, stage=stage)


def whole(schedule: Schedule, parts: int = 1) -> Sequence[Arrivals]:
    """Return the arrivals of each part, joined."""
    return [
        Arrivals(*(np.concatenate(columns) for columns in zip(*schedule.part(index, parts), strict=True)))
        for index in range(parts)
    ]


def test_poisson_counts_have_the_mean_and_the_variance_of_the_law(seed: int) -> None:
    """Counts in disjoint seconds have mean and variance equal to the rate."""
    rate, seconds = 50.0, 2000
    (drawn,) = whole(paced(rate, seconds, seed=seed))
    counts = np.bincount(drawn.due_s.astype(int), minlength=seconds)
    assert abs(counts.mean() - rate) < Z * math.sqrt(rate / seconds)
    # Variance of a sample variance of a Poisson law: (2 rate^2 + rate) / n.
    assert abs(counts.var() - rate) < Z * math.sqrt((2 * rate**2 + rate) / seconds)


def test_poisson_gaps_are_exponential(seed: int) -> None:
    """The largest distance of the gaps' distribution from 1 - exp(-rate t) is within Kolmogorov's bound."""
    (drawn,) = whole(paced(100.0, 200, seed=seed))
    gaps = np.sort(np.diff(drawn.due_s, prepend=0.0))
    expected = 1 - np.exp(-100.0 * gaps)
    distance = np.abs(expected - np.arange(1, len(gaps) + 1) / len(gaps)).max()
    assert distance < 2.2 / math.sqrt(len(gaps))  # P(exceeded) = 2 exp(-2 * 2.2^2) = 1.3e-4 for a fixed seed


def test_constant_arrivals_are_equally_far_apart() -> None:
    """Arrival i is due i / rate after the begin, and none at the end."""
    (drawn,) = whole(paced(8.0, 2.0, law="constant"))
    np.testing.assert_array_equal(drawn.due_s, np.arange(16) / 8)


@pytest.mark.parametrize("law", ["poisson", "constant"])
@pytest.mark.parametrize("parts", [2, 3, 7])
def test_parts_are_together_the_whole(law: Law, parts: int, seed: int) -> None:
    """However many processes share the arrivals, they send the same requests at the same times, each once."""
    schedule = Paced(law=law, segments=(Segment(900.0, 6.0), Segment(70.3, 3.1)), shares=(0.25, 0.75), seed=seed)
    (alone,) = whole(schedule)
    split = whole(schedule, parts)
    for column in range(3):
        merged = np.empty(len(alone.due_s))
        for index, part in enumerate(split):
            merged[index::parts] = part[column]
        np.testing.assert_array_equal(merged, alone[column])


def test_operations_come_by_their_shares(seed: int) -> None:
    """The share of an operation among many arrivals is what was asked, within its standard error."""
    (drawn,) = whole(paced(1000.0, 20, seed=seed))
    expected = 0.75
    error = math.sqrt(expected * (1 - expected) / len(drawn.operation))
    assert abs(drawn.operation.mean() - expected) < Z * error


def test_steps_follow_each_other() -> None:
    """Each segment has its own rate, and begins where the one before ends."""
    schedule = Paced(law="constant", segments=parse_steps("10x2,30x1"), shares=(1.0,), seed=1)
    (drawn,) = whole(schedule)
    np.testing.assert_array_equal(np.bincount(drawn.due_s.astype(int)), [10, 10, 30])
    assert schedule.seconds == 3


def test_stages_and_seeds_have_draws_of_their_own() -> None:
    """The same seed gives the same arrivals; another seed or stage gives others."""
    first, again, other_seed, other_stage = (
        whole(schedule)[0].due_s
        for schedule in (paced(50, 5), paced(50, 5), paced(50, 5, seed=2), paced(50, 5, stage=1))
    )
    np.testing.assert_array_equal(first, again)
    for other in (other_seed, other_stage):
        assert not np.array_equal(first[:10], other[:10])


def test_a_long_schedule_is_drawn_piece_by_piece() -> None:
    """The first arrivals of a test of many hours are there at once: no memory for all of them."""
    first = next(paced(1e5, 1e6).part(0, 1))
    assert len(first.due_s) < 10_000


def test_callers_of_a_closed_loop_choose_by_shares(seed: int) -> None:
    """Each caller has a sequence of its own that the seed repeats."""
    first, again, other = (
        list(itertools.islice(choose((0.5, 0.5), seed, caller=caller), 100)) for caller in (0, 0, 1)
    )
    assert first == again
    assert first != other
    assert {operation for operation, _ in first} == {0, 1}
    assert all(0 <= request < 1 for _, request in first)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "0.5,encode:1\n0.5\n\n1.25, sample:4\n"),
        ("a.csv", "seconds,operation\r\n0.5,encode:1\r\n0.5,\r\n1.25,sample:4\r\n"),
        (
            "a.jsonl",
            (
                '{"seconds": 0.5, "operation": "encode:1"}\n{"seconds": 0.5}\n\n'
                '{"seconds": 1.25, "operation": "sample:4"}'
            ),
        ),
    ],
)
def test_recordings_are_read(tmp_path: Path, name: str, text: str) -> None:
    """CSV with or without a header, and JSON lines, mean the same."""
    (tmp_path / name).write_text(text, newline="")
    recording = read_recording(tmp_path / name)
    assert recording == Recording([0.5, 0.5, 1.25], ["encode:1", None, "sample:4"])


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ("", 1, "there are no arrivals"),
        ("0.5\n\nsoon\n", 3, "expected seconds since the start, then perhaps an operation, got 'soon'"),
        ("0.5\n-1\n", 2, "got '-1'"),
        ("0.5\nnan\n", 2, "got 'nan'"),
        ("2\n1.5\n", 2, "1.5 s comes before 2 s"),
        ("1,encode:1,more\n", 1, "too many columns"),
        ('{"seconds": 1}\n{"second": 2}\n', 2, "expected an object such as"),
        ('{"seconds": 1}\n{"seconds": "x"}\n', 2, "got 'x'"),
        ('{"seconds": 1, "operation": 5}\n', 1, "an operation is a name"),
        ('{"seconds": 1}\n[2]\n', 2, "expected an object such as"),
    ],
)
def test_bad_recordings_name_file_and_line(tmp_path: Path, text: str, line: int, problem: str) -> None:
    """Whoever has to mend the file is told where."""
    path = tmp_path / "arrivals.txt"
    path.write_text(text)
    with pytest.raises(BadArrivals, match=r"arrivals\.txt, line") as caught:
        read_recording(path)
    assert caught.value.line == line
    assert problem in str(caught.value)


def test_a_recording_is_replayed_as_it_is(seed: int) -> None:
    """Times and named operations are the file's; what it does not name is drawn by shares, the same each time."""
    recording = Recording([0.0, 0.5, 0.5, 2.0], ["b", None, None, "c"])
    full = complete(recording, {"a": 1.0}, seed=seed)
    assert full.operations == ["b", "a", "a", "c"]
    schedule = recorded(full, ["a", "b", "c"], seed=seed)
    assert schedule.seconds == 3
    (drawn,) = whole(schedule)
    np.testing.assert_array_equal(drawn.due_s, recording.due_s)
    np.testing.assert_array_equal(drawn.operation, [1, 0, 0, 2])
    first, second = whole(schedule, 2)
    np.testing.assert_array_equal(first.due_s, [0.0, 0.5])
    np.testing.assert_array_equal(second.operation, [0, 2])


def test_numbers_of_the_command_line() -> None:
    """Lists of rates and counts, and steps, read as documented."""
    assert parse_rates("--rate", "50, 0.5,2e3") == [50.0, 0.5, 2000.0]
    assert parse_counts("--concurrency", "1,8, 64") == [1, 8, 64]
    assert parse_steps("50x10,0.5x1.5") == (Segment(50, 10), Segment(0.5, 1.5))


@pytest.mark.parametrize("text", ["", "0", "-1", "nan", "inf", "1e7", "ten", "1,,2"])
def test_bad_rates(text: str) -> None:
    """A rate that means nothing names its option."""
    with pytest.raises(BadWorkload, match=r"^--rate .*expected requests per second"):
        parse_rates("--rate", text)


@pytest.mark.parametrize("text", ["50", "50x", "50x0", "50xnan", "50x-1", "x", "50x1x2"])
def test_bad_steps(text: str) -> None:
    """So do steps."""
    with pytest.raises(BadWorkload, match=r"^--steps .*expected"):
        parse_steps(text)


@pytest.mark.parametrize("text", ["", "0", "1.5", "1,", "-2"])
def test_bad_counts(text: str) -> None:
    """And counts."""
    with pytest.raises(BadWorkload, match=r"^--concurrency .*expected whole numbers"):
        parse_counts("--concurrency", text)
