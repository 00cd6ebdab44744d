"""The whole distribution behind a `Latency`, from its histogram."""

import math
from collections.abc import Sequence
from typing import Final, Self

import numpy as np
from hdrh.histogram import HdrHistogram
from numpy.typing import NDArray

from serving.loadtest.errors import ReportError
from serving.loadtest.results import Latency

_US_PER_MS: Final = 1000.0
_STEPS_PER_HALVING: Final = 5
_ROUNDING: Final = 1e-9
_EXACT_UP_TO: Final = 100
"""Events up to which their exact distribution is summed."""


class Distribution:
    """Latencies in milliseconds, by rank.

    Args:
        values_ms: Ascending, shape (k,).
        counts: How often each, shape (k,).
    """

    def __init__(self, values_ms: NDArray[np.float64], counts: NDArray[np.int64]) -> None:
        self._values_ms, self._ranks = values_ms, np.cumsum(counts)

    @classmethod
    def of(cls, latency: Latency) -> Self:
        """Return the distribution of a latency.

        Raises:
            ReportError: If its histogram does not decode.
        """
        try:
            histogram = HdrHistogram.decode(latency.histogram)
        except Exception as error:  # the library raises whatever base64, zlib and struct do
            problem = f"a histogram does not decode ({type(error).__name__})"
            raise ReportError(path=latency.histogram[:16], problem=problem) from error
        # The library's own iterators take a third of a second over all buckets, most of which are empty.
        counts = np.asarray(histogram.counts, np.int64)
        held = np.flatnonzero(counts)
        highest = histogram.get_highest_equivalent_value
        values = [highest(histogram.get_value_from_index(int(index))) / _US_PER_MS for index in held]
        return cls(np.array(values), counts[held])

    @property
    def num_values(self) -> int:
        """How many latencies there are."""
        return int(self._ranks[-1]) if len(self._ranks) else 0

    def quantile_ms(self, share: float) -> float:
        """Return the latency that a share of all, in [0, 1], does not exceed; zero if there are none."""
        if not self.num_values:
            return 0.0
        rank = max(math.ceil(share * self.num_values - _ROUNDING), 1)
        return float(self._values_ms[np.searchsorted(self._ranks, rank)])

    def curve(self) -> Sequence[tuple[float, float]]:
        """Return (share, milliseconds) at shares that come closer together towards 1, which is left out.

        Each halving of what is left takes five steps, down to a single latency.
        """
        steps = range(math.floor(_STEPS_PER_HALVING * math.log2(max(self.num_values, 1))) + 1)
        shares = [1 - 0.5 ** (step / _STEPS_PER_HALVING) for step in steps] if self.num_values else []
        return [(share, self.quantile_ms(share)) for share in shares]

    def num_above(self, limit_ms: float) -> int:
        """Return how many latencies are above a limit, within the precision of the histogram."""
        index = int(np.searchsorted(self._values_ms, limit_ms, side="right"))
        return self.num_values - (int(self._ranks[index - 1]) if index else 0)


def is_more_often(later: int, of_later: int, earlier: int, of_earlier: int, *, level: float = 0.025) -> bool:
    """Return whether events are significantly more frequent in later trials than in earlier ones.

    Given all events, those of the later trials are Binomial(later + earlier, of_later / (of_later + of_earlier))
    if both are as frequent: exactly for rare events, and on the safe side for others. Events are taken as
    independent; where they come in bursts, a chance is taken for a difference more often than the level says.

    References:
        Przyborowski and Wilenski, Homogeneity of results in testing samples from Poisson series, 1940.
    """
    num, share = later + earlier, of_later / (of_later + of_earlier)
    if num > _EXACT_UP_TO:  # the normal approximation, with half an event for continuity
        z = (later - 0.5 - num * share) / math.sqrt(num * share * (1 - share))
        return 0.5 * math.erfc(z / math.sqrt(2)) < level
    return sum(math.comb(num, k) * share**k * (1 - share) ** (num - k) for k in range(later, num + 1)) < level
