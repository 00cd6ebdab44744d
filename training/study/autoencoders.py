"""The autoencoder against the VAE: samples, codes, smoothness (row 27), and interpolation (row 28)."""

from typing import Final, NamedTuple

import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Ellipse
from torch import Tensor

from training import data, latent_geometry, sample_quality
from training.coders import Coder, intensities
from training.config import TrainingConfig
from training.data import SplitLabels
from training.idx import Labels
from training.latent_geometry import CodeGaussian
from training.models.autoencoder import Autoencoder
from training.noise import Stream, normal
from training.sample_quality import Geometry, ImageSet, Quality
from training.study import claims, figures
from training.study.claims import Check, Checks, Correction, Figure, Section, Table
from training.study.generation import quality_table
from training.study.image_grids import draw_images, label_lines
from training.study.image_models import autoencoder, main_config, plane_config
from training.study.setup import Study, Trained

_VAE, _AE = "VAE", "autoencoder"
_COLORS: Final = {_VAE: figures.PALETTE[0], _AE: figures.PALETTE[1]}

_NUM_SHOWN: Final = 30
_NUM_STEPS: Final = 11
_NUM_PATHS: Final = 3

_HALF_A_TENTH: Final = (0.05, 0.95)
"""Quantiles of the prior between which the manifold is drawn."""


def autoencoder_against_vae(study: Study) -> Section:
    """Row 27: the same networks with and without a distribution; what each can do."""
    trained = study.trained(main_config(study))
    coders = _coders(study, trained)
    labels = _labels(study, trained)
    quality = sample_quality.measure(coders, trained.dataset, labels, seed=study.seed)
    return Section(
        "Autoencoder and VAE: what each can generate",
        (27,),
        (
            _AGAINST,
            _against_figure(study, trained, coders),
            quality_table(
                quality,
                f"Grey images, {quality.num_samples} in each set, against training images; features: "
                f"{quality.features}; "
                f"the classifier names {quality.held_out_accuracy:.1%} of unseen images rightly.",
            ),
            Table(
                ("model", "squared error of reconstructed test images, summed over the pixels"),
                tuple((name, f"{error:.3f}") for name, error in quality.reconstruction_errors.items()),
            ),
            _AGAINST_SEEN,
            Correction(
                "A standard autoencoder cannot create new samples.",
                "It defines no distribution of codes, so that there is nothing to draw from; decoding $N(0, I)$ "
                "gives "
                f"poor images (distance {_of(quality, _AE, fitted=False).frechet:.1f}). A Gaussian *fitted to its "
                f"codes* "
                f"makes it a sampler ({_of(quality, _AE, fitted=True).frechet:.1f}; the VAE, given the same help, "
                f"{_of(quality, _VAE, fitted=True).frechet:.1f}). What it lacks is a density that was part of the "
                f"training.",
            ),
            Checks(_against_checks(quality)),
        ),
    )


def smoothness(study: Study) -> Section:
    """Row 27: how far a code can be moved before its image turns into something else."""
    plane, main = (_geometries(study, config(study)) for config in (plane_config, main_config))
    return Section(
        "Autoencoder and VAE: what lies around a code",
        (27,),
        (
            _SMOOTHNESS,
            _smoothness_figure(plane, main),
            _smoothness_seen(plane, main),
            _NEIGHBOURS,
            Table(
                ("model", "smoothness up to one deviation", "largest step, median", "class by nearest codes"),
                tuple(
                    (
                        f"{geometry.model}, {geometries.title}",
                        f"{_smooth(geometry):.1%}",
                        f"{geometry.largest_step['linear']:.2f}",
                        f"{geometry.neighbour_accuracy:.1%}",
                    )
                    for geometries in (plane, main)
                    for geometry in (geometries.vae, geometries.plain)
                ),
                "Smoothness: share of moved codes whose image keeps its class, mean over the distances up to one. "
                "Largest "
                "step: of ten between two decoded images, over the distance of the ends; 0.1 is even, 1 a jump.",
            ),
            Checks(_smoothness_checks(plane, main)),
        ),
    )


def codes_in_the_plane(study: Study) -> Section:
    """Row 27: codes of both models in two dimensions, and what the plane decodes to."""
    trained = study.trained(plane_config(study))
    coders = _coders(study, trained)
    labels = _labels(study, trained)
    scales = {name: _spread(coder, trained) for name, coder in coders.items()}
    return Section(
        "Points and distributions: two latent dimensions",
        (27, 26),
        (
            _POINTS.format(vae=scales[_VAE], autoencoder=scales[_AE]),
            _codes_figure(trained, coders, labels),
            _MANIFOLD,
            _manifold_figure(coders),
            Checks(
                (
                    claims.between(
                        "VAE: mean square of a latent, E[mu^2 + sigma^2], mean over both dimensions",
                        _second_moment(trained),
                        0.5,
                        2.0,
                        source="the KL term keeps the latents of all images together near N(0, 1)",
                        unit="",
                    ),
                    claims.at_least(
                        "spread of the autoencoder's codes over that of the VAE's",
                        scales[_AE] / scales[_VAE],
                        1.5,
                        source="nothing in its loss says where codes should lie",
                        unit="",
                    ),
                )
            ),
        ),
    )


def interpolation(study: Study) -> Section:
    """Row 28: decoded paths between images, along lines and arcs."""
    trained = study.trained(main_config(study))
    coders = _coders(study, trained)
    pairs = _pairs(study, trained)
    paths = _paths(coders, pairs)
    return Section(
        "Interpolation",
        (28,),
        (
            _INTERPOLATION,
            _interpolation_figure(paths),
            _steps_table(paths),
            Checks(_interpolation_checks(coders, pairs, paths)),
        ),
    )


_AGAINST: Final = r"""
Take the VAE's two networks and leave out what is random. The encoder gives one code, $z = \mathrm{encoder}(x)$,
the decoder an image, and the loss is the error of the reconstruction, with no KL term: an **autoencoder**. The
VAE maps an image to a *distribution* and must decode all of it well; and it is charged for every distribution
that differs from the prior. Both models below have the same networks and started from the same weights.
"""

_AGAINST_SEEN: Final = r"""
Decoding draws from $N(0, I)$ is what the VAE was trained for: its samples look like data. The autoencoder never
promised to have codes there. But the comparison is only fair with a third case: fit a Gaussian to the *codes*
of the training images, and draw from that. The autoencoder then becomes a usable sampler. The VAE does not need
that help, because its KL term has brought the latents to the prior in advance. It need not gain from it either:
the codes are posterior *means*, which spread less than the latents that its decoder was trained on. The
autoencoder reconstructs better: it has no noise to fight and no divergence to pay.
"""

_SMOOTHNESS: Final = r"""
A VAE decodes not a point but a cloud, $\mu + \sigma \epsilon$, to the same image. So its decoder must be smooth
around each code, where an autoencoder's is free to jump. To measure it without asking how wide the codes are
spread, move a code by $\tau$ standard deviations $s$ *of all codes*, $z = \mu + \tau s \epsilon$, and ask the
classifier whether the decoded image still shows the same digit.
"""

_NEIGHBOURS: Final = r"""
One must not confuse this with how well the codes of different digits are *apart*, which the last column shows:
how often the five nearest codes name the class of a test image rightly. Codes may lie in clean clusters with
nothing in between; an autoencoder can win that game and still have a rough decoder.
"""

_POINTS: Final = r"""
With two latent dimensions the codes can be drawn. The autoencoder puts every image on a *point*, anywhere it
likes: its codes spread by {autoencoder:.1f}, along arms of their own. The VAE puts every image on a
small *distribution* (ellipses: one standard deviation, of some images). Where ellipses overlap the decoder must
serve several images at once, so that neighbours have to look alike; and the KL term packs all of them around
zero, with a spread of {vae:.1f}.
"""

_MANIFOLD: Final = r"""
What does the plane decode to? Take a grid of points that cuts the prior $N(0, I)$ into equal shares and decode
each. The VAE's digits fill it, each kind with a region of its own, and flow into each other. For the
autoencoder the same points are a small spot among its codes: which digits lie there is an accident, and the
others are out of reach.
"""

_INTERPOLATION: Final = r"""
Encode two images, walk from one code to the other, and decode on the way. The straight line is $(1 - t) \mu_a +
t \mu_b$. In many dimensions draws from $N(0, I)$ lie close to a sphere, and the middle of a line is nearer to
the centre than draws are; the *spherical* path goes around,
$$z(t) = \frac{\sin((1 - t) \omega)}{\sin \omega} \mu_a + \frac{\sin(t \omega)}{\sin \omega} \mu_b,$$
with $\omega$ the angle between the codes. A good model changes by small steps and shows an image everywhere.
"""


class _Pairs(NamedTuple):
    """Images to walk between, shape (n, *data_shape) each."""

    start: Tensor
    end: Tensor


class _DecodedPath(NamedTuple):
    """Decoded paths of one model."""

    model: str
    shape: latent_geometry.Path
    images: Tensor

    @property
    def name(self) -> str:
        """Model and shape of the path."""
        return f"{self.model}, {'line' if self.shape == 'linear' else 'arc'}"


def _labels(study: Study, trained: Trained) -> SplitLabels:
    return data.load_labels(trained.config.data, data_dir=study.data_dir)


def _coders(study: Study, trained: Trained) -> dict[str, Coder]:
    plain: Autoencoder = autoencoder(study, trained.config)
    return {_VAE: Coder.of(trained.vae), _AE: Coder.of(plain)}


def _of(quality: Quality, model: str, *, fitted: bool) -> ImageSet:
    """Return the samples of a model: of N(0, I), or of a Gaussian fitted to its codes."""
    of_prior, of_fitted = (found for found in quality.samples if found.name.startswith(f"{model}, "))
    return of_fitted if fitted else of_prior


def _against_checks(quality: Quality) -> tuple[Check, ...]:
    vae, plain = _of(quality, _VAE, fitted=False), _of(quality, _AE, fitted=False)
    fitted = _of(quality, _AE, fitted=True)
    errors = quality.reconstruction_errors
    confidences = [found.confidence or 0.0 for found in (vae, plain)]
    return (
        claims.at_least(
            "Frechet distance of samples from N(0, I), autoencoder over VAE",
            plain.frechet / vae.frechet,
            1.5,
            source="only the VAE was trained to decode such latents",
            unit="",
        ),
        claims.at_least(
            "classifier's confidence in samples from N(0, I), VAE less autoencoder",
            confidences[0] - confidences[1],
            0.0,
            source="only the VAE was trained to decode such latents",
            unit="",
        ),
        claims.at_most(
            "autoencoder: Frechet distance with a Gaussian fitted to the codes, over that with N(0, I)",
            fitted.frechet / plain.frechet,
            0.7,
            source="a density of its codes makes it a sampler",
            unit="",
        ),
        claims.at_most(
            "reconstruction error, autoencoder over VAE",
            errors[_AE] / errors[_VAE],
            1.0,
            source="no noise to fight, no divergence to pay",
            unit="",
        ),
    )


class _Geometries(NamedTuple):
    """Both models of one configuration."""

    title: str
    vae: Geometry
    plain: Geometry


def _geometries(study: Study, config: TrainingConfig) -> _Geometries:
    trained = study.trained(config)
    vae, plain = sample_quality.measure_geometry(
        _coders(study, trained), trained.dataset, _labels(study, trained), seed=study.seed
    )
    return _Geometries(f"{config.model.latent_dim} latents", vae, plain)


def _smooth(geometry: Geometry) -> float:
    """Return the mean share of kept classes over the distances up to one deviation: local smoothness."""
    shares = [share for tau, share in geometry.smoothness.items() if float(tau) <= 1]
    return sum(shares) / len(shares)


def _smoothness_seen(plane: _Geometries, main: _Geometries) -> str:
    """Return in words what was found; it is not the same for every data set."""
    said = " ".join(
        f"With {geometries.title} the class is kept in {_smooth(geometries.vae):.0%} of the cases by the VAE and "
        f"in "
        f"{_smooth(geometries.plain):.0%} by the autoencoder, mean over the distances up to one."
        for geometries in (plane, main)
    )
    if _smooth(main.vae) >= _smooth(main.plain):
        return said
    return (
        f"{said} So the VAE does not lead everywhere, though it is often said to. A likely reason: its codes "
        "fill the prior without gaps, so the clouds of two classes touch, and a move of one deviation of all "
        "codes takes many a code across. An autoencoder is free to leave gaps. The measure sees the decoder's "
        "smoothness *and* the distance to the borders of classes; in two dimensions, where the autoencoder has "
        "to fold its codes, the first decides."
    )


def _smoothness_checks(plane: _Geometries, main: _Geometries) -> tuple[Check, ...]:
    # With more latents the VAE need not lead, neither on 8x8 digits nor on MNIST: see `_smoothness_seen`.
    leads = claims.at_least(
        f"{plane.title}: share of moved codes that keep their class, VAE less autoencoder",
        _smooth(plane.vae) - _smooth(plane.plain),
        0.0,
        source="a decoder that serves clouds is smooth around them; distances up to one deviation",
        unit="",
    )
    shares = [
        list(geometry.smoothness.values())
        for geometries in (plane, main)
        for geometry in (geometries.vae, geometries.plain)
    ]
    return (
        leads,
        claims.at_most(
            f"{plane.title}: largest step of a walk, median, VAE over autoencoder",
            plane.vae.largest_step["linear"] / plane.plain.largest_step["linear"],
            1.0,
            source="gradual steps, no jumps",
            unit="",
        ),
        claims.holds(
            "the share falls with the distance, for all models",
            all(values == sorted(values, reverse=True) for values in shares),
            source="far away is another image",
        ),
    )


def _spread(coder: Coder, trained: Trained) -> float:
    """Return the root of the mean variance of the codes of test images."""
    return float(coder.encode(intensities(trained.dataset.test)).var(dim=0).mean().sqrt())


def _second_moment(trained: Trained) -> float:
    images = intensities(trained.dataset.test).to(next(trained.vae.parameters()).device)
    mean, log_var = trained.vae.posterior(images)
    return float((mean.square() + log_var.exp()).mean())


def _pairs(study: Study, trained: Trained) -> _Pairs:
    """Return pairs of test images of different classes."""
    labels = _labels(study, trained).test
    images = intensities(trained.dataset.test)
    half = len(images) // 2
    differ = [row for row in range(half) if labels[row] != labels[half + row]]
    return _Pairs(images[differ], images[[half + row for row in differ]])


def _paths(coders: dict[str, Coder], pairs: _Pairs) -> tuple[_DecodedPath, ...]:
    return tuple(
        _DecodedPath(
            name, shape, latent_geometry.interpolate(coder, *pairs, num_steps=_NUM_STEPS, path=shape).images
        )
        for name, coder in coders.items()
        for shape in ("linear", "spherical")
    )


def _interpolation_checks(
    coders: dict[str, Coder], pairs: _Pairs, paths: tuple[_DecodedPath, ...]
) -> tuple[Check, ...]:
    ends = [
        torch.equal(path.images[:, place], coders[path.model].reconstruct(side))
        for path in paths
        for place, side in ((0, pairs.start), (-1, pairs.end))
    ]
    largest = float(latent_geometry.largest_steps(paths[0].images).median())
    return (
        claims.holds(
            "both ends of every path equal the reconstructions, bit for bit",
            all(ends),
            source="both decode the same codes",
        ),
        claims.between(
            "VAE, line: largest of ten steps over the distance of the ends, median",
            largest,
            1 / (_NUM_STEPS - 1),
            0.5,
            source="a tenth is an even walk, one is a jump",
            unit="",
        ),
    )


def _steps_table(paths: tuple[_DecodedPath, ...]) -> Table:
    rows = []
    for path in paths:
        steps = latent_geometry.largest_steps(path.images)
        rows.append((path.name, *(f"{float(steps.quantile(share)):.2f}" for share in (0.5, 0.95))))
    return Table(
        ("path", "largest step, median", "largest step, 95 % of pairs below"),
        tuple(rows),
        f"The largest of {_NUM_STEPS - 1} steps between decoded images, over the distance of the two ends; "
        f"{1 / (_NUM_STEPS - 1):g} is an even walk, 1 a jump. {len(paths[0].images)} pairs of test images of "
        "different classes.",
    )


def _against_figure(study: Study, trained: Trained, coders: dict[str, Coder]) -> Figure:
    made = figures.figure(height=4.9)
    panels = figures.axes(made, 2, 3)
    train = intensities(trained.dataset.train)
    for line, (name, coder) in zip(panels, coders.items(), strict=True):
        noise = normal(study.seed, _NUM_SHOWN, coder.latent_dim, stream=Stream.PRIOR)
        fitted = CodeGaussian(coder.encode(train)).sample(_NUM_SHOWN, study.seed)
        test = intensities(trained.dataset.test[: _NUM_SHOWN // 2])
        side_by_side = torch.stack((test, coder.reconstruct(test)), dim=1).flatten(end_dim=1)
        shown = {"N(0, I)": coder.decode(noise), "fitted Gaussian": coder.decode(fitted), "pairs": side_by_side}
        for where, (title, images) in zip(line, shown.items(), strict=True):
            draw_images(where, images, num_columns=6, title=f"{name}, {title}")
    return Figure(
        "autoencoder-against-vae",
        "Above the VAE, below the autoencoder with the same networks. Left: decoded draws from $N(0, I)$. Middle: "
        "from a Gaussian "
        "fitted to the codes of the training images. Right: pairs of a test image and its reconstruction.",
        figures.png(made),
    )


def _smoothness_figure(*of_models: _Geometries) -> Figure:
    made = figures.figure(height=2.9)
    panels = figures.axes(made, 1, len(of_models), sharey=True)[0]
    for where, geometries in zip(panels, of_models, strict=True):
        for geometry in (geometries.vae, geometries.plain):
            where.errorbar(
                [float(tau) for tau in geometry.smoothness],
                list(geometry.smoothness.values()),
                yerr=list(geometry.smoothness_standard_error.values()),
                marker="o",
                capsize=2,
                color=_COLORS[geometry.model],
                label=geometry.model,
            )
        where.set(title=geometries.title, xlabel="distance $\\tau$, in deviations of the codes", ylim=(0, 1))
    panels[0].set_ylabel("share that keeps its class")
    panels[0].legend(frameon=False)
    return Figure(
        "smoothness",
        "How often a decoded image keeps its class when its code is moved in a random direction; bars are one "
        "standard error over "
        "the images.",
        figures.png(made),
    )


def _codes_figure(trained: Trained, coders: dict[str, Coder], labels: SplitLabels) -> Figure:
    images, classes = intensities(trained.dataset.train[:2000]), labels.train[:2000]
    made = figures.figure(width=7.6, height=3.9)
    panels = figures.axes(made, 1, 2)[0]
    for where, (name, coder) in zip(panels, coders.items(), strict=True):
        codes = coder.encode(images)
        for digit in range(int(classes.max()) + 1):
            where.scatter(*codes[classes == digit].T, s=5, alpha=0.65, color=_digit_color(digit), label=str(digit))
        where.set(title=name, aspect="equal", xlabel="first latent", ylabel="second latent")
        where.set_box_aspect(1)
    _posterior_ellipses(panels[0], trained, images[:150], classes)
    handles, names = panels[0].get_legend_handles_labels()
    made.legend(handles, names, loc="outside right center", frameon=False, markerscale=2.5, title="class")
    return Figure(
        "codes-in-the-plane",
        "Codes of training images over two latent dimensions, coloured by class, which neither model was told. "
        "Left: the VAE's "
        "posterior means, with the posterior of some images as ellipses of one standard deviation. Right: the "
        "autoencoder's "
        "points. Mind the scales.",
        figures.png(made),
    )


def _posterior_ellipses(where: Axes, trained: Trained, images: Tensor, classes: Labels) -> None:
    mean, log_var = trained.vae.posterior(images.to(next(trained.vae.parameters()).device))
    widths = (2 * (0.5 * log_var).exp()).cpu()
    for centre, (width, height), digit in zip(mean.cpu().tolist(), widths.tolist(), classes, strict=False):
        color = _digit_color(int(digit))
        where.add_patch(
            Ellipse(centre, width, height, facecolor="none", edgecolor=color, alpha=0.5, linewidth=0.7)
        )


def _digit_color(digit: int) -> tuple[float, float, float, float]:
    return colormaps["tab10"](digit)


def _manifold_figure(coders: dict[str, Coder]) -> Figure:
    side = 14
    quantiles = torch.linspace(*_HALF_A_TENTH, side, dtype=torch.float64)
    points = torch.special.ndtri(quantiles).float()
    # Upwards is the second latent, as in a picture of the plane.
    down, right = torch.meshgrid(points.flip(0), points, indexing="ij")
    codes = torch.stack((right, down), dim=-1).view(-1, 2)
    made = figures.figure(width=7.6, height=3.9)
    for where, (name, coder) in zip(figures.axes(made, 1, 2)[0], coders.items(), strict=True):
        draw_images(where, coder.decode(codes), num_columns=side, title=name)
    return Figure(
        "manifold",
        f"The plane, decoded at the quantiles of the prior from {quantiles[0]:.0%} to {quantiles[-1]:.0%}; to the "
        f"right the first "
        "latent, upwards the second.",
        figures.png(made),
    )


def _interpolation_figure(paths: tuple[_DecodedPath, ...]) -> Figure:
    made = figures.figure(width=7.6, height=7.4)
    where = figures.axes(made)[0, 0]
    lines = [path.images[pair] for pair in range(_NUM_PATHS) for path in paths]
    draw_images(where, torch.cat(lines), num_columns=_NUM_STEPS)
    label_lines(where, tuple(path.name for path in paths) * _NUM_PATHS, paths[0].images.shape[-2])
    return Figure(
        "interpolation",
        f"Walks between {_NUM_PATHS} pairs of test images in ten steps: for each pair the VAE and the "
        f"autoencoder, along a line and "
        "along an arc. The ends are the reconstructions.",
        figures.png(made),
    )
