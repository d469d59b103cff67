"""Keys and values in int8: numbers and the float32 step of each token's head."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_attn.parallel.context import merged

QUANTISED_SLOTS = 4096  # slots of int8 whose numbers exist in the dtype of the queries at a time


def quantised(x_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 numbers and the float32 step of each token's head: its largest number is 127 steps."""
    step_BKS = jnp.abs(x_BKSH).max(-1).astype(jnp.float32) / 127
    steps = x_BKSH.astype(jnp.float32) / jnp.where(step_BKS > 0, step_BKS, 1.0)[..., None]
    return jnp.round(steps).astype(jnp.int8), step_BKS


def merged_over(part: Callable, S: int, end: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(o, lse) over the slots before `end`, `QUANTISED_SLOTS` at a time."""
    size = min(S, QUANTISED_SLOTS)

    def merge(j, found):
        return merged(found, part(j * size, size))

    nothing = jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], -jnp.inf)
    return jax.lax.fori_loop(0, jnp.minimum(-(-end // size), -(-S // size)), merge, nothing)
