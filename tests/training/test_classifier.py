"""Scores of classes obey their bounds; the classifier knows digits, and repeats."""

import math

import pytest
import torch

from training import data
from training.classifier import Classifier, class_scores
from training.coders import intensities
from training.config import DataConfig
from training.data import Dataset, SplitLabels


@pytest.fixture(scope="module")
def labels() -> SplitLabels:
    """Return the classes of the digits."""
    return data.load_labels(DataConfig(name="digits"))


@pytest.fixture(scope="module")
def classifier(digits: Dataset, labels: SplitLabels) -> Classifier:
    """Return a classifier of digits."""
    train = torch.tensor(labels.train)
    return Classifier.fit(intensities(digits.train), train, torch.Generator().manual_seed(0))


def test_sure_and_varied_is_the_best_that_scores_can_be() -> None:
    """Certain of each image and all of ten classes equally often: score ten, diversity log 10."""
    scores = class_scores(torch.eye(10).repeat(3, 1))
    assert scores == pytest.approx((1.0, math.log(10), 10.0))


def test_one_class_or_no_idea_score_one() -> None:
    """Samples that all look alike, and samples that look like nothing, tell no classes apart; the rest differs."""
    alike = class_scores(torch.eye(10)[:1].repeat(7, 1))
    nothing = class_scores(torch.full((7, 10), 0.1))
    assert alike == pytest.approx((1.0, 0.0, 1.0))
    assert nothing == pytest.approx((0.1, math.log(10), 1.0))


def test_score_is_the_expected_divergence(source: torch.Generator) -> None:
    """It is exp E KL(p(y|x) || p(y)), written out with torch's own divergence, and within [1, classes]."""
    each = torch.softmax(3 * torch.randn(200, 6, generator=source, dtype=torch.float64), dim=1)
    marginal = torch.distributions.Categorical(probs=each.mean(dim=0))
    divergence = torch.distributions.kl_divergence(torch.distributions.Categorical(probs=each), marginal)
    scores = class_scores(each)
    assert scores.inception_score == pytest.approx(divergence.mean().exp().item())
    assert 1 <= scores.inception_score <= 6
    assert scores.confidence == pytest.approx(each.max(dim=1).values.mean().item())


def test_digits_are_recognised(classifier: Classifier, digits: Dataset, labels: SplitLabels) -> None:
    """At least 95 % of 250 test images, of which a nearest neighbour knows 98 %: a class means something."""
    images, classes = intensities(digits.test), torch.tensor(labels.test)
    assert classifier.accuracy(images, classes) >= 0.95
    probabilities = classifier.probabilities(images)
    torch.testing.assert_close(probabilities.sum(dim=1), torch.ones(250))
    assert torch.equal(probabilities.argmax(dim=1), classifier.classes(images))


def test_images_of_nothing_score_lower(classifier: Classifier, digits: Dataset, source: torch.Generator) -> None:
    """Images score above shuffled pixels in confidence and in the Inception-style score."""
    images = intensities(digits.test)
    shuffled = images.flatten()[torch.randperm(images.numel(), generator=source)].view(images.shape)
    real, noise = classifier.scores(images), classifier.scores(shuffled)
    assert real.confidence > noise.confidence
    assert real.inception_score > 2 * noise.inception_score


def test_fit_repeats(classifier: Classifier, digits: Dataset, labels: SplitLabels) -> None:
    """The same images and seed give the same probabilities; nobody else's random numbers are drawn."""
    before = torch.get_rng_state()
    again = Classifier.fit(intensities(digits.train), torch.tensor(labels.train), torch.Generator().manual_seed(0))
    images = intensities(digits.test)
    assert torch.equal(again.probabilities(images), classifier.probabilities(images))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("labels", "message"),
    [(torch.zeros(4), "all are 0; a classifier needs two classes"), (torch.arange(3), "4 images have 3 labels")],
    ids=["one class", "too few labels"],
)
def test_labels_that_teach_nothing_are_refused(
    labels: torch.Tensor, message: str, source: torch.Generator
) -> None:
    """The error says what is wrong."""
    with pytest.raises(ValueError, match=message):
        Classifier.fit(torch.rand(4, 2, generator=source), labels, source)
