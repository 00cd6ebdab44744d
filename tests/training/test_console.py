"""Plain lines where there is no terminal; one warning for a collapse; results on standard output alone."""

import json

import pytest

from training import console, presets
from training.trainer import Metrics, Terms


def _metrics(*, has_collapsed: bool = False) -> Metrics:
    terms = Terms(elbo=-20.5, log_likelihood=-20, kl=0.5)
    return Metrics(
        epoch=1,
        step=8,
        train=terms,
        validation=terms,
        learning_rate=1e-3,
        beta=1,
        is_best=True,
        has_collapsed=has_collapsed,
        seconds=1.25,
    )


def test_fit_writes_a_line_per_validation(capsys: pytest.CaptureFixture[str]) -> None:
    """Both terms, apart, on standard error; nothing on standard output."""
    with console.FitProgress(presets.smoke()) as progress:
        progress(_metrics())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("epoch 1/2  train ELBO -20.50  validation ELBO -20.50 = -20.00 - KL 0.50")


def test_a_line_shows_the_bound_that_is_climbed(capsys: pytest.CaptureFixture[str]) -> None:
    """The importance-weighted bound stands beside the ELBO and its terms."""
    line = _metrics()
    weighted = line.validation.merge({"importance_weighted": -19.75})
    with console.FitProgress(presets.smoke()) as progress:
        progress(line.model_copy(update={"validation": weighted}))
    assert "-20.50 = -20.00 - KL 0.50  importance-weighted -19.75  1.2 s" in capsys.readouterr().err


def test_collapse_is_said_once(capsys: pytest.CaptureFixture[str]) -> None:
    """The warning names the figure and two remedies, and is not repeated every epoch."""
    with console.FitProgress(presets.smoke()) as progress:
        progress(_metrics(has_collapsed=True))
        progress(_metrics(has_collapsed=True))
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert "KL term is 0.50 nats" in warning
    assert "optimizer.beta" in warning


def test_download_writes_a_line_at_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    """A log is not filled with percentages."""
    with console.DownloadProgress() as progress:
        for done in (2**20, 2**21, 3 * 2**20):
            progress("images", done, 3 * 2**20)
    assert capsys.readouterr().err == "downloaded images, 3.0 MiB\n"


def test_json_is_one_line_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    """A program can read the result without looking for it."""
    console.show_json({"a": [1, 2]})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"a": [1, 2]}
    assert captured.out.count("\n") == 1
    assert captured.err == ""


def test_table_holds_every_cell(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables are for people; nothing is lost in them."""
    console.show_table("title", ["name", "value"], [["first", "1.5"], ["second", "2.5"]])
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("title", "name", "value", "first", "1.5", "second", "2.5"))
