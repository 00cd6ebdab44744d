r"""A small classifier of images, and what it says about samples: how sure it is, and how varied they are.

.. math:: IS = \exp E_x\, KL(p(y \mid x) \,\|\, p(y)) = \exp\left( H(p(y)) - E_x\, H(p(y \mid x)) \right)

It judges samples only where it knows images: beside every figure stands its accuracy on held-out images, and the
same figure of those images. It is sure of some images that no person would read, so a high score proves little; a
low one shows that samples look like no class, or all like one.

References:
    Salimans et al., Improved Techniques for Training GANs, 2016. https://arxiv.org/abs/1606.03498
    Barratt and Sharma, A Note on the Inception Score, 2018. https://arxiv.org/abs/1801.01973
"""

from typing import Final, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

_HIDDEN: Final = 256
_NUM_STEPS: Final = 2000
_BATCH_SIZE: Final = 128
_LEARNING_RATE: Final = 2e-3
_ROWS_AT_ONCE: Final = 10_000
_MIN_CLASSES: Final = 2


class ClassScores(NamedTuple):
    """What a classifier says about a set of images."""

    confidence: float
    """Mean of the largest probability, in [1 / num_classes, 1]."""
    diversity: float
    """Entropy of the mean distribution over classes, nats, at most log num_classes: all classes equally often."""
    inception_score: float
    """In [1, num_classes]: high if every image is of a clear class and all classes occur."""


class Classifier:
    """A perceptron with one hidden layer of 256 units, fitted by Adam in 2000 steps of 128 images.

    Args:
        network: Images, flattened, to logits of the classes.
        num_classes: Classes.
    """

    def __init__(self, network: nn.Module, num_classes: int) -> None:
        self._network, self.num_classes = network, num_classes

    @classmethod
    def fit(cls, images: Tensor, labels: Tensor, source: torch.Generator) -> Self:
        """Return a classifier of images like these.

        Args:
            images: In [0, 1], shape (n, *data_shape).
            labels: Class of each, integers from 0, shape (n,).
            source: Initial weights, and the images of each step.

        Raises:
            ValueError: If there are not as many labels as images, or fewer than two classes.
        """
        if len(images) != len(labels):
            raise ValueError(f"{len(images)} images have {len(labels)} labels; give one for each")
        num_classes = int(labels.max()) + 1
        if num_classes < _MIN_CLASSES:
            raise ValueError("labels: all are 0; a classifier needs two classes")
        rows, targets = images.flatten(start_dim=1), labels.long()
        network = nn.Sequential(
            _linear(rows.shape[1], _HIDDEN, source), nn.ReLU(), _linear(_HIDDEN, num_classes, source)
        )
        optimizer = torch.optim.Adam(network.parameters(), lr=_LEARNING_RATE, fused=True)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=_NUM_STEPS)
        with torch.enable_grad():
            for _ in range(_NUM_STEPS):
                batch = torch.randint(len(rows), (_BATCH_SIZE,), generator=source)
                loss = functional.cross_entropy(network(rows[batch]), targets[batch])
                optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward(loss)
                optimizer.step()
                schedule.step()
        return cls(network.requires_grad_(requires_grad=False), num_classes)

    @torch.inference_mode()
    def probabilities(self, images: Tensor) -> Tensor:
        """Return p(class given image), shape (n, num_classes), for images of shape (n, *data_shape)."""
        rows = torch.split(images.flatten(start_dim=1), _ROWS_AT_ONCE)
        return torch.cat([functional.softmax(self._network(piece), dim=1) for piece in rows])

    def classes(self, images: Tensor) -> Tensor:
        """Return the likeliest class of each image, shape (n,)."""
        return self.probabilities(images).argmax(dim=1)

    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Return the share of images whose likeliest class is the labelled one."""
        return float((self.classes(images) == labels).double().mean())

    def scores(self, images: Tensor) -> ClassScores:
        """Return what it says about a set of images."""
        return class_scores(self.probabilities(images))


def class_scores(probabilities: Tensor) -> ClassScores:
    """Return the scores of a set of images from p(class given image), shape (n, num_classes).

    Example:
        >>> class_scores(torch.eye(4)).inception_score
        4.0
    """
    each = probabilities.double()
    mean = each.mean(dim=0)
    diversity = _entropy(mean)
    return ClassScores(
        confidence=float(each.amax(dim=1).mean()),
        diversity=float(diversity),
        inception_score=float((diversity - _entropy(each).mean()).exp()),
    )


def _entropy(probabilities: Tensor) -> Tensor:
    entropy: Tensor = torch.special.entr(probabilities).sum(dim=-1)
    return entropy


def _linear(num_inputs: int, num_outputs: int, source: torch.Generator) -> nn.Linear:
    """Return a layer with He's weights, drawn without the global generator."""
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, num_inputs, num_outputs)  # type: ignore[no-untyped-call]
    nn.init.kaiming_uniform_(layer.weight, nonlinearity="relu", generator=source)
    nn.init.zeros_(layer.bias)
    return layer
