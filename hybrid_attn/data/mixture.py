"""The order of sources in a mixture: a table of one period, computed from the weights alone."""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 100_000  # sequences; weights of four digits repeat sooner


class Mixture:
    """Interleaves the packed sequences of several sources in exact shares. Each source keeps its own order.

    The weights are read as decimal fractions, as they are written. Their order within a period is Tijdeman's (The chairman
    assignment problem, 1980): after n sequences each source has its share of n, to within less than one sequence.
    """

    def __init__(self, weights: Mapping[str, float]):
        """`weights` are positive; ValueError where the order repeats only after more than `LONGEST_PERIOD` sequences."""
        self.names = tuple(sorted(weights))  # a config file does not order them
        exact = [Fraction(str(weights[name])) for name in self.names]
        shares = [weight / sum(exact) for weight in exact]
        self.period = math.lcm(*(share.denominator for share in shares))
        if self.period > LONGEST_PERIOD:
            raise ValueError(
                f"the mixture weights {dict(weights)} repeat only after {self.period:,} sequences, and {LONGEST_PERIOD:,} are "
                "the most; round them to four digits"
            )
        self._per_period = np.array([int(share * self.period) for share in shares])
        self._source = _chairman_assignment(self._per_period.tolist())
        self._before = np.empty_like(self._source)  # sequences of the same source earlier in the period
        for source, count in enumerate(self._per_period):
            self._before[self._source == source] = np.arange(count)

    def source_of(self, number: int) -> tuple[str, int]:
        """The source of sequence `number` of the mixture, and its number within that source."""
        periods, index = divmod(number, self.period)
        source = self._source[index]
        return self.names[source], int(periods * self._per_period[source] + self._before[index])

    def counts(self, number: int) -> dict[str, int]:
        """How many of the first `number` sequences come from each source."""
        periods, remainder = divmod(number, self.period)
        counts = periods * self._per_period + np.bincount(self._source[:remainder], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))


def _chairman_assignment(counts: list[int]) -> np.ndarray:
    """A source for each of sum(counts) sequences. No source is ever a whole sequence away from its share."""
    period, margin = sum(counts), 2 * len(counts) - 2
    if not margin:
        return np.zeros(period, np.int64)
    order, taken = np.empty(period, np.int64), [0] * len(counts)
    for index in range(period):
        # How far each source is behind its share after this sequence, in units of sequences * period * margin. The sources that
        # are far enough behind are ready; of these, the one that would first fall too far behind is next.
        owed = [margin * ((index + 1) * count - period * x) for count, x in zip(counts, taken, strict=True)]
        ready = [i for i, x in enumerate(owed) if x >= period]
        order[index] = min(ready, key=lambda i: ((margin - 1) * period - owed[i]) // counts[i])
        taken[order[index]] += 1
    return order
