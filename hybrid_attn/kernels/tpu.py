"""Splash attention, the sparse flash attention for TPU that JAX maintains.

We take JAX's own copy (jax.experimental.pallas.ops.tpu.splash_attention): it comes with every jax, runs in Pallas' interpreter,
and is the same algorithm as tokamax's fork, which needs another package. Its public entry does not return a differentiable
log-sum-exp, and does not know where the queries of a shard stand among the keys. So this file calls the kernels underneath it:

- The mask is `index - window < key <= index` and equal segments, where `index` is each query's index among the keys: one
  integer per query that the kernel reads as data. One program therefore serves every shard of a sequence.
- Which tiles of keys a block of queries visits is a small table, computed on the device from positions: a window costs O(S W),
  and tiles that lie entirely in other documents are skipped.
- The backward kernels take a number per query: the sum of do * o over the head, minus the cotangent of the log-sum-exp
  (`gradient_shift`). That makes the log-sum-exp differentiable at no cost.

Condition: queries and keys are each a run of consecutive tokens of the same sequence, in reading order, and positions increase
by one inside a segment. Full sequences, context shards against gathered keys, a halo, and the older keys of a ring meet it. Two
separate slices in one call do not: call once for each. Where arrays break the condition, the results of the sequence are NaN,
never those of a wrong mask. Products of float32 arrays run at the default precision of the TPU.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head size; I query blocks, J key tiles,
V tiles that a block visits.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.kernels.interface import LAST, AttentionOptions, Keys, Pair, Queries, padded
from hybrid_attn.kernels.softmax import gradient_shift

BLOCK = 512  # queries of a block and keys of a tile: scores of 512 x 512 in float32 are 1 MiB of the 16 MiB of VMEM
MOST_BLOCK = 1024
TABLE_BYTES = 2**19  # half of the scalar memory of a core, which holds the tables
LANES = 128
INTERPRET = False  # tests run the kernels on CPU


class SplashOptions(NamedTuple):
    """The static arguments of one sequence: `num_keys` before padding, and the queries of a block and the keys of a tile."""

    window: int | None
    softcap: float | None
    num_keys: int
    queries: int
    keys: int


class Masks(NamedTuple):
    """What the kernels read of one sequence's mask.

    `index_T` is each query's index among the keys, `segments_TS` the segments of queries and keys. The tables list the tiles
    that a block of queries visits, and the blocks that visit a tile.
    """

    index_T: jax.Array
    segments_TS: Pair
    by_query: Pair
    by_key: Pair


def forward(options: AttentionOptions, queries: Queries, keys: Keys) -> Pair:
    """(o_BTNH, lse_BTN float32); NotImplementedError for sequences whose tables do not fit in scalar memory."""
    T = queries.q_BTNH.shape[1]
    splash = splash_options(T, keys.k_BSKH.shape[1], options)

    def one_sequence(inputs):
        masks, valid = make_masks(splash, *inputs)
        outputs_NT = _forward_heads(splash, masks, *_heads_first(*inputs))
        return tuple(jnp.where(valid, x_NT, jnp.nan) for x_NT in outputs_NT)

    o_BNTH, lse_BNT = jax.lax.map(one_sequence, _padded_inputs(splash, options.scale, queries, keys))
    return o_BNTH[:, :, :T].swapaxes(1, 2), lse_BNT[:, :, :T].swapaxes(1, 2)


def backward(options: AttentionOptions, queries: Queries, keys: Keys, outputs: Pair, grads: Pair):
    """(dq_BTNH, dk_BSKH, dv_BSKH)."""
    T, S = queries.q_BTNH.shape[1], keys.k_BSKH.shape[1]
    splash = splash_options(T, S, options)

    def one_sequence(arrays):
        inputs, outputs_NT, grads_TN = arrays
        masks, valid = make_masks(splash, *inputs)
        results_NT = (*outputs_NT, *(x.swapaxes(0, 1) for x in grads_TN))
        results_NT = (jnp.where(valid, x, 0) for x in results_NT)  # a sequence whose results are NaN has no gradient
        dqkv_NTH = _backward_heads(splash, masks, _heads_first(*inputs), *results_NT)
        return tuple(x.swapaxes(0, 1) for x in dqkv_NTH)

    outputs_BNT = [padded(x, splash.queries).swapaxes(1, 2) for x in outputs]
    grads_BTN = [padded(x, splash.queries) for x in grads]
    inputs = _padded_inputs(splash, options.scale, queries, keys)
    dq_BTNH, dk_BSKH, dv_BSKH = jax.lax.map(one_sequence, (inputs, outputs_BNT, grads_BTN))
    return (dq_BTNH[:, :T] * options.scale).astype(queries.q_BTNH.dtype), dk_BSKH[:, :S], dv_BSKH[:, :S]


def _padded_inputs(splash: SplashOptions, scale: float, queries: Queries, keys: Keys) -> tuple[Queries, Keys]:
    """Queries, scaled, and keys in full blocks and tiles."""
    queries = queries._replace(q_BTNH=(queries.q_BTNH * scale).astype(queries.q_BTNH.dtype))
    return Queries(*(padded(x, splash.queries) for x in queries)), Keys(*(padded(x, splash.keys) for x in keys))


def _heads_first(queries: Queries, keys: Keys) -> tuple[jax.Array, ...]:
    """(q_NTH, k_KSH, v_KSH) of one sequence."""
    return tuple(x_TNH.swapaxes(0, 1) for x_TNH in (queries.q_BTNH, keys.k_BSKH, keys.v_BSKH))


def splash_options(T: int, S: int, options: AttentionOptions) -> SplashOptions:
    return SplashOptions(options.window, options.softcap, S, *block_sizes(T, S, options.window))


def block_sizes(T: int, S: int, window: int | None) -> tuple[int, int]:
    """Queries of a block and keys of a tile: multiples of 128 that keep the tables within `TABLE_BYTES`."""
    size = BLOCK
    while True:
        queries, keys = (min(size, -(-length // LANES) * LANES) for length in (T, S))
        blocks, tiles = -(-T // queries), -(-S // keys)
        by_query, by_key = visits(blocks, tiles, queries, keys, window)
        needed = 3 * max(blocks * -(-by_query // LANES) * LANES, by_key * -(-tiles // LANES) * LANES)
        if needed <= TABLE_BYTES:
            return queries, keys
        if 2 * size > MOST_BLOCK:
            raise NotImplementedError(
                f"{T} queries of {S} keys on one core need tables of {needed} bytes and splash has room for {TABLE_BYTES}; "
                'split the sequence over more devices (mesh.context), or use train.kernel="blocked"'
            )
        size *= 2


def visits(blocks: int, tiles: int, queries: int, keys: int, window: int | None) -> tuple[int, int]:
    """Most tiles of keys that one block of queries sees, and most blocks of queries that see one tile."""
    if window is None:
        return tiles, blocks
    return min(tiles, (queries + window - 3) // keys + 2), min(blocks, (keys + window - 3) // queries + 2)


def make_masks(splash: SplashOptions, queries: Queries, keys: Keys) -> tuple[Masks, jax.Array]:
    """The masks of one sequence, and whether its tokens meet the condition at the head of this file."""
    (_, q_pos_T, q_seg_T), (*_, k_pos_S, k_seg_S) = queries, keys
    (T,), (S,) = q_pos_T.shape, k_pos_S.shape
    offset = _offset(queries, keys)
    index_T = offset + jnp.arange(T, dtype=jnp.int32)
    oldest_T = jnp.maximum(0, index_T - q_pos_T)
    oldest_T = oldest_T if splash.window is None else jnp.maximum(oldest_T, index_T - splash.window + 1)
    newest_T = jnp.minimum(index_T, S - 1)
    sees_key_T = (q_seg_T > 0) & (oldest_T <= newest_T)
    first_I = jnp.where(sees_key_T, oldest_T, LAST).reshape(-1, splash.queries).min(1) // splash.keys
    last_I = jnp.where(sees_key_T, newest_T, -1).reshape(-1, splash.queries).max(1) // splash.keys

    I, J = T // splash.queries, S // splash.keys
    by_query, by_key = visits(I, J, splash.queries, splash.keys, splash.window)
    touch_IJ = (first_I[:, None] <= jnp.arange(J)) & (jnp.arange(J) <= last_I[:, None])
    segments_TS = jnp.where(q_seg_T > 0, q_seg_T, -1), k_seg_S  # a query of padding matches no key
    masks = Masks(index_T, segments_TS, _table(touch_IJ, by_query), tuple(x.T for x in _table(touch_IJ.T, by_key)))
    return masks, _consecutive(splash.num_keys, offset, queries, keys)


def _consecutive(num_keys: int, offset, queries: Queries, keys: Keys) -> jax.Array:
    """Whether queries and keys are runs of consecutive tokens, and the queries are the keys from index `offset` on."""
    (_, q_pos_T, q_seg_T), (*_, k_pos_S, k_seg_S) = queries, keys
    (T,), (S,) = q_pos_T.shape, k_pos_S.shape
    index_T = offset + jnp.arange(T, dtype=jnp.int32)
    start = jnp.clip(offset + T, 0, S + T)
    seg_T, pos_T = (jax.lax.dynamic_slice_in_dim(jnp.pad(x, T), start, T) for x in (k_seg_S, k_pos_S))
    outside_T = (q_seg_T == 0) | (index_T < 0) | (index_T >= num_keys)
    same_T = outside_T | ((seg_T == q_seg_T) & (pos_T == q_pos_T))
    return same_T.all() & _increases(q_pos_T, q_seg_T) & _increases(k_pos_S, k_seg_S)


def _offset(queries: Queries, keys: Keys) -> jax.Array:
    """Index of the first query among the keys, by the first segment that both have; before all keys if there is none."""
    (_, q_pos_T, q_seg_T), (*_, k_pos_S, k_seg_S) = queries, keys
    first = jnp.maximum(*(jnp.where(seg > 0, seg, LAST).min() for seg in (q_seg_T, k_seg_S)))
    q_in_first_T, k_in_first_S = q_seg_T == first, k_seg_S == first
    t, s = jnp.argmax(q_in_first_T).astype(jnp.int32), jnp.argmax(k_in_first_S).astype(jnp.int32)
    offset = s + q_pos_T[t] - k_pos_S[s] - t
    return jnp.where(q_in_first_T.any() & k_in_first_S.any(), offset, -q_pos_T.shape[0])


def _increases(pos_S, seg_S) -> jax.Array:
    """Whether positions increase by one from each token to the next of its segment."""
    inside_S = (seg_S[1:] == seg_S[:-1]) & (seg_S[1:] > 0)
    return jnp.all(~inside_S | (pos_S[1:] == pos_S[:-1] + 1))


def _table(touch_IJ, count: int) -> tuple[jax.Array, jax.Array]:
    """(next_IV, run_IV): the v-th tile that block i visits, and whether it computes there; `count` is V."""
    J = touch_IJ.shape[1]
    first_I1 = jnp.argmax(touch_IJ, axis=1, keepdims=True)
    last_I1 = J - 1 - jnp.argmax(touch_IJ[:, ::-1], axis=1, keepdims=True)
    tile_IV = first_I1 + jnp.arange(count)
    next_IV = jnp.minimum(tile_IV, last_I1)  # after its last tile a block stays there, so that nothing more is fetched
    run_IV = jnp.take_along_axis(touch_IJ, next_IV, axis=1) & (tile_IV <= last_I1)
    return next_IV.astype(jnp.int8 if J <= 128 else jnp.int16), run_IV.astype(jnp.int8)


def _arguments(splash: SplashOptions, masks: Masks, table: Pair) -> dict[str, Any]:
    """The arguments that all three kernels of the library share."""
    # Imported here and below: Pallas takes a quarter of a second, on a CPU for nothing.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library
    from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

    def sees(index, key):
        return key <= index if splash.window is None else (key <= index) & (key > index - splash.window)

    next_IV, run_IV = table
    return {
        "mask_value": library.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        "mask_function": sees,
        "attn_logits_soft_cap": splash.softcap,
        "interpret": INTERPRET,
        "mask_info": MaskInfo(next_IV[None], None, run_IV[None], None, masks.index_T),
    }


def _forward_heads(splash: SplashOptions, masks: Masks, q_NTH, k_KSH, v_KSH) -> Pair:
    """(o_NTH, lse_NT) of one sequence."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

    arguments = _arguments(splash, masks, masks.by_query)
    o_NTH, (lse_NT,) = library._splash_attention_forward(
        arguments.pop("mask_info"), q_NTH, k_KSH, v_KSH, library.SegmentIds(*masks.segments_TS), None,
        block_sizes=library.BlockSizes(splash.queries, splash.keys), residual_checkpoint_name=None, save_residuals=True,
        **arguments,
    )  # fmt: skip
    # A query that sees no key has met only masked scores, whose value is beyond any real one, or none at all.
    sees_key_NT = lse_NT > 0.5 * library.DEFAULT_MASK_VALUE
    return jnp.where(sees_key_NT[..., None], o_NTH, 0), jnp.where(sees_key_NT, lse_NT, -jnp.inf)


def _backward_heads(splash: SplashOptions, masks: Masks, qkv_NTH: tuple, o_NTH, lse_NT, do_NTH, dlse_NT):
    """(dq_NTH, dk_KSH, dv_KSH) of one sequence."""
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

    sees_key_NT = jnp.isfinite(lse_NT)
    shift_NT = jnp.where(sees_key_NT, gradient_shift(do_NTH, o_NTH, dlse_NT), 0.0)
    segment_ids = library.SegmentIds(*masks.segments_TS)
    arrays = (*qkv_NTH, segment_ids, None, jnp.where(sees_key_NT, lse_NT, 0.0), do_NTH, shift_NT)
    layout = library.QKVLayout.HEAD_DIM_MINOR
    sizes = {"bq": splash.queries, "bkv": splash.keys, "q_layout": layout, "k_layout": layout, "v_layout": layout}
    dq_NTH = library._splash_attention_bwd_dq(*arrays, **sizes, **_arguments(splash, masks, masks.by_query))
    # The fused kernel would write a copy of dq for every tile of keys: O(S T) of memory.
    _, dk_KSH, dv_KSH = library._splash_attention_bwd_dkv(
        *arrays, **sizes, bkv_compute=splash.keys, use_fused_bwd_kernel=False,
        **_arguments(splash, masks, masks.by_key),
    )  # fmt: skip
    return dq_NTH, dk_KSH, dv_KSH
