"""Health and reflection under a policy: open, for known callers, or absent."""

import asyncio
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeAlias

import grpc

from serving.gateway.calls import Call, Context
from serving.gateway.identity import Identity
from serving.gateway.interceptors import report

Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"  # the class itself knows no parameters


class Guard(grpc.GenericRpcHandler):
    """Stands before a servicer of somebody else, and lets through whom the policy of the method allows.

    Args:
        identity: Knows callers and policies.
        add: The generated function that registers the servicer, such as `add_HealthServicer_to_server`.
        servicer: Of asyncio.
    """

    def __init__(self, identity: Identity, add: Callable[[Any, Any], None], servicer: object) -> None:
        self._identity = identity
        self._handlers: list[grpc.GenericRpcHandler] = []
        add(servicer, self)
        self._guarded: dict[str, Handler] = {}

    def add_generic_rpc_handlers(self, handlers: Iterable[grpc.GenericRpcHandler]) -> None:
        """Take what the generated function would give to a server."""
        self._handlers.extend(handlers)

    def add_registered_method_handlers(self, _service: str, _handlers: object) -> None:
        """Take the same once more; a server of asyncio does nothing with it either."""

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "Handler | None":
        """Return the handler of a method; None for one that does not exist, or that nobody may call."""
        path = handler_call_details.method.removeprefix("/")
        guarded = self._guarded.get(path)
        if guarded is not None:
            return guarded
        policy = self._identity.policy_for(path)
        found = (handler.service(handler_call_details) for handler in self._handlers)
        inner = next((handler for handler in found if handler is not None), None)
        if inner is None or policy == "disabled":
            return None
        # Only methods that exist come here, so there are few.
        self._guarded[path] = self._wrap(path, inner, is_open=policy == "open")
        return self._guarded[path]

    def _wrap(self, path: str, inner: "grpc.RpcMethodHandler[Any, Any]", *, is_open: bool) -> Handler:
        kinds: list[tuple[Any, Any]] = [
            (inner.unary_unary, grpc.unary_unary_rpc_method_handler),
            (inner.unary_stream, grpc.unary_stream_rpc_method_handler),
            (inner.stream_unary, grpc.stream_unary_rpc_method_handler),
            (inner.stream_stream, grpc.stream_stream_rpc_method_handler),
        ]
        behaviour, make = next(kind for kind in kinds if kind[0] is not None)

        async def guarded(request: object, context: Context) -> object:
            call = Call(path, context)
            try:
                if not is_open:
                    await self._identity.identify(context, call.metadata)
                return await _answer(behaviour, request, context)
            except (asyncio.CancelledError, grpc.aio.AbortError):
                raise
            except NotImplementedError:  # gRPC would show its class
                return await context.abort(grpc.StatusCode.UNIMPLEMENTED, "Method not found!")
            except Exception as error:  # noqa: BLE001 - the caller must not read what it is
                return await call.end(report(call, error))

        handler: Handler = make(guarded, inner.request_deserializer, inner.response_serializer)
        return handler


async def _answer(behaviour: Any, request: object, context: Context) -> object:  # noqa: ANN401 - a function of a servicer
    """Run a method of a servicer, whether it returns an answer, writes a stream or generates one."""
    if not inspect.isasyncgenfunction(behaviour):
        return await behaviour(request, context)
    async for response in behaviour(request, context):
        await context.write(response)
    return None
