"""Attention in blocks, on any platform: O(S W) for a window, the lower triangle for all earlier tokens, never a T x S array.

Each block of queries loops over the tiles of keys that any of its queries sees, with an online softmax ("FlashAttention",
arXiv 2205.14135, algorithm 1; the backward pass is its algorithm 4). Keys that all queries of the block see come in full tiles,
without a mask; keys that some of them see come in smaller tiles at the edges, with one. The keys of a window are one tile
where they fit, so that its scores are computed once and stay in cache. Tiles that hold only other documents are skipped. The
sequences of a batch share one loop: a tile that one of them needs is computed for all.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K, H head size; I query blocks,
Q queries of a block, M = G Q, C keys of a tile.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.kernels.interface import LAST, AttentionOptions, Keys, Pair, Queries, intervals, padded
from hybrid_attn.kernels.softmax import LOWEST, add_scores, finite_or_zero, gradient_shift, log_sum_exp, soft_cap

# Measured with 2 to 8 heads of 32 to 128, on two hyper-threads of a Xeon core (2 MiB of L2) and on two cores of an EPYC (Zen 4,
# 1 MiB each). Smaller tiles lose to the cost of starting each product; larger ones to scores that leave the cache, and at the
# edges to keys that no query sees. Keys that are no multiple of 16 cost a fifth more.
ROWS = 1024  # queries of a block times heads
QUERIES = (64, 256)  # fewest and most of a block
FULL, EDGE = 512, 256  # keys of a tile that all queries see, and of one at an edge
WINDOW = 2048  # most keys of a tile of a window
LINE = 64


class Sizes(NamedTuple):
    """Queries of a block, keys of a full tile (None: there are none), keys of a tile at an edge."""

    queries: int
    full: int | None
    edge: int


class Tile(NamedTuple):
    """`size` keys from `first` on, and which of them each query sees, [B, Q, C]; None: all of them."""

    first: jax.Array
    size: int
    see_BQC: jax.Array | None


def forward(options: AttentionOptions, queries: Queries, keys: Keys) -> Pair:
    """(o_BTNH, lse_BTN float32). Queries may be in any order, but only neighbours that see the same keys share work."""
    (T, N), (S, K) = queries.q_BTNH.shape[1:3], keys.k_BSKH.shape[1:3]
    sizes = block_sizes(T, N, S, options.window)
    kv_BKSH = keys.k_BSKH.swapaxes(1, 2), keys.v_BSKH.swapaxes(1, 2)

    def block(_, xs):
        q_BKMH, bounds_BQ = xs

        def add_tile(tile, sums):
            max_BKM, denominator_BKM, o_BKMH = sums
            k_BKCH, v_BKCH = _slices(tile, kv_BKSH)
            s_BKMC, _ = _scores(options, q_BKMH, k_BKCH, tile.see_BQC)
            max_BKM, denominator_BKM, p_BKMC, decay_BKM = add_scores(max_BKM, denominator_BKM, s_BKMC)
            new_BKMH = jnp.einsum("BKMC,BKCH->BKMH", p_BKMC.astype(v_BKCH.dtype), v_BKCH, preferred_element_type=jnp.float32)
            return max_BKM, denominator_BKM, decay_BKM[..., None] * o_BKMH + new_BKMH

        zero_BKM = jnp.zeros_like(q_BKMH[..., 0], jnp.float32)
        sums = zero_BKM + LOWEST, zero_BKM, jnp.zeros_like(q_BKMH, jnp.float32)
        max_BKM, denominator_BKM, o_BKMH = _over_tiles(sizes, S, bounds_BQ, add_tile, sums)
        safe_denominator_BKM, lse_BKM = log_sum_exp(max_BKM, denominator_BKM)
        return None, ((o_BKMH / safe_denominator_BKM[..., None]).astype(q_BKMH.dtype), lse_BKM)

    Q = sizes.queries
    xs = _to_blocks(queries.q_BTNH, K, Q), _bounds(options, queries, keys, Q)
    _, (o_IBKMH, lse_IBKM) = jax.lax.scan(block, None, xs)
    return _from_blocks(o_IBKMH, T, Q), _from_blocks(lse_IBKM[..., None], T, Q)[..., 0]


def backward(options: AttentionOptions, queries: Queries, keys: Keys, outputs: Pair, grads: Pair):
    """(dq_BTNH, dk_BSKH, dv_BSKH), with probabilities computed again from the log-sum-exp."""
    (o_BTNH, lse_BTN), (do_BTNH, dlse_BTN) = outputs, grads
    (T, N), (S, K) = queries.q_BTNH.shape[1:3], keys.k_BSKH.shape[1:3]
    sizes = block_sizes(T, N, S, options.window)
    kv_BKSH = keys.k_BSKH.swapaxes(1, 2), keys.v_BSKH.swapaxes(1, 2)

    def block(dkv_BKHS, xs):
        q_BKMH, o_BKMH, do_BKMH, lse_BKM1, dlse_BKM1, bounds_BQ = xs
        lse_BKM, shift_BKM = finite_or_zero(lse_BKM1[..., 0]), gradient_shift(do_BKMH, o_BKMH, dlse_BKM1[..., 0])
        query_block = q_BKMH, q_BKMH.swapaxes(2, 3), do_BKMH, do_BKMH.swapaxes(2, 3), lse_BKM, shift_BKM

        def add_tile(tile, sums):
            dq_BKMH, *dkv_BKHS = sums
            new_dq_BKMH, *dkv_BKHC = _tile_gradients(options, query_block, *_slices(tile, kv_BKSH), tile.see_BQC)
            return dq_BKMH + new_dq_BKMH, *(_add_at(*pair, tile.first) for pair in zip(dkv_BKHS, dkv_BKHC, strict=True))

        dq_BKMH = jnp.zeros_like(q_BKMH, jnp.float32)
        dq_BKMH, *dkv_BKHS = _over_tiles(sizes, S, bounds_BQ, add_tile, (dq_BKMH, *dkv_BKHS))
        return dkv_BKHS, dq_BKMH.astype(q_BKMH.dtype)

    Q = sizes.queries
    of_queries = (queries.q_BTNH, o_BTNH, do_BTNH, lse_BTN[..., None], dlse_BTN[..., None])
    xs = *(_to_blocks(x, K, Q) for x in of_queries), _bounds(options, queries, keys, Q)
    zeros = [jnp.zeros_like(x.swapaxes(2, 3), jnp.float32) for x in kv_BKSH]
    dkv_BKHS, dq_IBKMH = jax.lax.scan(block, zeros, xs)
    dk_BSKH, dv_BSKH = (x_BKHS.transpose(0, 3, 1, 2) for x_BKHS in dkv_BKHS)
    return _from_blocks(dq_IBKMH, T, Q), dk_BSKH.astype(keys.k_BSKH.dtype), dv_BSKH.astype(keys.v_BSKH.dtype)


def block_sizes(T: int, N: int, S: int, window: int | None) -> Sizes:
    """The keys that a block of queries sees of a window are one tile if they are at most `WINDOW`, of n `LINE` keys."""
    queries = min(T, max(QUERIES[0], min(QUERIES[1], ROWS // N)))
    if window is not None and min(S, window + queries - 1) <= WINDOW:
        return Sizes(queries, None, min(S, -(-(window + queries - 1) // LINE) * LINE))
    return Sizes(queries, FULL if S > FULL else None, min(S, EDGE))


def _pad_to_blocks(x_BT: jax.Array, Q: int) -> jax.Array:
    """[B, I, Q, ...] of [B, T, ...], padded with zeros."""
    return padded(x_BT, Q).reshape(x_BT.shape[0], -1, Q, *x_BT.shape[2:])


def _to_blocks(x_BTNH: jax.Array, K: int, Q: int) -> jax.Array:
    B, T, N, H = x_BTNH.shape
    x_IBKGQH = jnp.einsum("BIQKGH->IBKGQH", _pad_to_blocks(x_BTNH.reshape(B, T, K, N // K, H), Q))
    return x_IBKGQH.reshape(-1, B, K, N // K * Q, H)


def _from_blocks(x_IBKMH: jax.Array, T: int, Q: int) -> jax.Array:
    """The inverse of `_to_blocks` for T tokens."""
    I, B, K, M, H = x_IBKMH.shape
    x_BIQKGH = jnp.einsum("IBKGQH->BIQKGH", x_IBKMH.reshape(I, B, K, M // Q, Q, H))
    return x_BIQKGH.reshape(B, I * Q, -1, H)[:, :T]


def _bounds(options: AttentionOptions, queries: Queries, keys: Keys, Q: int) -> Pair:
    """The first key of each query and the end of its keys, [I, B, Q] each."""
    return tuple(_pad_to_blocks(x_BT, Q).swapaxes(0, 1) for x_BT in intervals(options.window, queries, keys))


def _over_tiles(sizes: Sizes, S: int, bounds_BQ: Pair, add_tile: Callable[[Tile, Any], Any], sums: Any) -> Any:
    """`sums` after `add_tile(tile, sums)` for every tile of the keys that a block of queries sees.

    Full tiles start at the first key that all queries see, as many as fit. Tiles of the edges have the other keys.
    """
    first_BQ, end_BQ = bounds_BQ
    sees_key_BQ = first_BQ < end_BQ
    start = jnp.min(jnp.where(sees_key_BQ, first_BQ, LAST))
    end = jnp.max(jnp.where(sees_key_BQ, end_BQ, 0))
    full, full_start, full_end = 0, start, start
    if sizes.full is not None:
        full = jnp.maximum(0, jnp.min(end_BQ) - jnp.max(first_BQ)) // sizes.full
        full_start = jnp.where(full > 0, jnp.max(first_BQ), start)
        full_end = full_start + full * sizes.full

        def add_full(j, sums):
            return add_tile(Tile(full_start + j * sizes.full, sizes.full, None), sums)

        sums = jax.lax.fori_loop(0, full, add_full, sums)
    left, right = _number(full_start - start, sizes.edge), _number(end - full_end, sizes.edge)

    def add_edge(j, sums):
        unseen = jnp.where(j < left, start + j * sizes.edge, full_end + (j - left) * sizes.edge)
        limit = jnp.where(j < left, full_start, end)
        # The last tile ends with the sequence; keys that an earlier one has shown are masked.
        first = jnp.minimum(unseen, S - sizes.edge)
        key_C = first + jnp.arange(sizes.edge, dtype=jnp.int32)
        is_new_BQC = key_C >= jnp.maximum(first_BQ, unseen)[..., None]
        return add_tile(Tile(first, sizes.edge, is_new_BQC & (key_C < jnp.minimum(end_BQ, limit)[..., None])), sums)

    return jax.lax.fori_loop(0, left + right, add_edge, sums)


def _number(keys: jax.Array, size: int) -> jax.Array:
    """Tiles of `size` that hold so many keys; none of fewer than one."""
    return jnp.maximum(0, keys + size - 1) // size


def _slices(tile: Tile, arrays_BKSH: tuple) -> list[jax.Array]:
    """The keys of a tile of each array."""
    return [jax.lax.dynamic_slice_in_dim(x_BKSH, tile.first, tile.size, axis=2) for x_BKSH in arrays_BKSH]


def _scores(options: AttentionOptions, q_BKMH, k_BKCH, see_BQC: jax.Array | None) -> tuple[jax.Array, jax.Array | None]:
    """Scores [B, K, M, C] in float32, masked unless all keys are seen, and the derivative of the soft cap, if there is one."""
    s_BKMC = options.scale * jnp.einsum("BKMH,BKCH->BKMC", q_BKMH, k_BKCH, preferred_element_type=jnp.float32)
    s_BKMC, slope_BKMC = soft_cap(s_BKMC, options.softcap)
    if see_BQC is None:
        return s_BKMC, slope_BKMC
    B, K, M, C = s_BKMC.shape
    s_BKGQC = jnp.where(see_BQC[:, None, None], s_BKMC.reshape(B, K, -1, see_BQC.shape[1], C), -jnp.inf)
    return s_BKGQC.reshape(B, K, M, C), slope_BKMC


def _tile_gradients(options: AttentionOptions, query_block: tuple, k_BKCH, v_BKCH, see_BQC):
    """(dq_BKMH, dk_BKHC, dv_BKHC) in float32 by one tile of keys."""
    q_BKMH, q_BKHM, do_BKMH, do_BKHM, lse_BKM, shift_BKM = query_block
    s_BKMC, slope_BKMC = _scores(options, q_BKMH, k_BKCH, see_BQC)
    p_BKMC = jnp.exp(s_BKMC - lse_BKM[..., None])
    dp_BKMC = jnp.einsum("BKMH,BKCH->BKMC", do_BKMH, v_BKCH, preferred_element_type=jnp.float32)
    ds_BKMC = options.scale * p_BKMC * (dp_BKMC - shift_BKM[..., None])
    ds_BKMC = (ds_BKMC if slope_BKMC is None else ds_BKMC * slope_BKMC).astype(q_BKMH.dtype)
    p_BKMC = p_BKMC.astype(do_BKMH.dtype)
    # Heads before keys: with the scores as the first factor XLA would transpose them, at twice the time on a CPU.
    dv_BKHC = jnp.einsum("BKHM,BKMC->BKHC", do_BKHM, p_BKMC, preferred_element_type=jnp.float32)
    dk_BKHC = jnp.einsum("BKHM,BKMC->BKHC", q_BKHM, ds_BKMC, preferred_element_type=jnp.float32)
    return jnp.einsum("BKMC,BKCH->BKMH", ds_BKMC, k_BKCH, preferred_element_type=jnp.float32), dk_BKHC, dv_BKHC


def _add_at(sum_BKHS, tile_BKHC, first):
    """The sum with a tile added at the keys from `first` on."""
    old_BKHC = jax.lax.dynamic_slice_in_dim(sum_BKHS, first, tile_BKHC.shape[3], axis=3)
    return jax.lax.dynamic_update_slice_in_dim(sum_BKHS, old_BKHC + tile_BKHC, first, axis=3)
