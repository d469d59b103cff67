"""Intervals of 95%: of shares, of their means, and of paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from hybrid_attn.trees import check

Z = 1.959963984540054  # 95% of a normal distribution lies within as many deviations


class Share(NamedTuple):
    """A share of right answers, its interval of 95%, and the number of answers."""

    share: float
    low: float
    high: float
    number: int

    @property
    def half(self) -> float:
        """The longer side of the interval."""
        return max(self.share - self.low, self.high - self.share)

    def __str__(self) -> str:
        return f"{100 * self.share:.0f}% ± {100 * self.half:.0f} (n = {self.number:,})"


def share(right: float, number: float) -> Share:
    """With Wilson's interval."""
    return Share(right / number, *wilson(right, number), round(number))


def wilson(right: float, number: float) -> tuple[float, float]:
    """The interval of 95% for a share of which `right` of `number` were seen (Wilson, 1927); partial answers count in part."""
    check(number > 0, "an interval needs one answer at least, and there are 0")
    share, z2 = right / number, Z * Z / number
    middle = share + z2 / 2
    spread = math.sqrt(z2 * (share * (1 - share) + z2 / 4))
    return max(0.0, (middle - spread) / (1 + z2)), min(1.0, (middle + spread) / (1 + z2))


def mean_share(shares: Sequence[Share]) -> Share:
    """Of independent shares, each with the same weight."""
    return Share(*mean_of(np.array([share[:3] for share in shares])), sum(share.number for share in shares))


def mean_of(numbers: np.ndarray) -> tuple[float, float, float]:
    """The mean of independent numbers with the ends of their intervals [n, 3], and its own interval.

    The distances from the numbers to the ends add up as errors do, below and above by themselves (Zou and Donner, 2008): unlike
    resampled means, all wrong answers or all right ones leave a width.
    """
    means, low, high = numbers.T
    below, above = (np.linalg.norm(means - ends) / len(means) for ends in (low, high))
    mean = float(means.mean())
    return mean, mean - float(below), mean + float(above)


OF_SCORES = -1.0, 1.0  # bounds of the difference of two scores, which lie between 0 and 1
UNBOUNDED = -math.inf, math.inf  # of losses


def mean_within(values: np.ndarray, bounds: tuple[float, float]) -> tuple[float, float, float]:
    """The mean of values, such as paired differences, and its interval within their `bounds`, by Student's t.

    Values that are all the same x have no spread. One that was not seen may be as small as the lower bound a or as large as the
    upper one b, and of such values Wilson's interval for 0 of n allows a share p: the mean lies between x - p (x - a) and
    x + p (b - x). Of differences of scores where both models are right everywhere, this is Newcombe's interval for paired
    shares (1998, method 10). Where nothing bounds the values, the ends are NaN.
    """
    n, mean, (low, high) = len(values), float(values.mean()), bounds
    if np.ptp(values) > 1e-9:  # up to rounding
        half = float(stdtrit(n - 1, 0.975) * values.std(ddof=1) / math.sqrt(n))
        return mean, max(low, mean - half), min(high, mean + half)
    if math.isinf(high):
        return mean, math.nan, math.nan
    share = wilson(0, n)[1]
    return mean, mean - share * (mean - low), mean + share * (high - mean)
