"""A bundle is what serving reads, repeats byte for byte, and needs no PyTorch."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from serving import bundle
from serving.errors import BundleError
from training import checkpoint, parity, presets
from training.checkpoint import RunFolder
from training.data import Dataset
from training.errors import ParityFailed
from training.evaluate import Evaluation, evaluate_run
from training.export import export
from training.graphs import Graph
from training.trainer import fit

from .conftest import CPU, ROOT, SmokeRun

_ANSWER_WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # importing it fails
import numpy as np, onnxruntime
from serving import bundle
read = bundle.read(sys.argv[1])
manifest = read.manifest
inputs = {"encoder": {"data": bundle.golden_data(manifest.data_shape)},
          "decoder": {"latents": bundle.golden_latents(manifest.latent_dim)}}
for answer in manifest.golden:
    session = onnxruntime.InferenceSession(getattr(read, answer.graph), providers=["CPUExecutionProvider"])
    (values,) = session.run([answer.output], inputs[answer.graph])
    np.testing.assert_allclose(values.ravel()[:len(answer.first)], answer.first, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(values.astype(np.float64).sum(), answer.total, rtol=1e-5, atol=1e-3)
print(len(manifest.golden), "known answers")
"""


def _files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_bundle_is_complete_and_verifies(bundle_folder: Path) -> None:
    """Serving's own reader accepts it; every promised file is there."""
    bundle.read(str(bundle_folder))
    assert sorted(_files(bundle_folder)) == [
        "MODEL_CARD.md",
        "decoder.onnx",
        "encoder.onnx",
        "manifest.json",
        "samples/prior.png",
        "samples/reconstructions.png",
    ]


def test_manifest_tells_where_the_model_comes_from(
    bundle_folder: Path, smoke_run: SmokeRun, evaluation: Evaluation, digits: Dataset
) -> None:
    """Data, configuration, end of training and figures are those of the run."""
    manifest = bundle.read_manifest(str(bundle_folder))
    assert manifest.config_sha256 == smoke_run.config.sha256()
    assert manifest.created == checkpoint.load(smoke_run.folder.last).saved
    assert manifest.dataset.sha256 == digits.sha256
    assert manifest.metrics == evaluation.metrics()
    assert manifest.metrics["k"] == smoke_run.config.evaluation.num_importance_samples
    assert (manifest.data_shape, manifest.latent_dim) == ((1, 8, 8), 4)
    assert {f"{answer.graph}.{answer.output}" for answer in manifest.golden} == set(manifest.parity)


def test_exports_are_byte_identical_also_in_another_process(
    bundle_folder: Path, smoke_run: SmokeRun, evaluation: Evaluation, digits: Dataset, tmp_path: Path
) -> None:
    """Neither the time nor the process leaves a trace in any file."""
    export(smoke_run.folder, digits, evaluation, tmp_path / "here")
    command = [sys.executable, "-m", "training", "export", str(smoke_run.folder.path), str(tmp_path / "there")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True)
    assert _files(tmp_path / "here") == _files(bundle_folder)
    assert _files(tmp_path / "there") == _files(bundle_folder)


def test_bundle_runs_without_torch(bundle_folder: Path) -> None:
    """NumPy and ONNX Runtime alone reproduce the known answers."""
    answer = subprocess.run(
        [sys.executable, "-c", _ANSWER_WITHOUT_TORCH, str(bundle_folder)],
        check=True,
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert answer.stdout == "4 known answers\n"


def test_failed_gate_writes_nothing(
    smoke_run: SmokeRun, evaluation: Evaluation, digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that answers otherwise than the model ends the export before there is a folder."""
    true_run = parity.Session.run

    def perturbed(session: parity.Session, rows: parity.Rows) -> dict[str, parity.Rows]:
        return {name: values + np.float32(1e-3) for name, values in true_run(session, rows).items()}

    monkeypatch.setattr(parity.Session, "run", perturbed)
    with pytest.raises(ParityFailed, match=r"encoder\.mean: .* differ by 0\.001 .*no bundle was written"):
        export(smoke_run.folder, digits, evaluation, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_folder_of_somebody_else_is_not_replaced(
    smoke_run: SmokeRun, evaluation: Evaluation, digits: Dataset, tmp_path: Path
) -> None:
    """Only a bundle is replaced by a bundle."""
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(BundleError, match="it exists and is not a bundle"):
        export(smoke_run.folder, digits, evaluation, tmp_path)
    assert (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("changes", "outputs", "words"),
    [
        (
            ["model.likelihood=gaussian"],
            ("mean", "log_var"),
            (
                "independent Gaussian pixels with one learned variance",
                "Binarisation: none: data are intensities, pixel / 255",
                "Its logarithm may be positive",
                "`mean` (batch, 1, 8, 8), `log_var` (batch, 1, 1, 1), mean in [0, 1]",
                'mean, log_var = decoder.run(["mean", "log_var"]',
                "vae-train fit smoke --set 'model.likelihood=\"gaussian\"'",
            ),
        ),
        (
            ["model.likelihood=categorical", "model.num_levels=17"],
            ("logits", "mean"),
            (
                "independent categorical pixels, 17 equally spaced levels",
                "Binarisation: none: data are the nearest of 17 equally spaced intensities",
                "`logits` (batch, 17, 1, 8, 8), `mean` (batch, 1, 8, 8)",
                "each pixel on its nearest level",
            ),
        ),
    ],
    ids=["gaussian", "categorical"],
)
def test_other_likelihoods_are_exported(
    changes: list[str], outputs: tuple[str, ...], words: tuple[str, ...], digits: Dataset, tmp_path: Path
) -> None:
    """Manifest, known answers and card name the likelihood, its outputs, its data and its units."""
    config, run = presets.smoke().override(changes), RunFolder(tmp_path / "run")
    run.path.mkdir()
    fit(config, digits._replace(train=digits.train[:512]), run, device=CPU)
    evaluation = evaluate_run(run, digits, config.evaluation, device=CPU)
    manifest = export(run, digits, evaluation, tmp_path / "bundle")
    assert bundle.read(str(tmp_path / "bundle")).manifest == manifest
    expected = config.model.num_levels if config.model.likelihood == "categorical" else None
    assert (manifest.likelihood, manifest.num_levels) == (config.model.likelihood, expected)
    assert manifest.decoder.outputs == outputs
    assert [answer.output for answer in manifest.golden if answer.graph == "decoder"] == list(outputs)
    assert {f"{answer.graph}.{answer.output}" for answer in manifest.golden} == set(manifest.parity)
    card = (tmp_path / "bundle" / bundle.MODEL_CARD).read_text()
    one_line = " ".join(card.split())
    assert [word for word in words if word not in one_line] == []
    assert "Bernoulli" not in card
    assert "{" not in card.split("```")[0]


def test_served_encoder_takes_pixel_units(
    smoke_run: SmokeRun, smoke_graphs: tuple[Graph, Graph], digits: Dataset
) -> None:
    """The graph divides by 255 itself: raw pixels give the posterior of the scaled image."""
    rows = digits.test[:3].astype(np.float32)
    expected = smoke_run.vae.posterior(torch.from_numpy(rows / 255)).mean
    actual = parity.Session(smoke_graphs[0]).run(rows)["mean"]
    np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-5, atol=1e-5)
