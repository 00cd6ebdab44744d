"""The Open Inference Protocol, inference.GRPCInferenceService: message -> arrays -> operation -> message."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from importlib import metadata
from typing import Any, Final, TypeVar

from protos.inference import inference_pb2 as pb
from serving.config import ServingConfig
from serving.errors import DeadlineExceeded, MethodDisabled, ModelUnloaded, UnknownModel, UnsupportedType
from serving.gateway.calls import Call, Method
from serving.gateway.inference_models import VERSION, Answer, Model, models
from serving.gateway.inference_parameters import read_parameters
from serving.gateway.inference_tensors import add_output, read_outputs, read_rows
from serving.gateway.interceptors import report
from serving.gateway.operations import Operations
from serving.tensors import to_output
from serving.tickets import Ticket

NAME: Final = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].full_name

T = TypeVar("T")

_DISTRIBUTION: Final = "vae-serving"
_EXTENSIONS: Final = (
    "binary_tensor_data",
    "model_configuration",
    "parameters",
    "schedule_policy",
    "statistics",
)
_REPOSITORY: Final = "model_repository"
_CONTROL_SETTING: Final = "gateway.repository_control"
_GRPC_ERROR_KEY: Final = "triton_grpc_error"
_SHOWN: Final = 64


class InferenceService:
    """Answers the methods; each takes the request and its ticket.

    Args:
        operations: What the service does, on arrays.
        config: What ModelConfig states, and limits.
        is_ready: Whether the service answers requests now.
        count_call: Told the client of each request of a stream; may refuse it.
    """

    def __init__(
        self,
        operations: Operations,
        config: ServingConfig,
        is_ready: Callable[[], bool],
        count_call: Callable[[str], None] = lambda _client: None,
    ) -> None:
        self._config, self._limits, self._is_ready = config, config.limits, is_ready
        self._max_rows, self._digest = operations.max_rows, operations.manifest.version
        self._models, self._count_call = models(operations), count_call
        self._unloaded: set[str] = set()
        control = [_REPOSITORY] if config.gateway.repository_control else []
        self._server = pb.ServerMetadataResponse(
            name=_DISTRIBUTION, version=metadata.version(_DISTRIBUTION), extensions=[*_EXTENSIONS, *control]
        )

    async def ServerLive(self, _request: pb.ServerLiveRequest, _ticket: Ticket) -> pb.ServerLiveResponse:
        """Return that the process runs."""
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, _request: pb.ServerReadyRequest, _ticket: Ticket) -> pb.ServerReadyResponse:
        """Return whether the service answers requests now."""
        return pb.ServerReadyResponse(ready=self._is_ready())

    async def ModelReady(self, request: pb.ModelReadyRequest, _ticket: Ticket) -> pb.ModelReadyResponse:
        """Return whether a model exists and answers requests now."""
        is_known = request.name in self._models and request.version in {"", VERSION}
        return pb.ModelReadyResponse(ready=is_known and not self._why_not(request.name))

    async def ServerMetadata(
        self, _request: pb.ServerMetadataRequest, _ticket: Ticket
    ) -> pb.ServerMetadataResponse:
        """Return what the server is."""
        return self._server

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, _ticket: Ticket) -> pb.ModelMetadataResponse:
        """Return inputs, outputs and parameters of a model."""
        return self._loaded(request.name, request.version).metadata()

    async def ModelConfig(self, request: pb.ModelConfigRequest, _ticket: Ticket) -> pb.ModelConfigResponse:
        """Return how a model is run."""
        model = self._loaded(request.name, request.version)
        return pb.ModelConfigResponse(config=model.config(self._config, self._max_rows))

    async def ModelStatistics(
        self, request: pb.ModelStatisticsRequest, _ticket: Ticket
    ) -> pb.ModelStatisticsResponse:
        """Return what a model did, or what all did."""
        asked = [self._known(request.name, request.version)] if request.name else self._models.values()
        return pb.ModelStatisticsResponse(
            model_stats=[model.statistics.message(model.name, VERSION) for model in asked]
        )

    async def RepositoryIndex(
        self, request: pb.RepositoryIndexRequest, _ticket: Ticket
    ) -> pb.RepositoryIndexResponse:
        """Return the models and their states."""
        reasons = {name: self._why_not(name) for name in self._models}
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=name, version=VERSION, state="UNAVAILABLE" if reason else "READY", reason=reason
                )
                for name, reason in reasons.items()
                if not (request.ready and reason)
            ]
        )

    async def RepositoryModelLoad(
        self, request: pb.RepositoryModelLoadRequest, _ticket: Ticket
    ) -> pb.RepositoryModelLoadResponse:
        """Put a model back into service."""
        model = self._controlled("RepositoryModelLoad", request.model_name)
        for name in request.parameters:
            field, actual = f"parameters.{name[:_SHOWN]}", "an override"
            raise UnsupportedType(field, expected="the model as its bundle has it", actual=actual)
        self._unloaded.discard(model.name)
        return pb.RepositoryModelLoadResponse()

    async def RepositoryModelUnload(
        self, request: pb.RepositoryModelUnloadRequest, _ticket: Ticket
    ) -> pb.RepositoryModelUnloadResponse:
        """Take a model out of service."""
        self._unloaded.add(self._controlled("RepositoryModelUnload", request.model_name).name)
        return pb.RepositoryModelUnloadResponse()

    async def ModelInfer(self, request: pb.ModelInferRequest, ticket: Ticket) -> pb.ModelInferResponse:
        """Run a model on rows."""
        model = self._loaded(request.model_name, request.model_version)
        began = time.monotonic()
        try:
            wanted = read_outputs(request, model.outputs)
            parameters = read_parameters(request.parameters, output_types=model.outputs[0].datatypes)
            ticket.demote(model.priority)
            ticket.demote(parameters.priority)
            if request.raw_input_contents:
                rows = read_rows(request, model.input, max_rows=self._max_rows)
            else:  # number by number: millions of them would keep the event loop from others
                rows = await asyncio.to_thread(read_rows, request, model.input, max_rows=self._max_rows)
            read_at = time.monotonic()
            if parameters.timeout_s is None:
                answer = await model.run(rows, parameters, ticket)
            else:
                ticket.expires_at = min(ticket.expires_at, began + parameters.timeout_s)
                async with _until(ticket.expires_at):
                    answer = await model.run(rows, parameters, ticket)
            ran_at = time.monotonic()
            response = self._response(request, answer, wanted, parameters.output_type)
        except BaseException:  # cancelled requests count too
            model.statistics.fail(time.monotonic() - began)
            raise
        ended = time.monotonic()
        model.statistics.succeed(ticket, total_s=ended - began, input_s=read_at - began, output_s=ended - ran_at)
        return response

    async def ModelStreamInfer(
        self, requests: AsyncIterator[Any], call: Call
    ) -> AsyncGenerator[pb.ModelStreamInferResponse]:
        """Run models on a stream of requests, several at a time; answer in their order.

        A request has its place until its answer was taken, so that a caller who does not read is not read from.
        """
        room = asyncio.Semaphore(self._limits.max_stream_calls)
        answers: asyncio.Queue[asyncio.Task[pb.ModelStreamInferResponse] | None] = asyncio.Queue()

        async def read() -> None:
            try:
                async with contextlib.aclosing(requests):  # type: ignore[type-var]  # an async generator
                    await room.acquire()
                    async for request in requests:
                        answers.put_nowait(asyncio.create_task(self._answer(request, call)))
                        await room.acquire()
            finally:
                answers.put_nowait(None)

        reader = asyncio.create_task(read())
        try:
            while (answer := await answers.get()) is not None:
                yield await answer
                room.release()
            await reader  # what ended the requests, unless the caller did
        finally:
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
            left = [answer for answer in _drained(answers) if answer is not None]
            for answer in left:
                answer.cancel()
            await asyncio.gather(*left, return_exceptions=True)

    def methods(self) -> dict[str, Method]:
        """Return every method of the service by its name."""
        return {
            "ServerLive": Method(pb.ServerLiveRequest, self.ServerLive, is_small=True),
            "ServerReady": Method(pb.ServerReadyRequest, self.ServerReady, is_small=True),
            "ModelReady": Method(pb.ModelReadyRequest, self.ModelReady, is_small=True),
            "ServerMetadata": Method(pb.ServerMetadataRequest, self.ServerMetadata, is_small=True),
            "ModelMetadata": Method(pb.ModelMetadataRequest, self.ModelMetadata, is_small=True),
            "ModelInfer": Method(pb.ModelInferRequest, self.ModelInfer),
            "ModelStreamInfer": Method(pb.ModelInferRequest, bidirectional=self.ModelStreamInfer),
            "ModelConfig": Method(pb.ModelConfigRequest, self.ModelConfig, is_small=True),
            "ModelStatistics": Method(pb.ModelStatisticsRequest, self.ModelStatistics, is_small=True),
            "RepositoryIndex": Method(pb.RepositoryIndexRequest, self.RepositoryIndex, is_small=True),
            "RepositoryModelLoad": Method(pb.RepositoryModelLoadRequest, self.RepositoryModelLoad, is_small=True),
            "RepositoryModelUnload": Method(
                pb.RepositoryModelUnloadRequest, self.RepositoryModelUnload, is_small=True
            ),
        }

    def _known(self, name: str, version: str) -> Model:
        """Return a model that exists.

        Raises:
            UnknownModel: If it does not, or not in this version.
        """
        if (model := self._models.get(name)) is None:
            raise UnknownModel(model=name)
        if version and version != VERSION:
            raise UnknownModel(model=name, version=version)
        return model

    def _loaded(self, name: str, version: str) -> Model:
        """Return a model that is in service.

        Raises:
            UnknownModel: If it does not exist.
            ModelUnloaded: If an operator took it out.
        """
        model = self._known(name, version)
        if name in self._unloaded:
            raise ModelUnloaded(model=name)
        return model

    def _controlled(self, method: str, name: str) -> Model:
        if not self._config.gateway.repository_control:
            raise MethodDisabled(method=method, setting=_CONTROL_SETTING)
        return self._known(name, VERSION)

    def _why_not(self, name: str) -> str:
        """Return why a model answers no requests now; empty if it does."""
        if name in self._unloaded:
            return "unloaded"
        return "" if self._is_ready() else "the service is not ready"

    def _response(
        self, request: pb.ModelInferRequest, answer: Answer, wanted: list[str], output_type: int
    ) -> pb.ModelInferResponse:
        response = pb.ModelInferResponse(model_name=request.model_name, model_version=VERSION, id=request.id)
        response.parameters["model_digest"].string_param = self._digest
        if answer.seed is not None:
            response.parameters["seed"].uint64_param = answer.seed
        for name in wanted:
            add_output(response, name, to_output(answer.outputs[name], output_type))
        return response

    async def _answer(self, request: pb.ModelInferRequest, call: Call) -> pb.ModelStreamInferResponse:
        """Return the answer to one request of a stream, which has as long as a call without a deadline has."""
        ticket = call.make_ticket()
        ticket.expires_at = min(ticket.expires_at, time.monotonic() + self._limits.default_deadline_s)
        try:
            self._count_call(call.client)
            async with _until(ticket.expires_at):
                response = await self.ModelInfer(request, ticket)
        except Exception as error:
            if call.metadata.get(_GRPC_ERROR_KEY) == "true":
                raise
            return _failure(request, call, error)
        finally:
            call.add(ticket)
        response.parameters["triton_final_response"].bool_param = True
        return pb.ModelStreamInferResponse(infer_response=response)


@contextlib.asynccontextmanager
async def _until(expires_at: float) -> AsyncIterator[None]:
    """End what is inside at a monotonic time.

    Raises:
        DeadlineExceeded: If it has not ended by itself.
    """
    try:
        async with asyncio.timeout(expires_at - time.monotonic()) as timer:
            yield
    except TimeoutError:
        if not timer.expired():
            raise
        raise DeadlineExceeded from None


def _failure(request: pb.ModelInferRequest, call: Call, error: Exception) -> pb.ModelStreamInferResponse:
    """Return what a stream says of a request that failed: Triton's fields; code and reason as parameters."""
    status = report(call, error)
    response = pb.ModelInferResponse(
        model_name=request.model_name[:_SHOWN], model_version=request.model_version[:_SHOWN], id=request.id
    )
    response.parameters["triton_final_response"].bool_param = True
    response.parameters["error_code"].string_param = status.code.name
    for key, value in status.trailers:
        if isinstance(value, str):
            response.parameters[key].string_param = value
    return pb.ModelStreamInferResponse(error_message=status.message, infer_response=response)


def _drained(queue: "asyncio.Queue[T]") -> list[T]:
    return [queue.get_nowait() for _ in range(queue.qsize())]
