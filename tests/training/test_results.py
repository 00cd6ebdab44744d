"""Recorded results: made from finished runs alone, and the README shows exactly them."""

import json
from pathlib import Path

import pytest

from serving.typed_config import ConfigError
from training import presets, results
from training.checkpoint import RunFolder, write_atomically
from training.errors import RunNotFound
from training.evaluate import Evaluation

from .conftest import SmokeRun

README = Path(results.__file__).with_name("README.md")


@pytest.fixture
def run(smoke_run: SmokeRun, evaluation: Evaluation, tmp_path: Path) -> RunFolder:
    """Return a copy of the finished smoke run with its evaluation and environment."""
    copy = RunFolder(tmp_path / "run")
    for file in smoke_run.folder.path.iterdir():
        write_atomically(copy.path / file.name, file.read_bytes())
    write_atomically(copy.evaluation, evaluation.to_json().encode())
    environment = {"device_name": "Example 9000", "tool_versions": {"torch": "2.13.0"}, "git_commit": None}
    write_atomically(copy.environment, json.dumps(environment).encode())
    return copy


def test_a_result_holds_what_was_measured_and_what_decides_it(run: RunFolder, evaluation: Evaluation) -> None:
    """Figures, configuration, hardware, time and the command that repeats them."""
    result = results.of_run(run)
    assert result.evaluation == evaluation
    assert result.command == "vae-train fit smoke && vae-train evaluate runs/smoke"
    assert result.config_sha256 == presets.smoke().sha256()
    assert result.hardware == "Example 9000"
    assert result.seconds == json.loads(run.metrics.read_text().splitlines()[-1])["seconds"]


def test_the_command_repeats_the_evaluation_too(run: RunFolder, evaluation: Evaluation) -> None:
    """More images or samples than the configuration has are part of what a reader must type."""
    larger = evaluation.model_copy(update={"num_images": 250, "num_importance_samples": 5000})
    write_atomically(run.evaluation, larger.to_json().encode())
    expected = "vae-train evaluate runs/smoke --num-importance-samples 5000 --max-images 250"
    assert results.of_run(run).command.endswith(f" && {expected}")


def test_a_run_without_current_figures_has_no_result(run: RunFolder) -> None:
    """Figures of another checkpoint, or of another split, are not its result."""
    stale = json.loads(run.evaluation.read_text()) | {"checkpoint_sha256": "0" * 64}
    run.evaluation.write_text(json.dumps(stale))
    with pytest.raises(RunNotFound, match=r"current evaluation\.json of the test split"):
        results.of_run(run)


def test_recorded_results_are_read_back(run: RunFolder, tmp_path: Path) -> None:
    """What is written is what the table is made of; recording again replaces."""
    folder = tmp_path / "recorded"
    assert results.record(run, folder) == results.record(run, folder)
    assert results.read(folder) == (results.of_run(run),)


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    """The text says which file to repair."""
    (tmp_path / "broken.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"broken\.json: not a recorded result"):
        results.read(tmp_path)


def test_the_readme_shows_the_recorded_results() -> None:
    """Line by line: no figure in the text is older or newer than its record."""
    assert results.table(results.read(results.FOLDER)) in README.read_text()


@pytest.mark.parametrize("result", results.read(results.FOLDER), ids=lambda result: result.name)
def test_a_recorded_result_is_that_of_its_preset(result: results.Result) -> None:
    """Whoever changes a preset records it anew, so that its command gives its line."""
    fit, evaluate = result.command.split(" && ")
    assert evaluate.startswith(f"vae-train evaluate runs/{result.name}")
    assert fit.startswith(f"vae-train fit {result.name}")
    assert (result.config_sha256 == presets.named(result.name).sha256()) == (fit == f"vae-train fit {result.name}")
