"""Calls the service as the examples of tritonclient do, and compares with known answers.

    python triton.py HOST:PORT ANSWERS.npz

Prints one JSON object: the name of each check, and what went wrong in it or nothing. Needs tritonclient and NumPy
alone: its messages and ours cannot live in one process.
"""

import asyncio
import json
import queue
import sys
import traceback
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import numpy as np
from tritonclient import grpc as blocking  # type: ignore[import-not-found]  # lives in another environment
from tritonclient.grpc import aio  # type: ignore[import-not-found]  # as above
from tritonclient.utils import InferenceServerException  # type: ignore[import-not-found]  # as above

SEED = 7
OUTPUTS = {"encoder": ("mean", "log_var"), "decoder": ("reconstruction",), "prior": ("samples",)}
INPUTS = {"encoder": "data", "decoder": "latents", "prior": "row"}
DATATYPES = {"float32": "FP32", "float16": "FP16", "uint8": "UINT8", "uint64": "UINT64"}
TIMEOUT_S = 20
NUM_REQUESTS = 24

Answers = Any


def inputs(module: Any, model: str, rows: Any) -> list[Any]:  # noqa: ANN401 - tritonclient has no types
    """Return the rows as the input of a model."""
    tensor = module.InferInput(INPUTS[model], list(rows.shape), DATATYPES[rows.dtype.name])
    tensor.set_data_from_numpy(rows)
    return [tensor]


def same(result: Any, answers: Answers, model: str) -> None:  # noqa: ANN401 - as above
    """Compare a result with the known answer, byte for byte."""
    for name in OUTPUTS[model]:
        np.testing.assert_array_equal(result.as_numpy(name), answers[name])


def check_health_and_metadata(target: str, _answers: Answers) -> None:
    """As simple_grpc_health_metadata.py."""
    with blocking.InferenceServerClient(target) as client:
        assert client.is_server_live(client_timeout=TIMEOUT_S)
        assert client.is_server_ready()
        assert client.is_model_ready("encoder")
        assert not client.is_model_ready("resnet")
        server = client.get_server_metadata(as_json=True)
        assert (server["name"], "statistics" in server["extensions"]) == ("vae-serving", True)
        for model, outputs in OUTPUTS.items():
            metadata = client.get_model_metadata(model, "1", as_json=True)
            assert [output["name"] for output in metadata["outputs"]] == list(outputs)
            config = client.get_model_config(model).config
            assert config.max_batch_size > 0
            assert config.WhichOneof("scheduling_choice") == "dynamic_batching"
        try:
            client.get_model_metadata("wrong_model_name")
        except InferenceServerException as error:
            assert "Request for unknown model" in error.message()  # noqa: PT017 - no pytest here
        else:
            raise AssertionError("a model that does not exist has metadata")


def check_infer(target: str, answers: Answers) -> None:
    """As simple_grpc_infer_client.py: all outputs, some, and every option of a request."""
    with blocking.InferenceServerClient(target) as client:
        same(client.infer("encoder", inputs(blocking, "encoder", answers["data"])), answers, "encoder")
        result = client.infer(
            "encoder",
            inputs(blocking, "encoder", answers["data"]),
            model_version="1",
            outputs=[blocking.InferRequestedOutput("log_var")],
            request_id="my request",
            sequence_id=3,
            sequence_start=True,
            sequence_end=True,
            priority=2,
            timeout=10_000_000,
            client_timeout=TIMEOUT_S,
            headers={"x-request-id": "triton"},
            parameters={"output_datatype": "FP16"},
        )
        np.testing.assert_array_equal(result.as_numpy("log_var"), answers["log_var"].astype(np.float16))
        assert result.as_numpy("mean") is None
        response = result.get_response()
        assert (response.id, response.model_version) == ("my request", "1")
        assert response.parameters["model_digest"].string_param


def check_prior(target: str, answers: Answers) -> None:
    """Rows and a seed in, the samples of that seed out."""
    with blocking.InferenceServerClient(target) as client:
        order = np.array([3, 0, 2], np.uint64)
        result = client.infer("prior", inputs(blocking, "prior", order[:, None]), parameters={"seed": SEED})
        np.testing.assert_array_equal(result.as_numpy("samples"), answers["samples"][order])
        drawn = client.infer("prior", inputs(blocking, "prior", order[:, None]), parameters={"temperature": 0.5})
        assert drawn.get_response().parameters["seed"].WhichOneof("parameter_choice") == "uint64_param"


def check_types(target: str, answers: Answers) -> None:
    """FP16 and UINT8, both ways."""
    with blocking.InferenceServerClient(target) as client:
        halves = client.infer("decoder", inputs(blocking, "decoder", answers["latents"].astype(np.float16)))
        assert halves.as_numpy("reconstruction").dtype == np.float32
        options = {"output_datatype": "UINT8"}
        small = client.infer("decoder", inputs(blocking, "decoder", answers["latents"]), parameters=options)
        expected = np.rint(answers["reconstruction"] * np.float32(255)).astype(np.uint8)
        np.testing.assert_array_equal(small.as_numpy("reconstruction"), expected)


def check_async_infer(target: str, answers: Answers) -> None:
    """As simple_grpc_async_infer_client.py: callbacks, and a call that is cancelled."""
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()

    def on_done(result: Any, error: Any) -> None:  # noqa: ANN401 - tritonclient's callback
        done.put((result, error))

    with blocking.InferenceServerClient(target) as client:
        tensors = inputs(blocking, "encoder", answers["data"])
        for _ in range(NUM_REQUESTS):
            client.async_infer("encoder", tensors, on_done)
        for _ in range(NUM_REQUESTS):
            result, error = done.get(timeout=TIMEOUT_S)
            assert error is None, error
            same(result, answers, "encoder")


def check_stream(target: str, answers: Answers) -> None:
    """As simple_grpc_sequence_stream_infer_client.py: answers in order, an error between them."""
    done: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with blocking.InferenceServerClient(target) as client:
        client.start_stream(callback=lambda result, error: done.put((result, error)), stream_timeout=TIMEOUT_S)
        models = [list(OUTPUTS)[index % 3] for index in range(NUM_REQUESTS)]
        rows = {"encoder": answers["data"], "decoder": answers["latents"], "prior": answers["row"]}
        for index, model in enumerate(models):
            client.async_stream_infer(
                model,
                inputs(blocking, model, rows[model]),
                request_id=str(index),
                parameters={"seed": SEED},
                enable_empty_final_response=True,
            )
        for index, model in enumerate(models):
            result, error = done.get(timeout=TIMEOUT_S)
            assert error is None, error
            same(result, answers, model)
            response = result.get_response()
            assert response.id == str(index)
            assert response.parameters["triton_final_response"].bool_param
        client.async_stream_infer("resnet", inputs(blocking, "encoder", answers["data"]))
        result, error = done.get(timeout=TIMEOUT_S)
        assert result is None
        assert "Request for unknown model: 'resnet' is not found" in error.message()
        client.async_stream_infer("encoder", inputs(blocking, "encoder", answers["data"]))
        result, error = done.get(timeout=TIMEOUT_S)
        assert error is None, error
        same(result, answers, "encoder")
        client.stop_stream()


async def _aio(target: str, answers: Answers) -> None:
    """As simple_grpc_aio_infer_client.py and simple_grpc_aio_sequence_stream_infer_client.py."""
    async with aio.InferenceServerClient(target) as client:
        assert await client.is_server_live()
        assert await client.is_server_ready()
        assert await client.is_model_ready("prior")
        tensors = inputs(aio, "encoder", answers["data"])
        results = await asyncio.gather(*(client.infer("encoder", tensors) for _ in range(NUM_REQUESTS)))
        for result in results:
            same(result, answers, "encoder")
        assert (await client.get_inference_statistics("encoder")).model_stats[0].inference_count > 0

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for index in range(NUM_REQUESTS):
                rows = inputs(aio, "prior", answers["row"])
                yield {
                    "model_name": "prior",
                    "inputs": rows,
                    "request_id": str(index),
                    "parameters": {"seed": SEED},
                }

        index = 0
        async for result, error in client.stream_infer(requests(), stream_timeout=TIMEOUT_S):
            assert error is None, error
            same(result, answers, "prior")
            assert result.get_response().id == str(index)
            index += 1
        assert index == NUM_REQUESTS


def check_asyncio(target: str, answers: Answers) -> None:
    """Calls and streams of the asyncio client."""
    asyncio.run(_aio(target, answers))


def check_statistics_and_index(target: str, answers: Answers) -> None:
    """As simple_grpc_model_control.py and the statistics of the example clients."""
    with blocking.InferenceServerClient(target) as client:

        def count() -> tuple[int, int]:
            (found,) = client.get_inference_statistics("decoder", "1").model_stats
            return found.inference_stats.success.count, found.inference_count

        before = count()
        client.infer("decoder", inputs(blocking, "decoder", answers["latents"]))
        assert count() == (before[0] + 1, before[1] + len(answers["latents"]))
        assert len(client.get_inference_statistics(as_json=True)["model_stats"]) == len(OUTPUTS)
        index = client.get_model_repository_index().models
        assert {(model.name, model.state) for model in index} == {(model, "READY") for model in OUTPUTS}


def check_errors(target: str, answers: Answers) -> None:
    """Wrong requests raise tritonclient's own exception, with the code and the words of Triton."""

    def fails(code: str, text: str, action: Callable[[], object]) -> None:
        try:
            action()
        except InferenceServerException as error:
            assert (error.status(), text in error.message()) == (f"StatusCode.{code}", True), error  # noqa: PT017 - as above
        else:
            raise AssertionError(f"expected {code}")

    good = inputs(blocking, "encoder", answers["data"])
    wide = np.zeros((1, 9), np.float32)
    with blocking.InferenceServerClient(target) as client:
        fails("NOT_FOUND", "'encoder' version 2 is not found", partial(client.infer, "encoder", good, "2"))
        fails("INVALID_ARGUMENT", "[-1,", partial(client.infer, "decoder", inputs(blocking, "decoder", wide)))
        fails("INVALID_ARGUMENT", "missing required input(s) ['latents']", partial(client.infer, "decoder", good))
        fails("UNIMPLEMENTED", "switched off", partial(client.load_model, "encoder"))
        fails("UNIMPLEMENTED", "switched off", partial(client.unload_model, "encoder"))
        fails("UNIMPLEMENTED", "", client.get_system_shared_memory_status)
        region = blocking.InferInput("data", list(answers["data"].shape), "FP32")
        region.set_shared_memory("region", answers["data"].nbytes)
        fails("INVALID_ARGUMENT", "shared memory is not served", partial(client.infer, "encoder", [region]))
        classes = [blocking.InferRequestedOutput("mean", class_count=2)]
        fails("INVALID_ARGUMENT", "classification", partial(client.infer, "encoder", good, outputs=classes))


CHECKS = {
    name.removeprefix("check_"): value for name, value in sorted(globals().items()) if name.startswith("check_")
}


def main(target: str, path: str) -> None:
    """Run every check."""
    with np.load(path) as file:
        answers = dict(file)
    report = {}
    for name, check in CHECKS.items():
        try:
            check(target, answers)
        except Exception:  # noqa: BLE001 - whatever it is belongs in the report
            report[name] = traceback.format_exc()
        else:
            report[name] = ""
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
