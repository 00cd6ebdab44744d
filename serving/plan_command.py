"""`vae-serve plan`: how many gateways, replicas, processors and GPUs a load needs."""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Final, Literal

import typer
from rich.console import Console
from rich.table import Table

from serving import planning
from serving.capacity import Capacity, Cost, MeasurementError
from serving.loadtest.errors import LoadTestError
from serving.loadtest.results import LoadReport
from serving.loadtest.workload import Operation, parse_mix
from serving.planning import Load, Plan
from serving.typed_config import ConfigError

_UNITS: Final = {"us": 1e-6, "ms": 1e-3, "s": 1.0}
_DEFAULT_ROWS: Final = 1


def plan(  # noqa: PLR0913 - typer: options are parameters
    *,
    rps: Annotated[float, typer.Option(help="Calls per second.")],
    p99: Annotated[str, typer.Option(help="Time in which 99 % of the calls are answered: 50ms, 0.2s.")],
    rows: Annotated[int | None, typer.Option(min=1, help="Rows in a call.")] = None,
    method: Annotated[
        str | None, typer.Option(help="encode, decode, sample, reconstruct or score. Default: encode.")
    ] = None,
    mix: Annotated[
        str | None, typer.Option(help="Instead of both: encode:1=0.4,sample:64=0.6; shares of the calls.")
    ] = None,
    headroom: Annotated[float, typer.Option(help="Most of what a tier can do that is planned for.")] = 0.7,
    measured: Annotated[
        Path | None, typer.Option(help="Measurements: JSON of `plan --save`, or the report of a load test.")
    ] = None,
    bundle: Annotated[str | None, typer.Option(help="Folder or URL of a bundle to measure here.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time to measure each graph of --bundle.")] = 3.0,
    threads: Annotated[int, typer.Option(min=1, help="Threads, and processors, of a replica of --bundle.")] = 1,
    gpu: Annotated[bool, typer.Option("--gpu", help="Replicas run on GPUs.")] = False,
    gpu_share: Annotated[float, typer.Option(min=0.01, max=1, help="Share of a GPU for a replica.")] = 0.5,
    seed: Annotated[int, typer.Option(help="Seed of the simulated arrivals.")] = 0,
    save: Annotated[Path | None, typer.Option(help="File for the measurements of --bundle, JSON.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Say what a load needs, from what was measured. Calls no service."""
    if measured is not None and bundle is not None:
        raise ConfigError("give --measured or --bundle, not both")
    if save is not None and bundle is None:
        raise ConfigError("--save needs --bundle: what comes with the package or from a file is saved already")
    if measured is not None and (report := _report(measured)) is not None:
        if rows is not None or method is not None or mix is not None:
            raise ConfigError("a load test speaks for its own mix: leave --mix, --rows and --method out")
        load = Load(rps, {Operation("encode", 1): 1.0}, _duration(p99), headroom)
        _tell_copies(report, load, as_json=as_json)
        return
    load = Load(rps, _mix(method, rows, mix), _duration(p99), headroom)
    planning.check(load)  # before anything is measured
    if bundle is not None:
        capacity = _of_bundle(bundle, is_gpu=gpu, seconds=seconds, threads=threads)
        if save is not None:
            capacity.write(save)
    else:
        capacity = Capacity.recorded() if measured is None else Capacity.read(measured)
    if gpu != (capacity.device == "cuda"):
        raise _wrong_device(capacity, is_gpu=gpu)
    _tell(planning.plan(load, capacity, gpu_share=gpu_share, seed=seed), load, capacity, as_json=as_json)


def assumptions(load: Load, capacity: Capacity, num_calls: int) -> list[str]:
    """Return what a plan takes for granted."""
    machine = ", ".join(f"{name} {value}" for name, value in capacity.machine.items())
    threads = capacity.encoder.threads
    costs = f"{_line(capacity.encoder.cost)}, of the decoder {_line(capacity.decoder.cost)}"
    where = f"{capacity.engine} engine on {capacity.device}, replicas of {threads} threads"
    return [
        f"Measured: {capacity.model}; {where}; {capacity.measured_at}; {machine}.",
        f"How: {capacity.method}.",
        f"Costs: a run of the encoder {costs}; a call beyond what it computes {capacity.floor_s * 1e3:.2g} ms.",
        f"At most {load.headroom:.0%} of what a tier can do: a gateway one processor, a replica full runs.",
        "The rest is for peaks, a lost replica and what the measurement missed.",
        f"p99: {num_calls:,} simulated calls with Poisson arrivals, gateways first come first served.",
        "A free replica takes all that waits (batch while busy: Inoue, Performance Evaluation 147, 2021).",
        "Costs do not grow with the number of replicas; callers spread evenly over gateways; no call is shed.",
    ]


def _line(cost: Cost) -> str:
    return f"{cost.per_call_s * 1e6:.0f} + {cost.per_row_s * 1e6:.2g} n us"


def _mix(method: str | None, rows: int | None, mix: str | None) -> dict[Operation, float]:
    if mix is not None and (method is not None or rows is not None):
        raise ConfigError("give --mix, or --method and --rows")
    name = f"{method or 'encode'}:{rows or _DEFAULT_ROWS}"
    try:
        return parse_mix(mix) if mix is not None else {Operation.parse(name, option="--method"): 1.0}
    except LoadTestError as error:
        raise ConfigError(str(error)) from None


def _duration(text: str) -> float:
    """Return seconds of "50ms" or "0.05s"."""
    match = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(us|ms|s)\s*", text)
    if match is None:
        raise ConfigError(f"--p99 {text!r}: expected a number and us, ms or s, such as 50ms")
    return float(match[1]) * _UNITS[match[2]]


def _report(path: Path) -> LoadReport | None:
    """Return the load test of a file; None if the file holds something else."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise MeasurementError(source=str(path), problem=f"cannot be read ({error})") from None
    if not isinstance(content, dict) or "stages" not in content:
        return None
    try:
        return LoadReport.read(path)
    except LoadTestError as error:
        raise ConfigError(str(error)) from None


def _of_bundle(location: str, *, is_gpu: bool, seconds: float, threads: int) -> Capacity:
    """Return the recorded service with the graphs of a bundle, measured here."""
    from serving import bundle as bundles  # noqa: PLC0415 - planning from a record needs no ONNX Runtime
    from serving.run_costs import of_graph  # noqa: PLC0415

    verified = bundles.read(location)
    base, manifest = Capacity.recorded(), verified.manifest
    device: Literal["cpu", "cuda"] = "cuda" if is_gpu else "cpu"
    encoder, decoder = (
        of_graph(verified, graph, device=device, threads=threads, seconds=seconds)
        for graph in ("encoder", "decoder")
    )
    values = 1
    for length in manifest.data_shape:
        values *= length
    return base.with_graphs(
        encoder=base.encoder.with_graph(encoder, threads),
        decoder=base.decoder.with_graph(decoder, threads),
        row_values=values,
        device=device,
        model=f"graphs of {manifest.name} {manifest.version}, gateway and hops of {base.model}",
        measured_at=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}; the rest {base.measured_at}",
        method=f"graphs: median times of runs here, each {seconds:g} s; the rest: {base.method}",
    )


def _wrong_device(capacity: Capacity, *, is_gpu: bool) -> ConfigError:
    if is_gpu:
        return ConfigError(
            f"--gpu: {capacity.model} was measured on {capacity.device}; "
            "give --bundle DIR on a machine with a GPU, or --measured FILE from one"
        )
    return ConfigError("these measurements are of a GPU: add --gpu")


def _tell(found: Plan, load: Load, capacity: Capacity, *, as_json: bool) -> None:
    assumed = assumptions(load, capacity, found.num_calls)
    if as_json:
        facts = {
            "tiers": {name: tier._asdict() for name, tier in found.tiers.items()},
            "num_cpus": found.num_cpus,
            "num_gpus": found.num_gpus,
            "memory_mib": round(found.memory_mib),
            "p99_s": found.p99_s,
            "alone_s": found.floor_s,
            "settings": _settings(found),
            "assumptions": assumed,
        }
        typer.echo(json.dumps(facts))
        return
    console = Console()
    table = Table("tier", "replicas", "load", "because of", title=_title(load), title_justify="left")
    for name, tier in found.tiers.items():
        table.add_row(name, str(tier.num_replicas), f"{tier.load:.0%}", tier.bound)
    console.print(table)
    gpus = f", {found.num_gpus:g} GPUs" if capacity.device == "cuda" else ""
    _print(console, f"{found.num_cpus:g} processors{gpus}, {found.memory_mib / 1024:.1f} GiB of memory")
    for operation, p99_s in found.p99_s.items():
        alone_ms = found.floor_s[operation] * 1e3
        _print(console, f"{operation}: p99 {p99_s * 1e3:.3g} ms, alone {alone_ms:.3g} ms")
    _print(console, f"vae-serve up {' '.join(f'--set {setting}' for setting in _settings(found))}")
    _print(console, "assumptions")
    for line in assumed:
        _print(console, f"- {line}")


def _title(load: Load) -> str:
    mix = ", ".join(f"{operation.name} {share:.0%}" for operation, share in load.mix.items())
    return f"{load.calls_per_s:,g} calls/s ({mix}), p99 {load.p99_s * 1e3:g} ms"


def _settings(found: Plan) -> list[str]:
    """Return the settings of the service that hold this plan."""
    settings = []
    for name, tier in found.tiers.items():
        bounds = ("num_replicas", "max_replicas") if name == "gateway" else ("min_replicas", "max_replicas")
        settings += [f"{name}.{bound}={tier.num_replicas}" for bound in bounds]
    return settings


def _tell_copies(report: LoadReport, load: Load, *, as_json: bool) -> None:
    planning.check(load)
    number, stage = planning.copies(report, load.calls_per_s, load.p99_s, headroom=load.headroom)
    p99_ms = stage.response_time.p99 if stage.response_time else 0.0
    assumed = [
        f"Measured: load test {report.label}, {report.model} at {report.target}, {report.started_at}.",
        f"Best stage within the time: {stage.goodput_per_s:,.0f} right answers/s, p99 {p99_ms:.3g} ms.",
        f"Copies share the load evenly, and each is asked for at most {load.headroom:.0%} of that.",
        f"The mix is that of the test: {', '.join(f'{name} {share:.0%}' for name, share in report.mix.items())}.",
    ]
    if as_json:
        typer.echo(json.dumps({"copies": number, "goodput_per_s": stage.goodput_per_s, "assumptions": assumed}))
        return
    console = Console()
    _print(console, f"{number} copies of the service that was tested")
    for line in assumed:
        _print(console, f"- {line}")


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)
