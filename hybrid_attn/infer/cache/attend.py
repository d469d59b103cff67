"""Attention of new tokens to one layer's cache, which holds them from then on; on one device or on a mesh.

Where the mesh has a `context` axis of c shards, every shard has a copy of a ring. The slots of other layers are distributed
block-cyclically: `span` slots to the first shard, `span` to the next, and so on in turn. A chunk of c x span new tokens, of
which each shard computes a part, then fills the same slots of every shard, and the shards hold equally many. Queries go to
all shards, and the partial results are merged by their log-sum-exp; the communication is the same at any length.

Letters: B requests, T new tokens, S slots of this shard, R slots of a ring, s slots of a part that is written, N query heads,
K key/value heads, G = N/K, H head size.
"""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from hybrid_attn import kernels
from hybrid_attn.infer.cache.shapes import LayerCache, LayerSettings, partition_specs, slot_numbers
from hybrid_attn.kernels.interface import Pair
from hybrid_attn.kernels.reference import visible_BTS
from hybrid_attn.kernels.softmax import finite_or_zero, log_sum_exp, merged
from hybrid_attn.parallel.context import AXIS, chunk_segments
from hybrid_attn.parallel.mesh import spec_of

QUANTISED_SLOTS = 4096  # slots that are dequantised at a time


def attend(
    settings: LayerSettings, layer: LayerCache, qkv: tuple, lengths_B, counts_B, sinks_N=None
) -> tuple[jax.Array, LayerCache]:
    """(o_BTNH, layer): new tokens (q_BTNH, k_BTKH, v_BTKH) see the cache and each other, and are written to it.

    Request b had `lengths_B[b]` tokens. The first `counts_B[b]` of its T tokens are new; the others are padding and give zeros.
    The layer must have room for the new tokens. T is sharded over `context` as q is; or T is at most `span`, and every shard
    has all of it.
    """
    spec = spec_of(qkv[0])
    split = spec[1] == AXIS and jax.sharding.get_abstract_mesh().shape[AXIS] > 1

    def shard(qkv, layer, lengths_B, counts_B, sinks_N):
        q_BTNH, *kv_BTKH = qkv
        if split:
            kv_BTKH = [jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in kv_BTKH]
        layer = written(settings, layer, kv_BTKH, lengths_B, counts_B)
        read = attend_ring if settings.is_ring else attend_slots
        o_BTNH, lse_BTN, segment_BT = read(settings, split, q_BTNH, layer, lengths_B, counts_B)
        if sinks_N is not None:
            o_BTNH, _ = kernels.with_sinks(o_BTNH, lse_BTN, segment_BT, sinks_N)
        return o_BTNH.astype(q_BTNH.dtype), layer

    out_specs = spec, partition_specs(layer)
    return jax.shard_map(shard, out_specs=out_specs, check_vma=False)(qkv, layer, lengths_B, counts_B, sinks_N)


def written(settings: LayerSettings, layer: LayerCache, kv_BTKH: Sequence, lengths_B, counts_B) -> LayerCache:
    """The layer with the new tokens in their slots; padding is not written."""
    k_BKTH, v_BKTH = (x_BTKH.swapaxes(1, 2) for x_BTKH in kv_BTKH)
    new = LayerCache(k_BKTH, v_BKTH, None, None, None)
    if layer.k_scales_BKS is not None:
        (k_BKTH, k_scales_BKT), (v_BKTH, v_scales_BKT) = quantised(k_BKTH), quantised(v_BKTH)
        new = LayerCache(k_BKTH, v_BKTH, k_scales_BKT, v_scales_BKT, None)
    first_BK = lengths_B[:, None] - (0 if settings.is_ring else layer.evicted_BK)
    groups = first_BK.shape[1]  # heads of a group start at the same slot
    requests = jnp.max(jnp.where(counts_B > 0, jnp.arange(1, len(counts_B) + 1), 0))

    # A loop with dynamic bounds: XLA would fuse any other write with the reads that follow, and then copy the whole cache.
    def write(i, arrays: LayerCache) -> LayerCache:
        b, g = i // groups, i % groups
        head = g * (k_BKTH.shape[1] // groups)
        write_array = functools.partial(_write, settings, (b, head), groups, first_BK[b, g], counts_B[b])
        return jax.tree.map(write_array, arrays, new)

    arrays = jax.lax.fori_loop(0, requests * groups, write, layer._replace(evicted_BK=None))
    return arrays._replace(evicted_BK=layer.evicted_BK)


def _write(settings: LayerSettings, at: Pair, groups: int, first, count, x_BKS: jax.Array, new_BKT: jax.Array) -> jax.Array:
    """[B, K, S] or [B, K, S, H] with the `count` new tokens of one request in a group of heads, which begins `at` (b, k).

    Their slot numbers begin with `first`. Only slots where they can lie are read and written.
    """
    (K, S), T, tail = x_BKS.shape[1:3], new_BKT.shape[2], x_BKS.shape[3:]
    if settings.is_ring:
        slot, size = (first % S, 1) if T == 1 else (0, S)
    else:
        span, slot = settings.span, first // (settings.span * jax.lax.axis_size(AXIS)) * settings.span
        slot, size = (slot + first % span, 1) if T == 1 else (slot, min(2 * span, S))
    slot = jnp.clip(slot, 0, S - size)
    slot_s = slot + jnp.arange(size)
    token_s = (slot_s - first) % S if settings.is_ring else slot_numbers(settings.span, slot_s) - first
    is_new_s = (token_s >= 0) & (token_s < count)
    heads, zeros = K // groups, (0,) * len(tail)
    own_1KT = jax.lax.dynamic_slice(new_BKT, (*at, 0, *zeros), (1, heads, T, *tail)).astype(x_BKS.dtype)
    new_1Ks = jnp.take(own_1KT, jnp.clip(token_s, 0, T - 1), axis=2)
    old_1Ks = jax.lax.dynamic_slice(x_BKS, (*at, slot, *zeros), (1, heads, size, *tail))
    is_new = is_new_s.reshape(1, 1, -1, *(1 for _ in tail))
    return jax.lax.dynamic_update_slice(x_BKS, jnp.where(is_new, new_1Ks, old_1Ks), (*at, slot, *zeros))


def quantised(x_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 numbers, float32 scales): the largest absolute number of a token's head is 127 times its scale."""
    scales_BKS = jnp.abs(x_BKSH).max(-1).astype(jnp.float32) / 127
    numbers_BKSH = x_BKSH.astype(jnp.float32) / jnp.where(scales_BKS > 0, scales_BKS, 1.0)[..., None]
    return jnp.round(numbers_BKSH).astype(jnp.int8), scales_BKS


def dequantised(x_BKSH: jax.Array, scales_BKS: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return (x_BKSH.astype(jnp.float32) * scales_BKS[..., None]).astype(dtype)


def attend_ring(settings: LayerSettings, split: bool, q_BTNH, layer: LayerCache, lengths_B, counts_B):
    """(o_BTNH, lse_BTN, segment_BT) of this shard's queries to a ring; `split`: they are sharded over `context`."""
    T = q_BTNH.shape[1]
    offset = jax.lax.axis_index(AXIS) * T if split else 0
    q_position_BT = lengths_B[:, None] + offset + jnp.arange(T)
    segment_BT = (offset + jnp.arange(T) < counts_B[:, None]).astype(jnp.int32)
    k_BKRH, v_BKRH, k_position_BR = _ring_keys(layer, (lengths_B + counts_B)[:, None], T)
    q_segment_BT, k_segment_BR = segment_BT, (k_position_BR >= 0).astype(jnp.int32)
    if settings.chunk is not None:
        # Queries and keys together: the number of a chunk's segment depends on how many tokens there are.
        pairs = (q_position_BT, k_position_BR), (q_segment_BT, k_segment_BR)
        positions, segments = (jnp.concatenate(pair, 1) for pair in pairs)
        q_segment_BT, k_segment_BR = jnp.split(chunk_segments(positions, segments, settings.chunk), [T], axis=1)
    keys = k_BKRH, v_BKRH, k_position_BR[:, None], k_segment_BR[:, None]
    o_BTNH, lse_BTN = _attend(settings, (q_BTNH, q_position_BT[:, None], q_segment_BT[:, None]), keys)
    return o_BTNH, lse_BTN, segment_BT


def _ring_keys(layer: LayerCache, end_B1: jax.Array, T: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(k_BKRH, v_BKRH, position_BR) before position `end`, in slot order for one query, else by position; negative if empty."""
    R = layer.k_BKSH.shape[2]
    if T == 1:
        newest_B1 = end_B1 - 1
        behind_BR = newest_B1 % R - jnp.arange(R)
        return layer.k_BKSH, layer.v_BKSH, newest_B1 - jnp.where(behind_BR < 0, behind_BR + R, behind_BR)
    position_BR = end_B1 - R + jnp.arange(R)
    order = (position_BR % R)[:, None, :, None]
    k_BKRH, v_BKRH = (jnp.take_along_axis(x_BKRH, order, axis=2) for x_BKRH in (layer.k_BKSH, layer.v_BKSH))
    return k_BKRH, v_BKRH, position_BR


def attend_slots(settings: LayerSettings, split: bool, q_BTNH, layer: LayerCache, lengths_B, counts_B):
    """(o_BTNH, lse_BTN, segment_BT) of this shard's queries to the slots of all shards; `split` as in `attend_ring`."""
    if split:
        q_BTNH = jax.lax.all_gather(q_BTNH, AXIS, axis=1, tiled=True)
    T, S = q_BTNH.shape[1], layer.k_BKSH.shape[2]
    segment_BT = (jnp.arange(T) < counts_B[:, None]).astype(jnp.int32)
    position_BKT = (lengths_B[:, None] - layer.evicted_BK)[..., None] + jnp.arange(T)
    end_BK1 = (lengths_B + counts_B)[:, None, None] - layer.evicted_BK[..., None]
    queries = q_BTNH, position_BKT, segment_BT[:, None]

    def attend_part(first, size: int) -> Pair:
        """Attention to those of this shard's slots [first, first + size) that exist and have numbers below `end`."""
        start = jnp.minimum(first, S - size)
        k_BKSH, v_BKSH, k_scales_BKS, v_scales_BKS = (
            None if x is None else jax.lax.dynamic_slice_in_dim(x, start, size, axis=2) for x in layer[:4]
        )
        if k_scales_BKS is not None:
            k_BKSH, v_BKSH = (dequantised(*x, q_BTNH.dtype) for x in ((k_BKSH, k_scales_BKS), (v_BKSH, v_scales_BKS)))
        slot_S = start + jnp.arange(size)
        number_S = slot_numbers(settings.span, slot_S)
        segment_BKS = ((number_S < end_BK1) & (slot_S >= first)).astype(jnp.int32)
        keys = k_BKSH, v_BKSH, jnp.broadcast_to(number_S, segment_BKS.shape), segment_BKS
        return _attend(settings, queries, keys)

    if layer.k_scales_BKS is None:
        o_BTNH, lse_BTN = attend_part(0, S)
    else:
        size = min(S, QUANTISED_SLOTS)
        parts = jnp.minimum(-(-jnp.max(end_BK1) // size), -(-S // size))
        nothing = jnp.zeros(q_BTNH.shape, jnp.float32), jnp.full(q_BTNH.shape[:3], -jnp.inf)
        o_BTNH, lse_BTN = jax.lax.fori_loop(0, parts, lambda i, result: merged(result, attend_part(i * size, size)), nothing)
    if jax.lax.axis_size(AXIS) > 1:
        o_BTNH, lse_BTN = _merged_over_shards(o_BTNH, lse_BTN, split)
    return o_BTNH, lse_BTN, _own_part(segment_BT) if split else segment_BT


def _own_part(x_BT: jax.Array) -> jax.Array:
    """This shard's part of an array that every shard has."""
    size = x_BT.shape[1] // jax.lax.axis_size(AXIS)
    return jax.lax.dynamic_slice_in_dim(x_BT, jax.lax.axis_index(AXIS) * size, size, axis=1)


def _merged_over_shards(o_BTNH, lse_BTN, split: bool) -> Pair:
    """The partial results of all shards merged: on every shard, or with `split` each shard's own queries alone."""

    def summed(x_BT):
        if not split:
            return jax.lax.psum(x_BT, AXIS)
        return jax.lax.psum_scatter(x_BT, AXIS, scatter_dimension=1, tiled=True)

    max_BTN = jax.lax.pmax(lse_BTN, AXIS)
    weight_BTN = jnp.exp(lse_BTN - finite_or_zero(max_BTN))
    denominator_BTN, o_BTNH = summed(weight_BTN), summed(weight_BTN[..., None] * o_BTNH.astype(jnp.float32))
    safe_denominator_BTN, lse_BTN = log_sum_exp(_own_part(max_BTN) if split else max_BTN, denominator_BTN)
    return o_BTNH / safe_denominator_BTN[..., None], lse_BTN


def _attend(settings: LayerSettings, queries: tuple, keys: tuple) -> Pair:
    """(o_BTNH, lse_BTN) of queries (q_BTNH, position_BKT, segment_B1T) to keys (k_BKSH, v_BKSH, position_BKS, segment_BKS).

    Positions count slots: after a compression they may differ between heads. Where they do not, K is 1.
    """
    (q_BTNH, *of_queries), (k_BKSH, v_BKSH, *of_keys) = queries, keys
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    if T == 1:
        return _attend_one(settings, queries, keys)

    def by_head(x_BKS):  # each key/value head becomes a sequence of its own
        return jnp.broadcast_to(x_BKS, (B, K, x_BKS.shape[2])).reshape(B * K, -1)

    q_RTGH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B * K, T, N // K, H)
    k_RS1H, v_RS1H = (x.reshape(B * K, S, 1, H) for x in (k_BKSH, v_BKSH))
    head_queries = kernels.Queries(q_RTGH, *map(by_head, of_queries))
    head_keys = kernels.Keys(k_RS1H, v_RS1H, *map(by_head, of_keys))
    o_RTGH, lse_RTG = kernels.attend(settings.kernel, settings.attention, head_queries, head_keys)
    o_BTNH = o_RTGH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H)
    return o_BTNH, lse_RTG.reshape(B, K, T, N // K).swapaxes(1, 2).reshape(B, T, N)


def _attend_one(settings: LayerSettings, queries: tuple, keys: tuple) -> Pair:
    """`_attend` of one query for each request: keys pass through memory once, in any order."""
    (q_BTNH, q_position_BKT, q_segment_B1T), (k_BKSH, v_BKSH, position_BKS, segment_BKS) = queries, keys
    (B, _, N, H), K, options = q_BTNH.shape, k_BKSH.shape[1], settings.attention
    visible_BK1S = visible_BTS(q_position_BKT, position_BKS, q_segment_B1T, segment_BKS, options.window)
    cache = q_BTNH.reshape(B, K, N // K, H), (k_BKSH, v_BKSH), visible_BK1S[:, :, 0]
    o_BKGH, lse_BKG = kernels.decode(settings.kernel, options, settings.vector_products, *cache)
    return o_BKGH.astype(q_BTNH.dtype).reshape(B, 1, N, H), lse_BKG.reshape(B, 1, N)
