"""A person sees every figure that was measured, beside what it is compared with, and none that was not."""

from training.bracket import Bracket
from training.evaluate import Evaluation, PixelBounds
from training.evaluation_report import tables, warning
from training.mean_estimate import Estimate
from training.sample_quality import Geometry, ImageSet, Quality


def _estimate(value: float) -> Estimate:
    return Estimate(value=value, standard_error=0.25)


def _quality(*, has_labels: bool) -> Quality:
    scores = {"confidence": 0.5, "diversity": 2.25, "inception_score": 7.5} if has_labels else {}
    return Quality(
        kind="draws",
        features="64 principal components",
        num_components=64,
        num_samples=500,
        seed=0,
        bias=0.37,
        held_out_accuracy=0.975 if has_labels else None,
        references=(ImageSet(name="held-out images", frechet=0.5, **scores),),
        samples=(ImageSet(name="VAE, N(0, I)", frechet=3.25, **scores),),
        reconstruction_errors={"VAE": 1.5},
    )


def _bracket() -> Bracket:
    return Bracket(
        num_images=4,
        num_chains=16,
        num_temperatures=500,
        num_leapfrog_steps=5,
        seed=0,
        nll=_estimate(87.25),
        chain_standard_error=0.125,
        nll_iwae=_estimate(88.5),
        acceptance=0.66,
        drawn_nll_at_most=_estimate(80.75),
        drawn_nll_at_least=_estimate(80.5),
        drawn_gap=_estimate(0.26),
    )


def test_plain_evaluation_is_one_table(evaluation: Evaluation) -> None:
    """Nothing that was not asked for is mentioned, and the limits of the NLL are."""
    (table,) = tables(evaluation)
    text = str(table.rows)
    assert evaluation.pixel_bounds is not None
    assert f"{evaluation.pixel_bounds.independent_pixels.value:.2f}" in text
    assert f"{evaluation.pixel_bounds.binarisation_entropy.value:.2f}" in text
    assert f"{evaluation.nll_iwae.value:.2f}" in text
    assert all(len(row) == len(table.columns) for row in table.rows)


def test_figures_of_other_likelihoods_have_no_such_limits(evaluation: Evaluation) -> None:
    """Nothing is binarised, so nothing is said of it."""
    (table,) = tables(evaluation.model_copy(update={"pixel_bounds": None}))
    assert not any("pixels" in row[0] for row in table.rows)


def test_everything_measured_is_shown(evaluation: Evaluation) -> None:
    """Samples beside references, latents, bracket: each a table with its conditions in the title."""
    geometry = Geometry(
        model="VAE",
        smoothness={"0.5": 0.875},
        smoothness_standard_error={"0.5": 0.01},
        largest_step={"linear": 0.14},
        neighbour_accuracy=0.96,
    )
    whole = evaluation.model_copy(
        update={"sample_quality": (_quality(has_labels=True),), "geometry": geometry, "bracket": _bracket()}
    )
    _, quality, latents, bracket = tables(whole)
    assert quality.rows[1] == ["VAE, N(0, I)", "3.25", "0.50", "2.25", "7.50"]
    assert "n = 500 each; 64 principal components; two sets of one kind are at about 0.37" in quality.title
    assert "classifier right in 97.5%" in quality.title
    assert ["same class after a move of 0.5 deviations of the codes", "87.5%"] in latents.rows
    assert ["largest of ten steps, linear path, median", "0.14 of the way"] in latents.rows
    assert ["NLL, annealed importance sampling", "87.25", "0.25"] in bracket.rows
    assert ["its error from the number of chains alone", "", "0.12"] in bracket.rows
    assert "16 chains through 500 densities" in bracket.title
    for table in (quality, latents, bracket):
        assert all(len(row) == len(table.columns) for row in table.rows)


def test_without_labels_classes_are_not_mentioned(evaluation: Evaluation) -> None:
    """Two columns, and no word of a classifier."""
    _, quality = tables(evaluation.model_copy(update={"sample_quality": (_quality(has_labels=False),)}))
    assert quality.columns == ["images", "Frechet distance"]
    assert quality.rows == [["held-out images", "0.50"], ["VAE, N(0, I)", "3.25"]]
    assert "classifier" not in quality.title


def test_collapse_is_a_warning(evaluation: Evaluation) -> None:
    """With its reason; a healthy model gets none."""
    healthy = evaluation.model_copy(update={"alarms": ()})
    collapsed = evaluation.model_copy(update={"alarms": ("kl",), "kl": _estimate(0.5)})
    assert warning(healthy) is None
    assert "warning: the posterior has collapsed: the KL term is 0.50 nats" in (warning(collapsed) or "")


def test_limits_are_part_of_the_record(evaluation: Evaluation) -> None:
    """What is shown is what is recorded, and comes back from JSON."""
    again = Evaluation.model_validate_json(
        evaluation.model_copy(
            update={"bracket": _bracket(), "sample_quality": (_quality(has_labels=True),)}
        ).to_json()
    )
    assert isinstance(again.pixel_bounds, PixelBounds)
    assert again.bracket == _bracket()
    assert again.sample_quality == (_quality(has_labels=True),)
