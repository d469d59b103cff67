"""Spikes: steps whose loss or gradient norm is not finite, or far above that of the steps before. Their update is not taken."""

import jax
import jax.numpy as jnp

from hybrid_attn.config import Optim
from hybrid_attn.train.objectives.objective import Extra

NAME = "spikes"
WINDOW = 64  # steps of which the median is taken
MIN_VALUES = 8  # with fewer finite values there is no median yet, and only what is not finite is a spike
VALUES = "loss", "grad_norm"


def start(params: dict) -> dict:
    """The last finite values of each of `VALUES`, with NaN where there are none yet, and the number of consecutive spikes."""
    return {name: jnp.full(WINDOW, jnp.nan, jnp.float32) for name in VALUES} | {"consecutive": jnp.int32(0)}


HISTORY = Extra(start, lambda extra, *_: extra)


def judge(optim: Optim, history: dict, values: dict) -> tuple[jax.Array, dict]:
    """Whether a step with these `values` is a spike, and the history after it.

    The history keeps the finite values of spikes too, so that the median follows a loss that stays higher.
    """
    is_spike, after = jnp.bool_(False), {}
    for name in VALUES:
        last, value = history[name], values[name]
        has_median = jnp.isfinite(last).sum() >= MIN_VALUES
        is_spike |= ~jnp.isfinite(value) | (has_median & (value > optim.spike_factor * jnp.nanmedian(last)))
        after[name] = jnp.where(jnp.isfinite(value), jnp.concatenate([last[1:], value[None]]), last)
    return is_spike, after | {"consecutive": jnp.where(is_spike, history["consecutive"] + 1, 0)}
