"""Over-optimisation of preferences: when an indicator of held-out pairs turned, and runs that end after that.

The indicator is that of the stage's objective, whose fall is the warning of arXiv 2410.11677, section 5. It turned at the
evaluation of the stage with its highest value, once as many evaluations as the patience follow and all are below: fewer are
noise. All of this is read from the records of the run, so a run that is resumed decides as one that went on.
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hybrid_attn.config import Config, StageConfig
from hybrid_attn.evals import preferences
from hybrid_attn.train.metrics import EVALS
from hybrid_attn.train.objectives import OBJECTIVES, objective_of
from hybrid_attn.trees import check

PATIENCE = 2  # of stages that do not end after a turn
EVAL = preferences.EVALUATION.name


class Turn(NamedTuple):
    """The newest value of an indicator, its highest one and the step of that, and how many evaluations are newer than that."""

    indicator: str
    value: float
    highest: float
    step: int
    newer: int


def check_rule(c: Config) -> None:
    """ValueError where a stage ends after a turn that would not be seen, or whose checkpoint would be gone."""
    for stage in c.each_stage:
        if stage.turn_patience is not None:
            _check_stage(c, stage, f"stages[{stage.index}].turn_patience={stage.turn_patience}")


def _check_stage(c: Config, stage: StageConfig, field: str) -> None:
    with_indicator = ", ".join(name for name, objective in OBJECTIVES.items() if objective.indicator)
    of_pairs = f"{field} is of the objectives {with_indicator}, and this one is {stage.objective!r}; leave it at None"
    check(objective_of(stage).indicator is not None, of_pairs)
    check(stage.index == len(c.stages) - 1, f"{field} ends the run, and stages follow; give them a run of their own, or None")
    seen = EVAL in c.evals.names and c.evals.every is not None
    check(seen, f"{field} needs evals.every and {EVAL!r} in evals.names, and they are {c.evals.every} and {c.evals.names}")
    every, train = c.evals.every, c.train
    divides = f"train.checkpoint_every={train.checkpoint_every} does not divide evals.every={every}"
    check(every % train.checkpoint_every == 0, f"{field} returns to a step that was evaluated, and {divides}; use {every}")
    needed = stage.turn_patience * every // train.checkpoint_every + 1
    kept = f"train.keep={train.keep} deletes the checkpoint before the turn; use {needed} or more"
    check(train.keep >= needed, f"{field}: {kept}")


def newest(c: Config, workdir: Path, step: int) -> Turn | None:
    """The turn in the evaluations of the stage of `step`, up to that step; None without an indicator or an evaluation."""
    stage = c.at(c.last_stage(step))
    indicator, begins = objective_of(stage).indicator, sum(x.steps for x in c.stages[: stage.index])
    records = _records(workdir / EVALS) if indicator else []
    values = {}
    for record in records:
        if record["eval"] == EVAL and begins <= record["step"] <= step and record.get(indicator) is not None:
            values.setdefault(record["step"], []).append(record[indicator])
    if not values:
        return None
    means = {at: statistics.fmean(of_step) for at, of_step in sorted(values.items())}  # over sources and lengths
    highest = max(means.values())
    best = max(at for at, mean in means.items() if mean == highest)
    return Turn(indicator, means[max(means)], highest, best, sum(at > best for at in means))


def _records(path: Path) -> list[Mapping]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def is_over(c: Config, workdir: Path, step: int) -> bool:
    """Whether a run ends after the evaluation of `step`, because the indicator turned."""
    patience, turn = c.at(c.last_stage(step)).turn_patience, newest(c, workdir, step)
    return patience is not None and turn is not None and turn.newer >= patience


def lines(c: Config, workdir: Path, step: int) -> list[str]:
    """What a run says of the indicator after the evaluation of `step`."""
    turn = newest(c, workdir, step)
    if turn is None:
        return []
    shown = f"turn         {turn.indicator} {turn.value:.4g}, highest {turn.highest:.4g} at step {turn.step}"
    patience = c.at(c.last_stage(step)).turn_patience or PATIENCE
    turned = f": it turned there, {turn.newer} evaluations ago" if turn.newer >= patience else ""
    return [f"{shown}{turned}"]


def ending(c: Config, workdir: Path, step: int) -> list[str]:
    """The last line of a run that ends because the indicator turned."""
    if not is_over(c, workdir, step):
        return []
    turn = newest(c, workdir, step)
    checkpoint = f"use {workdir}/checkpoints/{turn.step}, from before the turn of {turn.indicator}"
    return [f"turn         ended after step {step} of {c.total_steps}; {checkpoint}"]
