"""What scores are worth: intervals, and two models on the same questions."""

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.report.runs import Run, sample_of, sequences_of
from hybrid_attn.evals.table import EVALS
from hybrid_attn.trees import check

Z = 1.959963984540054  # 95% of a normal distribution lies within as many deviations
PAIRS = 10  # fewest pairs for a verdict: a sign test on five equal differences gives p = 0.06


class Difference(NamedTuple):
    """Mean scores of two models on the same `pairs` of answers, and the interval of 95% of b - a, if anything bounds it.

    `fewest` is how many pairs its task has; of a mean over tasks, the one with the fewest. Of a `loss` less is better.
    `in_mean` says that its task counts in such a mean.
    """

    task: str
    length: int
    pairs: int
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    fewest: int
    loss: bool
    in_mean: bool = False

    @property
    def verdict(self) -> str:
        """Unclear without an interval, where it has 0 in it, and where a task has too few pairs."""
        if self.low is None or self.fewest < PAIRS or self.low <= 0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0) != self.loss else "worse"


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


def compare(a: Run, b: Run, families: Mapping[str, set[str]]) -> list[Difference]:
    """b against a, by length, on the questions that both answered: the mean over the tasks of each family, then each task."""
    scores = {sample_of(answer): answer["score"] for answer in a.answers}
    common = [answer for answer in b.answers if sample_of(answer) in scores]
    cells = grouped(common, lambda answer: (answer["length"], answer["task"]))
    pairs = {key: np.array([(scores[sample_of(x)], x["score"]) for x in answers]) for key, answers in cells.items()}
    differences = []
    for length, keys in grouped(sorted(pairs), itemgetter(0)).items():
        of_families = {name: [key for key in keys if key[1] in family] for name, family in families.items()}
        of_families = {
            f"{name} of {len(averaged)} tasks": averaged for name, averaged in of_families.items() if len(averaged) > 1
        }
        differences += [_difference(name, length, [pairs[key] for key in averaged]) for name, averaged in of_families.items()]
        in_mean = {key for averaged in of_families.values() for key in averaged}
        differences += [_difference(key[1], length, [pairs[key]])._replace(in_mean=key in in_mean) for key in keys]
    return differences


def compare_sequences(a: Run, b: Run) -> list[Difference]:
    """b against a on the sequences that both have read: the share of right answers in each, or its mean loss in nats."""
    known = {sequences_of(a, record): record["by_row"] for record in a.records if "by_row" in record}
    differences = []
    for record in b.records:
        if "by_row" in record and (of_a := known.get(sequences_of(b, record))):
            loss = not EVALS[record["eval"]].headline.higher_is_better
            name = f"loss of {record['source']}" if loss else f"{record['eval']}: {record['source']}"
            differences.append(_difference(name, record["length"], [np.stack([of_a, record["by_row"]], 1)], loss))
    return differences


def _difference(task: str, length: int, cells: Sequence[np.ndarray], loss: bool = False) -> Difference:
    """The mean over tasks of b - a, of each of which there are pairs [n, 2]."""
    intervals = np.array([paired(pairs[:, 1] - pairs[:, 0], loss) for pairs in cells])
    mean, *ends = mean_of(intervals)
    low, high = (None if math.isnan(x) else x for x in ends)
    a, b = np.mean([pairs.mean(0) for pairs in cells], axis=0).tolist()
    sizes = [len(pairs) for pairs in cells]
    return Difference(task, length, sum(sizes), a, b, mean, low, high, min(sizes), loss)


def paired(differences: np.ndarray, loss: bool) -> tuple[float, float, float]:
    """The mean of paired differences and its interval, by Student's t.

    Differences that are all the same d have no spread. Scores lie between 0 and 1, so that a pair not seen differs by -1 at the
    least and by 1 at the most, and of such pairs Wilson's interval for 0 of n allows a share p: the mean lies between
    d - p (1 + d) and d + p (1 - d). Where both models are right everywhere, this is Newcombe's interval for paired shares
    (1998, method 10). Nothing bounds losses: the ends are NaN.
    """
    n, mean = len(differences), float(differences.mean())
    if np.ptp(differences) > 1e-9:  # up to rounding
        half = float(stdtrit(n - 1, 0.975) * differences.std(ddof=1) / math.sqrt(n))
        return (mean, mean - half, mean + half) if loss else (mean, max(-1.0, mean - half), min(1.0, mean + half))
    share = math.nan if loss else wilson(0, n)[1]
    return mean, mean - share * (1 + mean), mean + share * (1 - mean)
