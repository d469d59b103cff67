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


class PairedTest(NamedTuple):
    """A paired t test: the mean difference with its interval, and the two-sided p, NaN where the differences have no spread."""

    difference: Mean
    p: float


def paired(better: Sequence[float], worse: Sequence[float]) -> PairedTest:
    """Of the values of two cells, in the same order of seeds."""
    differences = np.subtract(better, worse)
    mean = mean_of(differences)
    return PairedTest(mean, math.nan if math.isnan(mean.low) else float(stats.ttest_rel(better, worse).pvalue))


def verdict(results: Results, claim: Claim | Reach) -> str:
    """A line that says whether a claim holds, with its numbers."""
    return _of_claim(results, claim) if isinstance(claim, Claim) else _of_reach(results, claim)


def _of_claim(results: Results, claim: Claim) -> str:
    by_seed = [results.values(cell, claim.metric) for cell in (claim.better, claim.worse)]
    seeds = by_seed[0].keys() & by_seed[1].keys()
    if claim.of_learned:
        seeds &= results.learned(claim.better) & results.learned(claim.worse)
    among = "seeds in which both learned" if claim.of_learned else "seeds"
    n = f"n = {len(seeds)} {among}"
    if len(seeds) < 2:
        return f"not tested ({n}): {claim.sentence}"
    metric = results.study.metrics[claim.metric]
    test = paired(*([values[seed] for seed in sorted(seeds)] for values in by_seed))
    shown = f"{claim.metric}: {claim.better} − {claim.worse} = {test.difference.show(metric.form)}"
    if math.isnan(test.p):
        return f"not tested ({n}, all with the same difference): {claim.sentence} {shown}."
    return f"{_decision(test, metric.higher_is_better)} (p = {test.p:.2g}, {n}): {claim.sentence} {shown}."


def _decision(test: PairedTest, higher_is_better: bool) -> str:
    if test.p >= P:
        return "not shown"
    return "shown" if (test.difference.mean > 0) == higher_is_better else "the opposite is shown"


def _of_reach(results: Results, claim: Reach) -> str:
    metric, values = results.study.metrics[claim.metric], results.values(claim.cell, claim.metric)
    seeds = results.learned(claim.cell)
    n = f"n = {len(seeds)}" + (
        f" of {len(results.of(claim.cell))} seeds, those that learned" if results.study.learned else " seeds"
    )
    if not seeds:
        return f"not tested ({n}): {claim.sentence}"
    reaching = [seed for seed in seeds if seed in values and results.reaches(claim.metric, values[seed], claim.bound)]
    decision = "holds" if len(reaching) == len(seeds) else f"holds in {len(reaching)} of {len(seeds)} seeds"
    shown = ", ".join(metric.show(values.get(seed)) for seed in sorted(seeds))
    return f"{decision} ({n}; {claim.metric}: {shown}): {claim.sentence}"
