"""Writes new keys and values to the slots of one layer's cache, as they are or as int8 numbers.

Letters: B requests, T new tokens, S slots of this shard, s slots of the part that is written, K key/value heads, H head size.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.infer.cache.shapes import LayerCache, LayerSettings, slot_numbers
from hybrid_attn.parallel.context import AXIS


class Write(NamedTuple):
    """The new tokens of one request, in the `group`-th of `groups` groups of heads: `count` slots from number `first` on."""

    request: jax.Array
    group: jax.Array
    groups: int
    first: jax.Array
    count: jax.Array


def quantised(x_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 numbers, float32 scales): the largest absolute number of a token's head is 127 times its scale."""
    scales_BKS = jnp.abs(x_BKSH).max(-1).astype(jnp.float32) / 127
    numbers_BKSH = x_BKSH.astype(jnp.float32) / jnp.where(scales_BKS > 0, scales_BKS, 1.0)[..., None]
    return jnp.round(numbers_BKSH).astype(jnp.int8), scales_BKS


def dequantised(x_BKSH: jax.Array, scales_BKS: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return (x_BKSH.astype(jnp.float32) * scales_BKS[..., None]).astype(dtype)


def written(settings: LayerSettings, layer: LayerCache, kv_BTKH: Sequence, lengths_B, counts_B) -> LayerCache:
    """The layer with the new tokens in their slots; padding is not written."""
    k_BKTH, v_BKTH = (x_BTKH.swapaxes(1, 2) for x_BTKH in kv_BTKH)
    new = {"k_BKSH": k_BKTH, "v_BKSH": v_BKTH}
    if layer.k_scales_BKS is not None:
        new["k_BKSH"], new["k_scales_BKS"] = quantised(k_BKTH)
        new["v_BKSH"], new["v_scales_BKS"] = quantised(v_BKTH)
    first_BK = lengths_B[:, None] - (0 if settings.is_ring else layer.evicted_BK)
    groups = first_BK.shape[1]  # heads of a group start at the same slot
    requests = jnp.max(jnp.where(counts_B > 0, jnp.arange(1, len(counts_B) + 1), 0))

    # A loop with dynamic bounds: XLA would fuse any other write with the reads that follow, and then copy the whole cache.
    def write(i, arrays):
        b, g = i // groups, i % groups
        where = Write(b, g, groups, first_BK[b, g], counts_B[b])
        return {name: _write(settings, x, new[name], where) for name, x in arrays.items()}

    arrays = {name: getattr(layer, name) for name in new}
    return layer._replace(**jax.lax.fori_loop(0, requests * groups, write, arrays))


def _write(settings: LayerSettings, x_BKS: jax.Array, new_BKT: jax.Array, where: Write) -> jax.Array:
    """`x_BKS`, [B, K, S] or [B, K, S, H], with one request's new tokens. Only slots where they can lie are read and written."""
    (K, S), T, tail = x_BKS.shape[1:3], new_BKT.shape[2], x_BKS.shape[3:]
    at, size = _written_part(settings, where.first, S, T)
    at = jnp.clip(at, 0, S - size)
    slot_s = at + jnp.arange(size)
    token_s = (slot_s - where.first) % S if settings.is_ring else slot_numbers(settings.span, slot_s) - where.first
    is_new_s = (token_s >= 0) & (token_s < where.count)
    heads, zeros = K // where.groups, (0,) * len(tail)
    start = (where.request, where.group * heads, at, *zeros)
    own_1KT = jax.lax.dynamic_slice(new_BKT, (*start[:2], 0, *zeros), (1, heads, T, *tail)).astype(x_BKS.dtype)
    new_1Ks = jnp.take(own_1KT, jnp.clip(token_s, 0, T - 1), axis=2)
    old_1Ks = jax.lax.dynamic_slice(x_BKS, start, (1, heads, size, *tail))
    is_new = is_new_s.reshape(1, 1, -1, *(1 for _ in tail))
    return jax.lax.dynamic_update_slice(x_BKS, jnp.where(is_new, new_1Ks, old_1Ks), start)


def _written_part(settings: LayerSettings, first: jax.Array, S: int, T: int) -> tuple[jax.Array | int, int]:
    """(first slot of this shard, number of slots) of the part where T tokens from slot number `first` on can lie."""
    if settings.is_ring:
        return (first % S, 1) if T == 1 else (0, S)
    span = settings.span
    at = first // (span * jax.lax.axis_size(AXIS)) * span
    return (at + first % span, 1) if T == 1 else (at, min(2 * span, S))
