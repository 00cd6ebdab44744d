"""Recorded results: one JSON file for each finished run, and the table of the README that is made of them.

A line of the table can be repeated by the command in it; whoever changes a preset records it anew.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from serving.typed_config import Config, ConfigError
from training import checkpoint
from training.checkpoint import RunFolder, write_atomically
from training.config import TrainingConfig
from training.errors import RunNotFound
from training.evaluate import Evaluation, recorded_evaluation
from training.model_card import reproduction_command

FOLDER: Final = Path(__file__).parent / "recorded"
"""Where the results of the presets are, beside the code that they are results of."""

_COLUMNS: Final = (
    "preset",
    "test ELBO",
    "test NLL, at most",
    "k",
    "n",
    "active units",
    "training",
    "hardware",
    "seeds",
    "repeat with",
)


class Result(Config):
    """What one run reached, and everything that decides it."""

    name: str
    """Name of the configuration."""

    command: str
    """What repeats the run and its evaluation."""

    config_sha256: str
    """Digest of the resolved configuration."""

    seed: int
    """Seed of the training."""

    seconds: float
    """Time of the fit with its validations, wall clock, seconds."""

    hardware: str
    """What computed."""

    tool_versions: dict[str, str]
    """Versions of the libraries."""

    git_commit: str | None
    """Commit of the source tree."""

    evaluation: Evaluation
    """Figures of the best checkpoint on the test split."""


def of_run(run: RunFolder) -> Result:
    """Return the result of a finished and evaluated run.

    Raises:
        RunNotFound: If the run, or a current evaluation of its best checkpoint on the test split, is not there.
    """
    best = checkpoint.load(run.best)
    evaluation = recorded_evaluation(run)
    if evaluation is None:
        raise RunNotFound(location=str(run.path), missing="current evaluation.json of the test split")
    environment = json.loads(run.environment.read_text())
    last_line = json.loads(run.metrics.read_text().splitlines()[-1])
    return Result(
        name=best.config.name,
        command=f"{reproduction_command(best.config)} && {_evaluation_command(best.config, evaluation)}",
        config_sha256=best.config.sha256(),
        seed=best.config.seed,
        seconds=last_line["seconds"],
        hardware=environment["device_name"],
        tool_versions=environment["tool_versions"],
        git_commit=environment["git_commit"],
        evaluation=evaluation,
    )


def record(run: RunFolder, folder: Path) -> Path:
    """Write the result of a run into a folder of results, in place of one of its name; return the file."""
    result = of_run(run)
    path = folder / f"{result.name}.json"
    write_atomically(path, (result.model_dump_json(indent=1) + "\n").encode())
    return path


def read(folder: Path) -> tuple[Result, ...]:
    """Return all recorded results, by name.

    Raises:
        ConfigError: If a file is not one; names the file.
    """
    return tuple(_parsed(path) for path in sorted(folder.glob("*.json")))


def table(results: Sequence[Result]) -> str:
    """Return the results as a Markdown table; bounds in nats per image, with the standard error over images."""
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Sequence[Result]) -> Iterator[str]:
    yield f"| {' | '.join(_COLUMNS)} |"
    yield f"|{'---|' * len(_COLUMNS)}"
    for result in results:
        figures = result.evaluation
        cells = (
            result.name,
            f"{figures.elbo.value:.2f} ± {figures.elbo.standard_error:.2f}",
            f"**{figures.nll_iwae.value:.2f}** ± {figures.nll_iwae.standard_error:.2f}",
            str(figures.num_importance_samples),
            str(figures.num_images),
            f"{figures.active_units} of {figures.latent_dim}",
            _duration(result.seconds),
            result.hardware,
            f"{result.seed}, {figures.seed}",
            f"`{result.command}`",
        )
        yield f"| {' | '.join(cells)} |"


def _evaluation_command(config: TrainingConfig, evaluation: Evaluation) -> str:
    """Return the command that repeats an evaluation: with every number that differs from the configuration's."""
    usual = config.evaluation
    options = [f"vae-train evaluate runs/{config.name}"]
    if evaluation.num_importance_samples != usual.num_importance_samples:
        options.append(f"--num-importance-samples {evaluation.num_importance_samples}")
    if evaluation.num_images > usual.max_images:
        options.append(f"--max-images {evaluation.num_images}")
    return " ".join(options)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _parsed(path: Path) -> Result:
    try:
        return Result.parse(json.loads(path.read_text()))
    except ValueError as error:
        raise ConfigError(f"{path.name}: not a recorded result ({str(error)[:200]})") from None
