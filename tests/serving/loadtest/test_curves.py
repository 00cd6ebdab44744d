"""The curves of a report show its stages: which there are, in which order, with the knee."""

import re

from serving.loadtest.curves import charts, stage_name
from tests.serving.loadtest.synthetic import report


def test_one_stage_has_no_curve_against_load() -> None:
    """A line needs two points."""
    titles = re.findall("<figcaption>([^<]*)", "".join(charts(report([300.0]))))
    assert not [title for title in titles if "against" in title]
    assert len(titles) == 4


def test_several_stages_are_drawn_against_their_load_with_the_knee() -> None:
    """Loads in order, whatever the order of the search."""
    figures = charts(report())
    (goodput,) = [figure for figure in figures if "Goodput against" in figure]
    assert "knee 1,100/s" in goodput
    (path,) = re.findall(r'<path class="s0" d="(M[^"]*\.[^"]*)"', goodput)
    xs = [float(x) for x in re.findall(r"[ML](\S+) ", path)]
    assert len(xs) == 6
    assert xs == sorted(xs)


def test_callers_stand_for_load_in_a_closed_loop() -> None:
    """There is no offered rate; the axis counts callers."""
    stages = [
        stage.model_copy(update={"offered_per_s": None, "concurrency": callers})
        for stage, callers in zip(report([300.0, 600.0]).stages, (1, 64), strict=True)
    ]
    assert stage_name(stages[1]) == "c64"
    figures = charts(report([300.0, 600.0], stages=stages, mode="closed", knee=None))
    assert any("Goodput against callers" in figure for figure in figures)


def test_more_stages_than_colours_are_thinned_and_said() -> None:
    """The first and the last are among those shown."""
    rates = [100.0 * index for index in range(1, 11)]
    (percentiles, *_) = charts(report(rates))
    assert "(7 of 10 stages)" in percentiles
    assert "100/s" in percentiles
    assert "1,000/s" in percentiles


def test_a_stage_without_a_right_answer_leaves_no_hole_in_the_page() -> None:
    """It has no latency, but it has counts."""
    one = report([300.0, 600.0])
    nothing = one.stages[1].model_copy(update={"response_time": None, "service_time": None})
    figures = charts(report([300.0, 600.0], stages=[one.stages[0], nothing]))
    assert len(figures) == 6
