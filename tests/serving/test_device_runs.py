"""Runs on buffers that stay: each caller its own rows, no buffer for two, nothing left of the one before.

Everything runs on ONNX Runtime's CPU provider: buffers, binding and lanes are the same code as on a GPU.
"""

import ctypes
import gc
import mmap
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from serving.bundle import Bundle
from serving.device_runs import CudaPageLock, DeviceRuns, Shapes
from serving.sessions import CPU, open_session

Rows = NDArray[Any]
Session = Any  # onnxruntime has no types

BUCKETS = (1, 8, 32)
OUTPUTS = ("mean", "log_var")
SHAPES = Shapes("data", (1, 4, 4), {"mean": (2,), "log_var": (2,)})


class WatchedSession:
    """A true session that notes what runs on it, and lets a test slow it down."""

    def __init__(self, session: Session, *, seconds: float = 0.0) -> None:
        self._session, self._seconds = session, seconds
        self.inputs: dict[int, Any] = {}
        """The bound input of each binding, by its id."""
        self.runs: list[tuple[int, int, str]] = []
        """Thread, binding and CUDA graph of each run."""
        self.seen: list[Rows] = []
        """What was in the whole input at each run."""
        self.in_flight: Counter[int] = Counter()
        self.most_in_flight = 0
        self.was_shared = False

    def io_binding(self) -> Session:
        """Return a true binding whose input is noted."""
        binding = self._session.io_binding()
        bind = binding.bind_ortvalue_input

        def noted(name: str, value: Session) -> None:
            self.inputs[id(binding)] = value
            bind(name, value)

        binding.bind_ortvalue_input = noted
        return binding

    def run_with_iobinding(self, binding: Session, options: Session) -> None:
        """Note the run, then run."""
        key = id(binding)
        self.in_flight[key] += 1
        self.was_shared |= self.in_flight[key] > 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight.total())
        self.runs.append((threading.get_ident(), key, options.get_run_config_entry("gpu_graph_id")))
        self.seen.append(self.inputs[key].numpy().copy())
        time.sleep(self._seconds)
        self._session.run_with_iobinding(binding, options)
        self.in_flight[key] -= 1


@pytest.fixture
def session(small: Bundle) -> Session:
    """Return a session of the small encoder."""
    return open_session(small.encoder, [(CPU, {})], threads=1)[0]


@pytest.fixture
def pixels(seed: int) -> Rows:
    """Return 100 rows of whole pixel values."""
    return np.random.default_rng(seed).integers(0, 256, (100, 1, 4, 4)).astype(np.float32)


def _runs(
    open_one: Callable[[], Session],
    *,
    num_lanes: int = 1,
    has_graphs: bool = False,
    page_lock: CudaPageLock | None = None,
) -> DeviceRuns:
    return DeviceRuns(
        open_one,
        SHAPES,
        memory="cpu",
        buckets=BUCKETS,
        num_lanes=num_lanes,
        has_graphs=has_graphs,
        page_lock=page_lock,
    )


class Opener:
    """Opens watched sessions and keeps them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.opened: list[WatchedSession] = []

    def __call__(self) -> WatchedSession:
        """Open another."""
        self.opened.append(WatchedSession(self._session))
        return self.opened[-1]


def test_every_number_of_rows_gives_what_a_plain_run_gives(session: Session, pixels: Rows) -> None:
    """Bit for bit, for each number of rows up to three times the largest bucket, padding and pieces included."""
    runs = _runs(lambda: session)
    for num_rows in range(1, 97):
        expected = session.run(OUTPUTS, {"data": pixels[:num_rows]})
        for wanted, actual in zip(expected, runs.run(pixels[:num_rows], OUTPUTS), strict=True):
            assert actual.dtype == np.float32
            assert actual.shape == wanted.shape
            assert actual.tobytes() == wanted.tobytes()


def test_no_rows_give_no_rows(session: Session, pixels: Rows) -> None:
    """An empty batch is answered by empty outputs."""
    assert [values.shape for values in _runs(lambda: session).run(pixels[:0], OUTPUTS)] == [(0, 2), (0, 2)]


def test_outputs_come_in_the_order_asked_for(session: Session, pixels: Rows) -> None:
    """Only what is asked for comes back, in that order."""
    runs = _runs(lambda: session)
    mean, log_var = runs.run(pixels[:5], OUTPUTS)
    assert [values.tobytes() for values in runs.run(pixels[:5], ("log_var", "mean"))] == [
        log_var.tobytes(),
        mean.tobytes(),
    ]
    assert [values.tobytes() for values in runs.run(pixels[:5], ("log_var",))] == [log_var.tobytes()]


def test_bytes_are_widened_exactly(session: Session, pixels: Rows) -> None:
    """Rows of uint8 give the bits of the same numbers as float32."""
    runs = _runs(lambda: session)
    for left, right in zip(runs.run(pixels.astype(np.uint8), OUTPUTS), runs.run(pixels, OUTPUTS), strict=True):
        assert left.tobytes() == right.tobytes()


def test_an_answer_stays_what_it_was(session: Session, pixels: Rows) -> None:
    """A later run does not touch what an earlier one returned, full buckets included."""
    runs = _runs(lambda: session)
    for num_rows in (1, 5, 8, 32, 40):
        first = runs.run(pixels[:num_rows], OUTPUTS)
        kept = [values.copy() for values in first]
        second = runs.run(pixels[50 : 50 + num_rows], OUTPUTS)
        for before, now, other in zip(kept, first, second, strict=True):
            assert before.tobytes() == now.tobytes()
            assert not np.shares_memory(now, other)


def test_padding_is_zero_whatever_ran_before(session: Session, pixels: Rows) -> None:
    """After a full bucket of NaN, a smaller batch runs beside zeros: nothing of another caller stays."""
    watched = WatchedSession(session)
    runs = _runs(lambda: watched)
    runs.run(np.full((32, 1, 4, 4), np.nan, np.float32), OUTPUTS)
    for num_rows in (20, 9, 31, 10):
        values = runs.run(pixels[:num_rows], OUTPUTS)
        assert watched.seen[-1].shape == (32, 1, 4, 4)
        assert watched.seen[-1][:num_rows].tobytes() == pixels[:num_rows].tobytes()
        assert not watched.seen[-1][num_rows:].any()
        assert values[0].tobytes() == session.run(OUTPUTS, {"data": pixels[:num_rows]})[0].tobytes()


@pytest.mark.parametrize("shape", [(3, 1, 4, 5), (3, 16), (3, 1, 1, 1), (3,)])
def test_rows_of_another_shape_are_refused(session: Session, shape: tuple[int, ...]) -> None:
    """Also those that NumPy would stretch to fit; and the runs go on."""
    runs = _runs(lambda: session)
    with pytest.raises(ValueError, match=r"expected rows of shape \(1, 4, 4\)"):
        runs.run(np.ones(shape, np.float32), OUTPUTS)
    assert len(runs.run(np.ones((3, 1, 4, 4), np.float32), OUTPUTS)[0]) == 3


@pytest.mark.parametrize("has_graphs", [False, True])
def test_callers_at_once_get_their_own_rows(session: Session, pixels: Rows, *, has_graphs: bool) -> None:
    """Eight threads on two lanes: two runs in flight, never on one buffer, and each caller's own answer."""
    watched = WatchedSession(session, seconds=0.002)
    runs = _runs(lambda: watched, num_lanes=2, has_graphs=has_graphs)

    def call(first: int) -> bool:
        some = pixels[first : first + 1 + first % 9]
        actual = runs.run(some, OUTPUTS)
        return [v.tobytes() for v in actual] == [v.tobytes() for v in session.run(OUTPUTS, {"data": some})]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(call, range(80)))
    assert watched.most_in_flight == 2
    assert not watched.was_shared
    runs.close()


def test_lanes_without_graphs_share_a_session(session: Session) -> None:
    """One session, so one copy of the weights, and no capture: `gpu_graph_id` is -1."""
    opener = Opener(session)
    runs = _runs(opener, num_lanes=3)
    runs.run(np.zeros((1, 1, 4, 4), np.float32), OUTPUTS)
    assert len(opener.opened) == 1
    assert len(opener.opened[0].inputs) == 3 * len(BUCKETS)
    assert opener.opened[0].runs[0][0] == threading.get_ident()
    assert opener.opened[0].runs[0][2] == "-1"


def test_a_graph_belongs_to_one_thread_one_binding_and_one_size(session: Session, pixels: Rows) -> None:
    """With CUDA graphs: ONNX Runtime replays whatever was captured under an id, in the thread that captured it."""
    opener = Opener(session)
    runs = _runs(opener, num_lanes=2, has_graphs=True)
    runs.warm_up(pixels, lambda *_: None, OUTPUTS)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda num_rows: runs.run(pixels[:num_rows], OUTPUTS), list(range(1, 33)) * 2))
    assert len(opener.opened) == 2
    threads = [{thread for thread, _, _ in lane.runs} for lane in opener.opened]
    assert [len(own) for own in threads] == [1, 1]
    assert threads[0] != threads[1]
    for lane in opener.opened:
        assert {graph for _, _, graph in lane.runs} == {"1", "2", "3"}
        assert len({(binding, graph) for _, binding, graph in lane.runs}) == len(BUCKETS)
    runs.close()


@pytest.mark.parametrize(("has_graphs", "at_least"), [(False, 2), (True, 4)])
def test_everything_is_warm_before_the_first_call(
    session: Session, pixels: Rows, *, has_graphs: bool, at_least: int
) -> None:
    """Each bucket of each lane has run full, often enough to be captured, and what it gave was looked at."""
    opener, checked = Opener(session), Counter[int]()

    def check(values: list[NDArray[np.float32]], num_rows: int) -> None:
        checked[num_rows] += 1
        wanted = session.run(OUTPUTS, {"data": np.resize(pixels[:4], (num_rows, 1, 4, 4))})
        assert [v.tobytes() for v in values] == [v.tobytes() for v in wanted]

    runs = _runs(opener, num_lanes=2, has_graphs=has_graphs)
    runs.warm_up(pixels[:4], check, OUTPUTS)
    assert checked == dict.fromkeys(BUCKETS, 2)
    counts = Counter((id(lane), binding) for lane in opener.opened for _, binding, _ in lane.runs)
    assert len(counts) == 2 * len(BUCKETS)
    assert min(counts.values()) >= at_least
    runs.close()


def test_what_the_check_says_ends_the_start(session: Session, pixels: Rows) -> None:
    """An answer that is refused in one bucket is raised."""

    def refuse(_values: object, num_rows: int) -> None:
        if num_rows == 32:
            raise ArithmeticError("wrong")

    with pytest.raises(ArithmeticError, match="wrong"):
        _runs(lambda: session).warm_up(pixels, refuse, OUTPUTS)


def test_a_run_that_fails_gives_its_lane_back(
    session: Session, pixels: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The only lane serves the next caller after an error of the session."""
    watched = WatchedSession(session)
    runs = _runs(lambda: watched)
    with monkeypatch.context() as broken:
        broken.setattr(watched, "run_with_iobinding", _fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            runs.run(pixels[:3], OUTPUTS)
    assert len(runs.run(pixels[:3], OUTPUTS)[0]) == 3


def test_the_buffers_are_counted(session: Session) -> None:
    """Two lanes of 41 rows of 16 + 2 + 2 numbers of four bytes."""
    runs = _runs(lambda: session, num_lanes=2)
    assert runs.device_bytes == 2 * sum(BUCKETS) * 20 * 4
    assert (runs.buckets, runs.num_lanes, runs.is_page_locked) == (BUCKETS, 2, False)


class Driver:
    """Stands in for CUDA's library: keeps what is locked; refuses after some."""

    def __init__(self, *, room: int = 100) -> None:
        self.locked: dict[int, int] = {}
        self.last_error = 0
        self._room = room

    def cudaHostRegister(  # noqa: N802 - CUDA's name
        self, address: ctypes.c_void_p, size: ctypes.c_size_t, flags: ctypes.c_uint
    ) -> int:
        """Lock, or say that there is no memory for it."""
        assert flags.value == 0
        assert (address.value or 1) % mmap.PAGESIZE == 0, "two buffers on a page could not both be locked"
        if len(self.locked) == self._room:
            self.last_error = 2
            return 2
        self.locked[address.value or 0] = size.value
        return 0

    def cudaGetLastError(self) -> int:  # noqa: N802 - CUDA's name
        """Return the last error, and forget it."""
        last, self.last_error = self.last_error, 0
        return last

    def cudaHostUnregister(self, address: ctypes.c_void_p) -> int:  # noqa: N802 - CUDA's name
        """Unlock."""
        del self.locked[address.value or 0]
        return 0


def test_staging_memory_is_locked_and_let_go(session: Session) -> None:
    """Each staging buffer is registered with its address and size, and unregistered when nobody holds the runs."""
    driver = Driver()
    runs = _runs(lambda: session, num_lanes=2, page_lock=CudaPageLock(driver))
    assert runs.is_page_locked
    assert sorted(driver.locked.values()) == sorted(2 * [64 * size for size in BUCKETS])
    del runs
    gc.collect()
    assert driver.locked == {}


def test_memory_that_cannot_be_locked_is_used_unlocked(session: Session, pixels: Rows) -> None:
    """A limit on locked memory makes copies slower, not wrong, and the report says so."""
    driver = Driver(room=2)
    runs = _runs(lambda: session, page_lock=CudaPageLock(driver))
    assert not runs.is_page_locked
    assert driver.last_error == 0  # what ONNX Runtime would take for a failure of its own
    assert len(runs.run(pixels, OUTPUTS)[0]) == 100
    runs.close()
    assert driver.locked == {}


def _fail(*_: object) -> None:
    raise RuntimeError("out of memory")
