"""What is sent to every server, and what each must answer."""

from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from protos.inference import inference_pb2
from protos.vae.v1 import vae_pb2
from serving.tensors import from_message, to_message

Method = Literal["Encode", "Decode"]
Interface = Literal["vae.v1", "OIP"]
Arrays = dict[str, NDArray[Any]]

NUM_REQUESTS: Final = 16
TOLERANCE: Final = 1e-5
"""Largest difference from ONNX Runtime's own answer. Values are of the order of one, float32 rounds at 1e-7, and a
sum over 784 inputs in another order differs by a few times that; a wrong row differs by far more."""

_MAX_KNOWN: Final = 8
_PIXEL_MAX: Final = np.float32(255)
_MODELS: Final = {"Encode": "encoder", "Decode": "decoder"}
_ON_THE_WIRE: Final = {"Encode": {"mean": "mean", "log_var": "log_var"}, "Decode": {"mean": "reconstruction"}}
"""Outputs of each graph that are asked for, and their names on the wire."""


class Workload(NamedTuple):
    """One kind of call."""

    method: Method
    num_rows: int

    @property
    def name(self) -> str:
        """Name in the tables."""
        return f"{self.method}, {self.num_rows} row{'s' if self.num_rows > 1 else ''}"

    @property
    def model(self) -> str:
        """Name of the model in the Open Inference Protocol."""
        return _MODELS[self.method]


WORKLOADS: Final = [Workload(method, num_rows) for method in ("Encode", "Decode") for num_rows in (1, 64)]


class Series(NamedTuple):
    """One interface of one server: a column of the tables."""

    server: str
    interface: Interface = "OIP"
    is_ours: bool = False
    names_application: bool = False
    """Whether calls carry the metadata by which Ray Serve's proxy finds an application."""

    is_brief: bool = False
    """Whether it is measured in the closed loop alone, with 1 and 128 calls in flight: what the ratios need."""

    @property
    def name(self) -> str:
        """Name in the tables."""
        return f"{self.server}, {self.interface}" if self.is_ours else self.server

    def method(self, workload: Workload) -> str:
        """Return the full name of the method that is called."""
        if self.interface == "vae.v1":
            return f"/vae.v1.VaeService/{workload.method}"
        return "/inference.GRPCInferenceService/ModelInfer"

    def metadata(self, workload: Workload) -> tuple[tuple[str, str], ...]:
        """Return the metadata of a call."""
        return (("application", workload.model),) if self.names_application else ()


class Calls:
    """Requests as ready bytes, different from each other, and the answers to them.

    All servers get float32. Ours takes intensities in [0, 1] and scales them itself; the others get the pixel
    units of the graph and are spared that.

    Args:
        bundle: Folder of the graphs.
        series: Who is called.
        workload: What is asked.
    """

    def __init__(self, bundle: Path, series: Series, workload: Workload) -> None:
        self.workload = workload
        self._interface = series.interface
        session = _session(bundle, workload)
        rows = _rows(session, workload)
        self._expected = _expected(session, workload, rows)
        if workload.method == "Encode" and series.is_ours:
            rows = rows / _PIXEL_MAX
        make = _typed_request if series.interface == "vae.v1" else _inference_request
        self.bodies = [make(workload, each) for each in rows]
        self._known: list[list[bytes]] = [[] for _ in self.bodies]

    def is_right(self, index: int, answer: bytes) -> bool:
        """Return whether an answer holds what ONNX Runtime says, within the tolerance.

        Bytes that were found right for this very request are known again without reading them: the check costs
        every server about the same.
        """
        if answer in self._known[index]:
            return True
        is_right = self._is_close(index, answer)
        if is_right and len(self._known[index]) < _MAX_KNOWN:
            self._known[index].append(answer)
        return is_right

    def _is_close(self, index: int, answer: bytes) -> bool:
        try:
            actual = (_typed_answer if self._interface == "vae.v1" else _inference_answer)(self.workload, answer)
        except Exception:  # noqa: BLE001 - bytes that cannot be read are a wrong answer, whatever the reader raises
            return False
        expected = self._expected[index]
        return actual.keys() == expected.keys() and all(
            actual[name].shape == values.shape
            and bool(np.all(np.abs(actual[name] - values) <= TOLERANCE))  # false where it is not a number
            for name, values in expected.items()
        )


def _session(bundle: Path, workload: Workload) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    path = bundle / f"{workload.model}.onnx"
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _rows(session: ort.InferenceSession, workload: Workload) -> NDArray[np.float32]:
    """Return rows of all requests, (requests, rows, *row_shape): pixels in [0, 255], or draws from the prior."""
    random = np.random.default_rng(0)
    shape = (NUM_REQUESTS, workload.num_rows, *session.get_inputs()[0].shape[1:])
    if workload.method == "Encode":
        return random.integers(0, 256, shape).astype(np.float32)
    return random.standard_normal(shape).astype(np.float32)


def _expected(session: ort.InferenceSession, workload: Workload, rows: NDArray[np.float32]) -> list[Arrays]:
    names = _ON_THE_WIRE[workload.method]
    key = session.get_inputs()[0].name
    return [dict(zip(names.values(), session.run(list(names), {key: each}), strict=True)) for each in rows]


def _typed_request(workload: Workload, rows: NDArray[np.float32]) -> bytes:
    if workload.method == "Encode":
        return vae_pb2.EncodeRequest(data=to_message(rows)).SerializeToString()
    return vae_pb2.DecodeRequest(latents=to_message(rows)).SerializeToString()


def _inference_request(workload: Workload, rows: NDArray[np.float32]) -> bytes:
    request = inference_pb2.ModelInferRequest(model_name=workload.model, id="1")
    name = "data" if workload.method == "Encode" else "latents"
    request.inputs.add(name=name, datatype="FP32", shape=rows.shape)
    request.raw_input_contents.append(rows.tobytes())
    return request.SerializeToString()


def _typed_answer(workload: Workload, answer: bytes) -> Arrays:
    message: Any = (vae_pb2.EncodeResponse if workload.method == "Encode" else vae_pb2.DecodeResponse).FromString(
        answer
    )
    names = _ON_THE_WIRE[workload.method].values()
    return {name: from_message(getattr(message, name), field=name) for name in names}


def _inference_answer(workload: Workload, answer: bytes) -> Arrays:
    message = inference_pb2.ModelInferResponse.FromString(answer)
    arrays = {
        output.name: np.frombuffer(raw, np.float32).reshape(output.shape)
        for output, raw in zip(message.outputs, message.raw_output_contents, strict=True)
    }
    return arrays if message.model_name == workload.model else {}
