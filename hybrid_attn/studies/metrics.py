"""Metrics: numbers that are read from the workdir of a finished run."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from hybrid_attn.evals.report.statistics import UNBOUNDED
from hybrid_attn.train import curves
from hybrid_attn.train.metrics import EVALS, METRICS
from hybrid_attn.trees import check

SHARE = 0.0, 1.0  # bounds of a share of right answers
POSITIVE = 0.0, math.inf  # of a number that is never negative


class Trained(NamedTuple):
    """A finished run: its workdir and last step, the CPU seconds of its processes, the FLOPs and tokens of its training.

    CPU seconds are None where a process was killed before it could write them.
    """

    workdir: Path
    step: int
    cpu_seconds: float | None
    flops: float
    tokens: int


class Metric(NamedTuple):
    """A number of a run, None where it has none; how it is written; which values it can have; and which are better."""

    read: Callable[[Trained], float | None]
    form: str = "{:.3f}"
    bounds: tuple[float, float] = UNBOUNDED
    higher_is_better: bool = True

    def show(self, value: float | None) -> str:
        return "none" if value is None else self.form.format(value)


def evaluated(evaluation: str, field: str, where: Mapping[str, object], **look) -> Metric:
    """The field of the one line of evals.jsonl after the last step that has the values `where`, such as {"length": 1024}.

    `evaluation` is a name in `evals.names`; `look` are other fields of the metric. ValueError where no line or more than one
    has these values.
    """

    def read(run: Trained) -> float | None:
        values = {"eval": evaluation, "step": run.step, **where}
        lines = [line for line in evaluations(run.workdir) if all(line.get(key) == x for key, x in values.items())]
        shown, path = ", ".join(f"{key}={x!r}" for key, x in values.items()), run.workdir / EVALS
        check(len(lines) == 1, f"{path} has {len(lines)} lines with {shown}, and a metric is read from one")
        check(field in lines[0], f"{path}: the line with {shown} has no {field!r}; it has {', '.join(lines[0])}")
        return lines[0][field]

    return Metric(read, **look)


def evaluations(workdir: Path) -> list[dict]:
    """The lines of evals.jsonl of a finished run."""
    path = workdir / EVALS
    check(path.is_file(), f"{path} does not exist: the run evaluates nothing; name evaluations in evals.names")
    return [json.loads(line) for line in path.read_text().splitlines()]


def logged(name: str, **look) -> Metric:
    """The number `name` in the last line of metrics.jsonl that has it; `look` are other fields of the metric."""

    def read(run: Trained) -> float | None:
        values = curves.points(curves.read(run.workdir / METRICS), name)
        check(bool(values), f"{run.workdir / METRICS} has no line with the number {name!r}")
        return values[-1][0]

    return Metric(read, **look)


def stays_below(name: str, bound: float) -> Metric:
    """The first logged step from which on every logged value of `name` is below `bound`; None where the last one is not."""

    def read(run: Trained) -> float | None:
        first = None
        for step, value in curves.points(curves.read(run.workdir / METRICS), "step", name):
            first = None if value >= bound else first or step
        return first

    return Metric(read, "{:,.0f}", POSITIVE, higher_is_better=False)
