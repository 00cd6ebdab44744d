"""Costs are fitted as they were measured, records survive the disk, and a bad file is said."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving.capacity import Capacity, Cost, Gateway, MeasurementError, Run

SIZES = (1, 8, 64, 256, 512)
METHODS = {"encode", "decode", "sample", "reconstruct", "score"}


def example(**changes: object) -> Capacity:
    """Return a record with round numbers."""
    run = Run(graph=Cost(per_call_s=1e-4, per_row_s=1e-5), overhead_s=9e-4, memory_mib=200)
    fields: dict[str, object] = {
        "engine": "ray",
        "device": "cpu",
        "model": "an example",
        "measured_at": "2026-11-27T12:00:00Z",
        "machine": {"processors": "2"},
        "method": "by hand",
        "encoder": run,
        "decoder": run,
        "gateway": Gateway(
            costs=dict.fromkeys(METHODS, Cost(per_call_s=2e-4, per_row_s=2e-6)), row_values=784, memory_mib=200
        ),
        "floor_s": 2e-3,
        "shared_memory_mib": 1000,
    }
    return Capacity.model_validate(fields | changes)


@given(st.floats(0, 1e-2), st.floats(1e-9, 1e-3))
def test_a_line_is_found_again(per_call_s: float, per_row_s: float) -> None:
    """Times on a line give that line."""
    line = Cost(per_call_s=per_call_s, per_row_s=per_row_s)
    found = Cost.fit(SIZES, [line.seconds(size) for size in SIZES])
    for size in SIZES:
        assert found.seconds(size) == pytest.approx(line.seconds(size), rel=1e-6)


def test_a_fit_has_no_part_below_zero() -> None:
    """Times that fall with the rows, or rise faster than in proportion, are noise: a cost is never negative."""
    falling, steep = Cost.fit([1, 64], [2e-3, 1e-3]), Cost.fit([1, 64], [1e-5, 64e-4])
    assert falling.per_row_s == 0
    assert 1e-3 < falling.per_call_s < 2e-3
    assert steep.per_call_s == 0
    assert 1e-5 < steep.per_row_s < 1e-4


def test_small_runs_count_as_much_as_large_ones() -> None:
    """A tenth more at 512 rows moves the time of one row by no more than that."""
    times = [1e-3 + 1e-4 * size for size in SIZES]
    moved = Cost.fit(SIZES, [*times[:-1], times[-1] * 1.1])
    assert moved.seconds(1) == pytest.approx(times[0], rel=0.1)


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    """Written and read again."""
    example().write(tmp_path / "capacity.json")
    assert Capacity.read(tmp_path / "capacity.json") == example()


@pytest.mark.parametrize(
    ("content", "problem"),
    [("{", "Invalid JSON"), ("{}", "engine: Field required"), ('{"more": 1}', "Field required"), ("[]", "object")],
)
def test_a_bad_file_is_said(tmp_path: Path, content: str, problem: str) -> None:
    """Which file, what was wrong, what was expected."""
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(MeasurementError, match=problem) as caught:
        Capacity.read(path)
    assert str(path) in str(caught.value)
    with pytest.raises(MeasurementError, match="cannot be read"):
        Capacity.read(tmp_path / "none.json")


def test_the_package_brings_a_record_of_both_engines() -> None:
    """Every method, plausible on any machine: a row costs less than a call; it says when and where.

    A row may cost a gateway too little to be seen: a fit is never below zero.
    """
    for engine in ("ray", "in-process"):
        record = Capacity.recorded(engine)
        assert record.engine == engine
        assert set(record.gateway.costs) == METHODS
        assert record.measured_at.startswith("20")
        assert record.machine
        for cost in (record.encoder.cost, record.decoder.cost, *record.gateway.costs.values()):
            assert 0 <= cost.per_row_s < cost.per_call_s < 0.05
        for run in (record.encoder, record.decoder):
            assert run.graph.per_row_s > 0
            for size, seconds in run.points.items():
                assert run.graph.seconds(size) == pytest.approx(seconds, rel=0.5)


def test_other_graphs_keep_the_gateway_and_scale_its_rows() -> None:
    """A row of twice the values costs the gateway twice as much, a call as much as before."""
    base = example()
    run = base.encoder.with_graph({1: 2e-3, 64: 8.3e-3}, threads=4)
    assert run.threads == 4
    assert run.overhead_s == base.encoder.overhead_s
    assert run.cost.seconds(64) == pytest.approx(8.3e-3 + base.encoder.overhead_s)
    other = base.with_graphs(encoder=run, decoder=run, row_values=2 * 784, model="another")
    assert other.gateway.costs["encode"].per_row_s == pytest.approx(4e-6)
    assert other.gateway.costs["encode"].per_call_s == base.gateway.costs["encode"].per_call_s
    assert other.model == "another"
    assert other.floor_s == base.floor_s
