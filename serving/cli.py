"""The command line of the service.

Exit codes: 0 done, 1 the service answered with an error or cannot be reached, 2 the command, configuration or
bundle is wrong, 130 interrupted.
"""

import asyncio
import contextlib
import dataclasses
import functools
import inspect
import json
import math
import os
import signal
import ssl
import sys
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar, cast, get_type_hints

import grpc
import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from serving import config as configuration
from serving import demo, event_loop, logs, pictures
from serving.client import (
    Bound,
    CallOptions,
    Decoded,
    Encoded,
    EncodeOptions,
    Interpolation,
    Model,
    Observation,
    ObservationOptions,
    OutputType,
    Sampled,
    SampledChunk,
    SampleOptions,
    Scored,
    ScoreOptions,
    VaeClient,
    VaeError,
)
from serving.config import GatewayConfig, ServingConfig, address_of
from serving.errors import StartupError
from serving.fleet_command import top
from serving.gateway.credentials import is_loopback
from serving.keys_command import keys_app
from serving.load_command import load, load_compare
from serving.loadtest.endpoint import Endpoint
from serving.plan_command import plan
from serving.typed_config import ConfigError

DEFAULT_TARGET: Final = "localhost:50051"
EXIT_CALL_FAILED: Final = 1
EXIT_WRONG: Final = 2
EXIT_INTERRUPTED: Final = 130
KEY_VARIABLE: Final = "VAE_API_KEY"
_MAX_SHOWN: Final = 64
_NUM_ANOMALIES: Final = 5
_PANEL: Final = "Connection"

IMAGE_RANK: Final = 4
"""Dimensions of a row of images: (n, 1, height, width)."""

T = TypeVar("T")
OptionsT = TypeVar("OptionsT", EncodeOptions, ObservationOptions, SampleOptions, ScoreOptions)

out = Console()
err = Console(stderr=True)
app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Serve a variational autoencoder over gRPC, and call it."
)
app.add_typer(keys_app, name="keys")

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
Out = Annotated[Path | None, typer.Option(help="File to write: .npy holds arrays, .npz several, .png a picture.")]
Seed = Annotated[int | None, typer.Option(help="Seed; chosen by the service if absent.")]
Input = Annotated[Path, typer.Argument(help="File of rows, .npy.")]


def _option(*names: str, **settings: Any) -> Any:  # noqa: ANN401 - typer's own types
    return typer.Option(*names, rich_help_panel=_PANEL, **settings)


@dataclasses.dataclass(frozen=True)
class Connection:
    """How a command reaches the service: options that all client commands share.

    Secrets come from files or the environment: whoever lists the processes of a machine reads their command lines.
    """

    target: Annotated[str, _option(help="Address of the service.")] = DEFAULT_TARGET
    timeout: Annotated[float, _option(help="Deadline of a call, seconds.")] = 10.0
    priority: Annotated[int | None, _option(min=1, max=3, help="3 lets others go first.")] = None
    tls: Annotated[bool, _option("--tls", help="Speak TLS; --ca and --cert imply it.")] = False
    ca: Annotated[Path | None, _option(help="Authorities that sign the service's certificate, PEM.")] = None
    cert: Annotated[Path | None, _option(help="Own certificate for mutual TLS, PEM.")] = None
    key: Annotated[Path | None, _option(help="Private key of --cert, PEM.")] = None
    api_key_file: Annotated[
        Path | None, _option(help=f"File that holds an API key. Without it, the variable {KEY_VARIABLE} counts.")
    ] = None
    token_file: Annotated[
        Path | None, _option(help="File that holds a JSON Web Token; read again at each call.")
    ] = None

    def open(self) -> VaeClient:
        """Return a client.

        Raises:
            ConfigError: If the options do not fit together, or a file is not what it should be.
        """
        if self.api_key_file and self.token_file:
            raise ConfigError("give --api-key-file or --token-file, not both")
        token: Callable[[], str] | None = None
        api_key: str | None = None
        if self.token_file:
            token = functools.partial(_secret, self.token_file)
            token()
        elif self.api_key_file:
            api_key = _secret(self.api_key_file)
        else:
            api_key = os.environ.get(KEY_VARIABLE) or None
        credentials = self._credentials()
        try:
            return VaeClient(
                self.target, timeout_s=self.timeout, credentials=credentials, api_key=api_key, token=token
            )
        except ValueError as error:
            raise ConfigError(f"--target {self.target}: {error}") from None

    def endpoint(self, *, retries: bool) -> Endpoint:
        """Return what other processes need to open channels of their own; `open` first says what is wrong."""
        ca, cert, key = (path.read_bytes() if path else None for path in (self.ca, self.cert, self.key))
        api_key = _secret(self.api_key_file) if self.api_key_file else os.environ.get(KEY_VARIABLE) or None
        return Endpoint(
            target=self.target,
            is_tls=bool(self.tls or self.ca or self.cert),
            ca=ca,
            certificate=cert,
            private_key=key,
            api_key=None if self.token_file else api_key,
            token_file=self.token_file,
            priority=self.priority,
            retries=retries,
        )

    @property
    def options(self) -> CallOptions:
        """What goes with each call."""
        return {} if self.priority is None else {"priority": cast("Literal[1, 2, 3]", self.priority)}

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if bool(self.cert) != bool(self.key):
            raise ConfigError("--cert and --key go together")
        if not (self.tls or self.ca or self.cert):
            return None
        # gRPC takes any bytes and then fails to connect without a reason; this reads the files to find one.
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        ca, cert, key = (path.read_bytes() if path else None for path in (self.ca, self.cert, self.key))
        try:
            if self.ca:
                context.load_verify_locations(self.ca)
        except ssl.SSLError:
            raise ConfigError(f"--ca {self.ca}: holds no certificates in PEM") from None
        try:
            if self.cert:
                context.load_cert_chain(self.cert, self.key, password="")
        except ssl.SSLError:
            raise ConfigError(f"--cert {self.cert} --key {self.key}: no certificate and its key in PEM") from None
        return grpc.ssl_channel_credentials(ca, key, cert)


def connected(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of `Connection`, in place of its parameter `connection`."""
    own = inspect.signature(command)
    kinds = get_type_hints(Connection, include_extras=True)
    options = [
        inspect.Parameter(
            field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=kinds[field.name]
        )
        for field in dataclasses.fields(Connection)
    ]

    @functools.wraps(command)
    def run_connected(**values: Any) -> None:  # noqa: ANN401 - whatever the options hold
        given = {field.name: values.pop(field.name) for field in dataclasses.fields(Connection)}
        command(connection=Connection(**given), **values)

    kept = [
        parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in own.parameters.values()
        if parameter.name != "connection"
    ]
    run_connected.__signature__ = own.replace(parameters=[*kept, *options])  # type: ignore[attr-defined]  # typer reads it
    return run_connected


def _secret(path: Path) -> str:
    """Return the one word that a file holds. Its text is never shown.

    Raises:
        ConfigError: If it cannot be read, or holds anything else.
    """
    try:
        words = path.read_text("ascii").split()
    except (OSError, ValueError):
        raise ConfigError(f"{path}: cannot be read as a key or token") from None
    if len(words) != 1:
        raise ConfigError(f"{path}: expected one key or token, found {len(words)} words")
    return words[0]


app.command()(connected(load))
app.command()(load_compare)
app.command()(plan)
app.command()(top)


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
        event_loop.run(_up_in_process(settings))
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
    gpu = settings.bucketed_accelerator()
    graphs = [
        GraphRuntime(verified, graph, device=settings.device, threads=1, accelerator=gpu)
        for graph in ("encoder", "decoder")
    ]
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
@connected
def status(
    connection: Connection,
    metrics: Annotated[str | None, typer.Option(help="Also show all processes: a gateway's metrics.")] = None,
    as_json: AsJson = False,
) -> None:
    """Say whether the service is healthy and what it serves; exit code 1 if it is not."""
    with connection.open() as client:
        model = client.get_model(**connection.options)
        _print(_facts(model), as_json=as_json, title=f"{connection.target} is SERVING")
    if metrics is not None:
        top(metrics, once=True, as_json=as_json)


@app.command()
@connected
def encode(
    connection: Connection,
    data: Input,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npz.")] = None,
    num_latents: Annotated[int, typer.Option(help="Draws from each posterior.")] = 0,
    seed: Seed = None,
) -> None:
    """Encode rows of data (n, *data_shape): uint8 in 255ths, or floats in [0, 1]."""
    _check_out(out_file, ".npz")
    rows = _load(data)
    with connection.open() as client:

        def call(part: NDArray[Any], first_row: int, part_seed: int | None) -> Encoded:
            options: EncodeOptions = {"num_latents": num_latents, "first_row": first_row}
            return client.encode(part, **_complete(options, connection, part_seed))

        parts = _in_parts(client, rows, call, seed, draws=max(1, num_latents))
    arrays = {"mean": _join(parts, "mean"), "log_var": _join(parts, "log_var")}
    if num_latents:
        arrays["latents"] = _join(parts, "latents")
    _deliver(arrays, out_file, {"model_version": parts[0].model_version, "seed": parts[0].seed})


@app.command()
@connected
def decode(
    connection: Connection,
    latents: Input,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npy, .npz or .png.")] = None,
    observation: Annotated[Observation, typer.Option(help="mean or sample.")] = "mean",
    output_type: Annotated[OutputType, typer.Option(help="float32, float16 or uint8.")] = "float32",
    seed: Seed = None,
) -> None:
    """Decode rows of latents (n, latent_dim)."""
    _check_out(out_file, ".npy", ".npz", ".png")
    rows = _load(latents)
    with connection.open() as client:
        options: ObservationOptions = {"observation": observation, "output_type": output_type}
        _complete(options, connection, seed)
        _reconstruct_in_parts(client, client.decode, rows, options, out_file)


@app.command()
@connected
def reconstruct(
    connection: Connection,
    data: Input,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npy, .npz or .png.")] = None,
    observation: Annotated[Observation, typer.Option(help="mean or sample.")] = "mean",
    output_type: Annotated[OutputType, typer.Option(help="float32, float16 or uint8.")] = "float32",
    seed: Seed = None,
) -> None:
    """Encode rows of data and decode the means of their posteriors."""
    _check_out(out_file, ".npy", ".npz", ".png")
    rows = _load(data)
    with connection.open() as client:
        options: ObservationOptions = {"observation": observation, "output_type": output_type}
        _complete(options, connection, seed)
        _reconstruct_in_parts(client, client.reconstruct, rows, options, out_file)


@app.command()
@connected
def sample(
    connection: Connection,
    num: Annotated[
        int, typer.Option(help="Samples to draw; they come as a stream above the limit of one call.")
    ] = 16,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npy, .npz or .png.")] = None,
    temperature: Annotated[float, typer.Option(help="Standard deviation of the latents, in [0, 10].")] = 1.0,
    observation: Annotated[Observation, typer.Option(help="mean or sample.")] = "mean",
    output_type: Annotated[OutputType, typer.Option(help="float32, float16 or uint8.")] = "float32",
    seed: Seed = None,
) -> None:
    """Draw new data from the prior."""
    _check_out(out_file, ".npy", ".npz", ".png")
    options: SampleOptions = {
        "observation": observation,
        "output_type": output_type,
        "temperature": temperature,
    }
    _complete(options, connection, seed)
    parts: Sequence[Sampled | SampledChunk]
    with connection.open() as client:
        if num <= client.get_model(**connection.options).limits["max_rows"]:
            parts = [client.sample(num, **options)]
        else:
            parts = list(client.sample_stream(num, progress=True, **options))
    facts = {"model_version": parts[0].model_version, "seed": parts[0].seed}
    _deliver({"samples": _join(parts, "samples")}, out_file, facts)


@app.command()
@connected
def score(
    connection: Connection,
    data: Input,
    out_file: Annotated[
        Path | None, typer.Option("--out", help="File to write: .npy the scores, .npz all.")
    ] = None,
    bound: Annotated[Bound, typer.Option(help="elbo or importance-weighted.")] = "elbo",
    num_latents: Annotated[int, typer.Option(help="Draws from each posterior; more say more.")] = 1,
    seed: Seed = None,
) -> None:
    """Bound log p(x) of rows of data from below, in nats; name the rows that are most unusual."""
    _check_out(out_file, ".npy", ".npz")
    rows = _load(data)
    with connection.open() as client:

        def call(part: NDArray[Any], first_row: int, part_seed: int | None) -> Scored:
            options: ScoreOptions = {"bound": bound, "num_latents": num_latents, "first_row": first_row}
            return client.score(part, **_complete(options, connection, part_seed))

        parts = _in_parts(client, rows, call, seed, draws=max(1, num_latents))
    arrays = {name: _join(parts, name) for name in ("score", "log_likelihood", "kl")}
    scores = arrays["score"]
    lowest = np.argsort(scores, kind="stable")[:_NUM_ANOMALIES]
    facts = {
        "model_version": parts[0].model_version,
        "seed": parts[0].seed,
        "mean_score": round(float(scores.mean(dtype=np.float64)), 4),
        "most_anomalous": [{"row": int(row), "score": round(float(scores[row]), 4)} for row in lowest],
    }
    _deliver(arrays, out_file, facts)


@app.command()
@connected
def interpolate(
    connection: Connection,
    ends: Annotated[Path, typer.Argument(help="File of two or more rows, .npy: a path from each to the next.")],
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write, .npy, .npz or .png.")] = None,
    num_steps: Annotated[int, typer.Option(help="Points on each path, both ends included.")] = 10,
    kind: Annotated[Literal["data", "latents"], typer.Option(help="What the rows are: data or latents.")] = "data",
    path: Annotated[Interpolation, typer.Option(help="linear or spherical.")] = "linear",
) -> None:
    """Decode points between consecutive rows."""
    _check_out(out_file, ".npy", ".npz", ".png")
    rows = _load(ends)
    if len(rows) < 2:  # noqa: PLR2004 - a path has two ends
        raise ConfigError(f"{ends}: a path needs two rows, this holds {len(rows)}")
    with connection.open() as client:
        result = client.interpolate(
            rows[:-1], rows[1:], num_steps, kind=kind, interpolation=path, **connection.options
        )
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
    secured, options = _security(settings.gateway)
    _tell(f"  secured: {secured}")
    program = sys.argv[0] if Path(sys.argv[0]).name == "vae-serve" else "vae-serve"  # as it was called
    for command in ("status", "sample --num 32 --seed 1 --out samples.png"):
        _tell(" ".join([f"  try: {program} {command} --target {target}", *options]))


def _security(gateway: GatewayConfig) -> tuple[str, list[str]]:
    """Return how the service is secured and who may call, and the options that a caller needs for it."""
    tls, auth = gateway.tls, gateway.auth
    transport = "plaintext on loopback" if is_loopback(gateway.host) else "plaintext, as allowed"
    ways, options = [], []
    if tls.certificate:
        transport = "mutual TLS" if tls.client_ca else "TLS"
        options.append("--ca CA.pem")
    if tls.client_ca:
        ways.append("a client certificate")
        options.append("--cert CERT.pem --key KEY.pem")
    if auth.api_keys_file or auth.api_keys_variable in os.environ:
        ways.append("an API key")
        options.append("--api-key-file FILE")
    if auth.jwt is not None:
        ways.append("a token")
        options += [] if "--api-key-file FILE" in options else ["--token-file FILE"]
    who = f"callers need {' or '.join(ways)}" if ways else "anybody may call"
    return f"{transport}; {who}", options


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


def _complete(options: OptionsT, connection: Connection, seed: int | None) -> OptionsT:
    """Add the seed and what goes with each call, where they are given."""
    if (priority := connection.options.get("priority")) is not None:
        options["priority"] = priority
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
    options: ObservationOptions,
    out_file: Path | None,
) -> None:
    """Call `decode` or `reconstruct` on all rows and deliver what comes back."""

    def call(part: NDArray[Any], first_row: int, part_seed: int | None) -> Decoded:
        options["first_row"] = first_row
        if part_seed is not None:
            options["seed"] = part_seed
        return method(part, **options)

    parts = _in_parts(client, rows, call, options.get("seed"))
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
