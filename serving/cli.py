"""The command line of the service.

Exit codes: 0 done, 1 the service answered with an error or cannot be reached, 2 the command, configuration or
bundle is wrong, 130 interrupted.
"""

import asyncio
import contextlib
import json
import math
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from serving import config as configuration
from serving import demo, logs, pictures
from serving.client import (
    Decoded,
    Encoded,
    EncodeOptions,
    Interpolation,
    Model,
    Observation,
    ObservationOptions,
    OutputType,
    Sampled,
    SampleOptions,
    VaeClient,
    VaeError,
)
from serving.config import ServingConfig, address_of
from serving.errors import StartupError
from serving.typed_config import ConfigError

DEFAULT_TARGET: Final = "localhost:50051"
EXIT_CALL_FAILED: Final = 1
EXIT_WRONG: Final = 2
EXIT_INTERRUPTED: Final = 130
_MAX_SHOWN: Final = 64

IMAGE_RANK: Final = 4
"""Dimensions of a row of images: (n, 1, height, width)."""

T = TypeVar("T")
OptionsT = TypeVar("OptionsT", EncodeOptions, ObservationOptions, SampleOptions)

out = Console()
err = Console(stderr=True)
app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Serve a variational autoencoder over gRPC, and call it."
)

Target = Annotated[str, typer.Option(help="Address of the service.")]
Timeout = Annotated[float, typer.Option(help="Deadline of a call, seconds.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path | None, typer.Option(help="File to write: .npy holds arrays, .npz several, .png a picture.")]
Seed = Annotated[int | None, typer.Option(help="Seed; chosen by the service if absent.")]
Input = Annotated[Path, typer.Argument(help="File of rows, .npy.")]


@app.command()
def up(
    bundle: Annotated[str | None, typer.Option(help="Folder or URL of the bundle.")] = None,
    engine: Annotated[str | None, typer.Option(help="ray or in-process.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on.")] = None,
    metrics_port: Annotated[int | None, typer.Option(help="Port of the Prometheus endpoint.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the configuration.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Dotted override, key=value.")] = None,
) -> None:
    """Start the service and keep it up until it is interrupted; then drain."""
    gateway = _given(host=host, port=port, metrics_port=metrics_port)
    settings = _settings(config, overrides, bundle=bundle, engine=engine, device=device, gateway=gateway)
    logs.configure()
    if settings.engine == "in-process":
        asyncio.run(_up_in_process(settings))
    else:
        _up_on_ray(settings)


@app.command()
def check(
    bundle: Annotated[str | None, typer.Option(help="Folder or URL of the bundle.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of the configuration.")] = None,
    overrides: Annotated[list[str] | None, typer.Option("--set", help="Dotted override, key=value.")] = None,
    as_json: AsJson = False,
) -> None:
    """Verify a configuration and its bundle: digests, known answers, batch independence. Starts nothing."""
    from serving import bundle as bundles  # noqa: PLC0415 - the client commands need no ONNX Runtime
    from serving.runtime import GraphRuntime  # noqa: PLC0415

    settings = _settings(config, overrides, bundle=bundle)
    verified = bundles.read(settings.bundle)
    graphs = [GraphRuntime(verified, graph, device=settings.device, threads=1) for graph in ("encoder", "decoder")]
    manifest = verified.manifest
    facts = {
        "name": manifest.name,
        "version": manifest.version,
        "data_shape": list(manifest.data_shape),
        "latent_dim": manifest.latent_dim,
        "dataset": manifest.dataset.name,
        "providers": [graph.report.provider for graph in graphs],
        "is_batch_independent": all(graph.is_batch_independent() for graph in graphs),
    }
    _print(facts, as_json=as_json, title="bundle verified")


@app.command()
def status(target: Target = DEFAULT_TARGET, timeout: Timeout = 5.0, as_json: AsJson = False) -> None:
    """Say whether the service is healthy and what it serves; exit code 1 if it is not."""
    with VaeClient(target, timeout_s=timeout) as client:
        _print(_facts(client.get_model()), as_json=as_json, title=f"{target} is SERVING")


@app.command()
def encode(
    data: Input,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npz.")] = None,
    num_latents: Annotated[int, typer.Option(help="Draws from each posterior.")] = 0,
    seed: Seed = None,
    target: Target = DEFAULT_TARGET,
    timeout: Timeout = 10.0,
) -> None:
    """Encode rows of data (n, *data_shape): uint8 in 255ths, or floats in [0, 1]."""
    _check_out(out_file, ".npz")
    rows = _load(data)
    with VaeClient(target, timeout_s=timeout) as client:

        def call(part: NDArray[Any], first_row: int, part_seed: int | None) -> Encoded:
            options: EncodeOptions = {"num_latents": num_latents, "first_row": first_row}
            return client.encode(part, **_seeded(options, part_seed))

        parts = _in_parts(client, rows, call, seed, draws=max(1, num_latents))
    arrays = {"mean": _join(parts, "mean"), "log_var": _join(parts, "log_var")}
    if num_latents:
        arrays["latents"] = _join(parts, "latents")
    _deliver(arrays, out_file, {"model_version": parts[0].model_version, "seed": parts[0].seed})


@app.command()
def decode(
    latents: Input,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npy, .npz or .png.")] = None,
    observation: Annotated[Observation, typer.Option(help="mean or sample.")] = "mean",
    output_type: Annotated[OutputType, typer.Option(help="float32, float16 or uint8.")] = "float32",
    seed: Seed = None,
    target: Target = DEFAULT_TARGET,
    timeout: Timeout = 10.0,
) -> None:
    """Decode rows of latents (n, latent_dim)."""
    _check_out(out_file, ".npy", ".npz", ".png")
    rows = _load(latents)
    with VaeClient(target, timeout_s=timeout) as client:
        _reconstruct_in_parts(client, client.decode, rows, observation, output_type, seed, out_file)


@app.command()
def reconstruct(
    data: Input,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npy, .npz or .png.")] = None,
    observation: Annotated[Observation, typer.Option(help="mean or sample.")] = "mean",
    output_type: Annotated[OutputType, typer.Option(help="float32, float16 or uint8.")] = "float32",
    seed: Seed = None,
    target: Target = DEFAULT_TARGET,
    timeout: Timeout = 10.0,
) -> None:
    """Encode rows of data and decode the means of their posteriors."""
    _check_out(out_file, ".npy", ".npz", ".png")
    rows = _load(data)
    with VaeClient(target, timeout_s=timeout) as client:
        _reconstruct_in_parts(client, client.reconstruct, rows, observation, output_type, seed, out_file)


@app.command()
def sample(
    num: Annotated[int, typer.Option(help="Samples to draw; drawn in several calls above the limit of one.")] = 16,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npy, .npz or .png.")] = None,
    temperature: Annotated[float, typer.Option(help="Standard deviation of the latents, in [0, 10].")] = 1.0,
    observation: Annotated[Observation, typer.Option(help="mean or sample.")] = "mean",
    output_type: Annotated[OutputType, typer.Option(help="float32, float16 or uint8.")] = "float32",
    seed: Seed = None,
    target: Target = DEFAULT_TARGET,
    timeout: Timeout = 10.0,
) -> None:
    """Draw new data from the prior."""
    _check_out(out_file, ".npy", ".npz", ".png")
    with VaeClient(target, timeout_s=timeout) as client:

        def call(first_row: int, num_rows: int, part_seed: int | None) -> Sampled:
            options: SampleOptions = {
                "observation": observation,
                "output_type": output_type,
                "first_row": first_row,
                "temperature": temperature,
            }
            return client.sample(num_rows, **_seeded(options, part_seed))

        limit = int(client.get_model().limits["max_rows"])
        first = call(0, min(num, limit), seed)
        later = _progress(range(limit, num, limit), "sampling")
        parts = [first, *(call(start, min(limit, num - start), first.seed) for start in later)]
    facts = {"model_version": first.model_version, "seed": first.seed}
    _deliver({"samples": _join(parts, "samples")}, out_file, facts)


@app.command()
def interpolate(
    ends: Annotated[Path, typer.Argument(help="File of two or more rows, .npy: a path from each to the next.")],
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npy, .npz or .png.")] = None,
    num_steps: Annotated[int, typer.Option(help="Points on each path, both ends included.")] = 10,
    kind: Annotated[Literal["data", "latents"], typer.Option(help="What the rows are: data or latents.")] = "data",
    path: Annotated[Interpolation, typer.Option(help="linear or spherical.")] = "linear",
    target: Target = DEFAULT_TARGET,
    timeout: Timeout = 10.0,
) -> None:
    """Decode points between consecutive rows."""
    _check_out(out_file, ".npy", ".npz", ".png")
    rows = _load(ends)
    if len(rows) < 2:  # noqa: PLR2004 - a path has two ends
        raise ConfigError(f"{ends}: a path needs two rows, this holds {len(rows)}")
    with VaeClient(target, timeout_s=timeout) as client:
        result = client.interpolate(rows[:-1], rows[1:], num_steps, kind=kind, interpolation=path)
    _deliver({"observations": result.observations}, out_file, {"model_version": result.model_version})


@app.command(name="demo")
def show_demo(
    bundle: Annotated[str, typer.Option(help="Folder or URL of the bundle.")],
    data: Annotated[Path, typer.Option(help="File of rows of data, .npy.")],
    out_dir: Annotated[Path, typer.Option("--out", help="Folder of the pictures.")] = Path("demo"),
    engine: Annotated[Literal["ray", "in-process"], typer.Option(help="Who runs the graphs.")] = "ray",
) -> None:
    """Start the service, call every method, write pictures, stop what was started."""
    settings = ServingConfig.parse({"bundle": bundle, "engine": engine, "gateway": {"port": demo.free_port()}})
    rows = _load(data)
    if len(rows) < demo.NUM_IMAGES:
        raise ConfigError(f"{data}: the demo needs {demo.NUM_IMAGES} rows, this holds {len(rows)}")
    demo.run(settings, rows, out_dir, console=out)


def _up_on_ray(settings: ServingConfig) -> None:
    from serving.app import Stopped, on_ray  # noqa: PLC0415 - the client commands need no Ray, which is slow to import

    stop = threading.Event()

    def ask_to_stop(number: int, _frame: object) -> None:
        stop.set()
        signal.signal(number, signal.SIG_DFL)  # whoever asks twice does not want to wait

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, ask_to_stop)
    with contextlib.suppress(Stopped), on_ray(settings, tell=_tell, stop=stop) as port:
        _welcome(settings, port)
        stop.wait()
    _tell("stopped")


async def _up_in_process(settings: ServingConfig) -> None:
    from serving.standalone import in_process  # noqa: PLC0415 - as above

    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with in_process(settings) as server:
        _welcome(settings, server.port)
        await stop.wait()


def _welcome(settings: ServingConfig, port: int) -> None:
    target = address_of(settings.gateway.host, port)
    _tell(f"SERVING at {target} ({settings.engine} engine); Ctrl-C drains and stops")
    program = sys.argv[0] if Path(sys.argv[0]).name == "vae-serve" else "vae-serve"  # as it was called
    _tell(f"  try: {program} status --target {target}")
    _tell(f"  try: {program} sample --num 32 --seed 1 --out samples.png --target {target}")


def _tell(line: str) -> None:
    """Print one line at once, also where the output is a pipe."""
    out.print(line, highlight=False, markup=False, soft_wrap=True)
    out.file.flush()


def _settings(path: Path | None, overrides: list[str] | None, **values: object) -> ServingConfig:
    """Return the configuration: defaults, below the file, below the options, below --set."""
    settings = configuration.load(path).merge(_given(**values)).override(overrides or [])
    if not settings.bundle:
        raise ConfigError("no bundle: give --bundle DIR, the folder that vae-train export wrote")
    return settings


def _given(**values: object) -> dict[str, object]:
    return {key: value for key, value in values.items() if value is not None}


def _load(path: Path) -> NDArray[Any]:
    """Return the rows of a .npy file; pickled objects are refused."""
    try:
        with path.open("rb") as file:
            array: NDArray[Any] = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: not a readable .npy file of numbers ({str(error)[:200]})") from None
    if array.dtype.kind not in "fiub":
        raise ConfigError(f"{path}: holds {array.dtype}, not numbers")
    if array.ndim == 0 or not array.size:
        raise ConfigError(f"{path}: holds no rows")
    return array


def _options(observation: Observation, output_type: OutputType, first_row: int) -> ObservationOptions:
    return {"observation": observation, "output_type": output_type, "first_row": first_row}


def _seeded(options: OptionsT, seed: int | None) -> OptionsT:
    if seed is not None:
        options["seed"] = seed
    return options


def _in_parts(
    client: VaeClient,
    rows: NDArray[Any],
    call: Callable[[NDArray[Any], int, int | None], T],
    seed: int | None,
    *,
    draws: int = 1,
) -> list[T]:
    """Call with as many rows as one call may have, until all are done.

    Parts draw what one call would: `call` is given its rows, the number of the first, and the seed of the first
    part. `draws` is how many rows of the limit one row takes.
    """
    limits = client.get_model().limits
    row_bytes = rows[:1].size * (1 if rows.dtype == np.uint8 else 4)
    limit = max(1, min(int(limits["max_rows"]) // draws, int(limits["max_request_bytes"]) // row_bytes))
    parts: list[T] = []
    for start in _progress(range(0, len(rows), limit), "calling"):
        parts.append(call(rows[start : start + limit], start, seed))
        seed = getattr(parts[0], "seed", None)
    return parts


def _reconstruct_in_parts(
    client: VaeClient,
    method: Callable[..., Decoded],
    rows: NDArray[Any],
    observation: Observation,
    output_type: OutputType,
    seed: int | None,
    out_file: Path | None,
) -> None:
    """Call `decode` or `reconstruct` on all rows and deliver what comes back."""

    def call(part: NDArray[Any], first_row: int, part_seed: int | None) -> Decoded:
        return method(part, **_seeded(_options(observation, output_type, first_row), part_seed))

    parts = _in_parts(client, rows, call, seed)
    facts = {"model_version": parts[0].model_version, "seed": parts[0].seed}
    _deliver({"reconstruction": _join(parts, "reconstruction")}, out_file, facts)


def _progress(steps: range, label: str) -> Iterable[int]:
    """Show a bar on a terminal when there is more than one step."""
    return track(steps, label, console=err, transient=True, disable=len(steps) < 2 or not err.is_terminal)  # noqa: PLR2004


def _join(parts: Sequence[object], name: str) -> NDArray[Any]:
    return np.concatenate([getattr(part, name) for part in parts])


def _deliver(arrays: dict[str, NDArray[Any]], path: Path | None, facts: Mapping[str, object]) -> None:
    """Write arrays where they were asked for, else print their shapes and a few values, as one JSON object."""
    summary: dict[str, object] = {key: value for key, value in facts.items() if value is not None}
    for name, array in arrays.items():
        first_row = array[0].astype(np.float64).ravel()[:_MAX_SHOWN].round(6).tolist()
        shape = {"shape": list(array.shape), "dtype": str(array.dtype)}
        summary[name] = shape if path is not None else shape | {"first_row": first_row}
    if path is not None:
        _write(path, arrays)
        summary["file"] = str(path)
    print(json.dumps(summary))  # noqa: T201 - the product of the command


def _check_out(path: Path | None, *suffixes: str) -> None:
    """Refuse a file that could not be written, before the work is done."""
    if path is None:
        return
    if path.suffix not in suffixes:
        raise ConfigError(f"--out {path}: this command writes {' or '.join(suffixes)}")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}")


def _write(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    first = next(iter(arrays.values()))
    if path.suffix == ".npz":
        np.savez(path, **arrays)  # type: ignore[arg-type]  # the stub takes a keyword of savez for an array
    elif path.suffix == ".npy":
        np.save(path, first)
    elif pictures.are_images(first.shape[-3:]):
        images = first.reshape(-1, *first.shape[-3:])
        per_row = first.shape[1] if first.ndim > IMAGE_RANK else math.ceil(math.sqrt(len(images)))
        pictures.save_grid(path, [("", images[i : i + per_row]) for i in range(0, len(images), per_row)])
    else:
        raise ConfigError(f"--out {path}: rows of shape {first.shape[1:]} are no grey images; write .npy")


def _facts(model: Model) -> dict[str, object]:
    facts = model._asdict()
    return facts | {"metrics": {name: round(value, 4) for name, value in model.metrics.items()}}


def _print(facts: dict[str, object], *, as_json: bool, title: str) -> None:
    if as_json:
        print(json.dumps(facts))  # noqa: T201 - the product of the command
        return
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in facts.items():
        shown = ", ".join(f"{key} {item:g}" for key, item in value.items()) if isinstance(value, dict) else value
        table.add_row(name, str(shown))
    out.print(table)


def run() -> int:
    """Run the command line; return the exit code. Expected errors are one line on standard error."""
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        return EXIT_INTERRUPTED
    except typer.TyperException as error:  # unknown option, value that does not parse
        return _fail(error.format_message(), EXIT_WRONG)
    except VaeError as error:  # before OSError, which a deadline is too
        return _fail(str(error), EXIT_CALL_FAILED)
    except (ConfigError, StartupError, OSError) as error:  # OSError: a file that cannot be written, and its name
        return _fail(str(error), EXIT_WRONG)
    return code if isinstance(code, int) else 0


def _fail(message: str, code: int) -> int:
    err.print(f"vae-serve: {message}", highlight=False, markup=False, soft_wrap=True)
    return code
