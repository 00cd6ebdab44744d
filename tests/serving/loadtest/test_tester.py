"""Load tests from plan to report, against servers whose truth is known."""

import io
import signal
import threading
from dataclasses import replace

import pytest
from rich.console import Console

from serving.loadtest.arrivals import Recording, Segment
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.errors import BadWorkload
from serving.loadtest.results import Counts, LoadReport
from serving.loadtest.tester import Plan, run
from serving.loadtest.workload import Operation
from tests.serving.loadtest.servers import ANSWER, MODEL, Capacity, Handler, in_thread, serving

ENCODE, SAMPLE = Operation("encode", 1), Operation("sample", 2)
PLAN = Plan(
    mode="open",
    protocol="vae",
    mix={ENCODE: 1.0},
    rates=(100.0,),
    law="constant",
    seconds=1.0,
    warm_up_s=0.2,
    deadline_s=2.0,
    num_processes=1,
    num_channels=1,
    seed=1,
    measures_limits=False,
    label="a run",
    command="vae-serve load",
)


def report_of(plan: Plan, answer: Handler) -> LoadReport:
    """Carry out a plan against a server that answers so."""
    with in_thread(lambda: serving(answer)) as endpoint:
        return run(plan, endpoint, Console(file=io.StringIO(), width=200))


async def right(body: bytes, _context: object) -> bytes:
    """Answer at once."""
    return ANSWER if body else MODEL.SerializeToString()


def test_an_open_loop_has_a_stage_for_each_rate() -> None:
    """Offered is what was asked; the warm-up is in no figure; the report says what was done."""
    report = report_of(replace(PLAN, rates=(50.0, 100.0)), right)
    assert [stage.offered_per_s for stage in report.stages] == [50.0, 100.0]
    assert [stage.counts for stage in report.stages] == [
        Counts(sent=number, right=number, refused=0, lost=0, wrong=0) for number in (50, 100)
    ]
    assert report.counts.sent == 150
    assert (report.label, report.model, report.mode) == ("a run", "puppet 000000000000", "open")
    assert report.mix == {"encode:1": 1.0}
    assert "the answer of the same seeded request made alone" in report.checks
    assert "the generator's own limit was not measured" in report.notes
    assert LoadReport.model_validate_json(report.model_dump_json()) == report


def test_steps_follow_each_other_without_a_pause() -> None:
    """One warm-up, then a stage for each step."""
    report = report_of(replace(PLAN, steps=(Segment(20, 1.0), Segment(60, 1.0))), right)
    assert [(stage.offered_per_s, stage.counts.right) for stage in report.stages] == [(20, 20), (60, 60)]


def test_a_closed_loop_has_a_stage_for_each_number_of_callers() -> None:
    """Nothing is offered; callers ask as fast as they are answered."""
    report = report_of(replace(PLAN, mode="closed", concurrency=(1, 4), seconds=0.5), right)
    assert [(stage.concurrency, stage.offered_per_s) for stage in report.stages] == [(1, None), (4, None)]
    assert all(stage.counts.right for stage in report.stages)


def test_a_recording_is_replayed() -> None:
    """Its own operations and times; the mix that is reported is what was sent."""
    recording = Recording([0.0, 0.1, 0.1, 1.5], ["encode:1", "sample:2", None, "sample:2"])
    report = report_of(replace(PLAN, mode="replay", recording=recording, warm_up_s=0.0), right)
    assert report.mix == {"encode:1": 0.5, "sample:2": 0.5}
    (stage,) = report.stages
    assert (stage.seconds, stage.offered_per_s) == (2.0, 2.0)
    assert {item.name: item.counts.right for item in stage.operations} == {"encode:1": 2, "sample:2": 2}
    with pytest.raises(BadWorkload, match="--warm-up 2 s: expected less than the recording, 2 s"):
        report_of(replace(PLAN, mode="replay", recording=recording, warm_up_s=2.0), right)
    with pytest.raises(BadWorkload, match="--replay train:1"):
        report_of(replace(PLAN, mode="replay", recording=Recording([0.0], ["train:1"])), right)


def test_what_is_wrong_while_warming_up_is_not_hidden() -> None:
    """It is in no figure, but in the notes."""
    number = 0

    async def worse_at_first(body: bytes, _context: object) -> bytes:
        nonlocal number
        number += bool(body)
        if not body:
            return MODEL.SerializeToString()
        return ANSWER if number > 266 or number <= 256 else b"wrong"  # the first 256 are asked alone

    report = report_of(PLAN, worse_at_first)
    assert report.counts.wrong == 0
    assert "during warm-up, which is not in the figures, 0 lost and 10 wrong" in report.notes


@pytest.mark.slow
def test_the_knee_of_a_known_capacity() -> None:
    """Eight places of 20 ms answer 400 per second: the knee is near it, above only by what a short stage hides.

    At a rate R above the capacity C, whoever comes last of T seconds waits (R - C) T / C; the limit of 150 ms is
    kept up to R = C (1 + 0.15 / T), and the stage of one second follows 0.2 s of warm-up.
    """
    plan = replace(PLAN, mode="knee", rates=(200.0,), law="constant", p99_limit_ms=150.0)
    report = report_of(plan, Capacity(8, 0.020).answer)
    assert report.knee is not None
    assert report.knee.good_per_s is not None
    assert report.knee.bad_per_s is not None
    # timers of a busy machine make the places slower, never quicker
    assert 100 <= report.knee.good_per_s <= 400 * (1 + 0.15 / 1.2)
    assert report.knee.bad_per_s <= report.knee.good_per_s * 1.08
    assert {200.0, report.knee.good_per_s} <= {stage.offered_per_s for stage in report.stages}
    assert len(report.stages) < 30


def test_an_interruption_ends_the_stage_and_the_report_says_so() -> None:
    """What was sent until then is reported; stages that had not begun are absent; the handler is put back."""
    before = signal.getsignal(signal.SIGINT)
    main = threading.main_thread().ident
    assert main is not None
    number = 0

    async def interrupt(body: bytes, _context: object) -> bytes:
        nonlocal number
        number += 1
        if number == 256 + 150:  # those that are asked alone, then a second and a half
            signal.pthread_kill(main, signal.SIGINT)
        return await right(body, _context)

    report = report_of(replace(PLAN, rates=(100.0, 200.0), seconds=60.0), interrupt)
    (stage,) = report.stages
    assert 0 < stage.seconds < 30
    assert stage.counts.right == stage.counts.sent > 0
    assert stage.rate_per_s == pytest.approx(100, rel=0.1)
    assert any(note.startswith("interrupted ") and note.endswith("of 100/s") for note in report.notes)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_generator_at_its_limit_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """The generator is measured against an echo, and a stage near that figure is named in the report.

    How near is near is another test's: a machine that changes its pace between two measurements decides it here.
    """
    monkeypatch.setattr("serving.loadtest.limits.MAX_SHARE_OF_LIMIT", 0.01)
    plan = replace(PLAN, mode="closed", concurrency=(64,), seconds=1.0, measures_limits=True)
    report = report_of(plan, right)
    assert report.limits is not None
    assert report.limits.calls_per_s > 0
    assert report.limits.is_limiting
    assert "64 callers: " in report.limits.reason


def test_secrets_are_in_no_report() -> None:
    """A key does not show, whatever prints the endpoint."""
    endpoint = Endpoint(target="x", api_key="vae_secret", private_key=b"PEM")
    assert "secret" not in repr(endpoint)
    assert "PEM" not in repr(endpoint)
