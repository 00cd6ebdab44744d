"""Before the load: clear errors within seconds, and right answers that were checked."""

import time
from collections.abc import Sequence

import pytest

from serving.bundle import Bundle
from serving.gateway.server import GatewayServer
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.errors import BadWorkload, ContentDiffers, ServiceNotReady
from serving.loadtest.generator import Prepared
from serving.loadtest.oracle import Oracle
from serving.loadtest.preparation import MAX_POOL, Checking, ask_facts, prepare
from serving.loadtest.workload import ModelFacts, parse_mix
from tests.serving.loadtest.servers import serving, silent


async def prepared(server: GatewayServer, mix: str, checking: Checking) -> Sequence[Prepared]:
    """Prepare a mix at a service."""
    endpoint = Endpoint(target=f"127.0.0.1:{server.port}")
    facts = await ask_facts(endpoint, "vae", timeout_s=5)
    return await prepare(endpoint, "vae", parse_mix(mix), facts, seed=1, timeout_s=5, checking=checking)


async def test_each_operation_has_different_requests_with_their_answers(
    service: GatewayServer, small: Bundle
) -> None:
    """Small requests have as many as the check wants; each knows the bytes and the arrays of its answer."""
    checking = Checking(expect=Oracle(small).answer)
    first, second = await prepared(service, "encode:1=1,sample:2=3", checking)
    assert (first.share, second.share) == (0.25, 0.75)
    for operation in (first, second):
        assert len({request.body for request in operation.requests}) == MAX_POOL
        assert len({request.answer for request in operation.requests}) == MAX_POOL
        assert all(request.expected for request in operation.requests)


async def test_without_a_bundle_the_answers_themselves_are_right(service: GatewayServer) -> None:
    """They were given to the same requests, made alone."""
    (only,) = await prepared(service, "decode:3", Checking())
    assert all(request.answer and not request.expected for request in only.requests)


async def test_without_checks_there_are_no_answers(service: GatewayServer) -> None:
    """Requests differ all the same."""
    (only,) = await prepared(service, "decode:3", Checking(is_on=False))
    assert len({request.body for request in only.requests}) == MAX_POOL
    assert {request.answer for request in only.requests} == {None}


async def test_an_answer_that_differs_from_the_bundle_is_told_before_any_load(
    service: GatewayServer, small: Bundle
) -> None:
    """It says by how much and what a tolerance would be; within it the test goes on."""
    oracle = Oracle(small)

    def other(operation: object, asked: object) -> dict[str, object]:
        values = oracle.answer(operation, asked)  # type: ignore[arg-type]  # as they come
        return {name: value + 1e-4 for name, value in values.items()}  # type: ignore[operator]  # arrays

    with pytest.raises(ContentDiffers, match=r"^encode:1: mean differs .*0\.0001 \(tolerance 0\), .*--tolerance"):
        await prepared(service, "encode:1", Checking(expect=other))  # type: ignore[arg-type]  # as above


async def test_more_rows_than_the_service_takes(service: GatewayServer) -> None:
    """The limit is named; nothing is sent."""
    with pytest.raises(BadWorkload, match=r"encode:1000000: expected at most \d+ rows"):
        await prepared(service, "encode:1000000", Checking())


async def test_a_request_that_the_service_refuses(service: GatewayServer) -> None:
    """What it says is what the caller reads: here a path that is too long for the limit of rows."""
    endpoint = Endpoint(target=f"127.0.0.1:{service.port}")
    facts = await ask_facts(endpoint, "vae", timeout_s=5)
    with pytest.raises(BadWorkload, match="it says INVALID_ARGUMENT: "):
        await prepare(
            endpoint,
            "vae",
            parse_mix("decode:1"),
            facts._replace(latent_dim=7),
            seed=1,
            timeout_s=5,
            checking=Checking(),
        )


async def test_no_service_is_said_within_seconds() -> None:
    """The text names the address and what went wrong."""
    began = time.monotonic()
    with pytest.raises(ServiceNotReady, match=r"127\.0\.0\.1:1: UNAVAILABLE: .*refused"):
        await ask_facts(Endpoint(target="127.0.0.1:1"), "vae", timeout_s=10)
    assert time.monotonic() - began < 6


async def test_a_silent_service_is_said_within_seconds() -> None:
    """Something listens, and says nothing."""
    async with silent() as endpoint:
        began = time.monotonic()
        with pytest.raises(ServiceNotReady, match="no answer within 3 s"):
            await ask_facts(endpoint, "vae", timeout_s=10)
        assert time.monotonic() - began < 6


async def test_a_service_that_fails_alone_is_no_service() -> None:
    """A failure without load is said, not measured."""

    async def fail(_body: bytes, _context: object) -> bytes:
        raise RuntimeError

    async with serving(fail) as endpoint:
        with pytest.raises(ServiceNotReady, match="UNKNOWN"):
            await ask_facts(endpoint, "oip", timeout_s=5)


async def test_bytes_that_are_no_answer_are_told_before_any_load() -> None:
    """A service that speaks otherwise is not measured."""

    async def strange(_body: bytes, _context: object) -> bytes:
        return b"\xff\xff"

    async with serving(strange) as endpoint:
        with pytest.raises(ContentDiffers, match=r"^encode:1: answered with what cannot be read"):
            await prepare(
                endpoint,
                "vae",
                parse_mix("encode:1"),
                ModelFacts("x", "", (1, 4, 4), 2, None),
                seed=1,
                timeout_s=5,
                checking=Checking(),
            )
