"""Rows 1, 4 and 6: the laws of the interface, the integral over z, the known maxima; and that errors are seen."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.study.sections import assert_shown
from training.models.gaussian_mixture import GaussianMixture
from training.models.linear_vae import LinearVAE
from training.models.ppca import ProbabilisticPCA
from training.models.vae import VAE
from training.study import numerics, simple_models
from training.study.claims import Check, Figure, Section, Table
from training.study.setup import Study
from training.study.simple_models import DIGITS_MAXIMA


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """Return a quick study."""
    return Study(tmp_path)


@pytest.fixture(scope="module")
def likelihood_section(tmp_path_factory: pytest.TempPathFactory) -> Section:
    """Return the section on maximum likelihood, whose fits take some seconds."""
    return simple_models.maximum_likelihood(Study(tmp_path_factory.mktemp("study")))


def _failed(checks: tuple[Check, ...]) -> list[str]:
    return [check.name for check in checks if not check.passed]


def test_one_interface(study: Study) -> None:
    """Four models keep the laws of the three methods; the table is of the classes."""
    section = simple_models.one_interface(study)
    assert_shown(section, 1)
    [table] = [block for block in section.blocks if isinstance(block, Table)]
    assert len(table.rows) == 4
    assert table.rows[3][2:5] == ("`log_prob(data, noise)`", "`elbo(data, noise)`", "`sample(num, generator)`")


def test_a_model_without_the_interface_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class that lost one of the methods does not pass as a model."""
    monkeypatch.setattr(VAE, "sample", None)
    checks = simple_models.MODELS
    assert not all(callable(getattr(entry.kind, name)) for entry in checks for name in simple_models.INTERFACE)
    with pytest.raises(TypeError):
        simple_models.one_interface(study)


def test_a_bound_above_the_density_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bound with the sign of the entropy turned round breaks Jensen's inequality and is not tight."""

    def broken(model: GaussianMixture, data: Tensor, q: Tensor) -> Tensor:
        return (q * model.log_joint(data) + 2 - torch.xlogy(q, q)).sum(dim=1)

    monkeypatch.setattr(GaussianMixture, "elbo", broken)
    assert _failed(simple_models.one_interface(study).checks) == [
        "Gaussian mixture: largest bound - log p, random $q$",
        "Gaussian mixture: largest error at the best $q$",
    ]


def test_samples_of_another_distribution_are_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples a tenth too wide have another mean log density than the model says."""
    sample = ProbabilisticPCA.sample
    monkeypatch.setattr(
        ProbabilisticPCA,
        "sample",
        lambda model, num, generator: model.mean + 1.1 * (sample(model, num, generator) - model.mean),
    )
    assert _failed(simple_models.one_interface(study).checks) == ["probabilistic PCA: mean log p of its samples"]


def test_mixture_of_simple(study: Study) -> None:
    """The spiral is a density, and integrals over one and two latents are log p."""
    assert_shown(simple_models.mixture_of_simple(study), 4)


def test_a_wrong_prior_in_the_integral_is_found(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    """A volume element that is one percent off shows in both integrals."""
    grid = numerics.grid

    def too_large(low: float, high: float, num: int, *, dim: int = 1) -> numerics.Grid:
        return grid(low, high, num, dim=dim)._replace(volume=1.01 * ((high - low) / num) ** dim)

    monkeypatch.setattr(numerics, "grid", too_large)
    assert len(_failed(simple_models.integral_checks(study))) == 2


def test_few_parts_are_less_than_the_integral() -> None:
    """A mixture of few has a lower expected log density than the mixture of all that it approximates."""
    plane = numerics.grid(-4, 4, 80, dim=2)
    exact = simple_models.spiral_log_density(plane.points)
    losses = [
        plane.expectation(exact, exact - simple_models.spiral_log_density(plane.points, num_components=num)).item()
        for num in (4, 16, 64, 600)
    ]
    assert losses[0] > losses[1] > losses[2] > 0
    assert losses[3] == 0


@pytest.mark.slow
def test_maximum_likelihood(likelihood_section: Section) -> None:
    """Known maxima for all six sizes, reached by gradient; the linear VAE reaches them where it was fitted."""
    assert_shown(likelihood_section, 6)
    names = [check.name for check in likelihood_section.checks]
    assert sum(name.startswith("largest mean log p, $d_z") for name in names) == len(DIGITS_MAXIMA)
    assert sum(isinstance(block, Figure) for block in likelihood_section.blocks) == 2


def test_equivalent_rows_have_the_likelihood_of_all() -> None:
    """Mean log p and the mean bound of any linear q agree on 128 rows and on 1797."""
    digits = simple_models.grey_digits()
    rows = simple_models.equivalent_rows(digits)
    source = torch.Generator().manual_seed(0)
    vae = LinearVAE(64, 5, source)
    assert rows.shape == (128, 64)
    with torch.no_grad():
        for log_density in (vae.elbo, vae.as_ppca().log_prob):
            # Values near -50, in which 1797 terms are added up.
            assert log_density(rows).mean().item() == pytest.approx(log_density(digits).mean().item(), abs=1e-9)


def test_short_fits_and_wrong_maxima_are_found() -> None:
    """A fit that ends early, a bound above log p, and a wrong closed form each fail their own check."""
    maximum, variance = DIGITS_MAXIMA[4]
    good = simple_models.Rung(4, maximum, variance, maximum, None, (maximum - 1e-5, maximum - 1e-6))
    assert not _failed(tuple(simple_models.rung_checks((good,))))
    spoilt = {
        "largest mean log p, $d_z = 4$, closed form": good._replace(
            maximum=maximum + 1e-5, by_gradient=maximum + 1e-5
        ),
        "log p by gradient, largest distance from the maximum": good._replace(by_gradient=maximum - 1e-4),
        "what the ELBO of a linear VAE lacks, at most": good._replace(linear=(maximum - 1e-2, maximum - 1e-3)),
        "linear VAE: ELBO ≤ log p ≤ maximum": good._replace(linear=(maximum - 1e-6, maximum - 1e-5)),
        "its noise variance, largest error": good._replace(variance=1.001 * variance),
    }
    for name, rung in spoilt.items():
        assert _failed(tuple(simple_models.rung_checks((rung,)))) == [name]


def test_sampling_the_prior_is_low_and_the_posterior_exact() -> None:
    """With one latent a thousand samples of the prior nearly do; with sixteen they miss tens of nats."""
    study, digits = Study(Path()), simple_models.grey_digits()
    misses = {miss.latent_dim: miss for miss in simple_models.prior_sampling(study, digits)}
    assert abs(misses[1].from_prior[1000]) < 0.1
    assert misses[16].from_prior[1000] > 10
    assert all(miss.from_prior[10] > miss.from_prior[1000] for miss in misses.values())
    assert all(miss.from_posterior < 1e-8 for miss in misses.values())
    assert math.isfinite(misses[32].from_prior[10])
