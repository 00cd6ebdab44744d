"""The benchmark of large answers: it runs, and notices an answer that is wrong."""

from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from protos.vae.v1 import vae_pb2 as pb
from serving import bundle as bundles
from serving.runtime import GraphRuntime
from serving.tensors import to_message
from tests.benchmarks import big_messages
from tests.bundles import small_bundle


def test_it_measures_every_shape_and_type(monkeypatch: pytest.MonkeyPatch) -> None:
    """With few rows and little time there is a rate for each, and uint8 moves fewer bytes for a row."""
    monkeypatch.setattr(big_messages, "SHAPES", {"1x28x28": (1, 28, 28)})
    monkeypatch.setattr(big_messages, "ROWS", {"1x28x28": (8,)})
    report = big_messages.run(0.05, 1, Console(quiet=True))
    sizes = {row["type"]: row["megabytes_per_s"] / row["rows_per_s"] for row in report["rows"]}
    assert sizes["float32"] > 3 * sizes["uint8"] > 0
    big_messages.show(report, Console(quiet=True))


def test_an_answer_that_is_not_the_graphs_is_noticed(tmp_path: Path) -> None:
    """One value off, and the run stops."""
    bundle = bundles.read(str(small_bundle(tmp_path, data_shape=(1, 4, 4), latent_dim=2)))
    graph = GraphRuntime(bundle, "decoder", device="cpu", threads=1)
    latents = np.zeros((2, 2), np.float32)
    (means,) = graph.run(latents, ["mean"])
    good = pb.DecodeResponse(reconstruction=to_message(means)).SerializeToString()
    big_messages._check(good, graph, latents, pb.DATA_TYPE_FLOAT32)  # noqa: SLF001
    bad = pb.DecodeResponse(reconstruction=to_message(means + np.float32(1e-6))).SerializeToString()
    with pytest.raises(AssertionError, match="not what the graph gives"):
        big_messages._check(bad, graph, latents, pb.DATA_TYPE_FLOAT32)  # noqa: SLF001
