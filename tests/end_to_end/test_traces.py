"""A trace goes through the processes: the caller's, the gateway's, a replica's."""

from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest

from protos.vae.v1 import vae_pb2 as pb
from serving.tensors import to_message
from tests.bundles import small_bundle
from tests.end_to_end.service import running
from tests.serving.collector import collecting

pytestmark = [pytest.mark.ray, pytest.mark.slow]

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
METADATA = (("traceparent", f"00-{TRACE}-{SPAN}-01"), ("tracestate", "congo=t61"))


def test_a_trace_crosses_to_the_replicas(tmp_path: Path) -> None:
    """By Serve's handle to the encoder, by a connection to the decoder; each process sends its own spans."""
    bundle = small_bundle(tmp_path / "small")
    requests = {
        "Encode": pb.EncodeRequest(data=to_message(np.zeros((3, 1, 4, 4), np.float32))),
        "Sample": pb.SampleRequest(num_samples=5, seed=1),
    }
    with collecting() as collector:
        chosen = ("tracing.exporter=otlp", f"tracing.endpoint={collector.endpoint}", "encoder.direct_runs=false")
        with running(bundle, *(word for choice in chosen for word in ("--set", choice))) as service:
            with grpc.insecure_channel(service.target) as channel:
                for method, request in requests.items():
                    call: Any = channel.unary_unary(f"/vae.v1.VaeService/{method}")
                    call(request.SerializeToString(), timeout=20, metadata=METADATA)
            assert service.stop() == 0  # the last spans are sent when the service drains
        for method, graph, num_rows in (("Encode", "encoder", 3), ("Sample", "decoder", 5)):
            call_span = collector.one(f"vae.v1.VaeService/{method}")
            run, computation = collector.one(f"run {graph}"), collector.one(f"onnxruntime {graph}")
            assert (call_span.trace, call_span.parent) == (TRACE, SPAN)
            assert (computation.trace, computation.parent) == (TRACE, run.id)
            assert computation.proto.trace_state == "congo=t61"
            assert computation.attributes["vae.rows"] == num_rows
            assert (run.process["service.name"], computation.process["service.name"]) == (
                "vae-gateway",
                f"vae-{graph}",
            )
            assert run.began < computation.began < computation.ended < run.ended  # one machine, one clock
