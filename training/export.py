"""Run folder -> bundle: graphs, gates, known answers, figures, model card, pictures. All or nothing.

Two exports of one run are byte-identical: nothing in a bundle depends on the time or the place of the
export, only on the run, its recorded evaluation and the versions of the tools.
"""

from pathlib import Path
from typing import Final

import numpy as np
import torch

from serving import bundle
from training import checkpoint, parity, pictures
from training.checkpoint import Checkpoint, RunFolder, averaged_model
from training.data import Dataset
from training.environment import tool_versions
from training.evaluate import Evaluation
from training.graphs import OPSET, Graph, MeanDecoder, PixelEncoder, decoder_graph, encoder_graph
from training.model_card import model_card
from training.models.vae import VAE
from training.noise import Stream, normal

PICTURE_SEED: Final = 0
"""Seed of samples/prior.png: the service's Sample with this seed decodes the same latents."""

_PRIOR_PICTURES: Final = 64
_RECONSTRUCTION_PICTURES: Final = 12
_PARITY_ROWS: Final = 256


def export(
    run: RunFolder, dataset: Dataset, evaluation: Evaluation, directory: Path, *, name: str | None = None
) -> bundle.Manifest:
    """Write the best checkpoint of a run as a bundle.

    Args:
        run: The run folder.
        dataset: The data set of the run: gates and pictures use its test split.
        evaluation: Figures of the best checkpoint on the test split.
        directory: Where to write; an older bundle there is replaced.
        name: Name of the model; default: that of the configuration.

    Returns:
        The manifest that was written.

    Raises:
        GraphRejected: If a graph is not fit to be served.
        ParityFailed: If ONNX Runtime does not answer as PyTorch does.
        BatchDependence: If the answer for a row depends on the other rows.
        BundleError: If the folder exists and is not a bundle.
    """
    best, last = checkpoint.load(run.best), checkpoint.load(run.last)
    vae = averaged_model(best, dataset.data_shape, torch.device("cpu"))
    encoder, decoder = encoder_graph(vae), decoder_graph(vae)
    differences = _pass_gates(vae, encoder, decoder, dataset)
    manifest = bundle.Manifest(
        name=name or best.config.name,
        version=bundle.version_of(encoder.content, decoder.content),
        created=last.saved,
        data_shape=dataset.data_shape,
        latent_dim=vae.latent_dim,
        likelihood=best.config.model.likelihood,
        num_levels=vae.decoder.num_levels,
        opset=OPSET,
        ir_version=encoder.ir_version,
        tool_versions=tool_versions(),
        dataset=bundle.Dataset(name=dataset.name, split=dataset.split, sha256=dataset.sha256),
        config_sha256=best.config.sha256(),
        seed=best.config.seed,
        metrics=evaluation.metrics(),
        parity=differences,
        encoder=_graph_file(encoder),
        decoder=_graph_file(decoder),
        golden=_known_answers(encoder, decoder, dataset.data_shape, vae.latent_dim),
    )
    bundle.write(
        directory,
        manifest=manifest,
        encoder=encoder.content,
        decoder=decoder.content,
        extra=_extras(manifest, best, evaluation, vae, dataset),
    )
    return manifest


def _pass_gates(vae: VAE, encoder: Graph, decoder: Graph, dataset: Dataset) -> dict[str, float]:
    """Return the largest differences; raise if a gate fails."""
    data = dataset.test[:_PARITY_ROWS].astype(np.float32)
    # The decoder meets encoded images when it reconstructs and the prior when it samples.
    encoded = parity.Session(encoder).run(data)["mean"]
    prior = normal(PICTURE_SEED, len(data), vae.latent_dim, stream=Stream.PRIOR).numpy()
    latents = np.concatenate((encoded, prior))
    differences = parity.require_parity(encoder, PixelEncoder(vae.encoder), data)
    differences |= parity.require_parity(decoder, MeanDecoder(vae.decoder), latents)
    num_rows = max(parity.BATCHES)
    parity.require_batch_independence(encoder, data[:num_rows])
    parity.require_batch_independence(decoder, prior[:num_rows])
    return differences


def _graph_file(graph: Graph) -> bundle.GraphFile:
    return bundle.graph_file(f"{graph.name}.onnx", graph.content, inputs=graph.inputs, outputs=graph.outputs)


def _known_answers(
    encoder: Graph, decoder: Graph, data_shape: tuple[int, ...], latent_dim: int
) -> tuple[bundle.KnownAnswer, ...]:
    """Return what ONNX Runtime, which serves, answers for the golden rows."""
    encoded = parity.Session(encoder).run(bundle.golden_data(data_shape))
    decoded = parity.Session(decoder).run(bundle.golden_latents(latent_dim))
    return (
        *(bundle.known_answer("encoder", output, values) for output, values in encoded.items()),
        *(bundle.known_answer("decoder", output, values) for output, values in decoded.items()),
    )


def _extras(
    manifest: bundle.Manifest, best: Checkpoint, evaluation: Evaluation, vae: VAE, dataset: Dataset
) -> dict[str, bytes]:
    card = model_card(manifest, best.config, evaluation, picture_seed=PICTURE_SEED)
    prior = pictures.prior_samples(vae, _PRIOR_PICTURES, seed=PICTURE_SEED)
    pairs = pictures.reconstructions(vae, dataset.test[:_RECONSTRUCTION_PICTURES])
    return {
        bundle.MODEL_CARD: card.encode(),
        "samples/prior.png": pictures.png(prior),
        "samples/reconstructions.png": pictures.png(pairs.flatten(0, 1), num_columns=_RECONSTRUCTION_PICTURES),
    }
