"""What the benchmark found: ratios to ours round by round, and whether the work was the same."""

import math
import statistics
from collections.abc import Sequence
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from serving.typed_config import Config
from training.bench.plan import BenchPlan, Setting
from training.bench.processes import Lap
from training.bench.tasks import Fitted, Measured

OURS: Final = "ours"
"""Name of the contestant that the others are compared with."""

CLIMB_TOLERANCE: Final = 0.1
"""A contestant whose ELBO rose this much less or more than ours, as a share of ours, did other work."""

ELBO_TOLERANCE: Final = 0.5
"""Nats by which two fits differ by chance: another order of the rows, other noise."""

AGREEMENT_Z: Final = 4.0
"""Standard errors within which two estimates of one bound agree: chance exceeds it once in 16,000 times."""


class Spread(Config):
    """A quantity over the rounds."""

    median: float
    """Half of the rounds are below."""

    low: float
    """Least of the rounds."""

    high: float
    """Greatest of the rounds."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Return the spread of values."""
        return cls(median=statistics.median(values), low=min(values), high=max(values))

    def __str__(self) -> str:
        """Return median and range."""
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


class Timing(Config):
    """Rounds of one contestant beside those of ours; the first round, which warms up, is left out."""

    seconds: tuple[float, ...]
    """Each round on the clock."""

    cpu_seconds: tuple[float, ...]
    """Each round in time of the processor, all threads together."""

    ratio: Spread
    """Its seconds divided by ours of the same round: how many times faster we are."""

    cpu_ratio: Spread
    """The same of processor time, which other programs on the machine disturb less."""

    @classmethod
    def of(cls, laps: Sequence[Lap], ours: Sequence[Lap]) -> Self:
        """Return the comparison of two contestants, both with the round that warms up."""
        pairs = list(zip(laps[1:], ours[1:], strict=True))
        return cls(
            seconds=tuple(lap.seconds for lap, _ in pairs),
            cpu_seconds=tuple(lap.cpu_seconds for lap, _ in pairs),
            ratio=Spread.of([lap.seconds / our.seconds for lap, our in pairs]),
            cpu_ratio=Spread.of([lap.cpu_seconds / our.cpu_seconds for lap, our in pairs]),
        )

    @property
    def median_seconds(self) -> float:
        """Seconds of the median round."""
        return statistics.median(self.seconds)


class TrainingResult(Config):
    """One contestant in one setting."""

    setting: Setting
    """Networks, batch, threads."""

    contestant: str
    """Who."""

    target: float
    """Least ratio that we want to see."""

    timing: Timing
    """Of epochs."""

    images_per_second: float
    """In the median epoch."""

    num_parameters: int
    """Numbers that were fitted."""

    elbo: float
    """On held-out binary images after the last epoch, nats per image; the same draws for all."""

    climb: float
    """Rise of that ELBO since the first step, divided by the rise of ours."""

    is_comparable: bool
    """Same number of parameters as ours, and the ELBO rose as much within a tenth, or ended within half a nat."""

    @classmethod
    def of(
        cls,
        contestant: str,
        fitted: Fitted,
        laps: Sequence[Lap],
        *,
        ours: tuple[Fitted, Sequence[Lap]],
        setting: Setting,
        target: float,
        start_elbo: float,
        num_images: int,
    ) -> Self:
        """Return the comparison of a contestant with ours.

        Args:
            contestant: Who.
            fitted: What came of it.
            laps: Its rounds.
            ours: The same of ours.
            setting: Networks, batch, threads.
            target: Least ratio that we want to see.
            start_elbo: ELBO of the weights with which all began.
            num_images: Rows in an epoch.
        """
        our_fitted, our_laps = ours
        timing = Timing.of(laps, our_laps)
        rise = our_fitted.elbo - start_elbo
        allowed = max(CLIMB_TOLERANCE * abs(rise), ELBO_TOLERANCE)
        return cls(
            setting=setting,
            contestant=contestant,
            target=target,
            timing=timing,
            images_per_second=num_images / timing.median_seconds,
            num_parameters=fitted.num_parameters,
            elbo=fitted.elbo,
            climb=(fitted.elbo - start_elbo) / rise,
            is_comparable=fitted.num_parameters == our_fitted.num_parameters
            and abs(fitted.elbo - our_fitted.elbo) <= allowed,
        )


class EvaluationResult(Config):
    """One contestant with the same weights and images as ours."""

    setting: Setting
    """How the weights were fitted; threads of the evaluation."""

    contestant: str
    """Who."""

    target: float
    """Least ratio that we want to see."""

    timing: Timing
    """Of evaluations of all images."""

    nll: float
    """Negative bound, mean over the images, nats."""

    standard_error: float
    """Of that mean, over the images."""

    difference: float
    """Its mean minus ours."""

    difference_standard_error: float
    """Monte Carlo error of the difference: from the differences of single images."""

    agrees: bool
    """The difference is within four of its standard errors."""

    @classmethod
    def of(
        cls,
        contestant: str,
        measured: Measured,
        laps: Sequence[Lap],
        *,
        ours: tuple[Measured, Sequence[Lap]],
        setting: Setting,
        target: float,
    ) -> Self:
        """Return the comparison of a contestant with ours; arguments as for `TrainingResult.of`."""
        our_measured, our_laps = ours
        nll, standard_error = _mean(measured.nll)
        difference, difference_error = _mean(measured.nll - our_measured.nll)
        return cls(
            setting=setting,
            contestant=contestant,
            target=target,
            timing=Timing.of(laps, our_laps),
            nll=nll,
            standard_error=standard_error,
            difference=difference,
            difference_standard_error=difference_error,
            agrees=abs(difference) <= AGREEMENT_Z * difference_error,
        )


class BenchReport(Config):
    """Everything that was found, and where."""

    date: str
    """Day of the run, ISO 8601."""

    machine: dict[str, str]
    """Processor, its cores, operating system, and how busy it was with other programs."""

    versions: dict[str, str]
    """Of whatever decides the speed."""

    data: str
    """What the images were."""

    plan: BenchPlan
    """What was asked for."""

    absent: tuple[str, ...]
    """Contestants whose packages are not here."""

    training: tuple[TrainingResult, ...]
    """Ours first in each setting."""

    evaluation: tuple[EvaluationResult, ...]
    """Ours first for each number of threads."""

    def to_json(self) -> str:
        """Return the report for a program."""
        return self.model_dump_json(indent=2) + "\n"


def _mean(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return a mean and its standard error."""
    return float(values.mean()), float(values.std(ddof=1)) / math.sqrt(len(values))
