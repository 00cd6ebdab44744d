"""PyTriton with both graphs of a bundle.

    python run_pytriton.py BUNDLE PORT HTTP_PORT MAX_BATCH_ROWS DELAY_US

Runs in an environment of its own; needs nvidia-pytriton and onnxruntime alone. The Triton server in it has no
backend for ONNX: the graph is run by a function, as its documentation shows.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from pytriton.decorators import batch  # type: ignore[import-not-found]  # not installed here
from pytriton.model_config import DynamicBatcher, ModelConfig, Tensor  # type: ignore[import-not-found]  # as above
from pytriton.triton import Triton, TritonConfig  # type: ignore[import-not-found]  # as above

OUTPUTS: Final = {"encoder": {"mean": "mean", "log_var": "log_var"}, "decoder": {"mean": "reconstruction"}}
"""Outputs of each graph, and their names on the wire: those of our service."""


def graph(path: Path, outputs: dict[str, str]) -> tuple[ort.InferenceSession, Callable[..., dict[str, Any]]]:
    """Return a session with one thread, and the function that runs it on the rows of one batch."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    @batch  # type: ignore[untyped-decorator]  # has no types here
    def run(**inputs: Any) -> dict[str, Any]:  # noqa: ANN401 - arrays by name
        return dict(zip(outputs.values(), session.run(list(outputs), inputs), strict=True))

    return session, run


def bind(triton: Any, bundle: Path, name: str, config: Any) -> None:  # noqa: ANN401 - as above
    """Offer one graph of the bundle."""
    outputs = OUTPUTS[name]
    session, run = graph(bundle / f"{name}.onnx", outputs)
    rows = session.get_inputs()[0]
    shapes = {value.name: tuple(value.shape[1:]) for value in session.get_outputs()}
    triton.bind(
        model_name=name,
        infer_func=run,
        inputs=[Tensor(name=rows.name, dtype=np.float32, shape=tuple(rows.shape[1:]))],
        outputs=[Tensor(name=wire, dtype=np.float32, shape=shapes[output]) for output, wire in outputs.items()],
        config=config,
        strict=False,  # its checks of every answer cost time
    )


def main() -> None:
    """Serve until stopped. Metrics, which cost time, are off."""
    bundle, port, http_port, max_rows, delay_us = Path(sys.argv[1]), *map(int, sys.argv[2:])
    config = ModelConfig(max_batch_size=max_rows, batcher=DynamicBatcher(max_queue_delay_microseconds=delay_us))
    addresses = {"grpc_address": "127.0.0.1", "http_address": "127.0.0.1"}
    ports = {"grpc_port": port, "http_port": http_port}
    with Triton(config=TritonConfig(**addresses, **ports, allow_metrics=False)) as triton:
        for name in OUTPUTS:
            bind(triton, bundle, name, config)
        triton.serve()


if __name__ == "__main__":
    main()
