"""Streams of requests of the Open Inference Protocol: in order, together, bounded, and never the end of others."""

from collections.abc import AsyncIterator

import grpc
import pytest

from protos.inference import inference_pb2 as pb
from serving.bundle import Bundle
from serving.client import AsyncVaeClient
from serving.config import ServingConfig
from serving.gateway.server import GatewayServer
from tests.serving.harness import PuppetEngine, eventually, serving_with, trailers, wire
from tests.serving.inference_harness import ask, counts, infer, refused, request, stream


@pytest.fixture
async def channel(service: GatewayServer) -> AsyncIterator[grpc.aio.Channel]:
    """Return a channel to the service."""
    async with wire(service.port) as connected:
        yield connected


async def test_a_stream_answers_in_order(channel: grpc.aio.Channel, client: AsyncVaeClient, seed: int) -> None:
    """A hundred requests to three models come back in order, each with its id and the bytes that it has alone."""
    names = ["encoder", "decoder", "prior"]
    messages = [request(names[index % 3], seed=seed) for index in range(100)]
    for index, message in enumerate(messages):
        message.id = str(index)
    alone = {message.model_name: await infer(channel, message) for message in messages[:3]}
    opened = stream(channel)
    for message in messages:
        await opened.write(message)
    await opened.done_writing()
    answers = [answer.infer_response async for answer in opened]
    assert [answer.id for answer in answers] == [message.id for message in messages]
    for answer in answers:
        assert answer.parameters["triton_final_response"].bool_param
        assert list(answer.raw_output_contents) == list(alone[answer.model_name].raw_output_contents)
    sampled = await client.sample(2, seed=seed)
    assert answers[2].raw_output_contents[0] == sampled.samples.tobytes()
    assert await opened.code() is grpc.StatusCode.OK


async def test_requests_of_a_stream_run_together_and_no_more_than_allowed(
    small: Bundle, config: ServingConfig
) -> None:
    """Of ten requests four are worked on at a time: the rest stay with the caller until answers were taken."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    few = config.override(["limits.max_stream_calls=4"])
    async with serving_with(engine, small.manifest, few) as server, wire(server.port) as channel:
        opened = stream(channel)
        for _ in range(10):
            await opened.write(request("encoder"))
        await opened.done_writing()
        await eventually(lambda: server.operations.encoder.num_rows == 8)
        # Whoever reads on has had turns enough by now: a call beside the stream went through all of the server.
        await ask(channel, "ServerLive", pb.ServerLiveRequest())
        assert server.operations.encoder.num_rows == 8
        engine.is_open.set()
        assert len([answer async for answer in opened]) == 10


async def test_an_error_does_not_end_a_stream(channel: grpc.aio.Channel) -> None:
    """Between good answers stands one with the message, the id and the model, and the code that it has alone."""
    bad = request("encoder", outputs=("median",))
    bad.id = "bad"
    unknown = pb.ModelInferRequest(model_name="resnet", id="unknown")
    opened = stream(channel)
    answers = []
    for message in (request("encoder"), bad, unknown, request("decoder")):
        await opened.write(message)
        answers.append(await opened.read())
    await opened.done_writing()
    assert [bool(answer.error_message) for answer in answers] == [False, True, True, False]
    error = await refused(channel, "ModelInfer", bad)
    response = answers[1].infer_response
    assert answers[1].error_message == error.details()
    assert (response.id, response.model_name, len(response.outputs)) == ("bad", "encoder", 0)
    told = {key: value.string_param for key, value in response.parameters.items()}
    assert told == {
        "triton_final_response": "",
        "error_code": "INVALID_ARGUMENT",
        "vae-error-reason": "UNKNOWN_TENSOR",
        "vae-error-field": "outputs[0].name",
    }
    assert answers[2].infer_response.parameters["error_code"].string_param == "NOT_FOUND"
    assert await opened.code() is grpc.StatusCode.OK


async def test_a_stream_ends_with_a_status_on_request(channel: grpc.aio.Channel) -> None:
    """With `triton_grpc_error: true` the first error is the status of the stream, after the answers before it."""
    opened = stream(channel, metadata=(("triton_grpc_error", "true"),))
    for message in (request("encoder"), request("encoder", outputs=("median",)), request("encoder")):
        await opened.write(message)
    assert not (await opened.read()).error_message
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await opened.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailers(caught.value)["vae-error-field"] == "outputs[0].name"


async def test_garbage_ends_a_stream(channel: grpc.aio.Channel) -> None:
    """A message that does not parse is INVALID_ARGUMENT, after the answers to what came before it."""
    opened = stream(channel)
    await opened.write(request("encoder"))
    await opened.write(b"\xff\xff\xff")
    assert (await opened.read()).infer_response.outputs
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await opened.read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert trailers(caught.value)["vae-error-reason"] == "MALFORMED_MESSAGE"


async def test_a_cancelled_stream_leaves_nothing_behind(small: Bundle, config: ServingConfig) -> None:
    """When the caller leaves, its rows leave the queue."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        opened = stream(channel)
        for model in ("encoder", "decoder", "encoder"):
            await opened.write(request(model))
        encoder, decoder = server.operations.encoder, server.operations.decoder
        await eventually(lambda: (encoder.num_rows, decoder.num_rows) == (4, 2))
        opened.cancel()
        await eventually(lambda: (encoder.num_rows, decoder.num_rows) == (0, 0))
        assert (await counts(channel, "encoder")).inference_stats.fail.count == 2


async def test_a_request_of_a_stream_has_a_deadline_of_its_own(small: Bundle, config: ServingConfig) -> None:
    """A long stream does not give its requests more time than a call without a deadline has; it goes on."""
    engine = PuppetEngine(small.manifest)
    engine.is_open.clear()
    short = config.override(["limits.default_deadline_s=0.1"])
    async with serving_with(engine, small.manifest, short) as server, wire(server.port) as channel:
        opened = stream(channel)
        await opened.write(request("encoder"))
        answer = (await opened.read()).infer_response
        assert answer.parameters["error_code"].string_param == "DEADLINE_EXCEEDED"
        engine.is_open.set()
        await opened.write(request("decoder"))
        assert (await opened.read()).infer_response.outputs
        await opened.done_writing()


@pytest.mark.parametrize("kind", [RuntimeError, TimeoutError])
async def test_nothing_internal_leaks_from_a_stream(
    small: Bundle, config: ServingConfig, kind: type[Exception]
) -> None:
    """An unexpected exception becomes an id for the operator; a time-out inside is not the caller's deadline."""
    engine = PuppetEngine(small.manifest)
    engine.error = kind("/secret/path in EngineThing")
    async with serving_with(engine, small.manifest, config) as server, wire(server.port) as channel:
        opened = stream(channel)
        await opened.write(request("encoder"))
        answer = await opened.read()
        await opened.done_writing()
    assert "internal error" in answer.error_message
    assert answer.infer_response.parameters["error_code"].string_param == "INTERNAL"
    assert "secret" not in str(answer)
    assert "EngineThing" not in str(answer)
