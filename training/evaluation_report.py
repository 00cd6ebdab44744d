"""An evaluation as tables for a person: every figure beside what it means and what it is compared with."""

from collections.abc import Iterator
from typing import Final, NamedTuple

from training import collapse
from training.bracket import Bracket
from training.evaluate import Evaluation
from training.mean_estimate import Estimate
from training.sample_quality import Geometry, ImageSet, Quality

_KINDS: Final = {
    "means": "expected images against grey ones",
    "draws": "draws of zeros and ones against binarised images",
}


class Table(NamedTuple):
    """Cells of text; the first line is the head."""

    title: str
    columns: list[str]
    rows: list[list[str]]


def tables(evaluation: Evaluation) -> Iterator[Table]:
    """Yield the figures, then whatever else was measured."""
    yield _figures(evaluation)
    yield from (_quality(quality) for quality in evaluation.sample_quality)
    if evaluation.geometry is not None:
        yield _geometry(evaluation.geometry)
    if evaluation.bracket is not None:
        yield _bracket(evaluation.bracket)


def warning(evaluation: Evaluation) -> str | None:
    """Return what a person must know, if there is anything."""
    if not evaluation.has_collapsed:
        return None
    said = collapse.described(
        evaluation.alarms,
        kl=evaluation.kl.value,
        active_units=evaluation.active_units,
        latent_dim=evaluation.latent_dim,
    )
    return f"warning: {said}"


def _figures(evaluation: Evaluation) -> Table:
    rows = [
        _row("ELBO", evaluation.elbo),
        _row("log-likelihood", evaluation.log_likelihood),
        _row("KL", evaluation.kl),
        _row(f"NLL, IWAE bound, k = {evaluation.num_importance_samples}", evaluation.nll_iwae),
    ]
    if evaluation.pixel_bounds is not None:
        rows.append(_row("no NLL is below: entropy of the pixels", evaluation.pixel_bounds.binarisation_entropy))
        rows.append(_row("useless NLL: independent pixels", evaluation.pixel_bounds.independent_pixels))
    rows.append(["active units", f"{evaluation.active_units} of {evaluation.latent_dim}", ""])
    title = f"{evaluation.split}, n = {evaluation.num_images}, nats per image"
    return Table(title, ["figure", "value", "standard error"], rows)


def _quality(quality: Quality) -> Table:
    columns = ["images", "Frechet distance", "confidence", "diversity", "inception score"]
    rows = [_image_set(found) for found in (*quality.references, *quality.samples)]
    knows = "" if quality.held_out_accuracy is None else f"; classifier right in {quality.held_out_accuracy:.1%}"
    title = (
        f"{_KINDS[quality.kind]}, n = {quality.num_samples} each; {quality.features}; "
        f"two sets of one kind are at about {quality.bias:.2f}{knows}"
    )
    used = columns if quality.held_out_accuracy is not None else columns[:2]
    return Table(title, used, [row[: len(used)] for row in rows])


def _image_set(found: ImageSet) -> list[str]:
    scores = (found.confidence, found.diversity, found.inception_score)
    return [found.name, f"{found.frechet:.2f}", *("" if score is None else f"{score:.2f}" for score in scores)]


def _geometry(geometry: Geometry) -> Table:
    rows = [
        [f"same class after a move of {tau} deviations of the codes", _share(share)]
        for tau, share in geometry.smoothness.items()
    ]
    rows += [
        [f"largest of ten steps, {path} path, median", f"{size:.2f} of the way"]
        for path, size in geometry.largest_step.items()
    ]
    rows.append(["class of five nearest codes is right (not smoothness)", _share(geometry.neighbour_accuracy)])
    return Table("latents, test images", ["figure", "value"], rows)


def _bracket(found: Bracket) -> Table:
    rows = [
        _row("NLL, IWAE bound, these images", found.nll_iwae),
        _row("NLL, annealed importance sampling", found.nll),
        ["its error from the number of chains alone", "", f"{found.chain_standard_error:.2f}"],
        _row("images drawn from the model: NLL at most", found.drawn_nll_at_most),
        _row("the same images: NLL at least", found.drawn_nll_at_least),
        _row("gap: the chains are off by at most, on average", found.drawn_gap),
    ]
    title = (
        f"log p(x) bracketed, n = {found.num_images}, {found.num_chains} chains through {found.num_temperatures} "
        f"densities, {found.acceptance:.0%} of moves accepted, nats per image"
    )
    return Table(title, ["figure", "value", "standard error"], rows)


def _row(name: str, estimate: Estimate) -> list[str]:
    return [name, f"{estimate.value:.2f}", f"{estimate.standard_error:.2f}"]


def _share(share: float) -> str:
    return f"{share:.1%}"
