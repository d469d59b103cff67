"""New keys and values in their slots of a layer's cache."""

import jax
import jax.numpy as jnp

from hybrid_attn.infer.cache.int8 import quantised
from hybrid_attn.infer.cache.shapes import Layer, Static, slot_numbers
from hybrid_attn.parallel.context import AXIS


def written(static: Static, layer: Layer, k_BTKH, v_BTKH, lengths_B, counts_B) -> Layer:
    """The layer with the new tokens in their slots; nothing is written for padding."""
    new = {"k_BKSH": k_BTKH.swapaxes(1, 2), "v_BKSH": v_BTKH.swapaxes(1, 2)}
    if layer.k_step_BKS is not None:
        new["k_BKSH"], new["k_step_BKS"] = quantised(new["k_BKSH"])
        new["v_BKSH"], new["v_step_BKS"] = quantised(new["v_BKSH"])
    first_BK = lengths_B[:, None] - (0 if static.bounded else layer.dropped_BK)
    groups = first_BK.shape[1]  # of heads whose slots begin together
    last = jnp.max(jnp.where(counts_B > 0, jnp.arange(1, len(counts_B) + 1), 0))

    # A loop, with bounds that are not known: other writes XLA merges with what reads them, and then copies the whole cache.
    def put(i, kept):
        b, g = i // groups, i % groups
        return {name: _put(static, x, new[name], b, g, first_BK[b, g], counts_B[b], groups) for name, x in kept.items()}

    return layer._replace(**jax.lax.fori_loop(0, last * groups, put, {name: getattr(layer, name) for name in new}))


def _put(static: Static, x_BKS, new_BKT, b, g, first, count, groups: int) -> jax.Array:
    """Slots with `count` new tokens of the g-th heads of row b from slot number `first` on.

    Only the part that they may lie in is touched.
    """
    (K, S), T = x_BKS.shape[1:3], new_BKT.shape[2]
    round_ = static.span * jax.lax.axis_size(AXIS)
    if static.bounded:
        at, size = (first % S, 1) if T == 1 else (0, S)
    else:
        at = first // round_ * static.span
        at, size = (at + first % static.span, 1) if T == 1 else (at, min(2 * static.span, S))
    at = jnp.clip(at, 0, S - size)
    local_s = at + jnp.arange(size)
    which_s = (local_s - first) % S if static.bounded else slot_numbers(static, local_s) - first
    here_s = (which_s >= 0) & (which_s < count)
    heads, rest = K // groups, x_BKS.shape[3:]
    where = (b, g * heads, at, *(0 for _ in rest))
    own_1KT = jax.lax.dynamic_slice(new_BKT, (b, g * heads, 0, *where[3:]), (1, heads, T, *rest)).astype(x_BKS.dtype)
    new_1Ks = jnp.take(own_1KT, jnp.clip(which_s, 0, T - 1), axis=2)
    old_1Ks = jax.lax.dynamic_slice(x_BKS, where, (1, heads, size, *rest))
    here = here_s.reshape(1, 1, -1, *(1 for _ in rest))
    return jax.lax.dynamic_update_slice(x_BKS, jnp.where(here, new_1Ks, old_1Ks), where)
