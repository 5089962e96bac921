"""What a run has been through, and whether its loss has just jumped."""

import statistics
from dataclasses import dataclass, field

from repa_fast.failure import Failure

WINDOW = 32
"""Readings that the next one is compared with, at most."""
ENOUGH = 8
"""Readings before which nothing is a spike."""
DEVIATIONS = 6.0
SMALLEST = 0.1
"""A spike is higher than the median by at least this share of it."""
NORMAL = 1.4826
"""Standard deviation of a normal distribution over its median absolute deviation."""


class TrainingDiverged(Failure):
    """The loss spiked, or too many steps in a row were not finite."""


@dataclass
class History:
    """Plain numbers, saved with every checkpoint.

    Attributes:
        skipped: steps' worth of data left out so far: step n takes the data of n + skipped.
        good_step: the last reading at which all was well.
        losses: the last readings of the loss of denoising at which it was, oldest first.
    """

    skipped: int = 0
    good_step: int = 0
    losses: list[float] = field(default_factory=list)

    def add(self, step: int, loss: float) -> None:
        """Take note of a reading at which all was well."""
        self.good_step = step
        self.losses = [*self.losses, loss][-WINDOW:]


def is_spike(loss: float, losses: list[float]) -> bool:
    """Return whether `loss` stands out above the recent ones, all of them positive.

    As OLMo-core's SkipStepOptimizer, which leaves out a step six standard deviations above the mean
    of the last 128 (SkipStepConfig, sigma_factor), with median and median absolute deviation in the
    place of mean and deviation, so that what came before a jump does not hide it.
    """
    if len(losses) < ENOUGH:
        return False
    median = statistics.median(losses)
    deviation = NORMAL * statistics.median(abs(value - median) for value in losses)
    return not loss <= median + max(DEVIATIONS * deviation, SMALLEST * median)
