"""A graph runs where it was asked to, gives its known answers, and treats each row alone."""

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from numpy.typing import NDArray

import serving.runtime
from serving import bundle
from serving.bundle import Bundle, Graph, Manifest
from serving.config import AcceleratorConfig
from serving.device_runs import DeviceRuns
from serving.errors import BundleError, DeadlineExceeded, ProviderUnavailable
from serving.runtime import GraphRuntime
from serving.sessions import CPU, TOLERANCES

GRAPHS: tuple[Graph, ...] = ("encoder", "decoder")
OUTPUTS = {"encoder": ("mean", "log_var"), "decoder": ("logits", "mean")}


def _load(small: Bundle, graph: Graph) -> GraphRuntime:
    return GraphRuntime(small, graph, device="cpu", threads=1)


def _rows(graph: Graph, num_rows: int, seed: int) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    if graph == "encoder":
        return random.integers(0, 256, (num_rows, 1, 4, 4)).astype(np.float32)
    return random.standard_normal((num_rows, 2)).astype(np.float32)


def _changed(small: Bundle, **values: Any) -> Bundle:  # noqa: ANN401 - values of a manifest
    return small._replace(manifest=Manifest.parse(small.manifest.model_dump() | values))


@pytest.mark.parametrize("graph", GRAPHS)
def test_loading_reports_what_was_chosen(small: Bundle, graph: Graph) -> None:
    """The report names version, provider and threads, and the time it took."""
    report = _load(small, graph).report
    assert report[:3] == (small.manifest.version, "CPUExecutionProvider", 1)
    assert 0 < report.load_s < 30


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_row_does_not_depend_on_its_batch(small: Bundle, graph: Graph, seed: int) -> None:
    """Bit for bit, each row of a batch of 1 to 64 is the row run alone."""
    runtime, rows = _load(small, graph), _rows(graph, 64, seed)
    alone = [runtime.run(rows[i : i + 1], OUTPUTS[graph]) for i in range(64)]
    for num_rows in range(1, 65):
        for index, output in enumerate(runtime.run(rows[:num_rows], OUTPUTS[graph])):
            assert output.tobytes() == b"".join(alone[i][index].tobytes() for i in range(num_rows))


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e38])
def test_a_bad_row_does_not_touch_its_neighbours(small: Bundle, graph: Graph, bad: float, seed: int) -> None:
    """Bit for bit, honest rows are the same beside a row of NaN, infinities or huge numbers."""
    runtime, rows = _load(small, graph), _rows(graph, 32, seed)
    clean = runtime.run(rows, OUTPUTS[graph])
    spoiled = rows.copy()
    spoiled[7] = bad
    for before, after in zip(clean, runtime.run(spoiled, OUTPUTS[graph]), strict=True):
        assert np.delete(before, 7, axis=0).tobytes() == np.delete(after, 7, axis=0).tobytes()


def test_bytes_and_floats_of_the_same_pixels_give_the_same_bits(small: Bundle, seed: int) -> None:
    """Rows of uint8 are widened exactly."""
    runtime = _load(small, "encoder")
    pixels = _rows("encoder", 16, seed)
    for left, right in zip(
        runtime.run(pixels.astype(np.uint8), OUTPUTS["encoder"]),
        runtime.run(pixels, OUTPUTS["encoder"]),
        strict=True,
    ):
        assert left.tobytes() == right.tobytes()


def test_only_the_outputs_asked_for_are_returned(small: Bundle, seed: int) -> None:
    """Outputs come in the order in which they are asked for."""
    runtime, rows = _load(small, "encoder"), _rows("encoder", 3, seed)
    log_var, mean = runtime.run(rows, ("log_var", "mean"))
    assert runtime.run(rows, ("mean",))[0].tobytes() == mean.tobytes()
    assert mean.tobytes() != log_var.tobytes()


@pytest.mark.parametrize("expires_in_s", [60.0, math.inf])
def test_a_run_whose_time_has_not_come_to_its_end_is_run(small: Bundle, seed: int, expires_in_s: float) -> None:
    """With time left, a run until a deadline is a run."""
    runtime, rows = _load(small, "decoder"), _rows("decoder", 3, seed)
    (mean,) = runtime.run_until(time.monotonic() + expires_in_s, rows, ("mean",))
    assert mean.tobytes() == runtime.run(rows, ("mean",))[0].tobytes()


@pytest.mark.parametrize("late_s", [1e-3, 1e9, math.inf])
def test_a_run_that_nobody_waits_for_is_not_run(
    small: Bundle, seed: int, late_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose deadline passed while they waited for a thread never reach the graph."""
    runtime, rows = _load(small, "decoder"), _rows("decoder", 3, seed)
    monkeypatch.setattr(runtime, "run", lambda *_: pytest.fail("it ran"))
    with pytest.raises(DeadlineExceeded, match="the deadline passed"):
        runtime.run_until(time.monotonic() - late_s, rows, ("mean",))


@pytest.mark.parametrize("graph", GRAPHS)
def test_cuda_without_a_gpu_is_refused(small: Bundle, graph: Graph) -> None:
    """ONNX Runtime alone would fall back in silence; we say what is missing and the way out."""
    if "CUDAExecutionProvider" in ort.get_available_providers():
        try:
            import torch  # noqa: PLC0415 - only to ask whether there is a GPU

            if torch.cuda.is_available():
                pytest.skip("this machine has a GPU")
        except ImportError:
            pass
    with pytest.raises(ProviderUnavailable, match=r"^CUDAExecutionProvider was asked for .*--device cpu"):
        GraphRuntime(small, graph, device="cuda", threads=1)


@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("key", ["first", "total"])
def test_a_wrong_known_answer_is_refused(small: Bundle, graph: Graph, key: str) -> None:
    """A graph that does not give what it gave at export does not serve."""
    golden = [answer.model_dump() for answer in small.manifest.golden]
    for answer in golden:
        if answer["graph"] == graph:
            answer[key] = answer[key] + 1.0 if key == "total" else (answer[key][0] + 0.1, *answer[key][1:])
    with pytest.raises(BundleError, match=rf"the {graph}'s \w+ is not its known answer here; export it again"):
        _load(_changed(small, golden=golden), graph)


@pytest.mark.parametrize(
    "change",
    [
        lambda golden: golden[1:],
        lambda golden: [*golden, golden[0]],
        lambda _golden: [],
        lambda golden: [{**golden[0], "output": "median"}, *golden[1:]],
        lambda golden: [{**golden[0], "first": (float("nan"), *golden[0]["first"][1:])}, *golden[1:]],
        lambda golden: [{**golden[0], "first": golden[0]["first"][:3]}, *golden[1:]],
        lambda golden: [{**golden[0], "first": ()}, *golden[1:]],
    ],
    ids=["one missing", "one twice", "none", "other output", "nan", "too short", "empty"],
)
def test_known_answers_that_are_not_complete_are_refused(
    small: Bundle, change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]
) -> None:
    """Each output of a graph has exactly one known answer of full length."""
    golden = change([answer.model_dump() for answer in small.manifest.golden])
    with pytest.raises(BundleError, match="known answer"):
        _load(_changed(small, golden=golden), "encoder")


@pytest.mark.parametrize("garbage", [b"not a graph", b"\x00" * 100, b"\x08\x0a"])
@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_that_does_not_load_is_refused(small: Bundle, graph: Graph, garbage: bytes) -> None:
    """Bytes with the right digest that are no graph are a BundleError."""
    broken = small._replace(encoder=garbage) if graph == "encoder" else small._replace(decoder=garbage)
    with pytest.raises(BundleError, match=rf"ONNX Runtime cannot load the {graph}"):
        _load(broken, graph)


@pytest.mark.parametrize(
    ("graph", "values"),
    [
        ("encoder", {"data_shape": (1, 5, 5)}),
        ("encoder", {"data_shape": (16,)}),
        ("decoder", {"latent_dim": 3}),
    ],
)
def test_a_manifest_that_does_not_fit_its_graph_is_refused(
    small: Bundle, graph: Graph, values: dict[str, Any]
) -> None:
    """Shapes that the graph does not take are a BundleError at start, not an INTERNAL at the first call."""
    with pytest.raises(BundleError, match="export it again"):
        _load(_changed(small, **values), graph)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"likelihood": "gaussian"}, "a gaussian likelihood needs the decoder's log_var"),
        (
            {"likelihood": "categorical", "num_levels": 5},
            r"logits has rows of shape \(1, 4, 4\), expected \(5, 1, 4, 4\) for a categorical likelihood",
        ),
    ],
)
def test_a_decoder_of_another_likelihood_is_refused(small: Bundle, values: dict[str, Any], message: str) -> None:
    """A decoder whose outputs are not the parameters that the manifest names would score wrongly: not served."""
    with pytest.raises(BundleError, match=message + ".*; export it again"):
        _load(_changed(small, **values), "decoder")


@pytest.mark.parametrize("key", ["inputs", "outputs"])
def test_names_that_the_graph_does_not_have_are_refused(small: Bundle, key: str) -> None:
    """A manifest that names other inputs or outputs than the graph is a BundleError."""
    encoder = small.manifest.encoder.model_dump() | {key: ("image", "picture")}
    golden = [
        answer.model_dump() | ({"output": name} if key == "outputs" else {})
        for answer, name in zip(small.manifest.golden, ("image", "picture", "logits", "mean"), strict=True)
    ]
    with pytest.raises(BundleError, match="export it again"):
        _load(_changed(small, encoder=encoder, golden=golden), "encoder")


def test_golden_rows_are_pixels() -> None:
    """The golden data are whole pixel values from 0 to 255, and never change."""
    data = bundle.golden_data((1, 4, 4))
    assert data.shape == (bundle.GOLDEN_ROWS, 1, 4, 4)
    assert ((data >= 0) & (data <= 255) & (data == np.floor(data))).all()
    assert data.tobytes() == bundle.golden_data((1, 4, 4)).tobytes()


def test_batch_independence_is_seen_and_its_lack_too(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that depend on their neighbours, as per-tensor quantisation makes them, are found."""
    runtime = GraphRuntime(small, "decoder", device="cpu", threads=1)
    assert runtime.is_batch_independent()
    honest = runtime.run
    monkeypatch.setattr(runtime, "run", lambda rows, names: [v + v.max() for v in honest(rows, names)])
    assert not runtime.is_batch_independent()


@pytest.fixture
def on_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `cuda` mean the CPU provider: the whole path of a GPU, buffers and binding included, in host memory."""
    monkeypatch.setattr(serving.runtime, "providers", lambda *_, **__: [(CPU, {})])


def _accelerated(small: Bundle, graph: Graph, **values: Any) -> GraphRuntime:  # noqa: ANN401 - values of a config
    accelerator = AcceleratorConfig.parse({"buckets": (1, 8, 32)} | values)
    return GraphRuntime(small, graph, device="cuda", threads=1, accelerator=accelerator)


@pytest.mark.usefixtures("on_buffers")
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("cuda_graphs", [False, True])
def test_the_path_of_a_gpu_gives_what_a_cpu_gives(
    small: Bundle, graph: Graph, seed: int, *, cuda_graphs: bool
) -> None:
    """Bit for bit, for numbers of rows below, at and above the buckets, and for outputs in any order."""
    plain, runtime = _load(small, graph), _accelerated(small, graph, cuda_graphs=cuda_graphs)
    for num_rows in (1, 2, 8, 9, 32, 33, 70):
        rows = _rows(graph, num_rows, seed)
        for names in (OUTPUTS[graph], OUTPUTS[graph][::-1], OUTPUTS[graph][:1]):
            for wanted, actual in zip(plain.run(rows, names), runtime.run(rows, names), strict=True):
                assert actual.tobytes() == wanted.tobytes()


@pytest.mark.usefixtures("on_buffers")
def test_the_report_tells_what_a_gpu_holds(small: Bundle) -> None:
    """Precision, buckets, lanes and the bytes of buffers: 41 rows of 16 + 2 + 2 floats in each of three lanes."""
    report = _accelerated(small, "encoder", precision="tf32", num_lanes=3).report
    assert (report.precision, report.buckets, report.num_lanes) == ("tf32", (1, 8, 32), 3)
    assert report.device_bytes == 3 * 41 * 20 * 4
    assert report.nodes == ((CPU, 4),)
    assert not report.is_page_locked


def test_a_cpu_has_neither_buckets_nor_another_precision(small: Bundle) -> None:
    """What is configured for a GPU does not change what the CPU computes, nor what is said of it."""
    accelerator = AcceleratorConfig(precision="tf32", buckets=(4,))
    report = GraphRuntime(small, "encoder", device="cpu", threads=1, accelerator=accelerator).report
    assert (report.precision, report.buckets, report.num_lanes, report.device_bytes) == ("fp32", (), 0, 0)


@pytest.mark.usefixtures("on_buffers")
def test_a_bucket_that_answers_otherwise_is_refused(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA graph replayed for another bucket would: found at start, before the first caller."""
    honest = DeviceRuns.warm_up

    def disturbed(self: DeviceRuns, rows: Any, check: Any, outputs: Any) -> None:  # noqa: ANN401
        honest(self, rows, lambda values, n: check([v + (n == 32) for v in values], n), outputs)

    monkeypatch.setattr(DeviceRuns, "warm_up", disturbed)
    with pytest.raises(BundleError, match="mean of 32 rows in a batch is not what it is for four"):
        _accelerated(small, "encoder")


@pytest.mark.usefixtures("on_buffers")
@pytest.mark.parametrize(("precision", "is_served"), [("fp32", False), ("tf32", True)])
def test_each_precision_has_its_own_gate(small: Bundle, precision: str, *, is_served: bool) -> None:
    """Off by 0.002, a known answer is TF32's rounding, and damage where arithmetic is exact."""
    golden = [answer.model_dump() for answer in small.manifest.golden]
    first, *rest = golden[0]["first"]
    golden[0]["first"] = (first + 0.002 * (1 + abs(first)), *rest)
    spoiled = _changed(small, golden=golden)
    if is_served:
        assert _accelerated(spoiled, "encoder", precision=precision).report.precision == precision
    else:
        with pytest.raises(BundleError, match="is not its known answer here"):
            _accelerated(spoiled, "encoder", precision=precision)


@pytest.fixture
def cuda(small: Bundle) -> None:
    """Skip where CUDA cannot be used, and say why."""
    try:
        GraphRuntime(small, "encoder", device="cuda", threads=1)
    except ProviderUnavailable as reason:
        pytest.skip(f"no CUDA here: {reason}")


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("graph", GRAPHS)
@pytest.mark.parametrize("values", [{}, {"cuda_graphs": True}, {"precision": "tf32"}, {"num_lanes": 1}], ids=str)
def test_a_gpu_gives_what_a_cpu_gives(small: Bundle, graph: Graph, values: dict[str, Any], seed: int) -> None:
    """Within the tolerance of the precision, for rows below, at and above the buckets; from threads, too."""
    plain, runtime = _load(small, graph), _accelerated(small, graph, **values)
    tolerance = TOLERANCES["tf32" if "precision" in values else "fp32"]
    batches = [_rows(graph, num_rows, seed + num_rows) for num_rows in (1, 2, 8, 9, 32, 33, 70)] * 5
    with ThreadPoolExecutor(4) as pool:
        computed = list(pool.map(lambda rows: runtime.run(rows, OUTPUTS[graph]), batches))
    for rows, outputs in zip(batches, computed, strict=True):
        for wanted, actual in zip(plain.run(rows, OUTPUTS[graph]), outputs, strict=True):
            np.testing.assert_allclose(actual, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
@pytest.mark.parametrize("graph", GRAPHS)
def test_with_one_bucket_a_row_on_a_gpu_does_not_depend_on_its_batch(
    small: Bundle, graph: Graph, seed: int
) -> None:
    """Bit for bit, each row of a batch is the row run alone, because both run in the same shape."""
    runtime, rows = _accelerated(small, graph, buckets=(64,)), _rows(graph, 64, seed)
    together = runtime.run(rows, OUTPUTS[graph])
    alone = [runtime.run(row[None], OUTPUTS[graph]) for row in rows]
    for index, values in enumerate(together):
        assert values.tobytes() == b"".join(outputs[index].tobytes() for outputs in alone)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_staging_memory_is_page_locked_on_a_gpu(small: Bundle) -> None:
    """CUDA's library is there, so rows need no help of the processor on their way."""
    assert _accelerated(small, "encoder").report.is_page_locked
