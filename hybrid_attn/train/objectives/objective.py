"""What a stage minimises."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.config import StageConfig
from hybrid_attn.model import Execution
from hybrid_attn.trees import check

Batch = dict[str, jax.Array]


class Extra(NamedTuple):
    """Arrays of the training state that a checkpoint carries, such as a moving average of the parameters.

    `init(params)` makes the initial arrays. They are used at step 0, and on resume from a checkpoint that lacks the extra.
    `update(extra, params, sums, step)` makes those after `step` steps, from the new parameters and the sums of the objective.
    With `of_stage` a state has them only in the stages whose objective has the extra: `init` makes them before the first step
    of each, of the parameters that the stage trains.
    """

    init: Callable[[dict], Any]
    update: Callable[[Any, dict, dict, jax.Array], Any]
    of_stage: bool = False

    def start(self, params: dict) -> Any:
        """The initial arrays, which share no buffer with the parameters: the step donates both."""
        return jax.tree.map(jnp.copy, self.init(params))


SETTINGS = {"average_over": "tokens", "preference": None}  # of a stage, for some objectives; the values of all others


def reads(*names: str) -> Callable[[StageConfig], None]:
    """The check of an objective that reads these `SETTINGS`: ValueError where the stage has set others."""

    def check_settings(config: StageConfig) -> None:
        for name in SETTINGS.keys() - set(names):
            field, unread = f"stages[{config.index}].{name}", getattr(config, name) == SETTINGS[name]
            problem = f"{field} is set, and the objective {config.objective!r} does not read it"
            check(unread, f"{problem}; use {SETTINGS[name]!r}")

    return check_settings


class Objective(NamedTuple):
    """A loss that is a sum over a batch, divided by the weight of the batch.

    `weight(config, batch)` is that weight. `loss(config, params, extras, batch, execution)` is the sum, and sums by name, of
    which `metrics(sums, batch)` makes the metrics of a step; both sums may be of a microbatch. The sum "aux_loss" is not
    divided by the weight: its mean over the microbatches is added to the loss. `fields` are the batch fields that these
    functions read; a batch without weight has the loss 0. `extras` are arrays that the state has for the objective, by name;
    the loss gets their values before the step. Stages with an extra of the same name share it. `check` refuses settings of a
    stage by a ValueError. A `paired` objective needs sources of pairs. `forward_passes`: further forward passes of the loss,
    with other parameters. A fall of its `indicator`, a field of the evaluation `preferences`, is a warning of
    over-optimisation.
    """

    weight: Callable[[StageConfig, Batch], jax.Array]
    loss: Callable[[StageConfig, dict, Mapping, Batch, Execution], tuple[jax.Array, dict]]
    metrics: Callable[[dict, Batch], dict]
    fields: tuple[str, ...]
    extras: Mapping[str, Extra] = {}
    check: Callable[[StageConfig], None] = reads()
    paired: bool = False
    forward_passes: int = 0
    indicator: str | None = None
