"""What scores are worth: intervals, and two models on the same questions."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.evals.report.runs import Run, sample_of, sequences_of
from hybrid_attn.evals.table import EVALS
from hybrid_attn.trees import check

Z = 1.959963984540054  # 95% of a normal distribution lies within as many deviations
RESAMPLES = 2000
DRAWS = 2**20  # at a time
FEWEST = 5  # questions that say something together
PAIRS = 10  # fewest pairs for a verdict: a sign test on five equal differences gives p = 0.06


class Difference(NamedTuple):
    """Mean scores of two models on the same `pairs` of answers, and the interval of 95% of b - a, if anything bounds it.

    `fewest` is how many pairs its task has; of a mean over tasks, the one with the fewest. Of a `loss` less is better.
    `family` is the name of the mean that counts its task, and empty if none does; `is_mean` if it is that mean.
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
    family: str = ""
    is_mean: bool = False

    @property
    def verdict(self) -> str:
        """Unclear without an interval, where it has 0 in it, and where a task has too few pairs to resample."""
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


def resampled_means(values: np.ndarray, key: int) -> np.ndarray:
    """Means of `RESAMPLES` draws, with replacement, of as many values as there are."""
    bits, n = np.random.Philox(key=key), len(values)
    step = max(1, DRAWS // n)
    chunks = [min(step, RESAMPLES - first) for first in range(0, RESAMPLES, step)]
    means = [values[(bits.random_raw(rows * n) % np.uint64(n)).astype(np.int64)].reshape(rows, n).mean(1) for rows in chunks]
    return np.concatenate(means)


def mean_interval(cells: Sequence[tuple[float, int]]) -> tuple[float, float]:
    """The interval of 95% for the mean of shares, each of which has right answers and answers.

    The distances from the shares to their Wilson limits add up as the errors of independent numbers do, below and above by
    themselves (Zou and Donner, 2008): unlike resampled means, all wrong answers or all right ones leave a width.
    """
    shares = np.array([right / number for right, number in cells])
    low, high = np.array([wilson(*cell) for cell in cells]).T
    mean, n = shares.mean(), len(cells)
    return float(mean - math.sqrt(((shares - low) ** 2).sum()) / n), float(mean + math.sqrt(((high - shares) ** 2).sum()) / n)


def compare(a: Run, b: Run, families: Mapping[str, set[str]]) -> list[Difference]:
    """b against a, by length, on the questions that both answered: the mean over the tasks of each family, then each task."""
    family_of = {task: name for name, family in families.items() for task in family}
    scores = {sample_of(answer): answer["score"] for answer in a.answers}
    cells: dict[tuple[int, str], list[tuple[float, float]]] = {}
    for answer in b.answers:
        if (sample := sample_of(answer)) in scores:
            cells.setdefault((answer["length"], answer["task"]), []).append((scores[sample], answer["score"]))
    differences = []
    for length in sorted({length for length, _ in cells}):
        tasks = sorted(task for at, task in cells if at == length)
        of_length = {task: (key, np.array(cells[length, task])) for key, task in enumerate(tasks)}
        for name, family in families.items():
            if len(averaged := [of_length[task] for task in tasks if task in family]) > 1:
                mean = _difference(f"{name} of {len(averaged)} tasks", length, averaged)
                differences.append(mean._replace(family=name, is_mean=True))
        for task in tasks:
            differences.append(_difference(task, length, [of_length[task]])._replace(family=family_of.get(task, "")))
    return differences


def compare_sequences(a: Run, b: Run) -> list[Difference]:
    """b against a on the sequences that both have read: the share of right answers in each, or its mean loss in nats."""
    known = {sequences_of(a, record): record["by_row"] for record in a.records if "by_row" in record}
    differences = []
    for key, record in enumerate(b.records):
        if "by_row" in record and (of_a := known.get(sequences_of(b, record))):
            pairs = np.stack([of_a, record["by_row"]], 1)
            loss = not EVALS[record["eval"]].headline.higher_is_better
            name = f"loss of {record['source']}" if loss else f"{record['eval']}: {record['source']}"
            differences.append(_difference(name, record["length"], [(key, pairs)], loss))
    return differences


def _difference(task: str, length: int, cells: Sequence[tuple[int, np.ndarray]], loss: bool = False) -> Difference:
    """The mean over tasks of b - a by a paired bootstrap: of each task the key of its random numbers and its pairs [n, 2].

    A task whose pairs all differ by the same d has resampled means without a spread. Scores lie between 0 and 1, so that a pair
    not seen differs by -1 at the least and by 1 at the most, and of such pairs Wilson's interval for 0 of n allows a share p:
    the mean lies between d - p (1 + d) and d + p (1 - d). Where both models are right everywhere, this is Newcombe's interval
    for paired shares (1998, method 10). Distances of tasks add up as in `mean_interval`. Nothing bounds losses.
    """
    gains = [pairs[:, 1] - pairs[:, 0] for _, pairs in cells]
    means = [resampled_means(gain, key) for gain, (key, _) in zip(gains, cells, strict=True)]
    low, high = np.quantile(np.mean(means, axis=0), (0.025, 0.975)).tolist()
    constant = [gain for gain in gains if np.ptp(gain) <= 1e-9]  # up to rounding
    if constant and loss:
        low = high = None
    elif constant:
        middle = float(np.mean([gain.mean() for gain in gains]))
        below, above = (middle - low) ** 2, (high - middle) ** 2
        for gain in constant:
            difference, share = float(gain[0]), wilson(0, len(gain))[1] / len(gains)
            below, above = below + (share * (1 + difference)) ** 2, above + (share * (1 - difference)) ** 2
        low, high = middle - math.sqrt(below), middle + math.sqrt(above)
    a, b = np.mean([pairs.mean(0) for _, pairs in cells], axis=0).tolist()
    sizes = [len(gain) for gain in gains]
    return Difference(task, length, sum(sizes), a, b, b - a, low, high, min(sizes), loss)
