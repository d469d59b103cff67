"""Compares new results of a study with those that are recorded."""

from hybrid_attn.bench.measurement import table as markdown
from hybrid_attn.studies.metrics import Metric
from hybrid_attn.studies.results import Results
from hybrid_attn.studies.statistics import Mean, mean_of


def compared(new: Results, recorded: Results) -> str:
    """A table of the means of both over the seeds that both have, and whether they agree."""
    rows = []
    for cell in new.study.cells:
        seeds = new.of(cell).keys() & recorded.of(cell).keys()
        for name, metric in new.study.metrics.items() if seeds else ():
            here, there = (_mean(results, cell, name, seeds) for results in (new, recorded))
            answer = "yes" if agree(metric, here, there) else "no"
            rows.append([cell, name, here.show(metric.form), there.show(metric.form), answer])
    if not rows:
        return "nothing is recorded of these cells"
    number = sum(row[-1] == "yes" for row in rows)
    return f"\n{markdown(['cell', 'metric', 'here', 'recorded', 'agree'], rows)}\n\n{number} of {len(rows)} numbers agree"


def _mean(results: Results, cell: str, name: str, seeds: set[int]) -> Mean:
    values = results.values(cell, name)
    return mean_of([x for seed, x in values.items() if seed in seeds], results.study.metrics[name].bounds)


def agree(metric: Metric, here: Mean, recorded: Mean) -> bool:
    """Whether as many seeds have the number, and the mean here is written like the recorded one or lies in its interval."""
    if here.number != recorded.number:
        return False
    return metric.show(here.mean) == metric.show(recorded.mean) or recorded.low <= here.mean <= recorded.high
