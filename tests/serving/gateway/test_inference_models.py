"""The models of the Open Inference Protocol: their description follows the configuration and the bundle."""

import numpy as np
import pytest

from protos.inference import inference_pb2 as pb
from serving.bundle import Bundle
from serving.config import ServingConfig
from serving.gateway.inference_models import Model, models
from serving.gateway.inference_parameters import DEFAULTS
from serving.gateway.operations import Operations
from serving.tickets import Ticket
from tests.serving.harness import PuppetEngine

NEVER = float("inf")


@pytest.fixture
async def made(small: Bundle, config: ServingConfig) -> dict[str, Model]:
    """Return the models on an engine that answers at once."""
    return models(Operations(PuppetEngine(small.manifest), small.manifest, config))


async def test_the_models_are_in_order(made: dict[str, Model]) -> None:
    """Each is known by its own name, in alphabetical order, as RepositoryIndex lists them."""
    assert [(name, model.name) for name, model in made.items()] == [
        ("decoder", "decoder"),
        ("encoder", "encoder"),
        ("prior", "prior"),
    ]


@pytest.mark.parametrize("name", ["decoder", "encoder", "prior"])
async def test_a_model_returns_what_it_describes(made: dict[str, Model], name: str) -> None:
    """Names and shapes of the outputs are those of the metadata, for any number of rows."""
    model = made[name]
    described = {output.name: list(output.shape[1:]) for output in model.metadata().outputs}
    for num_rows in (1, 3):
        rows = np.zeros((num_rows, *model.input.row_shape), np.uint64 if name == "prior" else np.float32)
        answer = await model.run(rows, DEFAULTS, Ticket(NEVER))
        assert {key: [num_rows, *described[key]] for key in described} == {
            key: list(values.shape) for key, values in answer.outputs.items()
        }
        assert (answer.seed is not None) == (name == "prior")


@pytest.mark.parametrize(
    ("overrides", "graph", "count", "kind"),
    [
        ([], "encoder", 1, pb.ModelInstanceGroup.KIND_CPU),
        (["device=cuda", "encoder.min_replicas=3", "encoder.max_replicas=4"], "encoder", 1,
         pb.ModelInstanceGroup.KIND_GPU),
        (["engine=ray", "encoder.min_replicas=3", "encoder.max_replicas=4"], "encoder", 3,
         pb.ModelInstanceGroup.KIND_CPU),
        (["engine=ray", "decoder.min_replicas=2", "decoder.max_replicas=2"], "prior", 2,
         pb.ModelInstanceGroup.KIND_CPU),
    ],
)  # fmt: skip
async def test_the_configuration_says_where_a_graph_runs(
    made: dict[str, Model],
    config: ServingConfig,
    overrides: list[str],
    graph: str,
    count: int,
    kind: pb.ModelInstanceGroup.Kind.ValueType,
) -> None:
    """The prior runs the decoder; replicas are counted where there are replicas."""
    found = made[graph].config(config.override(overrides), max_rows=2**40)
    assert [(group.count, group.kind) for group in found.instance_group] == [(count, kind)]
    assert found.max_batch_size == 2**31 - 1
    assert found.dynamic_batching.max_queue_delay_microseconds == 10_000
