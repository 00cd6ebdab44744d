"""ONNX Runtime sessions: providers and their options, and never another provider than the one asked for.

ONNX Runtime falls back in three ways, all silent, and each is closed here: a provider whose libraries are missing
is skipped (we compare), one that fails when the session is made or run is replaced by the CPU (switched off), and
a node that it does not know goes to the next provider of the list (we count the nodes). The order of that list is
TensorRT, CUDA, CPU; nodes below the first are reported.
"""

import contextlib
import ctypes
import functools
import io
import logging
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import onnxruntime as ort

from serving.config import AcceleratorConfig
from serving.errors import ProviderUnavailable

logger = logging.getLogger(__name__)

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "tf32", "fp16"]
Provider = tuple[str, dict[str, str]]

CPU: Final = "CPUExecutionProvider"
CUDA: Final = "CUDAExecutionProvider"
TENSORRT: Final = "TensorrtExecutionProvider"

TOLERANCES: Final[Mapping[Precision, float]] = {"fp32": 1e-3, "tf32": 4e-3, "fp16": 8e-3}
"""Largest difference from a known answer, absolute plus relative.

TF32 and fp16 round to u = 2^-11 = 4.9e-4. A product of two rounded factors is off by 2u at most and by at most
sqrt(2/3) u, 4e-4 of its size, in the root mean square; errors of the terms of a sum are independent, so a layer
adds 4e-4 of the size of its outputs, ten layers 1.3e-3, and three standard deviations are 4e-3. In fp16 what
leaves a layer is rounded too, and sums on the way may be: twice that. fp32 rounds to 6e-8, and what remains is
logits of some hundreds (3e-5) and other orders of summation. Swapped weights are off by far more.
"""

_SEARCH: Final = {"default": "DEFAULT", "heuristic": "HEURISTIC", "exhaustive": "EXHAUSTIVE"}
_ERROR: Final = 3
_FATAL: Final = 4


class GraphInput(NamedTuple):
    """The input of a graph: what TensorRT must know before it compiles."""

    name: str
    row_shape: tuple[int, ...]


def providers(
    device: Device, accelerator: AcceleratorConfig, graph_input: GraphInput, *, identity: str
) -> list[Provider]:
    """Return ONNX Runtime's providers in order of preference, with their options.

    Args:
        device: Where the graph runs.
        accelerator: How it runs on a GPU; buckets must be given.
        graph_input: The graph's only input.
        identity: Name of the graph and its bytes, which keeps engines of two models apart.
    """
    if device == "cpu":
        return [(CPU, {})]
    cuda = _cuda_options(accelerator)
    if accelerator.provider == "cuda":
        return [(CUDA, cuda)]
    return [(TENSORRT, _tensorrt_options(accelerator, graph_input, identity)), (CUDA, cuda)]


def open_session(graph: bytes, wanted: list[Provider], *, threads: int) -> tuple[Any, dict[str, int]]:
    """Open a session and check that it runs where it should.

    Args:
        graph: Bytes of an ONNX graph.
        wanted: Providers in order; the first must take at least one node.
        threads: Threads of the session. ONNX Runtime would take every core of the host unless told.

    Returns:
        The `InferenceSession`, and how many nodes each provider runs.

    Raises:
        ProviderUnavailable: If the first provider cannot be used.
        Exception: Whatever ONNX Runtime raises for a graph that it cannot load.
    """
    first = wanted[0][0]
    ort.set_default_logger_severity(_FATAL)  # what ONNX Runtime would print is raised by us, once
    if first != CPU:
        _preload()
    if first not in ort.get_available_providers():
        raise ProviderUnavailable(asked=first, actual="none of that name")
    try:
        session = ort.InferenceSession(
            graph, _options(threads, is_quiet=first != CPU), providers=wanted, enable_fallback=False
        )
    except Exception as error:
        if first == CPU:
            raise
        raise ProviderUnavailable(asked=first, actual=f"none ({_cause(first, error)})") from error
    if (actual := session.get_providers()[0]) != first:
        raise ProviderUnavailable(asked=first, actual=f"{actual} ({_cause(first, None)})")
    nodes = _nodes(session)
    if first != CPU and first not in nodes:
        raise ProviderUnavailable(asked=first, actual=f"{', '.join(nodes)} for every node of the graph")
    if set(nodes) - {first}:
        logger.warning("some nodes run elsewhere", extra={"provider": first, "nodes": dict(nodes)})
    return session, nodes


def _options(threads: int, *, is_quiet: bool) -> Any:  # noqa: ANN401 - onnxruntime has no types
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL if is_quiet else _ERROR
    # Several sessions share the cores of a machine: a spinning thread would take them from its neighbours.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    return options


def _cuda_options(accelerator: AcceleratorConfig) -> dict[str, str]:
    options = {
        "device_id": "0",  # Ray gives each replica its GPUs by CUDA_VISIBLE_DEVICES
        "arena_extend_strategy": "kSameAsRequested",  # the default doubles, which neighbours on the GPU pay for
        "cudnn_conv_algo_search": _SEARCH[accelerator.convolution_search],
        "use_tf32": str(int(accelerator.precision == "tf32")),
        "enable_cuda_graph": str(int(accelerator.cuda_graphs)),
    }
    if accelerator.memory_limit_bytes is not None:
        options["gpu_mem_limit"] = str(accelerator.memory_limit_bytes)
    return options


def _tensorrt_options(accelerator: AcceleratorConfig, graph_input: GraphInput, identity: str) -> dict[str, str]:
    largest = accelerator.buckets[-1]
    options = {
        "device_id": "0",
        "trt_fp16_enable": str(int(accelerator.precision == "fp16")),
        # One engine for all buckets: without a range it is compiled again for each size that is met first.
        "trt_profile_min_shapes": _shape(graph_input, 1),
        "trt_profile_opt_shapes": _shape(graph_input, largest),
        "trt_profile_max_shapes": _shape(graph_input, largest),
    }
    if accelerator.memory_limit_bytes is not None:
        options["trt_max_workspace_size"] = str(accelerator.memory_limit_bytes)
    if accelerator.engine_cache:
        # ONNX Runtime names engines after the graph, not after its weights: each gets a folder.
        which = f"{identity}-{accelerator.precision}-{largest}-ort{ort.__version__}"
        folder = Path(accelerator.engine_cache).absolute() / which
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        options |= {
            "trt_engine_cache_enable": "1",
            "trt_engine_cache_path": str(folder),
            "trt_timing_cache_enable": "1",
            "trt_timing_cache_path": str(folder),
        }
    return options


def _shape(graph_input: GraphInput, rows: int) -> str:
    return f"{graph_input.name}:{'x'.join(map(str, (rows, *graph_input.row_shape)))}"


def _nodes(session: Any) -> Counter[str]:  # noqa: ANN401 - onnxruntime has no types
    """Count the nodes of each provider; a compiled part of a graph counts as the nodes in it."""
    counts: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counts[part.ep_name] += len(part.get_nodes())
    return counts


@functools.cache
def _preload() -> None:
    """Load CUDA and cuDNN from the `nvidia-*` packages, once; what is not there the session finds or misses."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        ort.preload_dlls()
    if printed.getvalue():
        logger.debug("libraries of CUDA are missing", extra={"detail": printed.getvalue()[:1000]})


def _cause(provider: str, error: Exception | None) -> str:
    """Return why a provider does not start, as its library says it: ONNX Runtime keeps it to itself."""
    name = {CUDA: "cuda", TENSORRT: "tensorrt"}.get(provider, "")
    library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{name}.so"
    try:
        ctypes.CDLL(str(library))
    except OSError as missing:
        if "cannot open shared object" in str(missing):
            return str(missing).replace(f"{library.parent}/", "")
    return f"it failed to start: {type(error).__name__}" if error else "it failed to start"
