"""Plain Ray Serve: its own gRPC proxy in front, `@serve.batch` in each deployment.

    python -m tests.benchmarks.peers.servers.run_serve BUNDLE PORT HTTP_PORT MAX_BATCH_ROWS DELAY_S

Each graph is an application of its own, which spares a call what an ingress deployment would cost. Clients name
the application in their metadata.
"""

import logging
import os
import signal
import sys
from pathlib import Path
from typing import Final

import numpy as np
import ray
from ray import serve
from ray.serve.config import HTTPOptions, gRPCOptions
from ray.serve.schema import LoggingConfig

from protos.inference import inference_pb2 as pb
from tests.benchmarks.peers.servers.run_bare import OUTPUTS, answer, rows_of, session

SERVICER: Final = "protos.inference.inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server"
_MAX_ONGOING: Final = 256
_MIN_CPUS: Final = 4
_OBJECT_STORE_BYTES: Final = 100 * 2**20


def num_rows(requests: list[pb.ModelInferRequest]) -> int:
    """Return the rows of several requests."""
    return sum(request.inputs[0].shape[0] for request in requests)


def application(bundle: Path, name: str, *, max_rows: int, delay_s: float) -> serve.Application:
    """Return the application of one graph."""

    @serve.deployment(
        name=name, max_ongoing_requests=_MAX_ONGOING, ray_actor_options={"num_cpus": 1}, num_replicas=1
    )
    class Graph:
        def __init__(self) -> None:
            self._session = session(bundle / f"{name}.onnx")

        @serve.batch(max_batch_size=max_rows, batch_wait_timeout_s=delay_s, batch_size_fn=num_rows)
        async def _run(self, requests: list[pb.ModelInferRequest]) -> list[pb.ModelInferResponse]:
            inputs = [rows_of(request) for request in requests]
            (key,) = inputs[0]
            rows = np.concatenate([values[key] for values in inputs])
            outputs = OUTPUTS[name]
            values = self._session.run(list(outputs), {key: rows})
            ends = np.cumsum([len(each[key]) for each in inputs])[:-1]
            parts = zip(*(np.split(array, ends) for array in values), strict=True)
            return [answer(name, list(outputs.values()), list(part)) for part in parts]

        async def ModelInfer(self, request: pb.ModelInferRequest) -> pb.ModelInferResponse:  # noqa: N802 - from the proto
            response: pb.ModelInferResponse = await self._run(request)
            return response

    return Graph.bind()  # type: ignore[no-any-return,attr-defined]


def main() -> None:
    """Serve until stopped. Access log and dashboard, which cost time, are off."""
    bundle, port, http_port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    max_rows, delay_s = int(sys.argv[4]), float(sys.argv[5])
    ray.init(
        address="local",  # never a cluster that somebody else started on this machine
        logging_level=logging.ERROR,
        log_to_driver=False,
        include_dashboard=False,
        num_cpus=max(os.cpu_count() or 1, _MIN_CPUS),
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    try:
        serve.start(
            http_options=HTTPOptions(host="127.0.0.1", port=http_port),
            grpc_options=gRPCOptions(port=port, grpc_servicer_functions=[SERVICER]),
            logging_config=LoggingConfig(log_level="WARNING", enable_access_log=False),
        )
        for name in OUTPUTS:
            serve.run(
                application(bundle, name, max_rows=max_rows, delay_s=delay_s), name=name, route_prefix=f"/{name}"
            )
        signal.sigwait({signal.SIGTERM, signal.SIGINT})
    finally:
        ray.shutdown()


if __name__ == "__main__":
    # Blocked before Ray starts threads of its own, so that the signal reaches `sigwait`.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
