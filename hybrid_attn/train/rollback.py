"""After too many spikes in a row: the run goes back to an earlier checkpoint and passes over the batches from there on.

What follows is what a run from that checkpoint with the same --skip_steps computes. The data state records each rollback, so
that none goes to parameters that another one has gone back to. Checkpoints of later steps are renamed.
"""

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from hybrid_attn import checkpoint, trees
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.config import Config, to_dict
from hybrid_attn.stored import UnreadableError
from hybrid_attn.train.resume import Range

RECORD = "rollbacks"  # in the data state: the step of the checkpoint and the last step passed over, for each rollback


class TooManySpikes(FloatingPointError):
    """The steps `first` to `last` are spikes."""

    def __init__(self, message: str, first: int, last: int):
        super().__init__(message)
        self.first, self.last = first, last


class Rollback(NamedTuple):
    """The run goes on from the checkpoint of `step`, and passes over the batches of the steps after it up to `last`."""

    step: int
    last: int


def roll_back(c: Config, checkpoints: Checkpoints, spikes: TooManySpikes, recorded: Mapping) -> tuple[Rollback, list[str]]:
    """Renames the checkpoints of steps after that of the rollback; and lines about it. All processes do it together.

    `recorded` is of the data state. `spikes` is raised where the config has no rollbacks and where no checkpoint is old enough,
    of the same config, and trained since the last rollback.
    """
    least = c.optim.rollback_steps
    if least is None:
        raise spikes
    newest = -1
    if jax.process_index() == 0:
        trained_from = max((last + 1 for _, last in recorded.get(RECORD, ())), default=0)
        newest = newest_of_config(c, checkpoints, range(trained_from, spikes.first - least + 1))
    step = int(multihost_utils.broadcast_one_to_all(np.int32(newest)))
    if step < 0:
        cause = f"no checkpoint of this config, trained since the last rollback, is optim.rollback_steps={least} steps older"
        raise TooManySpikes(f"{spikes}; {cause}", spikes.first, spikes.last)
    later = [other for other in checkpoints.steps() if other > step] if jax.process_index() == 0 else []
    renamed = checkpoints.set_aside(later, "rolled_back")
    begins = f"goes back to the checkpoint of step {step}, and passes over the batches up to step {spikes.last}"
    lines = [f"rollback     steps {spikes.first} to {spikes.last} are spikes: the run {begins}"]
    return Rollback(step, spikes.last), lines + [f"kept         a checkpoint of a later step as {path}" for path in renamed]


def newest_of_config(c: Config, checkpoints: Checkpoints, steps: range) -> int:
    """The newest of the `steps` with a checkpoint that was made with this config, or -1."""
    for step in reversed(checkpoints.steps()):
        with contextlib.suppress(UnreadableError):
            if step in steps and not trees.differences(checkpoint.read_config(checkpoints.directory, step), to_dict(c)):
                return step
    return -1


def skipped_after(rollback: Rollback, skipped: Iterable[Range]) -> Sequence[Range]:
    """The steps that the run passes over after a rollback: those that it would have `skipped`, and those of the rollback."""
    step, last = rollback
    return [(step + 1, last), *((max(first, step + 1), end) for first, end in skipped if end > step)]
