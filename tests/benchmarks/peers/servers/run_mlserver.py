"""MLServer with both graphs of a bundle.

    python run_mlserver.py BUNDLE PORT HTTP_PORT MAX_BATCH_REQUESTS MAX_BATCH_S

Runs in an environment of its own; needs mlserver and onnxruntime alone. MLServer has no runtime for ONNX: this is
the one that its documentation shows how to write.
"""

import asyncio
import sys
from pathlib import Path
from typing import Any, Final

import onnxruntime as ort
from mlserver import MLModel, MLServer, ModelSettings, Settings  # type: ignore[import-not-found]  # not installed here
from mlserver.codecs import NumpyCodec  # type: ignore[import-not-found]  # as above
from mlserver.settings import ModelParameters  # type: ignore[import-not-found]  # as above
from mlserver.types import InferenceResponse  # type: ignore[import-not-found]  # as above
from mlserver.utils import install_uvloop_event_loop  # type: ignore[import-not-found]  # as above

OUTPUTS: Final = {"encoder": {"mean": "mean", "log_var": "log_var"}, "decoder": {"mean": "reconstruction"}}
"""Outputs of each graph, and their names on the wire: those of our service."""


class Graph(MLModel):  # type: ignore[misc]  # has no types here
    """One graph, run in the event loop: for runs this short a thread costs more than it frees."""

    async def load(self) -> bool:
        """Load the graph with one thread."""
        options = ort.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        self._session = ort.InferenceSession(
            self.settings.parameters.uri, options, providers=["CPUExecutionProvider"]
        )
        self._input = self._session.get_inputs()[0].name
        self._outputs = OUTPUTS[self.name]
        return True

    async def predict(self, payload: Any) -> Any:  # noqa: ANN401 - as above
        """Run the graph on the rows of one batch."""
        rows = NumpyCodec.decode_input(payload.inputs[0])
        values = self._session.run(list(self._outputs), {self._input: rows})
        outputs = [
            NumpyCodec.encode_output(name, array)
            for name, array in zip(self._outputs.values(), values, strict=True)
        ]
        return InferenceResponse(id=payload.id, model_name=self.name, outputs=outputs)


async def serve(bundle: Path, port: int, http_port: int, *, max_requests: int, max_batch_s: float) -> None:
    """Serve until stopped. Access log and metrics, which cost time, are off."""
    settings = Settings(
        debug=False,
        host="127.0.0.1",
        grpc_port=port,
        http_port=http_port,
        metrics_endpoint=None,
        parallel_workers=0,
    )
    models = [
        ModelSettings(
            name=name,
            implementation=Graph,
            max_batch_size=max_requests,
            max_batch_time=max_batch_s,
            parameters=ModelParameters(uri=str(bundle / f"{name}.onnx")),
        )
        for name in OUTPUTS
    ]
    await MLServer(settings).start(models)


if __name__ == "__main__":
    install_uvloop_event_loop()  # as its own command line does
    asyncio.run(
        serve(
            Path(sys.argv[1]),
            int(sys.argv[2]),
            int(sys.argv[3]),
            max_requests=int(sys.argv[4]),
            max_batch_s=float(sys.argv[5]),
        )
    )
