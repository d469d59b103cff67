"""Named arrays of the training state beside the parameters and those of the optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Extra(NamedTuple):
    """Arrays that a checkpoint carries, such as a moving average of the parameters.

    `init(params)` makes the initial arrays. They are used at step 0, and on resume from a checkpoint that lacks the extra.
    `update(extra, params, sums)` makes those after a step, from its new parameters and the sums of its objective.
    """

    init: Callable[[dict], Any]
    update: Callable[[Any, dict, dict], Any]

    def start(self, params: dict) -> Any:
        """The initial arrays, which share no buffer with the parameters: the step donates both."""
        return jax.tree.map(jnp.copy, self.init(params))
