"""The model card says what a reader must know, with the manifest's numbers."""

import shlex
from pathlib import Path

import pytest

from serving import bundle
from training import presets
from training.evaluate import Evaluation
from training.model_card import model_card, reproduction_command

from .conftest import SmokeRun


def test_card_states_the_figures_with_their_conditions(bundle_folder: Path, evaluation: Evaluation) -> None:
    """No figure without k, n, standard error and binarisation."""
    card = (bundle_folder / bundle.MODEL_CARD).read_text()
    manifest = bundle.read_manifest(str(bundle_folder))
    for estimate in (evaluation.elbo, evaluation.kl, evaluation.nll_iwae):
        assert f"| {estimate.value:.2f} | {estimate.standard_error:.2f} |" in card
    assert f"n = {evaluation.num_images} images" in card
    assert f"k = {evaluation.num_importance_samples}" in card
    assert "Binarisation: pixel is one with probability" in card
    assert manifest.version in card
    assert manifest.dataset.sha256 in card


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            [],
            (
                "Maximises the ELBO with one reparametrised sample and the closed-form KL term: 2 epochs, batches "
                "of 64, Adam with a step size that falls from 0.001 to 1e-05 along half a cosine, KL weight "
                "rising to 1 over the first 5% of the steps, fresh binarisation at each visit, moving average of "
                "the weights (0.999). The checkpoint with the highest validation ELBO was exported. Seed 0."
            ),
        ),
        (["num_samples=3"], "the ELBO with 3 reparametrised samples and the closed-form KL term:"),
        (["free_nats=0.5"], ", 0.5 nats of KL free in each latent dimension,"),
        (["warm_up_fraction=0", "beta=4"], ", KL weight 4, fresh binarisation"),
        (["gradient=sticking-the-landing"], "the ELBO with the sticking-the-landing gradient of one sample:"),
        (
            ["gradient=score-function", "baseline=leave-one-out", "num_samples=4"],
            "the ELBO with the score-function gradient (baseline: leave-one-out) of 4 samples:",
        ),
        (
            ["bound=importance-weighted", "num_samples=5", "warm_up_fraction=0", "gradient=doubly-reparametrised"],
            "the importance-weighted bound of k = 5, with the doubly-reparametrised gradient:",
        ),
        (
            ["schedule=stages", "ema_decay=0", "selection=last", "precision=bfloat16"],
            (
                "in eight stages, KL weight rising to 1 over the first 5% of the steps, fresh binarisation at "
                "each visit, networks in bfloat16, no average of the weights. The last checkpoint was exported."
            ),
        ),
    ],
)
def test_card_says_how_the_model_was_fitted(
    changes: list[str], words: str, bundle_folder: Path, smoke_run: SmokeRun, evaluation: Evaluation
) -> None:
    """Bound, gradient, schedule and choice of the checkpoint are those of the configuration."""
    config = smoke_run.config.override([f"optimizer.{change}" for change in changes])
    manifest = bundle.read_manifest(str(bundle_folder))
    card = " ".join(model_card(manifest, config, evaluation, picture_seed=0).split())
    assert words in card
    assert ("KL weight" in card) == (config.optimizer.bound == "elbo")


def test_card_says_what_it_is_not_for(bundle_folder: Path) -> None:
    """Licence of the data, limits and the way to call it are there, and no placeholder is left."""
    card = (bundle_folder / bundle.MODEL_CARD).read_text()
    assert all(word in card for word in ("Licence:", "## Limits", "## Use", "onnxruntime.InferenceSession"))
    assert "{latent" not in card


def test_pictures_of_the_card_exist(bundle_folder: Path) -> None:
    """The links of the card lead to files of the bundle."""
    card = (bundle_folder / bundle.MODEL_CARD).read_text()
    for name in ("samples/prior.png", "samples/reconstructions.png"):
        assert f"({name})" in card
        assert (bundle_folder / name).read_bytes().startswith(b"\x89PNG")


def test_command_repeats_the_configuration() -> None:
    """Preset plus overrides give back exactly the configuration that was fitted."""
    config = presets.mnist_mlp().override(["seed=3", "model.hidden_dims=[64, 32]", "data.max_train_rows=null"])
    words = shlex.split(reproduction_command(config))
    assert words[:3] == ["vae-train", "fit", "mnist-mlp"]
    assert words[3::2] == ["--set"] * len(words[4::2])
    assert presets.named(words[2]).override(words[4::2]) == config


def test_command_of_a_model_with_its_own_name_starts_from_a_preset() -> None:
    """A renamed model is repeated from the default preset."""
    words = shlex.split(reproduction_command(presets.digits().override(["name=mine"])))
    assert presets.named(words[2]).override(words[4::2]).name == "mine"
