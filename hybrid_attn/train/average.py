"""An exponential moving average of the parameters, beside those that are trained."""

import jax
import jax.numpy as jnp

from hybrid_attn.train.objectives.objective import Extra

NAME = "ema"


def moving_average(half_life: float) -> Extra:
    """After step n: average <- d average + (1 - d) parameters, with d = 2 ** (-1 / (half_life n)).

    The weight of a step halves over the next `half_life * n` steps.
    """

    def update(average: dict, params: dict, sums: dict, step: jax.Array) -> dict:
        decay = jnp.exp2(-1 / (half_life * step.astype(jnp.float32)))
        return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, average, params)

    return Extra(lambda params: params, update)
