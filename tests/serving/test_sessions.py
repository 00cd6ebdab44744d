"""The provider asked for, with the options asked for, or none; and each precision within its tolerance."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper

from serving import bundle
from serving.bundle import Bundle
from serving.config import AcceleratorConfig
from serving.errors import ProviderUnavailable
from serving.sessions import (
    CPU,
    CUDA,
    TENSORRT,
    TOLERANCES,
    GraphInput,
    Precision,
    Provider,
    open_session,
    providers,
)
from tests.bundles import small_bundle

Float32 = NDArray[np.float32]

PIXELS = GraphInput("data", (1, 28, 28))
BUCKETS = (1, 8, 32, 64)
NUM_LAYERS = 10


def _providers(identity: str = "encoder-abc", **values: Any) -> list[Provider]:  # noqa: ANN401 - values of a config
    accelerator = AcceleratorConfig.parse({"buckets": BUCKETS} | values)
    return providers("cuda", accelerator, PIXELS, identity=identity)


def test_a_cpu_needs_no_options() -> None:
    """On the CPU nothing of the accelerator's configuration counts."""
    config = AcceleratorConfig(precision="tf32", buckets=BUCKETS)
    assert providers("cpu", config, PIXELS, identity="encoder-abc") == [(CPU, {})]


def test_cuda_is_asked_for_alone_and_exactly() -> None:
    """IEEE arithmetic, memory as needed, the first GPU that Ray shows, no graphs, unless configured."""
    options = {
        "device_id": "0",
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "HEURISTIC",
        "use_tf32": "0",
        "enable_cuda_graph": "0",
    }
    assert _providers() == [(CUDA, options)]


@pytest.mark.parametrize(
    ("values", "option", "expected"),
    [
        ({"precision": "tf32"}, "use_tf32", "1"),
        ({"cuda_graphs": True}, "enable_cuda_graph", "1"),
        ({"memory_limit_bytes": 2**30}, "gpu_mem_limit", "1073741824"),
        ({"convolution_search": "exhaustive"}, "cudnn_conv_algo_search", "EXHAUSTIVE"),
    ],
)
def test_each_setting_is_an_option_of_cuda(values: dict[str, Any], option: str, expected: str) -> None:
    """What is configured reaches ONNX Runtime, in its words."""
    assert _providers(**values)[0][1][option] == expected


def test_tensorrt_comes_before_cuda(tmp_path: Path) -> None:
    """One engine for every bucket; what TensorRT does not know runs on CUDA."""
    (first, tensorrt), (second, cuda) = _providers(
        provider="tensorrt", precision="fp16", engine_cache=str(tmp_path), memory_limit_bytes=2**30
    )
    assert (first, second) == (TENSORRT, CUDA)
    assert tensorrt["trt_fp16_enable"] == "1"
    assert tensorrt["trt_profile_min_shapes"] == "data:1x1x28x28"
    assert tensorrt["trt_profile_opt_shapes"] == tensorrt["trt_profile_max_shapes"] == "data:64x1x28x28"
    assert tensorrt["trt_max_workspace_size"] == cuda["gpu_mem_limit"] == "1073741824"
    assert tensorrt["trt_engine_cache_enable"] == tensorrt["trt_timing_cache_enable"] == "1"
    assert Path(tensorrt["trt_engine_cache_path"]).is_dir()


def test_engines_of_two_models_never_meet(tmp_path: Path) -> None:
    """ONNX Runtime finds engines by the graph's name: bytes, precision and sizes each have their own folder."""
    common: dict[str, Any] = {"provider": "tensorrt", "engine_cache": str(tmp_path)}
    folders = {
        _providers(identity, precision=precision, buckets=buckets, **common)[0][1]["trt_engine_cache_path"]
        for identity in ("encoder-abc", "encoder-abd", "decoder-abc")
        for precision in ("tf32", "fp16")
        for buckets in ((64,), (128,))
    }
    assert len(folders) == 12
    assert all(Path(folder).stat().st_mode & 0o077 == 0 for folder in folders)


def test_without_a_cache_none_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorRT then compiles at each start."""
    monkeypatch.chdir(tmp_path)
    options = _providers(provider="tensorrt", precision="tf32")[0][1]
    assert not any("cache" in name for name in options)
    assert options["trt_fp16_enable"] == "0"
    assert list(tmp_path.iterdir()) == []


def test_every_option_is_one_that_the_providers_know(tmp_path: Path) -> None:
    """A misspelt option would fail on a GPU alone: each name stands in the provider's library."""
    folder = Path(ort.__file__).parent / "capi"
    libraries = {
        CUDA: folder / "libonnxruntime_providers_cuda.so",
        TENSORRT: folder / "libonnxruntime_providers_tensorrt.so",
    }
    if not all(path.exists() for path in libraries.values()):
        pytest.skip("this onnxruntime has no GPU providers to compare with")
    asked = _providers(provider="tensorrt", precision="fp16", memory_limit_bytes=2**30, engine_cache=str(tmp_path))
    for name, options in asked:
        content = libraries[name].read_bytes()
        assert [option for option in options if b"\0" + option.encode() + b"\0" not in content] == []


def test_nodes_are_counted(small: Bundle) -> None:
    """The encoder has a division, a flattening and two products, all on the provider asked for."""
    session, nodes = open_session(small.encoder, [(CPU, {})], threads=1)
    assert nodes == {CPU: 4}
    assert session.get_providers() == [CPU]


def test_a_provider_that_this_build_lacks_is_named(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime would warn and go on."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(ProviderUnavailable, match=f"{CUDA} was asked for and .* none of that name"):
        open_session(small.encoder, [(CUDA, {})], threads=1)


@pytest.mark.parametrize("name", [CUDA, TENSORRT])
def test_a_missing_library_is_named(small: Bundle, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Whoever installs learns which library is not there, and nothing is printed beside the error."""
    if name not in ort.get_available_providers():
        pytest.skip(f"this onnxruntime was built without {name}")
    if Path("/dev/nvidiactl").exists():
        pytest.skip("this machine has a GPU: its libraries may be complete")
    with pytest.raises(
        ProviderUnavailable, match=rf"^{name} .* \(lib\S+: cannot open shared object file"
    ) as caught:
        open_session(small.encoder, [(name, {"device_id": "0"})], threads=1)
    assert "/" not in caught.value.actual
    assert capfd.readouterr().out == ""


class SessionElsewhere:
    """What ONNX Runtime makes of a graph whose nodes the first provider does not know."""

    asked: dict[str, Any]

    def __init__(self, _graph: bytes, _options: object, **asked: Any) -> None:  # noqa: ANN401
        type(self).asked = asked

    def get_providers(self) -> list[str]:
        """Say that the provider is there."""
        return [CUDA, CPU]

    def get_provider_graph_assignment_info(self) -> list[Any]:
        """Say that it does nothing."""
        return [type("Part", (), {"ep_name": CPU, "get_nodes": lambda _: [1, 2, 3]})()]


def test_a_provider_that_runs_no_node_is_refused(small: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """That it is in the session's list says nothing; and ONNX Runtime's own fallback is off."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(ort, "InferenceSession", SessionElsewhere)
    with pytest.raises(ProviderUnavailable, match=f"chose {CPU} for every node of the graph"):
        open_session(small.encoder, [(CUDA, {})], threads=1)
    assert SessionElsewhere.asked["enable_fallback"] is False


def test_a_graph_that_is_none_raises_what_onnx_runtime_raises() -> None:
    """On the CPU it is the graph's fault, which the caller words."""
    with pytest.raises(Exception, match="INVALID_PROTOBUF"):
        open_session(b"no graph", [(CPU, {})], threads=1)


def _weights(graph: bytes) -> list[tuple[Float32, Float32]]:
    """Return weights and biases of the products, in order."""
    model = onnx.load_from_string(graph)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    products = [node for node in model.graph.node if node.op_type == "Gemm"]
    return [(tensors[node.input[1]], tensors[node.input[2]]) for node in products]


def _as_is(values: Float32) -> Float32:
    return values


def _tf32(values: Float32) -> Float32:
    """Round to ten bits of mantissa, to nearest, ties to even, as tensor cores do."""
    bits = values.view(np.uint32)
    kept = bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))
    return (kept & np.uint32(0xFFFFE000)).view(np.float32)


def _fp16(values: Float32) -> Float32:
    return values.astype(np.float16).astype(np.float32)


def _decode(weights: list[tuple[Float32, Float32]], latents: Float32, precision: Precision) -> Float32:
    """Compute the decoder's logits in a precision: rounded factors; in fp16 rounded sums, too."""
    roundings: dict[Precision, Callable[[Float32], Float32]] = {"fp32": _as_is, "tf32": _tf32, "fp16": _fp16}
    rounded, leaves = roundings[precision], _fp16 if precision == "fp16" else _as_is
    values = latents
    for layer, (weight, bias) in enumerate(weights):
        values = leaves(rounded(values) @ rounded(weight) + bias)
        if layer < len(weights) - 1:
            values = np.maximum(values, 0)
    return values


@pytest.mark.parametrize("precision", ["fp32", "tf32", "fp16"])
@pytest.mark.parametrize("model_seed", range(3))
def test_a_deep_decoder_stays_within_the_tolerance_of_its_precision(
    tmp_path: Path, precision: Precision, model_seed: int
) -> None:
    """Ten layers of 256 units, rounded as the precision rounds, differ from exact ones by less than is allowed."""
    widths = (256,) * (NUM_LAYERS - 1)
    folder = small_bundle(tmp_path / "deep", seed=model_seed, data_shape=(1, 28, 28), latent_dim=32, hidden=widths)
    weights, latents = _weights(bundle.read(str(folder)).decoder), bundle.golden_latents(32)
    assert len(weights) == NUM_LAYERS
    exact = _decode([(w.astype(np.float64), b.astype(np.float64)) for w, b in weights], latents, "fp32")
    excess = np.abs(_decode(weights, latents, precision) - exact) / (1 + np.abs(exact))
    assert excess.max() < TOLERANCES[precision]


def test_the_tolerances_tell_the_precisions_apart(tmp_path: Path) -> None:
    """Each coarser arithmetic gets more room, and two layers in the wrong order need more than any has."""
    assert TOLERANCES["fp32"] < TOLERANCES["tf32"] < TOLERANCES["fp16"]
    folder = small_bundle(tmp_path / "deep", data_shape=(1, 28, 28), latent_dim=32, hidden=(256,) * 3)
    weights, latents = _weights(bundle.read(str(folder)).decoder), bundle.golden_latents(32)
    swapped = [weights[0], weights[2], weights[1], weights[3]]
    difference = np.abs(_decode(swapped, latents, "fp32") - _decode(weights, latents, "fp32"))
    assert np.median(difference) > 10 * TOLERANCES["fp16"]
