"""The order of the study: which experiments, under which headings. The report is read from top to bottom."""

import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Final, NamedTuple

from training.environment import git_commit, hardware, tool_versions
from training.study import (
    autoencoders,
    bound,
    bound_gradients,
    computation_graphs,
    divergences,
    generation,
    gradients,
    inference,
    latent_kinds,
    mixtures,
    quality,
    references,
    simple_models,
    tightness,
    vae_objective,
)
from training.study.claims import Section
from training.study.report import Chapter, Report
from training.study.setup import Study

Experiment = Callable[[Study], Section]


class Plan(NamedTuple):
    """A chapter before its experiments have run."""

    title: str
    introduction: str
    experiments: tuple[Experiment, ...]


PLANS: Final[tuple[Plan, ...]] = (
    Plan(
        "Models with something hidden",
        "What a latent variable is, in models small enough to look at: clusters, answers with several modes, and "
        "densities that are mixtures of simpler ones.",
        (
            simple_models.one_interface,
            mixtures.three_clusters_found,
            mixtures.mixture_density,
            simple_models.mixture_of_simple,
            generation.generative_or_latent,
        ),
    ),
    Plan(
        "Maximum likelihood, and a bound for it",
        "The likelihood of a latent variable model is an integral. Where it can be done, it is the judge of "
        "everything else; where it cannot, a bound takes its place.",
        (
            simple_models.maximum_likelihood,
            bound.two_forms,
            divergences.entropy,
            divergences.asymmetry,
            bound.evidence_identity,
            bound.alternation,
            bound.importance_weighting,
        ),
    ),
    Plan(
        "Inference: one posterior for each datapoint, or one network for all",
        "The bound wants a distribution over the latents of every image. It can be stored for each of them, or "
        "computed from the image.",
        (
            inference.inference_for_each_image,
            inference.cost_of_one_q_for_each_image,
            inference.amortised_inference,
        ),
    ),
    Plan(
        "Gradients of an expectation",
        "Both ways of inference climb the bound, whose gradient is that of an expectation under a distribution "
        "that moves. There are two ways to estimate it, and they differ by orders of magnitude in noise.",
        (
            divergences.expected_log_prior,
            gradients.score_function,
            gradients.reparametrised,
            computation_graphs.two_graphs,
            gradients.variance_in_closed_form,
            gradients.sine_counterexample,
            latent_kinds.categorical,
            latent_kinds.other_families,
            bound_gradients.sticking_the_landing,
            bound_gradients.importance_weighted,
        ),
    ),
    Plan(
        "The variational autoencoder",
        "All parts together: a decoder with a simple prior, an encoder, the bound with a closed-form divergence, "
        "and gradients that pass through the draw of the latents.",
        (
            vae_objective.learnt_parts,
            vae_objective.objective,
            quality.trained_models,
            quality.collapsed_model,
            bound_gradients.image_model_variance,
            bound_gradients.training_with_each,
            latent_kinds.binary_vae,
        ),
    ),
    Plan(
        "How tight is the bound?",
        "What the bound misses is the divergence from q to the true posterior. On a trained model it can be "
        "measured, and divided into what the family of q cannot reach and what the encoder does not find.",
        (
            tightness.exact_gap_in_the_plane,
            tightness.two_parts_of_the_gap,
            tightness.bound_against_samples,
            tightness.annealed_bounds,
        ),
    ),
    Plan(
        "Generation, and autoencoders without a distribution",
        "Draws from the prior become images. What the distribution over the latents is good for shows beside an "
        "autoencoder of the same networks that has none.",
        (
            generation.samples,
            autoencoders.autoencoder_against_vae,
            autoencoders.codes_in_the_plane,
            autoencoders.interpolation,
            autoencoders.smoothness,
        ),
    ),
    Plan(
        "Where to read on",
        "The article rests on these.",
        (references.references,),
    ),
)
"""The whole study, in the order in which it is read."""


def run(study: Study, plans: Sequence[Plan] = PLANS) -> Report:
    """Do every experiment in order and return what they found.

    Args:
        study: How large; told about each experiment.
        plans: Which chapters.
    """
    began = time.monotonic()
    num_experiments = sum(len(plan.experiments) for plan in plans)
    chapters, number = [], 0
    for plan in plans:
        sections = []
        for experiment in plan.experiments:
            number += 1
            started = time.monotonic()
            section = experiment(study)
            sections.append(section)
            num_failed = sum(not check.passed for check in section.checks)
            verdict = f"{num_failed} FAILED" if num_failed else "pass"
            study.say(
                f"[{number}/{num_experiments}] {section.title}: {len(section.checks)} checks, {verdict}, "
                f"{time.monotonic() - started:.1f} s"
            )
        chapters.append(Chapter(plan.title, plan.introduction, tuple(sections)))
    return Report(tuple(chapters), _setting(study, time.monotonic() - began))


def _setting(study: Study, seconds: float) -> tuple[tuple[str, str], ...]:
    """Return what a reader needs to repeat the study and to judge its times."""
    size = "full" if study.is_full else "quick"
    versions = ", ".join(f"{tool} {version}" for tool, version in tool_versions().items())
    return (
        ("command", f"`vae-train study --{size} --seed {study.seed}`"),
        ("data", "MNIST and Fashion-MNIST" if study.is_full else "8x8 digits of scikit-learn"),
        ("finished", datetime.now(UTC).isoformat(timespec="seconds")),
        ("took", f"{seconds:.0f} s, less what earlier runs in the same folder had trained"),
        ("hardware", hardware(study.device)),
        ("versions", versions),
        ("commit", git_commit() or "not in a repository"),
    )
