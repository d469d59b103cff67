"""Which source, and which of its rows, is a row of a mixture: a table of one period, computed from the weights alone."""

import math
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

LONGEST_PERIOD = 100_000  # rows; weights of four digits stay within


class Mixture:
    """Rows of several sources, each source's own rows in order, in exact shares at every row.

    The weights are read as the decimal fractions that they are written as. Their order within a period is Tijdeman's (The
    chairman assignment problem, 1980): after n rows each source has its share of n to within less than a row.
    """

    def __init__(self, weights: Mapping[str, float]):
        """`weights` are positive; ValueError where they repeat only after more than `LONGEST_PERIOD` rows."""
        self.names = tuple(sorted(weights))  # a config file does not order them
        exact = [Fraction(str(weights[name])) for name in self.names]
        shares = [weight / sum(exact) for weight in exact]
        self.period = math.lcm(*(share.denominator for share in shares))
        if self.period > LONGEST_PERIOD:
            raise ValueError(
                f"the mixture weights {dict(weights)} repeat only after {self.period:,} rows, and {LONGEST_PERIOD:,} are the "
                "most; round them to four digits"
            )
        self._per_period = np.array([int(share * self.period) for share in shares])
        self._source = _chairman_assignment(self._per_period.tolist())
        self._before = np.empty_like(self._source)  # rows of the same source earlier in the period
        for source, count in enumerate(self._per_period):
            self._before[self._source == source] = np.arange(count)

    def source_of(self, number: int) -> tuple[str, int]:
        """The source of row `number`, and which of that source's rows it is."""
        periods, place = divmod(number, self.period)
        source = self._source[place]
        return self.names[source], int(periods * self._per_period[source] + self._before[place])

    def counts(self, rows: int) -> dict[str, int]:
        """How many of the first `rows` rows each source gives."""
        periods, rest = divmod(rows, self.period)
        counts = periods * self._per_period + np.bincount(self._source[:rest], minlength=len(self.names))
        return dict(zip(self.names, counts.tolist(), strict=True))


def _chairman_assignment(counts: list[int]) -> np.ndarray:
    """A source for each of sum(counts) rows, so that none is ever a row or more away from its share."""
    period, margin = sum(counts), 2 * len(counts) - 2
    if not margin:
        return np.zeros(period, np.int64)
    order, given = np.empty(period, np.int64), [0] * len(counts)
    for place in range(period):
        # Owed to each source once this row is given, in rows * period * margin. Whom a row's share of that is owed may have
        # it, and gets it who would be the first to be owed too much.
        owed = [margin * ((place + 1) * count - period * x) for count, x in zip(counts, given, strict=True)]
        ready = [i for i, x in enumerate(owed) if x >= period]
        order[place] = min(ready, key=lambda i: ((margin - 1) * period - owed[i]) // counts[i])
        given[order[place]] += 1
    return order
