"""Compares new results of a study with those that are recorded."""

import numpy as np

from hybrid_attn.bench.measurement import table as markdown
from hybrid_attn.studies.results import Results
from hybrid_attn.studies.statistics import mean_of


def compared(new: Results, recorded: Results) -> str:
    """A table of the means of both. They agree where the ranges that intervals and seeds span have a number in common."""
    rows = []
    for cell in new.study.cells:
        for name, metric in new.study.metrics.items():
            sides = [[*results.values(cell, name).values()] for results in (new, recorded)]
            if all(sides):
                shown = [mean_of(values, metric.bounds).show(metric.form) for values in sides]
                rows.append([cell, name, *shown, "yes" if _meet(*(_range(x, metric.bounds) for x in sides)) else "no"])
    if not rows:
        return "nothing is recorded of these cells"
    agree = sum(row[-1] == "yes" for row in rows)
    return f"\n{markdown(['cell', 'metric', 'here', 'recorded', 'agree'], rows)}\n\n{agree} of {len(rows)} numbers agree"


def _range(values: list[float], bounds: tuple[float, float]) -> tuple[float, float]:
    """From the lowest seed, or the lower end of the interval of the mean, to the highest."""
    ends = [*values, *mean_of(values, bounds)[1:3]]
    return float(np.nanmin(ends)), float(np.nanmax(ends))


def _meet(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return max(one[0], other[0]) <= min(one[1], other[1])
