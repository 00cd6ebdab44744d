"""What runs take is measured size by size in turn, and grows with the rows."""

from pathlib import Path

import pytest

from serving import bundle as bundles
from serving.capacity import Cost
from serving.run_costs import SIZES, measure_run, of_graph
from tests.bundles import small_bundle


class Machine:
    """Runs that take a known time on a clock of their own; every tenth is disturbed."""

    def __init__(self, cost: Cost) -> None:
        self.now_s, self.sizes, self._cost = 0.0, list[int](), cost

    def run(self, size: int) -> None:
        """Let the time of a run pass."""
        self.sizes.append(size)
        disturbed = 20 if len(self.sizes) % 10 == 0 else 1
        self.now_s += self._cost.seconds(size) * disturbed

    def clock(self) -> float:
        """Return the time."""
        return self.now_s


def test_a_disturbed_machine_does_not_change_the_median() -> None:
    """One run of ten takes twenty times as long, and the cost is found all the same."""
    cost = Cost(per_call_s=1e-3, per_row_s=1e-5)
    machine = Machine(cost)
    times = measure_run(machine.run, (1, 64, 512), seconds=0.05, clock=machine.clock)
    for size, seconds in times.items():
        assert seconds == pytest.approx(cost.seconds(size), rel=1e-6)


def test_sizes_take_turns_after_a_run_to_warm_up() -> None:
    """So that a slow second of the machine meets all sizes; each is measured at least thrice."""
    machine = Machine(Cost(per_call_s=1.0, per_row_s=0.0))
    measure_run(machine.run, (1, 64), seconds=0.0, clock=machine.clock)
    assert machine.sizes == [1, 64] * 4


@pytest.mark.parametrize("graph", ["encoder", "decoder"])
def test_the_graphs_of_a_bundle_take_longer_for_more_rows(tmp_path: Path, graph: str) -> None:
    """512 rows of a wide network take at least four times the time of one."""
    path = small_bundle(tmp_path / "wide", data_shape=(1, 16, 16), latent_dim=8, hidden=(256,))
    times = of_graph(
        bundles.read(str(path)),
        graph,  # type: ignore[arg-type]  # one of both
        device="cpu",
        threads=1,
        seconds=0.2,
    )
    assert tuple(times) == SIZES
    assert times[512] > 4 * times[1] > 0
