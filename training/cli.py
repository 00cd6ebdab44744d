"""`vae-train`: fit, evaluate, export, sample, data. Results go to standard output, progress to standard error."""

import io
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Final

import numpy as np
import torch
import typer

from training import checkpoint, console, pictures, presets
from training import data as datasets
from training.checkpoint import Checkpoint, RunFolder, averaged_model, write_atomically
from training.config import DataConfig, TrainingConfig
from training.data import Dataset, SplitName
from training.environment import environment_json
from training.evaluate import Evaluation, evaluate_run, recorded_evaluation
from training.trainer import DeviceName, FitResult, choose_device, fit, load_for_resume

RUNS: Final = Path("runs")
"""Folder of run folders, unless --output-dir says otherwise."""

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
    threads: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="CPU threads. Default: PyTorch's choice, all cores; take fewer where other programs "
            "compute too, for threads that wait for a busy core are slower than none.",
            show_default=False,
        ),
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Cut down to two epochs on 512 rows.")] = False,
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
    chosen = choose_device(device)
    dataset = _load(config.data, data_dir)  # first: nothing is removed for a run that cannot begin
    if config.data.name == datasets.OWN:
        config = config.merge({"data": {"data_shape": dataset.data_shape}})
    start = _starting_point(config, run, resume)
    write_atomically(run.config, config.to_json().encode())
    write_atomically(run.environment, environment_json(seed=config.seed, device=chosen).encode())
    stop = StopRequest()
    with stop.listening(), console.FitProgress(config) as progress:
        result = fit(config, dataset, run, device=chosen, resume_from=start, should_stop=stop, listener=progress)
    _show_fit(run, result, as_json=as_json)
    if not result.is_finished and stop.signal is not None:
        console.say(f"interrupted; saved at step {result.checkpoint.step}, the same command continues")
        raise typer.Exit(128 + stop.signal)


@app.command("evaluate")
def evaluate_command(
    run: RunArgument,
    *,
    split: Annotated[SplitName, typer.Option(help="Which rows.")] = "test",
    num_importance_samples: Annotated[
        int | None, typer.Option(help="k of the importance-weighted bound; the literature uses 5000.")
    ] = None,
    max_images: Annotated[int | None, typer.Option(help="Images to measure, from the split's start.")] = None,
    data_dir: DataDirOption = None,
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure the best checkpoint of a run; writes evaluation.json into its folder."""
    folder = RunFolder(run)
    config = checkpoint.load(folder.best).config
    given = {"num_importance_samples": num_importance_samples, "max_images": max_images}
    settings = config.evaluation.override([f"{key}={value}" for key, value in given.items() if value is not None])
    dataset = _load(config.data, data_dir)
    evaluation = evaluate_run(folder, dataset, settings, split=split, device=choose_device(device))
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


def _data_config(name: str, image_size: int | None) -> DataConfig:
    """Return the configuration of a published data set, or of the user's own by its path."""
    if name in datasets.SOURCES or not Path(name).exists():
        datasets.source(name)
        return DataConfig.parse({"name": name})
    own = {"name": datasets.OWN, "path": str(Path(name).absolute()), "image_size": image_size}
    return DataConfig.parse(own)


def _starting_point(config: TrainingConfig, run: RunFolder, resume: str) -> Checkpoint | None:
    """Return the checkpoint to continue from, and leave nothing in the run folder that is not of this run."""
    if resume == "never" or (resume == "auto" and not run.last.exists()):
        run.clear()
        return None
    if resume == "auto":
        return load_for_resume(config, run.last)
    path = Path(resume)
    file = RunFolder(path).last if path.is_dir() else path
    start = load_for_resume(config, file)
    if file.parent.resolve() != run.path.resolve():
        run.adopt(RunFolder(file.parent))
        checkpoint.save(start, run.last)
        if not run.best.exists():
            checkpoint.save(start, run.best)
    return start


def _load(config: DataConfig, data_dir: Path | None) -> Dataset:
    with console.DownloadProgress() as progress:
        return datasets.load(config, data_dir=data_dir, progress=progress)


def _show_fit(run: RunFolder, result: FitResult, *, as_json: bool) -> None:
    state = result.checkpoint
    content = {
        "run": str(run.path),
        "is_finished": result.is_finished,
        "step": state.step,
        "best_validation_elbo": state.best_elbo if run.best.exists() else None,
        "has_collapsed": state.has_collapsed,
        "weights_sha256": state.weights_sha256(),
        "seconds": round(result.seconds, 3),
    }
    if as_json:
        console.show_json(content)
        return
    console.show_text(
        f"{run.path}: step {state.step}, best validation ELBO {state.best_elbo:.2f} nats per image, "
        f"{result.seconds:.1f} s"
    )


def _show_evaluation(evaluation: Evaluation, *, as_json: bool) -> None:
    if as_json:
        console.show_json(json.loads(evaluation.to_json()))
        return
    estimates = {
        "ELBO": evaluation.elbo,
        "log-likelihood": evaluation.log_likelihood,
        "KL": evaluation.kl,
        f"NLL, IWAE bound, k = {evaluation.num_importance_samples}": evaluation.nll_iwae,
    }
    rows = [[key, f"{item.value:.2f}", f"{item.standard_error:.2f}"] for key, item in estimates.items()]
    rows.append(["active units", f"{evaluation.active_units} of {evaluation.latent_dim}", ""])
    title = f"{evaluation.split}, n = {evaluation.num_images}, nats per image"
    console.show_table(title, ["figure", "value", "standard error"], rows)


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
