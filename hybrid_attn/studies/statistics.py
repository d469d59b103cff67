"""Statistics over seeds: means with intervals, paired t tests, and the sentences of claims."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from hybrid_attn.evals.report.statistics import UNBOUNDED, mean_within
from hybrid_attn.studies.results import Results
from hybrid_attn.studies.study import Claim, Reach

P = 0.01  # a claim needs a smaller p
SPREAD = 1e-9  # values that differ by less are alike


class Mean(NamedTuple):
    """The mean of `number` seeds and its interval of 95% by Student's t; an interval of NaN where the seeds have no spread."""

    mean: float
    low: float
    high: float
    number: int

    def show(self, form: str) -> str:
        if self.number == 0:
            return "—"
        if math.isnan(self.low):
            return form.format(self.mean)
        return f"{form.format(self.mean)} ({form.format(self.low)} to {form.format(self.high)})"


def mean_of(values: Sequence[float], bounds: tuple[float, float] = UNBOUNDED) -> Mean:
    """One seed has no spread, and seeds that are all alike say nothing of it."""
    if not len(values):
        return Mean(math.nan, math.nan, math.nan, 0)
    if np.ptp(values) <= SPREAD:
        return Mean(float(np.mean(values)), math.nan, math.nan, len(values))
    return Mean(*mean_within(np.array(values), bounds), len(values))


def seeds_of(number: int) -> str:
    """1 seed, 2 seeds."""
    return f"{number} seed" + "s" * (number != 1)


def ordered(results: Results) -> list[str]:
    """The cells in the order of the table, which `Study` describes; those without a number are last."""
    cells, by = list(results.study.cells), results.study.sorted_by
    if by is None:
        return cells
    sign = -1 if results.study.metrics[by].higher_is_better else 1

    def key(cell: str) -> tuple[bool, bool, float]:
        mean = mean_of([*results.values(cell, by).values()])
        return mean.number == 0, results.learned(cell) != set(results.of(cell)), sign * mean.mean if mean.number else 0.0

    return sorted(cells, key=key)


class PairedTest(NamedTuple):
    """A paired t test: the mean difference with its interval, and the two-sided p, NaN where the differences have no spread."""

    difference: Mean
    p: float


def paired(better: Sequence[float], worse: Sequence[float], bounds: tuple[float, float] = UNBOUNDED) -> PairedTest:
    """Of the values of two cells, in the same order of seeds and within `bounds`."""
    low, high = bounds
    mean = mean_of(np.subtract(better, worse), (low - high, high - low))
    return PairedTest(mean, math.nan if math.isnan(mean.low) else float(stats.ttest_rel(better, worse).pvalue))


def verdict(results: Results, claim: Claim | Reach) -> str:
    """A line that says whether a claim holds, with its numbers."""
    return _of_claim(results, claim) if isinstance(claim, Claim) else _of_reach(results, claim)


def _of_claim(results: Results, claim: Claim) -> str:
    by_seed = [results.values(cell, claim.metric) for cell in (claim.better, claim.worse)]
    seeds = by_seed[0].keys() & by_seed[1].keys()
    if claim.of_learned:
        seeds &= results.learned(claim.better) & results.learned(claim.worse)
    n = f"n = {seeds_of(len(seeds))}" + " in which both learned" * claim.of_learned
    if len(seeds) < 2:
        return f"not tested ({n}): {claim.sentence}"
    metric = results.study.metrics[claim.metric]
    test = paired(*([values[seed] for seed in sorted(seeds)] for values in by_seed), metric.bounds)
    shown = f"{claim.metric}: {claim.better} − {claim.worse} = {test.difference.show(metric.form)}"
    if math.isnan(test.p):
        return f"not tested ({n}, all with the same difference): {claim.sentence} {shown}."
    return f"{_decision(test, metric.higher_is_better)} (p = {test.p:.2g}, {n}): {claim.sentence} {shown}."


def _decision(test: PairedTest, higher_is_better: bool) -> str:
    if test.p >= P:
        return "not shown"
    return "shown" if (test.difference.mean > 0) == higher_is_better else "the opposite is shown"


def _of_reach(results: Results, claim: Reach) -> str:
    """The seeds that reach the bound, among those that learned; and what the others have."""
    metric, values = results.study.metrics[claim.metric], results.values(claim.cell, claim.metric)
    seeds, learned = set(results.of(claim.cell)), results.learned(claim.cell)

    def shown(some: set[int]) -> str:
        return ", ".join(metric.show(values.get(seed)) for seed in sorted(some))

    if not learned:
        none = f"not counted ({seeds_of(len(seeds))}" + ", of which none learned the task" * bool(seeds)
        return f"{none}; {claim.metric}: {shown(seeds) or 'none'}): {claim.sentence}"
    reaching = [seed for seed in learned & values.keys() if results.reaches(claim.metric, values[seed], claim.bound)]
    of = seeds_of(len(learned)) + " that learned the task" * (results.study.learned is not None)
    others = f"; {shown(seeds - learned)} in {seeds_of(len(seeds - learned))} that did not learn it" * (learned != seeds)
    return f"holds in {len(reaching)} of {of} (a count, no test; {claim.metric}: {shown(learned)}{others}): {claim.sentence}"
