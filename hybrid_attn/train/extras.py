"""Named arrays of the training state beside the parameters and those of the optimiser."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Extra(NamedTuple):
    """Arrays that a checkpoint carries, such as a moving average of the parameters.

    `init(params)` are those before the first step, and where a run continues from a checkpoint without them.
    `update(extra, params, sums)` are those after a step, from its new parameters and the sums of its objective.
    """

    init: Callable[[dict], Any]
    update: Callable[[Any, dict, dict], Any]

    def start(self, params: dict) -> Any:
        """The initial arrays, which share no buffer with the parameters: the step donates both."""
        return jax.tree.map(jnp.copy, self.init(params))
