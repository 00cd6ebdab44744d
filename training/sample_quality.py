"""How good samples of models are, beside references that say what the numbers mean.

Every set of images in a report has the same number of rows and is compared with the same rows of the training
split. Two kinds of images are distinguished, and never compared with each other:

- `means`: expected images, and grey training images. What the service shows; smoother than data by construction.
- `draws`: zeros and ones drawn from those expectations, and binarised training images. What a model with a
  Bernoulli likelihood is a model of.
"""

from collections.abc import Mapping
from typing import Final, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from serving.typed_config import Config
from training.classifier import Classifier
from training.coders import Coder, intensities
from training.data import Dataset, SplitLabels
from training.frechet import PrincipalFeatures
from training.latent_geometry import (
    TAUS,
    CodeGaussian,
    interpolate,
    largest_steps,
    neighbour_accuracy,
    smoothness,
)
from training.models.ppca import ProbabilisticPCA
from training.noise import Stream, normal

Kind = Literal["means", "draws"]

_NUM_STEPS: Final = 11
_NUM_PATHS: Final = 200
_NUM_NEIGHBOURS: Final = 5
_NUM_VOTERS: Final = 10_000
_NUM_MOVED: Final = 1000
_SEEDS: Final = (0, 1, 2)


class ImageSet(Config):
    """What is known of one set of images."""

    name: str
    """What the images are."""

    frechet: float
    """Frechet distance to the training images; lower is better, compare with the references."""

    confidence: float | None = None
    """Mean of the classifier's largest probability; null without labels."""

    diversity: float | None = None
    """Entropy of the classifier's mean distribution over classes, nats."""

    inception_score: float | None = None
    """exp E KL(p(class given image), p(class)): from 1 to the number of classes."""


class Quality(Config):
    """Samples of models and references, with everything that decides the numbers."""

    kind: Kind
    """Expected images, or zeros and ones drawn from them."""

    features: str
    """What the Frechet distance is measured on."""

    num_components: int
    """Features."""

    num_samples: int = Field(ge=2)
    """Images in every set, and training images that they are compared with."""

    seed: int
    """Seed of the samples: the service's Sample with this seed decodes the same latents."""

    bias: float
    """Frechet distance between two sets of one distribution, if it were Gaussian: where zero is, in effect."""

    held_out_accuracy: float | None = None
    """Accuracy of the classifier on the held-out images; null without labels."""

    references: tuple[ImageSet, ...]
    """Sets that no model of ours made."""

    samples: tuple[ImageSet, ...]
    """Samples of each model: from N(0, I), and from a Gaussian fitted to its codes."""

    reconstruction_errors: dict[str, float]
    """Of each model: squared error of reconstructed held-out grey images, summed over pixels, mean over images."""


class Geometry(Config):
    """What lies between and around the codes of a model."""

    model: str
    """Which one."""

    smoothness: dict[str, float]
    """Distance in deviations of the codes to the share of moved codes whose image keeps its class."""

    smoothness_standard_error: dict[str, float]
    """Of each share, over the images."""

    largest_step: dict[str, float]
    """Shape of the path to the median of the largest of ten steps relative to the distance of the ends."""

    neighbour_accuracy: float
    """How often five nearest codes vote for the right class. Not a measure of smoothness: clusters with nothing in
    between have it too."""


class _Judge(NamedTuple):
    """Looks at sets of images of one kind."""

    features: PrincipalFeatures
    compared: Tensor
    classifier: Classifier | None

    def look(self, name: str, images: Tensor) -> ImageSet:
        scores = {} if self.classifier is None else self.classifier.scores(images)._asdict()
        return ImageSet(name=name, frechet=self.features.distance(images, self.compared), **scores)


def measure(
    coders: Mapping[str, Coder],
    dataset: Dataset,
    labels: SplitLabels | None,
    *,
    kind: Kind = "means",
    num_samples: int = 10_000,
    num_components: int | None = None,
    seed: int = 0,
) -> Quality:
    """Return what samples of models are worth; several models are measured on the same images and latents.

    Args:
        coders: The models by name. For `draws` their images are probabilities.
        dataset: Training images to compare with; the held-out images are those of test, then of validation.
        labels: Classes of the rows; without them nothing is said of classes.
        kind: Which images.
        num_samples: Images in every set; cut down to the held-out images and to half of the training images.
        num_components: Features, see `training.frechet.PrincipalFeatures`.
        seed: Of the samples, of what the references draw, and of the classifier.
    """
    source = torch.Generator().manual_seed(seed)
    grey = intensities(dataset.train)
    held_out_grey = torch.cat((intensities(dataset.test), intensities(dataset.validation)))
    number = min(num_samples, len(held_out_grey), len(grey) // 2)
    train, held_out = _as(kind, grey, source), _as(kind, held_out_grey[:number], source)
    judge = _Judge(
        PrincipalFeatures.fit(train, num_components=num_components),
        train[:number],
        None if labels is None else Classifier.fit(train, torch.tensor(labels.train), source),
    )
    accuracy = None
    if judge.classifier is not None and labels is not None:
        classes = torch.cat((torch.tensor(labels.test), torch.tensor(labels.validation)))
        accuracy = judge.classifier.accuracy(held_out, classes[:number])
    references = {
        "training images, the other half": train[number : 2 * number],
        "held-out images": held_out,
        **{name: _as(kind, rows, source) for name, rows in _linear_model(coders, judge, grey, number, source)},
        # Of binarised images for draws: what independent grey pixels give when binarised is paler.
        "independent pixels": independent_pixels(train, number, source),
    }
    samples = {
        f"{name}, {where}": _as(kind, coder.decode(codes), source)
        for name, coder in coders.items()
        for where, codes in _latents(coder, grey, number, seed)
    }
    return Quality(
        kind=kind,
        features=judge.features.described(),
        num_components=judge.features.num_components,
        num_samples=number,
        seed=seed,
        bias=judge.features.expected_distance(number),
        held_out_accuracy=accuracy,
        references=tuple(judge.look(name, images) for name, images in references.items()),
        samples=tuple(judge.look(name, images) for name, images in samples.items()),
        reconstruction_errors={
            name: _squared_error(coder, held_out_grey[:number]) for name, coder in coders.items()
        },
    )


def measure_geometry(
    coders: Mapping[str, Coder], dataset: Dataset, labels: SplitLabels, *, seed: int = 0
) -> tuple[Geometry, ...]:
    """Return what lies between and around the codes of models, on the same grey images, directions and classifier.

    Args:
        coders: The models by name.
        dataset: Deviations and voters are of the training split, what is moved and voted on of the test split.
        labels: Classes of the rows.
        seed: Of the classifier.
    """
    train, test = intensities(dataset.train), intensities(dataset.test)
    of_train, of_test = torch.tensor(labels.train), torch.tensor(labels.test)
    judge = Classifier.fit(train, of_train, torch.Generator().manual_seed(seed))
    pairs = min(_NUM_PATHS, len(test) // 2)
    start, end = test[:pairs], test[pairs : 2 * pairs]
    measured = []
    for name, coder in coders.items():
        codes, held_out = coder.encode(train), coder.encode(test)
        kept = smoothness(coder, judge.classes, held_out[:_NUM_MOVED], codes.std(dim=0), taus=TAUS, seeds=_SEEDS)
        steps = {
            path: largest_steps(interpolate(coder, start, end, num_steps=_NUM_STEPS, path=path).images)
            for path in ("linear", "spherical")
        }
        measured.append(
            Geometry(
                model=name,
                smoothness={f"{item.tau:g}": item.share for item in kept},
                smoothness_standard_error={f"{item.tau:g}": item.standard_error for item in kept},
                largest_step={path: float(sizes.nanmedian()) for path, sizes in steps.items()},
                neighbour_accuracy=neighbour_accuracy(
                    codes[:_NUM_VOTERS],
                    of_train[:_NUM_VOTERS],
                    held_out[:_NUM_MOVED],
                    of_test[:_NUM_MOVED],
                    num_neighbours=_NUM_NEIGHBOURS,
                ),
            )
        )
    return tuple(measured)


def independent_pixels(images: Tensor, num_samples: int, source: torch.Generator) -> Tensor:
    """Return images whose pixels are each right and do not know of each other, shape (num_samples, *data_shape).

    Every pixel is that of some image, drawn anew for each pixel.

    Args:
        images: Shape (n, *data_shape).
        num_samples: How many.
        source: Draws the images.
    """
    flat = images.flatten(start_dim=1)
    rows = torch.randint(len(flat), (num_samples, flat.shape[1]), generator=source)
    return flat.gather(0, rows).view(num_samples, *images.shape[1:])


def _as(kind: Kind, images: Tensor, source: torch.Generator) -> Tensor:
    """Return expected images as they are, or one draw of zeros and ones from them."""
    if kind == "means":
        return images
    return (torch.rand(images.shape, generator=source) < images).to(images.dtype)


def _latents(coder: Coder, train: Tensor, number: int, seed: int) -> tuple[tuple[str, Tensor], ...]:
    return (
        ("N(0, I)", normal(seed, number, coder.latent_dim, stream=Stream.PRIOR)),
        ("Gaussian fitted to its codes", CodeGaussian(coder.encode(train)).sample(number, seed)),
    )


def _linear_model(
    coders: Mapping[str, Coder], judge: _Judge, grey: Tensor, number: int, source: torch.Generator
) -> list[tuple[str, Tensor]]:
    """Return samples of the linear model with as many latent dimensions, cut off at black and white.

    There is none of images that vary in a single direction.
    """
    latent_dim = min(max(coder.latent_dim for coder in coders.values()), judge.features.rank - 1)
    if latent_dim < 1:
        return []
    model = ProbabilisticPCA.fit(grey.flatten(start_dim=1).double(), latent_dim)
    samples = model.sample(number, source).clamp(0, 1).float()
    return [(f"probabilistic PCA, {latent_dim} latent dimensions", samples.view(number, *grey.shape[1:]))]


def _squared_error(coder: Coder, images: Tensor) -> float:
    return float((coder.reconstruct(images) - images).square().sum() / len(images))
