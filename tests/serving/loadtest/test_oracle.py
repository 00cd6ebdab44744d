"""The oracle and both protocols against the service itself: the right answers are what it answers, bit by bit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from serving import bundle as bundles
from serving.bundle import Bundle
from serving.loadtest.checks import difference
from serving.loadtest.dialects import DIALECTS, ProtocolName
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.errors import BadWorkload
from serving.loadtest.oracle import Oracle
from serving.loadtest.preparation import ask_facts
from serving.loadtest.workload import METHODS, Operation, contents
from serving.standalone import in_process
from tests.bundles import LikelihoodName, small_bundle
from tests.serving.harness import settings

SHARED = ("encode", "decode", "sample")
OPERATIONS = [
    *(("vae", Operation.parse(f"{method}:{rows}")) for method in METHODS for rows in (2, 5)),
    *(("oip", Operation.parse(f"{method}:{rows}")) for method in SHARED for rows in (1, 5)),
]


@pytest.fixture(scope="module")
def oracle(small: Bundle) -> Oracle:
    """Return the oracle of the small bundle."""
    return Oracle(small)


@pytest.mark.parametrize(("protocol", "operation"), OPERATIONS, ids=str)
async def test_the_service_answers_what_the_graphs_give(
    service: object, oracle: Oracle, protocol: ProtocolName, operation: Operation
) -> None:
    """Every operation, over the wire, by both protocols: no tolerance."""
    endpoint = Endpoint(target=f"127.0.0.1:{service.port}")  # type: ignore[attr-defined]  # the fixture's server
    facts = await ask_facts(endpoint, protocol, timeout_s=5)
    asked = contents(operation, facts, seed=7, index=3)
    dialect = DIALECTS[protocol]
    channel = endpoint.channel()
    call: Any = channel.unary_unary(dialect.path(operation))
    answer = await call(dialect.body(operation, asked))
    await channel.close()
    values = dialect.read(operation, answer)
    expected = oracle.answer(operation, asked)
    assert expected
    assert difference(expected, values, 0.0) is None
    rows = {name: len(value) for name, value in expected.items() if isinstance(value, np.ndarray)}
    assert set(rows.values()) == {1 if operation.method == "interpolate" else operation.rows}


@pytest.mark.parametrize("likelihood", ["gaussian", "categorical"])
async def test_scores_of_other_likelihoods(tmp_path: Path, likelihood: LikelihoodName) -> None:
    """The bound is that of the model's own likelihood."""
    folder = small_bundle(
        tmp_path / "b", likelihood=likelihood, num_levels=5 if likelihood == "categorical" else None
    )
    operation = Operation("score", 4)
    async with in_process(settings(folder)) as server:
        endpoint = Endpoint(target=f"127.0.0.1:{server.port}")
        facts = await ask_facts(endpoint, "vae", timeout_s=5)
        asked = contents(operation, facts, seed=7, index=3)
        dialect = DIALECTS["vae"]
        channel = endpoint.channel()
        call: Any = channel.unary_unary(dialect.path(operation))
        values = dialect.read(operation, await call(dialect.body(operation, asked)))
        await channel.close()
    assert difference(Oracle(bundles.read(str(folder))).answer(operation, asked), values, 0.0) is None


async def test_both_protocols_know_the_model(service: object, small: Bundle) -> None:
    """Name, digest and shapes are the bundle's, whoever is asked."""
    endpoint = Endpoint(target=f"127.0.0.1:{service.port}")  # type: ignore[attr-defined]  # as above
    for protocol in ("vae", "oip"):
        facts = await ask_facts(endpoint, protocol, timeout_s=5)
        manifest = small.manifest
        assert facts[:4] == (manifest.name, manifest.version, manifest.data_shape, manifest.latent_dim)


@pytest.mark.parametrize("method", ["score", "reconstruct", "interpolate"])
def test_what_a_protocol_lacks_is_named(method: str) -> None:
    """The Open Inference Protocol has three models."""
    with pytest.raises(BadWorkload, match="expected encode, decode, sample with --protocol oip"):
        DIALECTS["oip"].path(Operation.parse(f"{method}:2"))


@pytest.mark.parametrize("protocol", ["vae", "oip"])
def test_bytes_that_are_no_answer_are_errors(protocol: ProtocolName) -> None:
    """They are for the check to refuse, not for the load to die of."""
    with pytest.raises(ValueError, match=r"\S"):
        DIALECTS[protocol].read(Operation("encode", 1), b"\xff\xff\xff")
