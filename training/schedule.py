"""Step size and weight of the KL term as functions of the step: nothing to store, so a run may resume anywhere."""

import math
from typing import Final, NamedTuple

from training import objectives
from training.config import OptimizerConfig

NUM_STAGES: Final = 8
"""Stages of the schedule of that name. Each is three times as long as the one before: 1, 3, 9, ..., 2187 epochs of
3280, as Burda, Grosse and Salakhutdinov have it. https://arxiv.org/abs/1509.00519, section 5."""

_GROWTH: Final = 3


class Schedule(NamedTuple):
    """The schedule of one run.

    Args:
        config: Which one, and its numbers.
        num_steps: Steps of the whole run, at least 1.
    """

    config: OptimizerConfig
    num_steps: int

    @property
    def warm_up_steps(self) -> int:
        """Steps until beta has its final value."""
        return math.ceil(self.config.warm_up_fraction * self.num_steps)

    def learning_rate(self, step: int) -> float:
        """Return the step size at a step in [0, num_steps]."""
        return self._cosine(step) if self.config.schedule == "cosine" else self._of_stage(self.stage(step))

    def beta(self, step: int) -> float:
        """Return the weight of the KL term: a line from zero, then constant."""
        return objectives.kl_weight(step, num_warm_up_steps=self.warm_up_steps, beta=self.config.beta)

    def stage(self, step: int) -> int:
        r"""Return the stage of a step, in [0, 8).

        Stage i ends when the share \((3^{i+1} - 1) / (3^8 - 1)\) of the steps is done, in a shortened run too.
        """
        whole = _GROWTH**NUM_STAGES - 1
        return next(
            (i for i in range(NUM_STAGES - 1) if step * whole < self.num_steps * (_GROWTH ** (i + 1) - 1)),
            NUM_STAGES - 1,
        )

    def _cosine(self, step: int) -> float:
        first, final = self.config.learning_rate, self.config.final_learning_rate
        return final + 0.5 * (first - final) * (1 + math.cos(math.pi * step / self.num_steps))

    def _of_stage(self, stage: int) -> float:
        """Return the final step size times a factor that falls geometrically to 1, rounded to a tenth.

        With 1e-3 and 1e-4 that is the published 1e-4 round(10^(1 - i/7), 1).
        """
        first, final = self.config.learning_rate, self.config.final_learning_rate
        return float(final * round((first / final) ** (1 - stage / (NUM_STAGES - 1)), 1))
