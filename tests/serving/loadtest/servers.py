"""Services for tests of the load tester: real grpc.aio servers that behave, or misbehave, as told."""

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from typing import Any

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection

from protos.vae.v1 import vae_pb2
from serving.loadtest.endpoint import Endpoint
from serving.loadtest.generator import Prepared, Request, Settings
from serving.loadtest.workload import Operation

Handler = Callable[[bytes, Any], Awaitable[bytes]]

BODY = b"a request"
ANSWER = vae_pb2.EncodeResponse(model_version="its answer").SerializeToString()
OPERATION = Operation("encode", 1)
MODEL = vae_pb2.GetModelResponse(name="puppet", model_version="0" * 12, data_shape=[1, 4, 4], latent_dim=2)


@contextlib.asynccontextmanager
async def serving(handler: Handler) -> AsyncIterator[Endpoint]:
    """Run a server whose every method, but for health, is one function of the request's bytes and the context."""

    class Methods(grpc.GenericRpcHandler):
        def service(self, details: Any) -> Any:  # noqa: ANN401 - of gRPC
            if details.method.startswith("/grpc.health"):  # not implemented: gRPC takes it for healthy
                return None
            return grpc.unary_unary_rpc_method_handler(handler)

    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    server.add_generic_rpc_handlers((Methods(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Endpoint(target=f"127.0.0.1:{port}")
    finally:
        await server.stop(0)


def settings(deadline_s: float = 5.0, requests: Sequence[Request] = ()) -> Settings:
    """Return settings of one operation whose right answer is `ANSWER`."""
    workload = [Prepared(OPERATION, 1.0, list(requests) or [Request(BODY, ANSWER)])]
    return Settings(
        protocol="vae", workload=workload, deadline_s=deadline_s, tolerance=0.0, num_channels=2, seed=1
    )


@contextlib.asynccontextmanager
async def silent() -> AsyncIterator[Endpoint]:
    """Run a server that speaks HTTP/2, takes every request, and never ends one: no gRPC library would do that."""
    writers: list[asyncio.StreamWriter] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers.append(writer)
        connection = H2Connection(H2Configuration(client_side=False))
        connection.initiate_connection()
        with contextlib.suppress(OSError):
            writer.write(connection.data_to_send())
            while received := await reader.read(2**16):
                connection.receive_data(received)
                writer.write(connection.data_to_send())

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield Endpoint(target=f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    finally:
        server.close()
        for writer in writers:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


@contextlib.contextmanager
def in_thread(server: Callable[[], contextlib.AbstractAsyncContextManager[Endpoint]]) -> Iterator[Endpoint]:
    """Run a server on an event loop of its own, beside a test that blocks."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def wait(coroutine: Any) -> Any:  # noqa: ANN401 - the result of whatever is awaited
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(30)

    context = server()
    try:
        endpoint = wait(context.__aenter__())
        try:
            yield endpoint
        finally:
            wait(context.__aexit__(None, None, None))
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


class Capacity:
    """A server of `num_slots` places, each busy for `service_s` per call, with a queue in front of them."""

    def __init__(self, num_slots: int, service_s: float) -> None:
        self._slots, self._service_s = asyncio.Semaphore(num_slots), service_s

    async def answer(self, body: bytes, _context: object) -> bytes:
        """Wait for a place, keep it, answer; say what is served to who asks with an empty request: GetModel."""
        if not body:
            return MODEL.SerializeToString()
        async with self._slots:
            await asyncio.sleep(self._service_s)
        return ANSWER
