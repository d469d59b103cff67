"""Over-optimisation of preferences: when an indicator of held-out pairs turned, and runs that end after that.

The warnings are those of arXiv 2410.11677, section 5: an entropy that turns from rising to falling, or a mass that falls. Take
the last evaluation within `TOLERANCE` of the highest one of the stage. Once as many evaluations as the patience follow it, the
indicator has turned there. An entropy must have risen before by more than that. All of this is read from the records of the
run, so a run that is resumed decides as one that went on.
"""

import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from hybrid_attn import checkpoint
from hybrid_attn.config import Config, StageConfig
from hybrid_attn.evals import preferences
from hybrid_attn.train.metrics import EVALS
from hybrid_attn.train.objectives import OBJECTIVES, objective_of
from hybrid_attn.trees import check

PATIENCE = 2  # of stages that do not end after a turn
TOLERANCE = 0.01  # relative; smaller differences are noise
EVAL, MASS = preferences.EVALUATION.name, "mass"


class Turn(NamedTuple):
    """The newest and the highest value of an indicator, the last step near that, and how many evaluations are newer.

    `warns` says whether its fall is a warning: an entropy must have risen.
    """

    indicator: str
    value: float
    highest: float
    step: int
    newer: int
    warns: bool

    def has_come(self, patience: int) -> bool:
        return self.warns and self.newer >= patience


def check_rule(c: Config) -> None:
    """ValueError where a stage names an indicator or ends after a turn that would not be seen, or whose checkpoint is gone."""
    for stage in c.each_stage:
        for name in ("turn_indicator", "turn_patience"):
            if (value := getattr(stage, name)) is not None:
                _check_seen(c, stage, f"stages[{stage.index}].{name}={value!r}")
        if stage.turn_patience is not None:
            _check_end(c, stage, f"stages[{stage.index}].turn_patience={stage.turn_patience}")


def _check_seen(c: Config, stage: StageConfig, field: str) -> None:
    with_indicator = ", ".join(name for name, objective in OBJECTIVES.items() if objective.indicator)
    of_pairs = f"{field} is of the objectives {with_indicator}, and this one is {stage.objective!r}; leave it at None"
    check(objective_of(stage).indicator is not None, of_pairs)
    check(EVAL in c.evals.names, f"{field} needs {EVAL!r} in evals.names, and they are {c.evals.names}")


def _check_end(c: Config, stage: StageConfig, field: str) -> None:
    check(stage.index == len(c.stages) - 1, f"{field} ends the run, and stages follow; give them a run of their own, or None")
    check(c.evals.every is not None, f"{field} counts evaluations, and evals.every is None; give it a number of steps")
    every, train = c.evals.every, c.train
    divides = f"train.checkpoint_every={train.checkpoint_every} does not divide evals.every={every}"
    check(every % train.checkpoint_every == 0, f"{field} returns to a step that was evaluated, and {divides}; use {every}")
    needed = stage.turn_patience * every // train.checkpoint_every + 2  # one is of a run that was stopped between these steps
    gone = f"train.keep={train.keep} deletes the checkpoint before the turn; use {needed} or more"
    check(train.keep >= needed, f"{field}: {gone}")


def newest(c: Config, workdir: Path, step: int) -> Turn | None:
    """The turn in the evaluations of the stage of `step`, up to that step; None without an indicator or an evaluation."""
    stage = c.at(c.last_stage(step))
    indicator = stage.turn_indicator or objective_of(stage).indicator
    begins = sum(x.steps for x in c.stages[: stage.index])
    records = _records(workdir / EVALS) if indicator else []
    values = {}
    for record in records:
        if record["eval"] == EVAL and begins <= record["step"] <= step and record.get(indicator) is not None:
            values.setdefault(record["step"], []).append(record[indicator])
    means = {at: statistics.fmean(of_step) for at, of_step in values.items()}  # over sources and lengths
    return turn_of(indicator, means) if means else None


def turn_of(indicator: str, values: Mapping[int, float]) -> Turn:
    """The turn of an indicator, of its values by step."""
    first, last, highest = values[min(values)], values[max(values)], max(values.values())
    near = (1 - TOLERANCE) * highest
    step = max(at for at, value in values.items() if value >= near)
    warns = indicator == MASS or first < near
    return Turn(indicator, last, highest, step, sum(at > step for at in values), warns)


def _records(path: Path) -> list[Mapping]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(c: Config, workdir: Path, step: int) -> Turn | None:
    """The turn after which a run ends at the evaluation of `step`; None if it goes on."""
    patience = c.at(c.last_stage(step)).turn_patience
    turn = None if patience is None else newest(c, workdir, step)
    return turn if turn is not None and turn.has_come(patience) else None


def lines(c: Config, workdir: Path, step: int) -> list[str]:
    """What a run says of the indicator after the evaluation of `step`."""
    turn = newest(c, workdir, step)
    if turn is None:
        return []
    shown = f"turn         {turn.indicator} {turn.value:.4g}, highest {turn.highest:.4g}, near it until step {turn.step}"
    patience = c.at(c.last_stage(step)).turn_patience or PATIENCE
    return [f"{shown}{f': it turned {turn.newer} evaluations ago' if turn.has_come(patience) else ''}"]


def ending(c: Config, workdir: Path, step: int) -> list[str]:
    """The last line of a run that ends because the indicator turned."""
    turn = ended(c, workdir, step)
    return [] if turn is None else [f"turn         ended after step {step} of {c.total_steps}; {_advice(turn, workdir)}"]


def _advice(turn: Turn, workdir: Path) -> str:
    """Which checkpoint to use: that of the turn, or the newest one before it where that is gone."""
    folder, before = workdir / "checkpoints", f"from before the turn of {turn.indicator}"
    steps = [step for step in checkpoint.steps(folder) if step <= turn.step]
    gone = f"that of step {turn.step}, {before}, was deleted"
    if not steps:
        return f"no checkpoint is left: {gone}"
    return f"use {folder}/{steps[-1]}, " + (before if steps[-1] == turn.step else f"the newest one left: {gone}")
