"""Steps whose loss or gradient norm is far above the last ones, or not finite: their update is not taken."""

import jax
import jax.numpy as jnp

from hybrid_attn.config import Optim
from hybrid_attn.train.objectives.objective import Extra

NAME = "spikes"
FEWEST = 8  # values of which a median is known; before, only what is not finite is a spike
VALUES = "loss", "grad_norm"


def history(optim: Optim) -> Extra:
    """The last `spike_window` finite values of each of `VALUES`, first NaN, and the number of spikes in a row and in all."""

    def start(params: dict) -> dict:
        values = {name: jnp.full(optim.spike_window, jnp.nan, jnp.float32) for name in VALUES}
        return values | {"in_a_row": jnp.int32(0), "total": jnp.int32(0)}

    return Extra(start, lambda extra, *_: extra)


def judge(optim: Optim, spikes: dict, values: dict) -> tuple[jax.Array, dict]:
    """Whether a step with these `values` is a spike, and the history after it.

    Finite values of a spike are remembered too: a level that stays becomes the median.
    """
    is_spike = jnp.bool_(False)
    after = {}
    for name in VALUES:
        last, value = spikes[name], values[name]
        has_median = jnp.isfinite(last).sum() >= FEWEST
        is_spike |= ~jnp.isfinite(value) | (has_median & (value > optim.spike_factor * jnp.nanmedian(last)))
        after[name] = jnp.where(jnp.isfinite(value), jnp.concatenate([last[1:], value[None]]), last)
    after["in_a_row"] = jnp.where(is_spike, spikes["in_a_row"] + 1, 0)
    after["total"] = spikes["total"] + is_spike
    return is_spike, after
