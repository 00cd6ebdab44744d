"""What an experiment of the study returns: text, checks against known values, tables, pictures, corrections.

Blocks are shown in the order in which they are given. Texts are Markdown with formulas between dollar signs
(`$...$` in a line, `$$...$$` on lines of their own), which the report renders without a script.
"""

import math
from dataclasses import dataclass
from typing import Final, NamedTuple

ROWS: Final[dict[int, str]] = {
    1: "one interface for models p(x) and p(y given x)",
    2: "Gaussian mixture: three clusters",
    3: "mixture density network",
    4: "a complicated density is a mixture of simple ones",
    5: "a generative model is not the same as a latent variable model",
    6: "maximum likelihood and its integral",
    7: "one q per datapoint, steps on p and q in turn",
    8: "what one q per datapoint costs",
    9: "the bound by Jensen: expected log joint + entropy",
    10: "the bound as likelihood - KL",
    11: "what the entropy does to q",
    12: "KL divergence, its asymmetry",
    13: "log p(x) = ELBO + KL(q, posterior)",
    14: "the q step tightens, the p step improves",
    15: "how tight the bound is",
    16: "which parts are learnt",
    17: "the gradient of E_q[log p(z)]",
    18: "amortised inference",
    19: "the score-function estimator",
    20: "the reparametrised estimator",
    21: "its lower variance",
    22: "which estimator for which latents",
    23: "two computation graphs",
    24: "the objective of the VAE",
    25: "training it",
    26: "generation",
    27: "autoencoder against VAE",
    28: "interpolation",
    29: "references",
}
"""The checklist: what the article contains, row by row."""


_LARGEST_COUNT: Final = 1e12
"""Whole numbers below this are counts, and written out."""


@dataclass(frozen=True)
class Check:
    """A measured number beside what it must be. Made by the functions below, so that NaN never passes."""

    name: str
    """What was measured."""

    value: float
    """The measured number."""

    requirement: str
    """What it must be, as text."""

    passed: bool
    """Whether it is."""

    source: str
    """Where the requirement comes from: a closed form, a paper, a law."""

    unit: str = "nats"
    """Unit of the value; empty for pure numbers."""


def close(name: str, value: float, expected: float, *, within: float, source: str, unit: str = "nats") -> Check:
    """Require |value - expected| <= within. Derive the tolerance: rounding, or standard errors."""
    passed = abs(value - expected) <= within
    return Check(name, value, f"{as_text(expected)} ± {as_text(within)}", passed, source, unit)


def at_least(name: str, value: float, bound: float, *, source: str, unit: str = "nats") -> Check:
    """Require value >= bound."""
    return Check(name, value, f"≥ {as_text(bound)}", value >= bound, source, unit)


def at_most(name: str, value: float, bound: float, *, source: str, unit: str = "nats") -> Check:
    """Require value <= bound."""
    return Check(name, value, f"≤ {as_text(bound)}", value <= bound, source, unit)


def between(name: str, value: float, low: float, high: float, *, source: str, unit: str = "nats") -> Check:
    """Require low <= value <= high."""
    return Check(name, value, f"{as_text(low)} to {as_text(high)}", low <= value <= high, source, unit)


def holds(name: str, fact: bool, *, source: str) -> Check:  # noqa: FBT001 - the fact is what is checked
    """Require that something is so: an order, an equality of bytes."""
    return Check(name, float(fact), "true", fact, source, "")


@dataclass(frozen=True)
class Checks:
    """A table of checks."""

    items: tuple[Check, ...]


@dataclass(frozen=True)
class Table:
    """A table of numbers without a verdict. Cells are Markdown."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A picture."""

    name: str
    """File name without suffix; unique in the study."""

    caption: str
    """Markdown: what is to be seen, for somebody who never saw it."""

    png: bytes
    """From `figures.png`, so that all look alike."""


@dataclass(frozen=True)
class Correction:
    """Something that the article says wrongly, too strongly, or leaves open."""

    article: str
    """What it says, in our words; Markdown."""

    right: str
    """What is so; Markdown."""


Block = str | Checks | Table | Figure | Correction


class Section(NamedTuple):
    """One experiment: which rows of the checklist it shows, and how."""

    title: str
    rows: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def checks(self) -> tuple[Check, ...]:
        """All checks, in order."""
        return tuple(check for block in self.blocks if isinstance(block, Checks) for check in block.items)


def as_text(value: float) -> str:
    """Return a number as people write it: enough digits, no noise."""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    if value == round(value) and abs(value) < _LARGEST_COUNT:
        return f"{value:,.0f}"
    return f"{value:.3e}" if abs(value) < 1e-3 or abs(value) >= 1e6 else f"{value:.7g}"  # noqa: PLR2004
