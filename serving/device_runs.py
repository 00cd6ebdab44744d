"""Runs of a graph on buffers that stay where they are: one set for each lane and size of batch.

A lane is one run in flight. It owns, for each bucket, rows in host memory (staging), input and outputs on the
device, and ONNX Runtime's binding of them; a lane is never used twice at a time, so no buffer is. Rows are copied
to the staging memory and padded with zeros, go to the device in one copy, and the outputs that were asked for come
back in arrays of their own, cut to the rows that came.

What ONNX Runtime 1.31 allows from Python, and what follows:

- Page-locked memory comes from plugin providers alone, which its GPU wheel is not. The staging memory is NumPy's
  and locked by CUDA's own `cudaHostRegister`. Outputs go to fresh memory, which is pageable: it is handed out, and
  a second copy out of a locked buffer would cost much of what the lock saves.
- A run ends when its kernels have. Streams cannot be chosen; each run of a session in flight has its own, which is
  what overlaps the copies of one lane and the kernels of another. Copies are done when they return, and hold the
  interpreter lock meanwhile; runs do not.
- CUDA graphs are kept for each thread that captured them, one stream for the session, and while one is captured no
  other thread may copy. So a lane with graphs has a session and a thread of its own, and all are captured at
  start, one after the other; lanes without share a session and run in the caller's thread.
- The graph takes float32. Rows of bytes are widened while they are staged, where they are copied anyway; to widen
  on the device would need a graph in front of the graph, that is another bundle.
"""

import ctypes
import math
import mmap
import queue
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Rows = NDArray[Any]
Float32 = NDArray[np.float32]
Outputs = dict[str, Float32]
Memory = Literal["cpu", "cuda"]

_NO_GRAPH: Final = "-1"
"""Value of `gpu_graph_id` with which nothing is captured or replayed; zero is ONNX Runtime's own."""

_RUNS_UNTIL_READY: Final = 2
_RUNS_UNTIL_CAPTURED: Final = 4
"""Two runs that allocate, one that captures, one that replays."""


class Shapes(NamedTuple):
    """Names of a graph's input and outputs, and the shape of one row of each."""

    input_name: str
    input_row: tuple[int, ...]
    outputs: Mapping[str, tuple[int, ...]]


class PageLock(Protocol):
    """Locks memory of the host to its place, so that a GPU reads it without help of the processor."""

    def lock(self, array: Rows) -> bool:
        """Return whether the array's memory is locked now. It must be unlocked before it is freed."""

    def unlock(self, array: Rows) -> None:
        """Let go of locked memory."""


class CudaPageLock:
    """`cudaHostRegister` of the CUDA library that ONNX Runtime has loaded.

    Args:
        library: The library, or a stand-in of it; by default the one in this process.
    """

    def __init__(self, library: Any = None) -> None:  # noqa: ANN401 - functions of a shared library
        self._library = library or _cuda_runtime()

    def lock(self, array: Rows) -> bool:
        """Return whether CUDA locked it; without the library nothing is."""
        if self._library is None or array.nbytes == 0:
            return False
        address, size = ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes)
        if self._library.cudaHostRegister(address, size, ctypes.c_uint(0)) == 0:
            return True
        self._library.cudaGetLastError()  # else ONNX Runtime, which looks for errors of its kernels, finds it
        return False

    def unlock(self, array: Rows) -> None:
        """Let go of locked memory."""
        self._library.cudaHostUnregister(ctypes.c_void_p(array.ctypes.data))


class DeviceRuns:
    """A graph on the buffers of a device.

    Args:
        open_session: Returns a session of the graph; called once, or once for each lane with CUDA graphs.
        shapes: Names and shapes.
        memory: Where buffers are: `cuda`, or `cpu` for a session on the CPU.
        buckets: Sizes of batches, ascending, rows.
        num_lanes: Runs that may be in flight; more wait.
        has_graphs: Whether CUDA graphs are captured.
        page_lock: Locks the staging memory; none with buffers on the CPU.
    """

    def __init__(
        self,
        open_session: Callable[[], Any],
        shapes: Shapes,
        *,
        memory: Memory,
        buckets: Sequence[int],
        num_lanes: int,
        has_graphs: bool = False,
        page_lock: PageLock | None = None,
    ) -> None:
        self._buckets = tuple(buckets)
        shared = None if has_graphs else open_session()
        self._lanes = [
            _Lane(
                shared or open_session(),
                [_Bucket(shapes, rows, memory, page_lock) for rows in self._buckets],
                has_graphs=has_graphs,
            )
            for _ in range(num_lanes)
        ]
        # Last in, first out: at low load one lane, whose memory is in the caches, does everything.
        self._idle: queue.LifoQueue[_Lane] = queue.LifoQueue()
        for lane in self._lanes:
            self._idle.put(lane)
        self._finalizer = weakref.finalize(self, _close, self._lanes)
        self._finalizer.atexit = False  # CUDA may be gone by then, and the system frees all

    @property
    def buckets(self) -> tuple[int, ...]:
        """Sizes of batches, ascending, rows."""
        return self._buckets

    @property
    def num_lanes(self) -> int:
        """Runs that may be in flight."""
        return len(self._lanes)

    @property
    def device_bytes(self) -> int:
        """Size of all inputs and outputs, which stay on the device; weights and what is in between not counted."""
        return sum(bucket.device_bytes for lane in self._lanes for bucket in lane.buckets)

    @property
    def is_page_locked(self) -> bool:
        """Whether all staging memory is page-locked."""
        return all(bucket.is_page_locked for lane in self._lanes for bucket in lane.buckets)

    def run(self, rows: Rows, outputs: Sequence[str]) -> list[Float32]:
        """Run the graph on rows, in pieces of at most the largest bucket. Waits for a lane; any thread may call.

        Args:
            rows: Shape (rows, *input_row); anything that NumPy casts to float32 within its kind.
            outputs: Names of the outputs to return.

        Returns:
            One array per name, float32, that nothing else refers to; the first dimension counts rows.
        """
        largest = self._buckets[-1]
        pieces = [rows[first : first + largest] for first in range(0, len(rows), largest)] or [rows]
        lane = self._idle.get()
        try:
            parts = [lane.run(self._index(len(piece)), piece, outputs) for piece in pieces]
        finally:
            self._idle.put(lane)
        return parts[0] if len(parts) == 1 else [np.concatenate(values) for values in zip(*parts, strict=True)]

    def warm_up(self, rows: Rows, check: Callable[[list[Float32], int], None], outputs: Sequence[str]) -> None:
        """Run every bucket of every lane, full, until it is as fast as it gets; then check what it gives.

        Args:
            rows: Rows to fill the buckets with, over and over.
            check: Takes the outputs and their number of rows; raises if they are wrong.
            outputs: Names of the outputs that are checked.
        """
        for lane in self._lanes:
            for index, size in enumerate(self._buckets):
                for _ in range(_RUNS_UNTIL_CAPTURED if lane.has_graphs else _RUNS_UNTIL_READY):
                    lane.run(index, np.resize(rows, (size, *rows.shape[1:])), outputs)
        # Only when all are captured: a graph that another one disturbs would show here.
        for lane in self._lanes:
            for index, size in enumerate(self._buckets):
                check(lane.run(index, np.resize(rows, (size, *rows.shape[1:])), outputs), size)

    def close(self) -> None:
        """End the lanes' threads and unlock memory, as happens when nobody holds this. Nothing may run."""
        self._finalizer()

    def _index(self, num_rows: int) -> int:
        return next(index for index, size in enumerate(self._buckets) if num_rows <= size)


class _Bucket:
    """Buffers for one size of batch."""

    def __init__(self, shapes: Shapes, size: int, memory: Memory, page_lock: PageLock | None) -> None:
        self.shapes, self.size, self._memory, self._page_lock = shapes, size, memory, page_lock
        self.staging = _own_pages((size, *shapes.input_row))
        self.num_dirty = 0
        """Rows of the staging memory that are not zero."""
        self.is_page_locked = page_lock is not None and page_lock.lock(self.staging)
        self.input = _on_device(self.staging.shape, memory)
        self.outputs = {name: _on_device((size, *row), memory) for name, row in shapes.outputs.items()}
        self.device_bytes = 4 * size * sum(map(math.prod, (shapes.input_row, *shapes.outputs.values())))

    def bind(self, session: Any) -> Any:  # noqa: ANN401 - onnxruntime has no types
        """Return a binding of these buffers to a session."""
        binding = session.io_binding()
        binding.bind_ortvalue_input(self.shapes.input_name, self.input)
        for name, value in self.outputs.items():
            binding.bind_ortvalue_output(name, value)
        return binding

    def fill(self, rows: Rows) -> None:
        """Copy rows to the device, zeros after them: nothing of an earlier caller stays beside them."""
        num_rows = len(rows)
        if rows.shape[1:] != self.shapes.input_row:  # NumPy would repeat a row of one value
            raise ValueError(f"expected rows of shape {self.shapes.input_row}, got {rows.shape[1:]}")
        self.staging[num_rows : self.num_dirty] = 0
        self.num_dirty = num_rows
        np.copyto(self.staging[:num_rows], rows, casting="same_kind")
        self.input.update_inplace(self.staging)

    def take(self, name: str, num_rows: int) -> Float32:
        """Return the first rows of an output in memory of their own."""
        values: Float32 = self.outputs[name].numpy()[:num_rows]
        # In host memory it is a view of the buffer, which the next run overwrites.
        return values.copy() if self._memory == "cpu" else values

    def close(self) -> None:
        """Unlock the staging memory."""
        if self.is_page_locked and self._page_lock is not None:
            self._page_lock.unlock(self.staging)
            self.is_page_locked = False


class _Lane:
    """Buffers of every size for one run in flight, bound to a session."""

    def __init__(self, session: Any, buckets: Sequence[_Bucket], *, has_graphs: bool) -> None:  # noqa: ANN401
        self._session, self.buckets, self.has_graphs = session, buckets, has_graphs
        self._bindings = [bucket.bind(session) for bucket in buckets]
        self._options = [run_options(index + 1 if has_graphs else None) for index in range(len(buckets))]
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="lane") if has_graphs else None

    def run(self, index: int, rows: Rows, outputs: Sequence[str]) -> list[Float32]:
        """Run one bucket, in the lane's thread if it has one."""
        if self._thread is None:
            return self._run(index, rows, outputs)
        return self._thread.submit(self._run, index, rows, outputs).result()

    def close(self) -> None:
        """End the thread and unlock memory."""
        if self._thread is not None:
            self._thread.shutdown(wait=False)
        for bucket in self.buckets:
            bucket.close()

    def _run(self, index: int, rows: Rows, outputs: Sequence[str]) -> list[Float32]:
        bucket = self.buckets[index]
        bucket.fill(rows)
        self._session.run_with_iobinding(self._bindings[index], self._options[index])
        return [bucket.take(name, len(rows)) for name in outputs]


def _close(lanes: Sequence[_Lane]) -> None:
    for lane in lanes:
        lane.close()


def run_options(graph_id: int | None) -> Any:  # noqa: ANN401 - onnxruntime has no types
    """Return options of a run that captures or replays a CUDA graph, or none."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", _NO_GRAPH if graph_id is None else str(graph_id))
    return options


def _own_pages(shape: tuple[int, ...]) -> Float32:
    """Return zeros on pages that they share with nothing: pages are locked whole, and each but once."""
    size = math.prod(shape)
    memory = mmap.mmap(-1, max(1, 4 * size))
    return np.frombuffer(memory, np.float32, count=size).reshape(shape)


def _on_device(shape: tuple[int, ...], memory: Memory) -> Any:  # noqa: ANN401 - onnxruntime has no types
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, memory, 0)


def _cuda_runtime() -> Any:  # noqa: ANN401 - functions of a shared library
    """Return CUDA's runtime library if this process can load it, else nothing."""
    major = str(getattr(ort, "cuda_version", "") or "").partition(".")[0]
    if not major or not sys.platform.startswith("linux"):
        return None
    try:
        return ctypes.CDLL(f"libcudart.so.{major}")
    except OSError:
        return None
