"""What a stage minimises."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.config import StageConfig
from hybrid_attn.model import Execution

Batch = dict[str, jax.Array]


class Extra(NamedTuple):
    """Arrays of the training state that a checkpoint carries, such as a moving average of the parameters.

    `init(params)` makes the initial arrays. They are used at step 0, and on resume from a checkpoint that lacks the extra.
    `update(extra, params, sums)` makes those after a step, from its new parameters and the sums of its objective.
    """

    init: Callable[[dict], Any]
    update: Callable[[Any, dict, dict], Any]

    def start(self, params: dict) -> Any:
        """The initial arrays, which share no buffer with the parameters: the step donates both."""
        return jax.tree.map(jnp.copy, self.init(params))


class Objective(NamedTuple):
    """A loss that is a sum over a batch, divided by the weight of the batch.

    `weight(batch)` is that weight. `loss(config, params, extras, batch, execution)` is the sum, and sums by name of which
    `metrics(sums, batch)` makes the metrics of a step; both sums may be of a microbatch. The sum "aux_loss" is not divided by
    the weight: its mean over the microbatches is added to the loss. `fields` are the names of the batch fields that these
    functions read; a batch without weight has the loss 0. `extras` are arrays that the state has for the objective, by name;
    the loss gets their values before the step. Stages with an extra of the same name share it.
    """

    weight: Callable[[Batch], jax.Array]
    loss: Callable[[StageConfig, dict, Mapping, Batch, Execution], tuple[jax.Array, dict]]
    metrics: Callable[[dict, Batch], dict]
    fields: tuple[str, ...]
    extras: Mapping[str, Extra] = {}
