"""What the runtime costs on a GPU: raw ONNX Runtime, our runtime class and the whole service, alternating.

    python -m tests.benchmarks.gpu [--device auto] [--bundle DIR] [--json FILE]

Needs this repository, NumPy and `onnxruntime-gpu` with CUDA (`pip install "onnxruntime-gpu[cuda,cudnn]"`).
Without a bundle it writes the graphs of a 784-512-512-32 MLP itself. What else it can measure depends on what is
installed, and it says what is missing: the runtime class needs pydantic, pyyaml and fsspec; the service grpcio and
more and, but for `--service in-process`, Ray. `--device cpu` runs the same code on the CPU provider.

Every contestant takes rows in host memory and gives outputs in host memory, except `device only`, which shows the
kernels alone. Before and after the timing each answers the same rows, and is compared with the CPU.
"""

import argparse
import asyncio
import contextlib
import datetime as dt
import importlib
import importlib.util
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tests.benchmarks import plain_onnx

Rows = NDArray[np.float32]
Run = Callable[[Rows], Sequence[Rows]]
Device = Literal["cpu", "cuda"]

DATA_SHAPE: Final = (1, 28, 28)
HIDDEN: Final = (512, 512)
LATENT_DIM: Final = 32
BATCHES: Final = (1, 8, 32, 64, 256, 512)
SERVICE_ROWS: Final = 256
SERVICE_CALLS: Final = 8
"""Calls in flight: two runs on the device, two on their way to each side of it."""
NUM_REQUESTS: Final = 8
START_TIMEOUT_S: Final = 180
TOLERANCES: Final = {"fp32": 1e-3, "tf32": 4e-3}
"""As `serving.sessions.TOLERANCES`, which this script can do without."""
WANTED: Final = {"runtime / bound": 0.95, "service / runtime": 0.7}
_CPU: Final = "CPUExecutionProvider"
_CUDA: Final = "CUDAExecutionProvider"
RUNTIME_NEEDS: Final = {"pydantic": "pydantic", "yaml": "pyyaml", "fsspec": "fsspec"}
SERVICE_NEEDS: Final = {
    "grpc": "grpcio",
    "typer": "typer",
    "rich": "rich",
    "prometheus_client": "prometheus-client",
    "cryptography": "cryptography",
    "jwt": "pyjwt[crypto]",
    "PIL": "pillow",
    "grpc_health": "grpcio-health-checking",
    "grpc_reflection": "grpcio-reflection",
}


class Graph(NamedTuple):
    """One graph and what is asked of it."""

    name: Literal["encoder", "decoder"]
    content: bytes
    input_name: str
    row_shape: tuple[int, ...]
    outputs: tuple[str, ...]

    def rows(self, number: int) -> Rows:
        """Return inputs like those it was made for, with a fixed seed."""
        random = np.random.default_rng(number)
        if self.name == "encoder":
            return random.integers(0, 256, (number, *self.row_shape)).astype(np.float32)
        return random.standard_normal((number, *self.row_shape)).astype(np.float32)


class Contestant(NamedTuple):
    """A way to run a graph; `answers` says whether outputs come back to the host."""

    name: str
    run: Run
    answers: bool = True


def own_graphs() -> list[Graph]:
    """Return the graphs of the MLP, written here."""
    make = {"encoder": plain_onnx.encoder, "decoder": plain_onnx.decoder}
    content = {name: graph(0, DATA_SHAPE, HIDDEN, LATENT_DIM) for name, graph in make.items()}
    return [
        Graph("encoder", content["encoder"], "data", DATA_SHAPE, ("mean", "log_var")),
        Graph("decoder", content["decoder"], "latents", (LATENT_DIM,), ("mean",)),
    ]


def graphs_of(folder: Path) -> list[Graph]:
    """Return the graphs of a bundle, unverified: the runtime class verifies its own."""
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {name: manifest[name] for name in ("encoder", "decoder")}
    content = {name: (folder / file["path"]).read_bytes() for name, file in files.items()}
    data, latents = tuple(manifest["data_shape"]), (manifest["latent_dim"],)
    return [
        Graph("encoder", content["encoder"], files["encoder"]["inputs"][0], data, ("mean", "log_var")),
        Graph("decoder", content["decoder"], files["decoder"]["inputs"][0], latents, ("mean",)),
    ]


def open_session(content: bytes, device: Device, precision: str, *, has_graphs: bool = False) -> Any:  # noqa: ANN401
    """Open a session as somebody without our package would, and refuse another provider than the one asked for."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    cuda = {
        "device_id": "0",
        "use_tf32": str(int(precision == "tf32")),
        "cudnn_conv_algo_search": "HEURISTIC",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": str(int(has_graphs)),
    }
    wanted = (_CUDA, cuda) if device == "cuda" else (_CPU, {})
    session = ort.InferenceSession(content, options, providers=[wanted], enable_fallback=False)
    if (actual := session.get_providers()[0]) != wanted[0]:
        raise RuntimeError(f"{wanted[0]} was asked for, ONNX Runtime chose {actual}")
    return session


def why_no_cuda() -> str | None:
    """Return why CUDA cannot be used here, or nothing if it can."""
    if _CUDA not in ort.get_available_providers():
        return "this onnxruntime has no CUDA provider: pip install onnxruntime-gpu[cuda,cudnn]"
    with contextlib.redirect_stdout(sys.stderr):
        ort.preload_dlls()
    ort.set_default_logger_severity(4)
    try:
        open_session(own_graphs()[1].content, "cuda", "fp32")
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer
        return f"{error}; is there a GPU, its driver and CUDA {ort.cuda_version}?"
    return None


def plain(graph: Graph, device: Device, precision: str) -> Run:
    """Return `InferenceSession.run` on NumPy arrays."""
    session = open_session(graph.content, device, precision)
    return lambda rows: list(session.run(list(graph.outputs), {graph.input_name: rows}))


class Bound:
    """Raw IO binding: buffers on the device for one size of batch, written and read by ONNX Runtime."""

    def __init__(self, graph: Graph, device: Device, precision: str, number: int, *, has_graphs: bool) -> None:
        self._session = open_session(graph.content, device, precision, has_graphs=has_graphs)
        names = tuple(output.name for output in self._session.get_outputs())
        everything = first_answers(graph._replace(outputs=names), number)
        self._input = _buffer((number, *graph.row_shape), device)
        buffers = {name: _buffer(values.shape, device) for name, values in zip(names, everything, strict=True)}
        self._outputs, self._is_host = [buffers[name] for name in graph.outputs], device == "cpu"
        self._binding = self._session.io_binding()
        self._binding.bind_ortvalue_input(graph.input_name, self._input)
        for name, value in buffers.items():
            self._binding.bind_ortvalue_output(name, value)
        self._options = ort.RunOptions()
        self._options.add_run_config_entry("gpu_graph_id", "1" if has_graphs else "-1")

    def __call__(self, rows: Rows) -> list[Rows]:
        """Copy in, run, copy out."""
        self._input.update_inplace(rows)
        self.run(rows)
        return [value.numpy().copy() if self._is_host else value.numpy() for value in self._outputs]

    def run(self, _rows: Rows) -> list[Rows]:
        """Run on what is in the input."""
        self._session.run_with_iobinding(self._binding, self._options)
        return []


def first_answers(graph: Graph, number: int) -> list[Rows]:
    """Return what the CPU answers: the truth that contestants are compared with."""
    return list(plain(graph, "cpu", "fp32")(graph.rows(number)))


def raw_contestants(graph: Graph, device: Device, precision: str, number: int) -> list[Contestant]:
    """Return ONNX Runtime without us: plain runs, IO binding, and IO binding without copies."""
    bound = Bound(graph, device, precision, number, has_graphs=False)
    found = [
        Contestant("plain", plain(graph, device, precision)),
        Contestant("bound", bound),
        Contestant("device only", bound.run, answers=False),
    ]
    if device == "cuda":
        found.append(Contestant("bound, graph", Bound(graph, device, precision, number, has_graphs=True)))
    return found


def is_installed(module: str) -> bool:
    """Return whether a module could be imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def missing(packages: Mapping[str, str]) -> str | None:
    """Return what to install, or nothing."""
    names = [package for module, package in packages.items() if not is_installed(module)]
    return f"pip install {' '.join(names)}" if names else None


def in_memory_bundle(graphs: Sequence[Graph]) -> Any:  # noqa: ANN401 - a class of a package that may be absent
    """Return the graphs as a bundle with the CPU's answers as known ones."""
    from serving import bundle  # noqa: PLC0415 - needs what may not be there

    encoder, decoder = graphs
    outputs = {"encoder": ("mean", "log_var"), "decoder": ("logits", "mean")}
    inputs = {"encoder": bundle.golden_data(encoder.row_shape), "decoder": bundle.golden_latents(LATENT_DIM)}
    golden = tuple(
        bundle.known_answer(graph.name, name, values)
        for graph in graphs
        for name, values in zip(
            outputs[graph.name],
            plain(graph._replace(outputs=outputs[graph.name]), "cpu", "fp32")(inputs[graph.name]),
            strict=True,
        )
    )
    manifest = bundle.Manifest(
        name="gpu-benchmark",
        version=bundle.version_of(encoder.content, decoder.content),
        created="2026-01-01T00:00:00Z",
        data_shape=encoder.row_shape,
        latent_dim=LATENT_DIM,
        opset=plain_onnx.OPSET,
        ir_version=plain_onnx.IR_VERSION,
        tool_versions={},
        dataset=bundle.Dataset(name="none", split="none", sha256="0" * 64),
        config_sha256="0" * 64,
        seed=0,
        metrics={},
        parity={},
        encoder=bundle.graph_file("encoder.onnx", encoder.content, inputs=("data",), outputs=outputs["encoder"]),
        decoder=bundle.graph_file(
            "decoder.onnx", decoder.content, inputs=("latents",), outputs=outputs["decoder"]
        ),
        golden=golden,
    )
    return bundle.Bundle(manifest, encoder.content, decoder.content)


class Ours:
    """Our runtime class on one graph, with and without CUDA graphs."""

    def __init__(self, bundle: Any, graph: Graph, device: Device, precision: str, batches: Sequence[int]) -> None:  # noqa: ANN401
        from serving.config import AcceleratorConfig  # noqa: PLC0415 - needs what may not be there
        from serving.runtime import GraphRuntime  # noqa: PLC0415

        self._runtimes = {
            name: GraphRuntime(
                bundle,
                graph.name,
                device=device,
                threads=1,
                accelerator=AcceleratorConfig.parse(
                    {"buckets": sorted(set(batches)), "precision": precision, "cuda_graphs": has_graphs}
                ),
            )
            for name, has_graphs in [("runtime", False)] + [("runtime, graphs", True)] * (device == "cuda")
        }
        self._outputs = graph.outputs
        self._pool = ThreadPoolExecutor(2)

    @property
    def reports(self) -> dict[str, Any]:
        """What loading them chose."""
        return {name: runtime.report._asdict() for name, runtime in self._runtimes.items()}

    def contestants(self) -> list[Contestant]:
        """Return each runtime by itself, and called by two threads at once, each with all of the rows."""
        found = []
        for name, runtime in self._runtimes.items():
            found.append(Contestant(name, partial(self._once, runtime)))
            found.append(Contestant(f"{name}, two at once", partial(self._twice, runtime)))
        return found

    def _once(self, runtime: Any, rows: Rows) -> list[Rows]:  # noqa: ANN401
        result: list[Rows] = runtime.run(rows, self._outputs)
        return result

    def _twice(self, runtime: Any, rows: Rows) -> list[Rows]:  # noqa: ANN401
        other = self._pool.submit(runtime.run, rows, self._outputs)
        result: list[Rows] = runtime.run(rows, self._outputs)
        other.result()
        return result


def check(graph: Graph, contestant: Contestant, rows: Rows, truth: Sequence[Rows], tolerance: float) -> None:
    """Compare a contestant's answer with the CPU's; a wrong one ends the benchmark."""
    if not contestant.answers:
        return
    for name, actual, wanted in zip(graph.outputs, contestant.run(rows), truth, strict=True):
        if not np.allclose(actual, wanted, rtol=tolerance, atol=tolerance):
            worst = float(np.abs(actual - wanted).max())
            raise SystemExit(
                f"{graph.name}: {contestant.name} of {len(rows)} rows is off by {worst:.2g} in {name}"
            )


def rows_per_s(contestant: Contestant, rows: Rows, seconds: float) -> float:
    """Run for some seconds; return rows per second."""
    count, began = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - began) < seconds:
        contestant.run(rows)
        count += 1
    return count * len(rows) * (2 if "two at once" in contestant.name else 1) / elapsed


def contest(
    graph: Graph, contestants: Sequence[Contestant], number: int, *, rounds: int, seconds: float, tolerance: float
) -> dict[str, list[float]]:
    """Measure contestants on batches of one size, in turn, each round in the other direction."""
    rows, truth = graph.rows(number), first_answers(graph, number)
    for contestant in contestants:
        for _ in range(5):
            contestant.run(rows)  # a CUDA graph is captured in the third run
        check(graph, contestant, rows, truth, tolerance)
    measured: dict[str, list[float]] = {contestant.name: [] for contestant in contestants}
    for index in range(rounds):
        for contestant in contestants[:: 1 if index % 2 == 0 else -1]:
            measured[contestant.name].append(rows_per_s(contestant, rows, seconds))
    for contestant in contestants:
        check(graph, contestant, rows, truth, tolerance)
    return measured


@contextlib.contextmanager
def service(bundle: Path, engine: str, device: Device, precision: str) -> Iterator[int]:
    """Start the service in a process of its own; stop it at the end."""
    from serving.client import VaeClient  # noqa: PLC0415 - needs what may not be there
    from serving.demo import free_port  # noqa: PLC0415

    port = free_port()
    command = [sys.executable, "-m", "serving", "up", "--bundle", str(bundle), "--engine", engine]
    command += ["--device", device, "--port", str(port), "--set", f"accelerator.precision={precision}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        with VaeClient(f"127.0.0.1:{port}") as client:
            client.get_model(timeout_s=START_TIMEOUT_S)
        yield port
    finally:
        process.terminate()
        process.wait(timeout=60)


class Served(NamedTuple):
    """Rows per second of the service, and how many answers had other bytes than the same call made alone."""

    rows_per_s: float
    num_calls: int
    num_other_bits: int


async def serve_calls(port: int, graph: Graph, seconds: float, tolerance: float) -> Served:
    """Keep calls of 256 rows in flight, and check the answers.

    Each must have the bytes of the same call made alone, or be as close to the CPU's answer as that one: where
    batches have other sizes, a GPU may round otherwise. Of those some are kept, and compared when time is over.
    """
    grpc, method = importlib.import_module("grpc"), "Encode" if graph.name == "encoder" else "Decode"
    batches = [graph.rows(SERVICE_ROWS + index)[:SERVICE_ROWS] for index in range(NUM_REQUESTS)]
    bodies = [_request(graph, rows) for rows in batches]
    others: list[tuple[int, bytes]] = []
    options = [("grpc.max_receive_message_length", -1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        call = channel.unary_unary(f"/vae.v1.VaeService/{method}")
        alone = [await call(body) for body in bodies]
        done, num_others, began = 0, 0, time.monotonic()
        stop_at = began + seconds

        async def caller(index: int) -> None:
            nonlocal done, num_others
            while time.monotonic() < stop_at:
                which = index % NUM_REQUESTS
                if (answer := await call(bodies[which])) != alone[which]:
                    num_others += 1
                    others[NUM_REQUESTS:] = [(which, answer)]
                done, index = done + 1, index + 1

        await asyncio.gather(*(caller(index) for index in range(SERVICE_CALLS)))
        elapsed = time.monotonic() - began
    truth = plain(graph, "cpu", "fp32")
    for which, answer in [*enumerate(alone), *others]:
        for values, wanted in zip(_answer(graph, answer), truth(batches[which]), strict=True):
            if not np.allclose(values, wanted, rtol=tolerance, atol=tolerance):
                raise SystemExit(f"{method}: the service's answer is off by {np.abs(values - wanted).max():.2g}")
    return Served(done * SERVICE_ROWS / elapsed, done, num_others)


def _request(graph: Graph, rows: Rows) -> bytes:
    pb = importlib.import_module("protos.vae.v1.vae_pb2")
    to_message = importlib.import_module("serving.tensors").to_message
    if graph.name == "encoder":
        request = pb.EncodeRequest(data=to_message(rows.astype(np.uint8)))
    else:
        request = pb.DecodeRequest(latents=to_message(rows))
    content: bytes = request.SerializeToString()
    return content


def _answer(graph: Graph, content: bytes) -> list[Rows]:
    pb = importlib.import_module("protos.vae.v1.vae_pb2")
    from_message = importlib.import_module("serving.tensors").from_message
    if graph.name == "encoder":
        encoded = pb.EncodeResponse.FromString(content)
        return [from_message(encoded.mean, field="mean"), from_message(encoded.log_var, field="log_var")]
    return [from_message(pb.DecodeResponse.FromString(content).reconstruction, field="reconstruction")]


def driver() -> dict[str, str]:
    """Return name, driver and memory of the GPU, as its driver says."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    names = ("device", "driver", "memory")
    return dict(zip(names, (part.strip() for part in answer.splitlines()[0].split(",")), strict=False))


def environment(device: Device) -> dict[str, Any]:
    """Return what the figures depend on."""
    return {
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "command": " ".join(sys.argv[1:]),
        "provider": _CUDA if device == "cuda" else _CPU,
        "processor": platform.processor() or platform.machine(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "onnxruntime": ort.__version__,
        "cuda_of_the_build": getattr(ort, "cuda_version", ""),
        **(driver() if device == "cuda" else {}),
    }


def measure_runtime(arguments: argparse.Namespace, device: Device, graphs: Sequence[Graph]) -> dict[str, Any]:
    """Measure raw ONNX Runtime and our runtime class on every graph and size of batch."""
    skipped = missing(RUNTIME_NEEDS)
    if skipped:
        say(f"runtime class left out: {skipped}")
    bundle = None if skipped else _bundle(arguments, graphs)
    found: dict[str, Any] = {"medians": {}, "ratios": {}, "reports": {}}
    for graph in graphs:
        ours = Ours(bundle, graph, device, arguments.precision, arguments.batches) if bundle else None
        found["reports"][graph.name] = ours.reports if ours else {}
        for number in arguments.batches:
            contestants = raw_contestants(graph, device, arguments.precision, number)
            contestants += ours.contestants() if ours else []
            measured = contest(
                graph,
                contestants,
                number,
                rounds=arguments.rounds,
                seconds=arguments.seconds,
                tolerance=TOLERANCES[arguments.precision],
            )
            key = f"{graph.name} {number}"
            found["medians"][key] = {name: statistics.median(values) for name, values in measured.items()}
            found["ratios"][key] = {
                name: statistics.median(a / b for a, b in zip(values, measured["bound"], strict=True))
                for name, values in measured.items()
            }
            shown = ", ".join(f"{name} {ratio:.2f}" for name, ratio in found["ratios"][key].items())
            say(f"{key} rows: bound {found['medians'][key]['bound']:,.0f} rows/s; / bound: {shown}")
    return found | ({"runtime_left_out": skipped} if skipped else {})


def measure_service(arguments: argparse.Namespace, device: Device, graphs: Sequence[Graph]) -> dict[str, Any]:
    """Measure the whole service with calls of 256 rows."""
    if arguments.service == "none":
        return {"left_out": "not asked for"}
    has_ray = is_installed("ray")
    engine = arguments.service if arguments.service != "auto" else "ray" if has_ray else "in-process"
    needs = missing(RUNTIME_NEEDS | SERVICE_NEEDS | ({"ray": "ray[serve]"} if engine == "ray" else {}))
    if needs:
        say(f"service left out: {needs}")
        return {"left_out": needs}
    with tempfile.TemporaryDirectory() as folder:
        place = arguments.bundle or Path(folder) / "bundle"
        if arguments.bundle is None:
            write = importlib.import_module("serving.bundle").write
            made = in_memory_bundle(graphs)
            write(place, manifest=made.manifest, encoder=made.encoder, decoder=made.decoder, extra={})
        found: dict[str, Any] = {"engine": engine, "calls": {}, "rows_per_s": {}, "ratios": {}}
        bundle = _bundle(arguments, graphs)
        with service(place, engine, device, arguments.precision) as port:
            for graph in graphs:
                ours = Ours(bundle, graph, device, arguments.precision, [SERVICE_ROWS]).contestants()[0]
                rounds = [_served_and_run(arguments, port, graph, ours) for _ in range(arguments.rounds)]
                served = [each for each, _ in rounds]
                found["rows_per_s"][graph.name] = statistics.median(each.rows_per_s for each in served)
                found["ratios"][graph.name] = statistics.median(each.rows_per_s / alone for each, alone in rounds)
                found["calls"][graph.name] = {
                    "answered": sum(each.num_calls for each in served),
                    "other_bits_than_alone": sum(each.num_other_bits for each in served),
                }
    return found


def _served_and_run(
    arguments: argparse.Namespace, port: int, graph: Graph, runtime: Contestant
) -> tuple[Served, float]:
    """Measure the service, and right after it the runtime class in this process: one round of the two."""
    seconds = max(arguments.seconds, 1.0)
    served = asyncio.run(serve_calls(port, graph, seconds, TOLERANCES[arguments.precision]))
    return served, rows_per_s(runtime, graph.rows(SERVICE_ROWS), seconds)


def verdicts(report: dict[str, Any]) -> list[str]:
    """Return the ratios at 256 rows, and on a GPU whether they are those to reach."""
    lines = []
    for name in ("encoder", "decoder"):
        key = f"{name} {SERVICE_ROWS}"
        if "runtime" not in report["ratios"].get(key, {}):
            continue
        figures = {"runtime / bound": report["ratios"][key]["runtime"]}
        if served := report["service"].get("ratios", {}).get(name):
            figures["service / runtime"] = served
        for figure, value in figures.items():
            wanted = f"wanted {WANTED[figure]}: {'reached' if value >= WANTED[figure] else 'NOT reached'}"
            said = wanted if report["environment"]["provider"] == _CUDA else "no number to reach on a CPU"
            lines.append(f"{key} rows: {figure} {value:.2f}, {said}")
    return lines


def say(text: str) -> None:
    """Write a line at once; rich may not be there."""
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def _bundle(arguments: argparse.Namespace, graphs: Sequence[Graph]) -> Any:  # noqa: ANN401
    if arguments.bundle is None:
        return in_memory_bundle(graphs)
    return importlib.import_module("serving.bundle").read(str(arguments.bundle))


def _buffer(shape: tuple[int, ...], device: Device) -> Any:  # noqa: ANN401
    return ort.OrtValue.ortvalue_from_shape_and_type(shape, np.float32, device, 0)


def choose_device(asked: str) -> Device:
    """Return where to run; say why not on CUDA."""
    if asked == "cpu":
        return "cpu"
    reason = why_no_cuda()
    if reason is None:
        return "cuda"
    if asked == "cuda":
        raise SystemExit(f"CUDA cannot be used: {reason}")
    say(f"CUDA skipped: {reason}")
    return "cpu"


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="where to run")
    parser.add_argument("--precision", choices=sorted(TOLERANCES), default="fp32", help="arithmetic on CUDA")
    parser.add_argument("--bundle", type=Path, help="folder of a bundle; without one an MLP is made")
    parser.add_argument("--batches", type=int, nargs="+", default=list(BATCHES), help="rows per run")
    parser.add_argument("--rounds", type=int, default=5, help="alternating rounds; medians are shown")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of one measurement")
    parser.add_argument("--service", choices=["auto", "ray", "in-process", "none"], default="auto")
    parser.add_argument("--json", type=Path, help="file for the record")
    arguments = parser.parse_args(argv)
    device = choose_device(arguments.device)
    graphs = graphs_of(arguments.bundle) if arguments.bundle else own_graphs()
    report = {"environment": environment(device), "precision": arguments.precision if device == "cuda" else "fp32"}
    report |= measure_runtime(arguments, device, graphs)
    report["service"] = measure_service(arguments, device, graphs)
    report["verdicts"] = verdicts(report)
    say("\n".join(report["verdicts"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
