"""`vae-train`: fit, evaluate, export, publish, promote, sample, data, study, bench.

Results go to standard output, progress to standard error.
"""

import io
import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Final, Literal

import numpy as np
import torch
import typer

from training import (
    bundle_store,
    checkpoint,
    console,
    distributed,
    evaluation_report,
    launch,
    pictures,
    presets,
    ray_launcher,
    results,
)
from training import data as datasets
from training.checkpoint import RunFolder, averaged_model, write_atomically
from training.config import DataConfig, TrainingConfig
from training.data import Dataset, SplitLabels, SplitName
from training.errors import ChecksFailed, LabelsMissing
from training.evaluate import Evaluation, Extras, evaluate_run, recorded_evaluation
from training.launch import Execution
from training.trainer import DeviceName, FitResult, Metrics, check_setup, choose_device

RUNS: Final = Path("runs")
"""Folder of run folders, unless --output-dir says otherwise."""

STUDY: Final = Path("study")
"""Folder of the study, unless --output-dir says otherwise."""

app = typer.Typer(
    name="vae-train",
    help="Makes a bundle from data: fit a variational autoencoder, measure it, export it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunArgument = Annotated[Path, typer.Argument(help="Folder that `vae-train fit` wrote.", show_default=False)]
DataDirOption = Annotated[
    Path | None,
    typer.Option(
        help="Folder of the official IDX files (.gz or unpacked), or of a sub-folder named like the data set. "
        "Absent files are downloaded into that sub-folder. Default: the user's cache folder.",
        show_default=False,
    ),
]
DeviceOption = Annotated[DeviceName, typer.Option(help="Where to compute; auto: the GPU if there is one.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="CPU threads. Default: PyTorch's choice, all cores; take fewer where other programs "
        "compute too, for threads that wait for a busy core are slower than none.",
        show_default=False,
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]


class StopRequest:
    """Remembers the signal that asked this process to stop; the fit then saves and ends."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __call__(self) -> bool:
        """Return whether there was a signal."""
        return self.signal is not None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Catch SIGINT and SIGTERM inside the block; the second one of a kind ends the process at once."""
        before = {number: signal.signal(number, self._remember) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)


@app.command("fit")
def fit_command(
    preset: Annotated[str, typer.Argument(help=f"One of {', '.join(presets.PRESETS)}.")] = "digits",
    *,
    assignments: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override a value, such as model.latent_dim=8."),
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option(help="Run folder. Default: runs/<name>.", show_default=False)
    ] = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "auto",
    images: Annotated[
        Path | None,
        typer.Option(
            "--data",
            help="Your own data in place of the preset's: a folder of images, or a .npy, .npz or IDX file.",
            show_default=False,
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side to bring the images of a folder to, pixels.", show_default=False)
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="Short for --set optimizer.epochs.")] = None,
    seed: Annotated[int | None, typer.Option(help="Short for --set seed.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Short for --set optimizer.batch_size.")] = None,
    lr: Annotated[float | None, typer.Option(help="Short for --set optimizer.learning_rate.")] = None,
    resume: Annotated[
        str,
        typer.Option(
            metavar="auto|never|PATH",
            help="auto: continue the run in the folder if there is one; never: begin again, removing it; "
            "PATH: continue from that run folder or checkpoint.",
        ),
    ] = "auto",
    threads: ThreadsOption = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Cut down to two epochs on 512 rows.")] = False,
    is_compiled: Annotated[
        bool,
        typer.Option(
            "--compile",
            help="Make steps faster by torch.compile, and on a GPU by a CUDA graph: a minute to begin with.",
        ),
    ] = False,
    has_tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Also write curves and pictures for TensorBoard into the folder.")
    ] = False,
    launcher: Annotated[
        Literal["local", "ray"],
        typer.Option(help="local: this process, or those of torchrun around it; ray: workers of Ray Train."),
    ] = "local",
    num_workers: Annotated[int, typer.Option(min=1, help="Processes of --launcher ray.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Fit a model and leave its checkpoints and metrics in a run folder."""
    config = presets.shortened(presets.named(preset)) if smoke else presets.named(preset)
    shorthands = {
        "optimizer.epochs": epochs,
        "seed": seed,
        "optimizer.batch_size": batch_size,
        "optimizer.learning_rate": lr,
    }
    given = [f"{key}={value}" for key, value in shorthands.items() if value is not None]
    config = config.override([*(assignments or []), *given])
    if images is not None:
        own = {"name": datasets.OWN, "path": str(images.absolute()), "image_size": image_size}
        config = config.merge({"data": own})
    run = RunFolder(output_dir or RUNS / config.name)
    if threads is not None:
        torch.set_num_threads(threads)
    execution = Execution(
        device=device, data_dir=data_dir, is_compiled=is_compiled, has_tensorboard=has_tensorboard
    )
    if launcher == "ray":
        result = _fit_on_ray(config, run, execution, resume=resume, num_workers=num_workers)
        _show_fit(run, result, as_json=as_json)
        return
    stop = StopRequest()
    result, is_first = _fit_here(config, run, execution, resume=resume, stop=stop)
    if is_first:
        _show_fit(run, result, as_json=as_json)
    if not result.is_finished:
        if is_first:
            console.say(f"interrupted; saved at step {result.checkpoint.step}, the same command continues")
        # With several processes the signal may have reached another one.
        raise typer.Exit(128 + (stop.signal or signal.SIGTERM))


@app.command("evaluate")
def evaluate_command(
    run: RunArgument,
    *,
    split: Annotated[SplitName, typer.Option(help="Which rows.")] = "test",
    num_importance_samples: Annotated[
        int | None, typer.Option(help="k of the importance-weighted bound; the literature uses 5000.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="Images to measure, from the split's start.")] = None,
    is_full: Annotated[
        bool,
        typer.Option("--full", help="The convention of the literature: k = 5000 on the first 10,000 images."),
    ] = False,
    sample_quality: Annotated[
        bool,
        typer.Option(
            "--sample-quality",
            help="Also compare samples with images (Frechet distance, classifier), move codes; MNIST: a minute.",
        ),
    ] = False,
    num_samples: Annotated[
        int, typer.Option(min=2, help="Samples and images in each set of --sample-quality, at most.")
    ] = 10_000,
    num_annealed: Annotated[
        int,
        typer.Option(
            "--ais",
            metavar="N",
            min=0,
            help="Also bracket log p(x) of the first N images by annealed importance sampling; seconds for each.",
        ),
    ] = 0,
    data_dir: DataDirOption = None,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the best checkpoint of a run; writes evaluation.json into its folder."""
    if num_annealed == 1:
        raise typer.BadParameter("one image has no standard error; give at least two", param_hint="--ais")
    if threads is not None:
        torch.set_num_threads(threads)
    folder = RunFolder(run)
    config = checkpoint.load(folder.best).config
    convention = {"num_importance_samples": 5000, "max_images": 10_000} if is_full else {}
    asked = {"num_importance_samples": num_importance_samples, "max_images": max_images}
    given = convention | {key: value for key, value in asked.items() if value is not None}
    settings = config.evaluation.override([f"{key}={value}" for key, value in given.items()])
    dataset = _load(config.data, data_dir)
    extras = Extras(
        num_samples=num_samples if sample_quality else 0,
        labels=_labels(config.data, data_dir) if sample_quality else None,
        num_annealed=num_annealed,
    )
    evaluation = evaluate_run(folder, dataset, settings, split=split, device=choose_device(device), extras=extras)
    _show_evaluation(evaluation, as_json=as_json)


@app.command("export")
def export_command(
    run: RunArgument,
    bundle: Annotated[Path, typer.Argument(help="Folder to write; an older bundle there is replaced.")],
    *,
    name: Annotated[
        str | None, typer.Option(help="Name of the model. Default: the run's.", show_default=False)
    ] = None,
    data_dir: DataDirOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the best checkpoint of a run as a bundle that vae-serve runs."""
    from training.export import export  # noqa: PLC0415  # ONNX costs half a second that the others need not wait

    folder = RunFolder(run)
    config = checkpoint.load(folder.best).config
    dataset = _load(config.data, data_dir)
    evaluation = recorded_evaluation(folder)
    if evaluation is None:
        console.say("no current figures on the test split; evaluating first")
        evaluation = evaluate_run(folder, dataset, config.evaluation, device=torch.device("cpu"))
    manifest = export(folder, dataset, evaluation, bundle, name=name)
    if as_json:
        console.show_json({"bundle": str(bundle), **manifest.model_dump(mode="json")})
        return
    largest = max(manifest.parity.values())
    console.show_text(f"{bundle}: {manifest.name} version {manifest.version}, parity within {largest:.1e}")


@app.command("publish")
def publish_command(
    bundle: Annotated[Path, typer.Argument(help="Folder that `vae-train export` wrote.", show_default=False)],
    store: Annotated[str, typer.Argument(help="Folder or URL of a store of bundles.", show_default=False)],
    *,
    is_promoted: Annotated[bool, typer.Option("--promote", help="Then promote it.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Copy a bundle to STORE/NAME/VERSION; a version that is there is verified and left as it is."""
    published = bundle_store.publish(bundle, store)
    console.say(f"{published.location}: {'published' if published.is_new else 'was there, and is whole'}")
    if is_promoted:
        _promote(published.location, as_json=as_json)
        return
    manifest, digest = published.manifest, published.bundle_sha256
    if as_json:
        facts = {"name": manifest.name, "version": manifest.version, "is_new": published.is_new}
        console.show_json({"bundle": published.location, "bundle_sha256": digest, **facts})
        return
    console.show_text(f"bundle: {published.location}\nbundle_sha256: {digest}")


@app.command("promote")
def promote_command(
    location: Annotated[str, typer.Argument(help="STORE/NAME/VERSION of a published bundle.", show_default=False)],
    *,
    as_json: JsonOption = False,
) -> None:
    """Make STORE/NAME/current.json name this version, in one step; also the way back to an older one."""
    _promote(location, as_json=as_json)


@app.command("sample")
def sample_command(
    run: RunArgument,
    *,
    out: Annotated[Path, typer.Option(help="PNG file to write.")],
    num: Annotated[int, typer.Option(min=1, max=10_000, help="Number of samples.")] = 64,
    seed: Annotated[
        int, typer.Option(min=0, max=2**64 - 1, help="Seed; the service's Sample decodes the same latents.")
    ] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="Factor on the latents.")] = 1.0,
) -> None:
    """Draw a grid of samples from the prior: decoded means of the best checkpoint's averaged weights."""
    best = checkpoint.load(RunFolder(run).best)
    shape = datasets.described(best.config.data).data_shape
    vae = averaged_model(best, shape, torch.device("cpu"))
    images = pictures.prior_samples(vae, num, seed=seed, temperature=temperature)
    write_atomically(out, pictures.png(images))
    console.show_text(str(out))


@app.command("data")
def data_command(
    name: Annotated[
        str | None,
        typer.Argument(help="Data set, or the path of your own; none: list them.", show_default=False),
    ] = None,
    *,
    data_dir: DataDirOption = None,
    split: Annotated[SplitName, typer.Option(help="Which rows to write.")] = "test",
    out: Annotated[
        Path | None,
        typer.Option(help="Write uint8 rows (n, *data_shape) to this .npy file.", show_default=False),
    ] = None,
    max_rows: Annotated[int | None, typer.Option(min=1, help="Write only the first rows.")] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side to bring the images of a folder to, pixels.", show_default=False)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the data sets, or fetch and verify one, and write rows of it for other programs."""
    if name is None:
        _show_sources(as_json=as_json)
        return
    config = _data_config(name, image_size)
    dataset = _load(config, data_dir)
    known = datasets.described(config)
    if out is not None:
        buffer = io.BytesIO()
        np.save(buffer, dataset.rows(split)[:max_rows])
        write_atomically(out, buffer.getvalue())
    content = {
        "name": dataset.name,
        "title": known.title,
        "data_shape": list(dataset.data_shape),
        "num_rows": {split_name: len(dataset.rows(split_name)) for split_name in datasets.SPLITS},
        "split": dataset.split,
        "sha256": {file.name: file.sha256 for file in known.files} or {"data": dataset.sha256},
        **dict(dataset.found),
        "licence": known.licence,
        "out": None if out is None else str(out),
    }
    if as_json:
        console.show_json(content)
        return
    console.show_table(
        known.title, ["fact", "value"], [[key, _plain(value)] for key, value in content.items() if value]
    )


@app.command("record")
def record_command(
    run: RunArgument,
    *,
    folder: Annotated[
        Path, typer.Option("--to", help="Folder of recorded results. Default: that of this package.")
    ] = results.FOLDER,
) -> None:
    """Record what a finished and evaluated run reached; prints the table of all recorded results."""
    results.record(RunFolder(run), folder)
    console.show_text(results.table(results.read(folder)).rstrip())


@app.command("study")
def study_command(
    *,
    is_full: Annotated[
        bool,
        typer.Option(
            "--full/--quick",
            help="Quick: some three minutes, 8x8 digits. Full: MNIST and Fashion-MNIST, sizes of the literature.",
        ),
    ] = False,
    output_dir: Annotated[
        Path, typer.Option(help="Folder of the report; models trained there are used again.")
    ] = STUDY,
    data_dir: DataDirOption = None,
    device: DeviceOption = "auto",
    seed: Annotated[int, typer.Option(min=0, max=2**64 - 1, help="Seed of everything.")] = 0,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads. Default: one for the quick study, whose models gain nothing from a second; else "
            "PyTorch's choice.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show every claim of the article by numbers and pictures: one page that is also a tutorial."""
    from training.study import chapters, report  # noqa: PLC0415  # matplotlib: the other commands need not wait
    from training.study.setup import Study  # noqa: PLC0415

    if threads is not None or not is_full:
        torch.set_num_threads(threads or 1)
    study = Study(
        folder=output_dir,
        is_full=is_full,
        data_dir=data_dir,
        device=choose_device(device),
        seed=seed,
        say=console.say,
    )
    found = chapters.run(study)
    page = report.write(found, output_dir)
    if as_json:
        console.show_json(json.loads(report.as_json(found)))
    else:
        console.show_text(f"{page}: {len(found.checks)} checks, {len(found.failed)} fail")
    if found.failed:
        raise ChecksFailed([check.name for check in found.failed], page=str(page))


@app.command("bench")
def bench_command(
    *,
    data_dir: DataDirOption = None,
    peers: Annotated[
        Path | None,
        typer.Option(
            help="Folder of the peers' packages. Default: training-peers in this environment, which "
            "`make training-peers` fills.",
            show_default=False,
        ),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Pass through every line in seconds; the ratios say nothing.")
    ] = False,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Timed epochs of each contestant. Default: 5.", show_default=False)
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            help="CPU threads of each contestant; may be repeated. Default: 1 and 2. Only 1 means anything "
            "while other programs compute.",
            show_default=False,
        ),
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(help="Write the tables to this .md file, and all figures beside it.", show_default=False),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Compare training and evaluation with pythae and Pyro, on MNIST with --data-dir, else on made-up images."""
    from training.bench import contest, plan, tables  # noqa: PLC0415  # the other commands need not wait

    chosen = plan.quick() if quick else plan.full()
    if rounds is not None:
        chosen = chosen.merge({"num_rounds": rounds})
    if threads:
        chosen = chosen.merge({"threads": tuple(threads)})
    images = contest.synthetic_images(chosen.num_rows, chosen.num_held_out, seed=chosen.seed)
    if data_dir is not None:
        dataset = _load(DataConfig(name="mnist"), data_dir)
        images = contest.Images("MNIST", dataset.train, dataset.test)
    folder = peers or Path(sys.prefix) / "training-peers"
    report = contest.bench(chosen, images, peers_folder=folder, say=console.say)
    if record is not None:
        write_atomically(record, tables.markdown(report).encode())
        write_atomically(record.with_suffix(".json"), report.to_json().encode())
    if as_json:
        console.show_json(report.model_dump(mode="json"))
        return
    console.show_table("training", tables.TRAINING_COLUMNS, tables.training_rows(report))
    console.show_table("evaluation", tables.EVALUATION_COLUMNS, tables.evaluation_rows(report))
    for line in tables.verdicts(report):
        console.show_text(line)


def _promote(location: str, *, as_json: bool) -> None:
    """Print what a deployment says of a bundle, in the words of its configuration."""
    pointer = bundle_store.promote(location)
    if as_json:
        console.show_json({"bundle": location, **pointer.model_dump()})
        return
    before = f", before it {pointer.previous}" if pointer.previous else ""
    console.say(f"{pointer.name}: current is {pointer.version}{before}")
    console.show_text(f"bundle: {location}\nbundle_sha256: {pointer.bundle_sha256}")


def _data_config(name: str, image_size: int | None) -> DataConfig:
    """Return the configuration of a published data set, or of the user's own by its path."""
    if name in datasets.SOURCES or not Path(name).exists():
        datasets.source(name)
        return DataConfig.parse({"name": name})
    own = {"name": datasets.OWN, "path": str(Path(name).absolute()), "image_size": image_size}
    return DataConfig.parse(own)


def _fit_here(
    config: TrainingConfig, run: RunFolder, execution: Execution, *, resume: str, stop: StopRequest
) -> tuple[FitResult, bool]:
    """Fit in this process and those that torchrun started beside it; return whether this is the first of them."""
    with distributed.joined(choose_device(execution.device).type) as processes:
        with console.DownloadProgress() as downloads:
            config, dataset = launch.load_data(config, execution, processes, progress=downloads)
        launch.prepare(config, dataset, run, execution, resume=resume, processes=processes)
        with stop.listening(), ExitStack() as stack:
            listener: Callable[[Metrics], None] = _ignore
            if processes.is_first:
                listener = stack.enter_context(console.FitProgress(config))
            result = launch.fit_share(
                config, dataset, run, execution, processes=processes, should_stop=stop, listener=listener
            )
    return result, processes.is_first


def _fit_on_ray(
    config: TrainingConfig, run: RunFolder, execution: Execution, *, resume: str, num_workers: int
) -> FitResult:
    """Fit in workers of Ray Train; what can be refused is refused before Ray starts."""
    with console.DownloadProgress() as downloads:
        config, dataset = launch.load_data(config, execution, progress=downloads)
    check_setup(config, dataset, num_processes=num_workers)
    ray_launcher.check_installed()
    launch.prepare(config, dataset, run, execution, resume=resume)
    with console.FitProgress(config) as progress:
        return ray_launcher.fit(config, run, execution, num_workers=num_workers, listener=progress)


def _ignore(_: Metrics) -> None:
    """Show nothing: the first process does."""


def _load(config: DataConfig, data_dir: Path | None) -> Dataset:
    with console.DownloadProgress() as progress:
        return datasets.load(config, data_dir=data_dir, progress=progress)


def _labels(config: DataConfig, data_dir: Path | None) -> SplitLabels | None:
    """Return the classes of the rows; None, and a word about it, if the data have none."""
    try:
        with console.DownloadProgress() as progress:
            return datasets.load_labels(config, data_dir=data_dir, progress=progress)
    except LabelsMissing:
        console.say("the data have no labels; nothing is said of classes")
        return None


def _show_fit(run: RunFolder, result: FitResult, *, as_json: bool) -> None:
    state = result.checkpoint
    content = {
        "run": str(run.path),
        "is_finished": result.is_finished,
        "step": state.step,
        "bound": state.config.optimizer.bound,
        "best_validation_bound": state.best_bound if run.best.exists() else None,
        "has_collapsed": state.has_collapsed,
        "weights_sha256": state.weights_sha256(),
        "seconds": round(result.seconds, 3),
    }
    if as_json:
        console.show_json(content)
        return
    best = f"best validation {_bound(state.config)} {state.best_bound:.2f} nats per image"
    console.show_text(f"{run.path}: step {state.step}, {best}, {result.seconds:.1f} s")


def _bound(config: TrainingConfig) -> str:
    settings = config.optimizer
    return "ELBO" if settings.bound == "elbo" else f"importance-weighted bound, k = {settings.num_samples},"


def _show_evaluation(evaluation: Evaluation, *, as_json: bool) -> None:
    if as_json:
        console.show_json(json.loads(evaluation.to_json()))
    else:
        for table in evaluation_report.tables(evaluation):
            console.show_table(*table)
    if (warning := evaluation_report.warning(evaluation)) is not None:
        console.say(warning)


def _show_sources(*, as_json: bool) -> None:
    if as_json:
        console.show_json(
            {
                name: {"title": known.title, "data_shape": known.data_shape, "num_rows": known.num_rows}
                for name, known in datasets.SOURCES.items()
            }
        )
        return
    rows = [
        [name, known.title, "x".join(map(str, known.data_shape)), " / ".join(map(str, known.num_rows))]
        for name, known in datasets.SOURCES.items()
    ]
    console.show_table("data sets", ["name", "what", "data shape", "train / validation / test"], rows)


def _plain(value: object) -> str:
    if isinstance(value, dict):
        return "\n".join(f"{key}: {item}" for key, item in value.items())
    return str(value)
