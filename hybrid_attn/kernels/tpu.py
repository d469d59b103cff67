"""Splash attention, the sparse flash attention for TPU that JAX maintains, behind the contract of `kernels.attend`.

We take JAX's own copy (jax.experimental.pallas.ops.tpu.splash_attention): it comes with every jax, runs in Pallas' interpreter,
and is the same algorithm as tokamax's fork, which needs another package. Its public entry neither returns a differentiable
log-sum-exp nor knows where a shard's queries lie among the keys. So this file calls the kernels underneath it:

- The mask is `row - window < key <= row` and equal segments, where `row` is each query's place among the keys: one integer per
  query that the kernel reads as data. One program therefore serves every shard of a sequence.
- Which tiles of keys a block of queries visits is a small table, made on the device from positions: a window costs O(S W), and
  tiles that lie wholly in other documents are skipped.
- The backward kernels take a `shift` per query: sum(do o) from the values less the cotangent of the log-sum-exp, for
  d lse / d score is the probability itself. That makes the log-sum-exp differentiable at no cost.

Condition: queries and keys are each a run of consecutive tokens of the same row, in reading order, and positions rise by one
inside a segment. Whole rows, context shards against gathered keys, a halo, and a ring's older keys all are. Two separate
slices in one call are not: call once for each. Where arrays break the condition, the row's results are NaN, never a wrong mask.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head size; I query blocks, J key tiles,
V tiles that a block visits.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_mask_info import MaskInfo

from hybrid_attn.kernels import kept

BLOCK = 512  # queries of a block and keys of a tile: scores of 512 x 512 in float32 are 1 MiB of the 16 MiB of VMEM
MOST_BLOCK = 1024
TABLE_BYTES = 2**19  # half of the scalar memory of a core, which holds the tables
LANES = 128
LAST = jnp.iinfo(jnp.int32).max
INTERPRET = False  # tests run the kernels on CPU


class Static(NamedTuple):
    """What is known while tracing."""

    window: int | None
    softcap: float | None
    length: int  # of the keys, before they are padded to whole tiles
    queries: int
    keys: int
    interpret: bool


class Masks(NamedTuple):
    """What the kernels read of one row's mask: rows and segments, and tables of visits by query block and by key tile."""

    row_T: jax.Array
    segments: splash.SegmentIds
    by_query: tuple[jax.Array, jax.Array]
    by_key: tuple[jax.Array, jax.Array]


def attend(q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, *, window, scale, softcap, merged=None):
    """(o_BTNH, lse_BTN float32): a query that sees no key gives zeros and a log-sum-exp of -inf.

    Matrix products of float32 arrays run at the default precision of the TPU. Raises NotImplementedError for rows whose
    tables do not fit in scalar memory.
    """
    T, S = q_BTNH.shape[1], k_BSKH.shape[1]
    static = Static(window, softcap, S, *block_sizes(T, S, window), INTERPRET)

    def padded(x, size):
        return jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))

    q_BTNH = padded((q_BTNH * scale).astype(q_BTNH.dtype), static.queries)
    k_BSKH, v_BSKH = padded(k_BSKH, static.keys), padded(v_BSKH, static.keys)
    q_pos_BT, q_seg_BT = padded(q_pos_BT, static.queries), padded(q_seg_BT, static.queries)
    k_pos_BS, k_seg_BS = padded(k_pos_BS, static.keys), padded(k_seg_BS, static.keys)
    merged = merged and tuple(padded(x, static.queries) for x in merged)

    def one_row(arrays):
        (q_TNH, k_SKH, v_SKH, *tokens), merged = arrays
        masks, right = mask_row(static, *tokens)
        merged = merged and tuple(x.swapaxes(0, 1) for x in merged)
        o_NTH, lse_NT = _attend(static, q_TNH.swapaxes(0, 1), k_SKH.swapaxes(0, 1), v_SKH.swapaxes(0, 1), masks, merged)
        return jnp.where(right, o_NTH, jnp.nan).swapaxes(0, 1), jnp.where(right, lse_NT, jnp.nan).T

    o_BTNH, lse_BTN = jax.lax.map(one_row, ((q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS), merged))
    return o_BTNH[:, :T], lse_BTN[:, :T]


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


def mask_row(static: Static, q_pos_T, k_pos_S, q_seg_T, k_seg_S) -> tuple[Masks, jax.Array]:
    """The masks of one row, and whether its tokens meet the condition at the head of this file."""
    (T,), (S,) = q_pos_T.shape, k_pos_S.shape
    offset = _offset(q_pos_T, k_pos_S, q_seg_T, k_seg_S)
    row_T = offset + jnp.arange(T, dtype=jnp.int32)
    oldest_T = jnp.maximum(0, row_T - q_pos_T)
    oldest_T = oldest_T if static.window is None else jnp.maximum(oldest_T, row_T - static.window + 1)
    newest_T = jnp.minimum(row_T, S - 1)
    see_T = (q_seg_T > 0) & (oldest_T <= newest_T)
    first_I = jnp.where(see_T, oldest_T, LAST).reshape(-1, static.queries).min(1) // static.keys
    last_I = jnp.where(see_T, newest_T, -1).reshape(-1, static.queries).max(1) // static.keys

    I, J = T // static.queries, S // static.keys
    by_query, by_key = visits(I, J, static.queries, static.keys, static.window)
    touch_IJ = (first_I[:, None] <= jnp.arange(J)) & (jnp.arange(J) <= last_I[:, None])
    segments = splash.SegmentIds(jnp.where(q_seg_T > 0, q_seg_T, -1), k_seg_S)  # a query of padding matches no key
    masks = Masks(row_T, segments, _table(touch_IJ, by_query), tuple(x.T for x in _table(touch_IJ.T, by_key)))

    at = jnp.clip(offset + T, 0, S + T)
    seg_T, pos_T = (jax.lax.dynamic_slice_in_dim(jnp.pad(x, T), at, T) for x in (k_seg_S, k_pos_S))
    apart_T = (q_seg_T == 0) | (row_T < 0) | (row_T >= static.length)
    same_T = apart_T | ((seg_T == q_seg_T) & (pos_T == q_pos_T))
    return masks, same_T.all() & _rises(q_pos_T, q_seg_T) & _rises(k_pos_S, k_seg_S)


def _offset(q_pos_T, k_pos_S, q_seg_T, k_seg_S) -> jax.Array:
    """Place of the first query among the keys, by the first segment that both have; before all of them if there is none."""
    first = jnp.maximum(*(jnp.where(seg > 0, seg, LAST).min() for seg in (q_seg_T, k_seg_S)))
    q_is_T, k_is_S = q_seg_T == first, k_seg_S == first
    t, s = jnp.argmax(q_is_T).astype(jnp.int32), jnp.argmax(k_is_S).astype(jnp.int32)
    return jnp.where(q_is_T.any() & k_is_S.any(), s + q_pos_T[t] - k_pos_S[s] - t, -q_pos_T.shape[0])


def _rises(pos_S, seg_S) -> jax.Array:
    """Whether positions rise by one from each token to the next of its segment."""
    inside_S = (seg_S[1:] == seg_S[:-1]) & (seg_S[1:] > 0)
    return jnp.all(~inside_S | (pos_S[1:] == pos_S[:-1] + 1))


def _table(touch_IJ, count: int) -> tuple[jax.Array, jax.Array]:
    """(next_IV, run_IV): the v-th tile that block i visits, and whether it computes there; `count` is V.

    After its last tile a block stays there, so that nothing more is fetched.
    """
    J = touch_IJ.shape[1]
    first_I1 = jnp.argmax(touch_IJ, axis=1, keepdims=True)
    last_I1 = J - 1 - jnp.argmax(touch_IJ[:, ::-1], axis=1, keepdims=True)
    wanted_IV = first_I1 + jnp.arange(count)
    next_IV = jnp.minimum(wanted_IV, last_I1)
    run_IV = jnp.take_along_axis(touch_IJ, next_IV, axis=1) & (wanted_IV <= last_I1)
    return next_IV.astype(jnp.int8 if J <= 128 else jnp.int16), run_IV.astype(jnp.int8)


def _arguments(static: Static, masks: Masks, table: tuple[jax.Array, jax.Array]) -> dict:
    """What all three kernels of the library are told."""
    window = static.window

    def sees(row, key):
        return key <= row if window is None else (key <= row) & (key > row - window)

    next_IV, run_IV = table
    return {
        "mask_value": splash.DEFAULT_MASK_VALUE,
        "is_mqa": False,
        "mask_function": sees,
        "attn_logits_soft_cap": static.softcap,
        "interpret": static.interpret,
        "mask_info": MaskInfo(next_IV[None], None, run_IV[None], None, masks.row_T),
    }


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, q_NTH, k_KSH, v_KSH, masks: Masks, merged):
    return merged or _forward(static, q_NTH, k_KSH, v_KSH, masks)


def _forward(static: Static, q_NTH, k_KSH, v_KSH, masks: Masks):
    arguments = _arguments(static, masks, masks.by_query)
    o_NTH, (lse_NT,) = splash._splash_attention_forward(
        arguments.pop("mask_info"), q_NTH, k_KSH, v_KSH, masks.segments, None,
        block_sizes=splash.BlockSizes(static.queries, static.keys), residual_checkpoint_name=None, save_residuals=True,
        **arguments,
    )  # fmt: skip
    # A query that sees no key has met masked scores only, whose value is beyond any real one, or nothing at all.
    some_NT = lse_NT > 0.5 * splash.DEFAULT_MASK_VALUE
    return jnp.where(some_NT[..., None], o_NTH, 0), jnp.where(some_NT, lse_NT, -jnp.inf)


def _forward_keep(static: Static, q_NTH, k_KSH, v_KSH, masks: Masks, merged):
    o_NTH, lse_NT = merged or kept(*_forward(static, q_NTH, k_KSH, v_KSH, masks))
    return (o_NTH, lse_NT), (q_NTH, k_KSH, v_KSH, masks, o_NTH, lse_NT)


def _backward(static: Static, residuals, grads):
    q_NTH, k_KSH, v_KSH, masks, o_NTH, lse_NT = residuals
    do_NTH, dlse_NT = grads
    shift_NT = jnp.einsum("NTH,NTH->NT", do_NTH, o_NTH, preferred_element_type=jnp.float32) - dlse_NT
    some_NT = jnp.isfinite(lse_NT)
    shift_NT, lse_NT = (jnp.where(some_NT, x, 0.0) for x in (shift_NT, lse_NT))
    arrays = (q_NTH, k_KSH, v_KSH, masks.segments, None, lse_NT, do_NTH, shift_NT)
    layout = splash.QKVLayout.HEAD_DIM_MINOR
    sizes = {"bq": static.queries, "bkv": static.keys, "q_layout": layout, "k_layout": layout, "v_layout": layout}
    dq_NTH = splash._splash_attention_bwd_dq(*arrays, **sizes, **_arguments(static, masks, masks.by_query))
    # The fused kernel would write a copy of dq for every tile of keys: O(S T) of memory.
    _, dk_KSH, dv_KSH = splash._splash_attention_bwd_dkv(
        *arrays, **sizes, bkv_compute=static.keys, use_fused_bwd_kernel=False,
        **_arguments(static, masks, masks.by_key),
    )  # fmt: skip
    return dq_NTH, dk_KSH, dv_KSH, None, None


_attend.defvjp(_forward_keep, _backward)
