"""Keys and values in int8: numbers, and a float32 scale for each token and head.

Letters: B requests, T queries, N query heads, K key/value heads, S slots, H head size.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from hybrid_attn.kernels.softmax import merged

QUANTISED_SLOTS = 4096  # slots that are dequantised at a time


def quantised(x_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 numbers, scales): the largest absolute number of a token's head is 127 times its scale."""
    scales_BKS = jnp.abs(x_BKSH).max(-1).astype(jnp.float32) / 127
    numbers_BKSH = x_BKSH.astype(jnp.float32) / jnp.where(scales_BKS > 0, scales_BKS, 1.0)[..., None]
    return jnp.round(numbers_BKSH).astype(jnp.int8), scales_BKS


def dequantised(x_BKSH: jax.Array, scales_BKS: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return (x_BKSH.astype(jnp.float32) * scales_BKS[..., None]).astype(dtype)


def attend_in_parts(
    attend: Callable[[jax.Array, int], tuple[jax.Array, jax.Array]], S: int, end: jax.Array, shape_BTNH: tuple[int, ...]
) -> tuple[jax.Array, jax.Array]:
    """(o_BTNH, lse_BTN) of `attend(first slot, number of slots)` over the slots before `end`, `QUANTISED_SLOTS` at a time."""
    size = min(S, QUANTISED_SLOTS)

    def merge(i, result):
        return merged(result, attend(i * size, size))

    nothing = jnp.zeros(shape_BTNH, jnp.float32), jnp.full(shape_BTNH[:3], -jnp.inf)
    return jax.lax.fori_loop(0, jnp.minimum(-(-end // size), -(-S // size)), merge, nothing)
