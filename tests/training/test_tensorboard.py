"""What TensorBoard shows is what the run recorded; a resumed run has one curve."""

import shutil
import sys
from pathlib import Path

import pytest

from training.checkpoint import RunFolder
from training.data import Dataset
from training.errors import ExtraMissing
from training.tensorboard import TensorBoard
from training.trainer import Metrics

from .conftest import SmokeRun

accumulators = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator", reason="the extra tensorboard is not installed"
)

SCALARS = {
    *(f"{split}/{term}" for split in ("train", "validation") for term in ("elbo", "log_likelihood", "kl")),
    "optimizer/learning_rate",
    "optimizer/beta",
}

SINGLE = 1e-6
"""Relative: event files hold float32."""


@pytest.fixture
def run(smoke_run: SmokeRun, tmp_path: Path) -> RunFolder:
    """Return a folder with a finished run in it."""
    shutil.copytree(smoke_run.folder.path, tmp_path / "run")
    return RunFolder(tmp_path / "run")


def _lines(run: RunFolder) -> list[Metrics]:
    return [Metrics.model_validate_json(line) for line in run.metrics.read_text().splitlines()]


def _shown(run: RunFolder) -> dict[str, list[tuple[int, float]]]:
    """Return step and value of every scalar, as TensorBoard itself reads them."""
    events = accumulators.EventAccumulator(str(run.tensorboard))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_curves_are_the_lines_of_metrics(run: RunFolder, digits: Dataset) -> None:
    """Both terms of both splits, step size and beta, at the steps of the validations."""
    with TensorBoard(run, digits) as board:
        for line in _lines(run):
            board(line)
    shown = _shown(run)
    assert set(shown) == SCALARS
    assert [step for step, _ in shown["validation/kl"]] == [8, 16]
    for name, value in (("elbo", _lines(run)[1].train.elbo), ("kl", _lines(run)[1].train.kl)):
        assert shown[f"train/{name}"][1][1] == pytest.approx(value, rel=SINGLE)


def test_importance_weighted_bound_has_a_curve_where_it_is_climbed(run: RunFolder, digits: Dataset) -> None:
    """Beside the ELBO, not in its place."""
    line = _lines(run)[0]
    terms = line.validation.merge({"importance_weighted": -20.0})
    with TensorBoard(run, digits) as board:
        board(line.model_copy(update={"validation": terms}))
    shown = _shown(run)
    assert set(shown) == SCALARS | {"validation/importance_weighted"}
    assert shown["validation/importance_weighted"] == [(8, -20.0)]


def test_pictures_are_of_samples_and_reconstructions(run: RunFolder, digits: Dataset) -> None:
    """Grids of 8x8 samples and of eight pairs, grey, of 56 pixels an image with gaps of two."""
    with TensorBoard(run, digits) as board:
        board(_lines(run)[0])
    events = accumulators.EventAccumulator(str(run.tensorboard))
    events.Reload()
    sizes = {tag: [(image.width, image.height) for image in events.Images(tag)] for tag in events.Tags()["images"]}
    assert sizes == {"samples": [(466, 466)], "reconstructions": [(118, 466)]}


def test_a_resumed_run_has_one_curve(run: RunFolder, digits: Dataset) -> None:
    """Points behind the checkpoint from which the run goes on are not shown beside those made anew."""
    first, second = _lines(run)
    with TensorBoard(run, digits) as board:
        board(first)
        board(second)
    again = second.model_copy(update={"beta": 0.5})
    with TensorBoard(run, digits, first_step=8) as board:
        board(again)
    assert _shown(run)["optimizer/beta"] == [(8, 1.0), (16, 0.5)]


def test_without_the_extra_the_error_says_how_to_get_it(
    run: RunFolder, digits: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing else of training needs it."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ExtraMissing, match=r"pip install 'vae-serving\[tensorboard\]'"):
        TensorBoard(run, digits)
