"""Attention in blocks, on any platform: O(S W) for a window, the lower triangle for the prefix, never a T x S array.

Each block of queries walks over the tiles of keys that any of its queries sees, merging by the running maximum and sum
of "FlashAttention" (arXiv 2205.14135, algorithm 1; the backward pass is its algorithm 4). A window's keys are one tile where
they fit, so its scores are made once and stay in cache. Tiles that hold only other documents are not visited; the rows of a
batch walk together, so what one of them needs all of them visit.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K, H head size; I query blocks,
M = G x queries of a block, C keys of a tile.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.kernels import kept
from hybrid_attn.kernels.intervals import intervals

# Measured on two hyper-threads of one core with 2 MiB of L2, 2 to 8 heads of 32 and 64: smaller tiles lose to the cost of
# starting each product, larger ones to scores that leave the cache. Keys that are no multiple of 16 cost a fifth more.
ROWS = 1024  # queries of a block times heads
QUERIES = (64, 256)  # fewest and most of a block
KEYS = 1024
LINE = 64


class Static(NamedTuple):
    """What is known while tracing."""

    scale: float
    softcap: float | None
    queries: int
    keys: int


def attend(q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, *, window, scale, softcap, merged=None):
    """(o_BTNH, lse_BTN float32): a query that sees no key gives zeros and a log-sum-exp of -inf.

    Keys are in reading order (see `intervals`); queries may be in any, but only neighbours that see the same keys share work.
    """
    (B, T, N, H), (S, K) = q_BTNH.shape, k_BSKH.shape[1:3]
    queries = min(T, max(QUERIES[0], min(QUERIES[1], ROWS // N)))
    static = Static(scale, softcap, queries, tile_size(S, window, queries))
    first_BT, end_BT = intervals(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, window)
    pad = -T % static.queries
    I = (T + pad) // static.queries

    def blocks(x_BT):
        return jnp.pad(x_BT, [(0, 0), (0, pad)] + [(0, 0)] * (x_BT.ndim - 2)).reshape(B, I, static.queries, *x_BT.shape[2:])

    def heads(x_BTNH):
        x_IBKGQH = jnp.einsum("BIQKGH->IBKGQH", blocks(x_BTNH.reshape(B, T, K, N // K, -1)))
        return x_IBKGQH.reshape(I, B, K, -1, x_IBKGQH.shape[-1])

    q_IBKMH = heads(q_BTNH)
    k_BKSH, v_BKSH = k_BSKH.swapaxes(1, 2), v_BSKH.swapaxes(1, 2)
    bounds_IBQ = tuple(blocks(x).swapaxes(0, 1) for x in (first_BT, end_BT))
    if merged is not None:
        merged = heads(merged[0]), heads(merged[1][..., None])[..., 0]
    o_IBKMH, lse_IBKM = _attend(static, q_IBKMH, k_BKSH, v_BKSH, bounds_IBQ, merged)
    o_IBKGQH, lse_IBKGQ = (x.reshape(I, B, K, N // K, static.queries, *x.shape[4:]) for x in (o_IBKMH, lse_IBKM))
    o_BTNH = jnp.einsum("IBKGQH->BIQKGH", o_IBKGQH).reshape(B, T + pad, N, H)
    lse_BTN = jnp.einsum("IBKGQ->BIQKG", lse_IBKGQ).reshape(B, T + pad, N)
    return o_BTNH[:, :T], lse_BTN[:, :T]


def tile_size(S: int, window: int | None, queries: int) -> int:
    """Keys of a tile, whole `LINE`s: what a block of queries sees under a window in as few equal tiles as fit 2 `KEYS`."""
    if window is None:
        return min(S, KEYS)
    seen = min(S, window + queries - 1)
    tiles = -(-seen // (2 * KEYS))
    return min(S, -(-seen // (tiles * LINE)) * LINE)


def _walk(bounds_BQ, keys: int) -> tuple[jax.Array, jax.Array]:
    """First key and number of tiles of `keys` that a block of queries needs."""
    first_BQ, end_BQ = bounds_BQ
    seen_BQ = first_BQ < end_BQ
    start = jnp.min(jnp.where(seen_BQ, first_BQ, jnp.iinfo(jnp.int32).max))
    end = jnp.max(jnp.where(seen_BQ, end_BQ, 0))
    return start, jnp.maximum(0, end - start + keys - 1) // keys


def _tile(static: Static, start, j, arrays_BKSH, bounds_BQ):
    """The j-th tile of each array, its first key, and which of its keys each query sees.

    The last tile is moved back to stay inside the row; keys that an earlier tile has shown are masked there.
    """
    S = arrays_BKSH[0].shape[2]
    wanted = start + j * static.keys
    at = jnp.minimum(wanted, S - static.keys)
    tiles_BKCH = [jax.lax.dynamic_slice_in_dim(x, at, static.keys, axis=2) for x in arrays_BKSH]
    key_C = at + jnp.arange(static.keys, dtype=jnp.int32)
    first_BQ, end_BQ = bounds_BQ
    see_BQC = (key_C >= jnp.maximum(first_BQ, wanted)[..., None]) & (key_C < end_BQ[..., None])
    return tiles_BKCH, at, see_BQC


def _scores(static: Static, q_BKMH, k_BKCH, see_BQC):
    """Masked scores [B,K,M,C] in float32, and the derivative of the soft cap (None without one)."""
    s_BKMC = static.scale * jnp.einsum("BKMH,BKCH->BKMC", q_BKMH, k_BKCH, preferred_element_type=jnp.float32)
    slope_BKMC = None
    if static.softcap is not None:
        t_BKMC = jnp.tanh(s_BKMC / static.softcap)
        s_BKMC, slope_BKMC = static.softcap * t_BKMC, 1 - t_BKMC**2
    B, K, M, C = s_BKMC.shape
    see = see_BQC[:, None, None]
    s_BKMC = jnp.where(see, s_BKMC.reshape(B, K, M // static.queries, static.queries, C), -jnp.inf)
    return s_BKMC.reshape(B, K, M, C), slope_BKMC


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, q_IBKMH, k_BKSH, v_BKSH, bounds_IBQ, merged):
    return merged or _forward(static, q_IBKMH, k_BKSH, v_BKSH, bounds_IBQ)


def _forward(static: Static, q_IBKMH, k_BKSH, v_BKSH, bounds_IBQ):
    def block(_, xs):
        q_BKMH, bounds_BQ = xs
        start, tiles = _walk(bounds_BQ, static.keys)

        def merge(j, carry):
            top_BKM, total_BKM, o_BKMH = carry
            (k_BKCH, v_BKCH), _, see_BQC = _tile(static, start, j, (k_BKSH, v_BKSH), bounds_BQ)
            s_BKMC, _ = _scores(static, q_BKMH, k_BKCH, see_BQC)
            new_BKM = jnp.maximum(top_BKM, s_BKMC.max(-1))
            p_BKMC = jnp.exp(s_BKMC - new_BKM[..., None])
            keep_BKM = jnp.exp(top_BKM - new_BKM)
            add_BKMH = jnp.einsum("BKMC,BKCH->BKMH", p_BKMC.astype(v_BKCH.dtype), v_BKCH, preferred_element_type=jnp.float32)
            return new_BKM, keep_BKM * total_BKM + p_BKMC.sum(-1), keep_BKM[..., None] * o_BKMH + add_BKMH

        zero_BKM = jnp.zeros_like(q_BKMH[..., 0], jnp.float32)
        lowest = jnp.finfo(jnp.float32).min  # finite, so that a query without keys gives exp(-inf) = 0 and not NaN
        top_BKM, total_BKM, o_BKMH = jax.lax.fori_loop(
            0, tiles, merge, (zero_BKM + lowest, zero_BKM, jnp.zeros_like(q_BKMH, jnp.float32))
        )
        some_BKM = jnp.where(total_BKM > 0, total_BKM, 1.0)
        lse_BKM = jnp.where(total_BKM > 0, top_BKM + jnp.log(some_BKM), -jnp.inf)
        return None, ((o_BKMH / some_BKM[..., None]).astype(q_BKMH.dtype), lse_BKM)

    return jax.lax.scan(block, None, (q_IBKMH, bounds_IBQ))[1]


def _forward_keep(static: Static, q_IBKMH, k_BKSH, v_BKSH, bounds_IBQ, merged):
    o_IBKMH, lse_IBKM = merged or kept(*_forward(static, q_IBKMH, k_BKSH, v_BKSH, bounds_IBQ))
    return (o_IBKMH, lse_IBKM), (q_IBKMH, k_BKSH, v_BKSH, bounds_IBQ, o_IBKMH, lse_IBKM)


def _backward(static: Static, residuals, grads):
    q_IBKMH, k_BKSH, v_BKSH, bounds_IBQ, o_IBKMH, lse_IBKM = residuals
    do_IBKMH, dlse_IBKM = grads

    def block(carry, xs):
        q_BKMH, bounds_BQ, o_BKMH, lse_BKM, do_BKMH, dlse_BKM = xs
        start, tiles = _walk(bounds_BQ, static.keys)
        shift_BKM = jnp.einsum("BKMH,BKMH->BKM", do_BKMH, o_BKMH, preferred_element_type=jnp.float32) - dlse_BKM
        safe_BKM = jnp.where(jnp.isfinite(lse_BKM), lse_BKM, 0.0)
        q_BKHM, do_BKHM = q_BKMH.swapaxes(2, 3), do_BKMH.swapaxes(2, 3)

        def merge(j, carry):
            dq_BKMH, dk_BKHS, dv_BKHS = carry
            (k_BKCH, v_BKCH), at, see_BQC = _tile(static, start, j, (k_BKSH, v_BKSH), bounds_BQ)
            s_BKMC, slope_BKMC = _scores(static, q_BKMH, k_BKCH, see_BQC)
            p_BKMC = jnp.exp(s_BKMC - safe_BKM[..., None])
            dp_BKMC = jnp.einsum("BKMH,BKCH->BKMC", do_BKMH, v_BKCH, preferred_element_type=jnp.float32)
            ds_BKMC = static.scale * p_BKMC * (dp_BKMC - shift_BKM[..., None])
            ds_BKMC = (ds_BKMC if slope_BKMC is None else ds_BKMC * slope_BKMC).astype(q_BKMH.dtype)
            p_BKMC = p_BKMC.astype(do_BKMH.dtype)
            # Heads before keys: with the scores as the first factor XLA would transpose them, at twice the time on a CPU.
            dv_BKHC = jnp.einsum("BKHM,BKMC->BKHC", do_BKHM, p_BKMC, preferred_element_type=jnp.float32)
            dk_BKHC = jnp.einsum("BKHM,BKMC->BKHC", q_BKHM, ds_BKMC, preferred_element_type=jnp.float32)
            dq_BKMH += jnp.einsum("BKMC,BKCH->BKMH", ds_BKMC, k_BKCH, preferred_element_type=jnp.float32)
            return dq_BKMH, _add_at(dk_BKHS, dk_BKHC, at), _add_at(dv_BKHS, dv_BKHC, at)

        dq_BKMH = jnp.zeros_like(q_BKMH, jnp.float32)
        dq_BKMH, *carry = jax.lax.fori_loop(0, tiles, merge, (dq_BKMH, *carry))
        return carry, dq_BKMH.astype(q_BKMH.dtype)

    zeros = [jnp.zeros_like(x.swapaxes(2, 3), jnp.float32) for x in (k_BKSH, v_BKSH)]
    xs = (q_IBKMH, bounds_IBQ, o_IBKMH, lse_IBKM, do_IBKMH, dlse_IBKM)
    (dk_BKHS, dv_BKHS), dq_IBKMH = jax.lax.scan(block, zeros, xs)
    return dq_IBKMH, dk_BKHS.swapaxes(2, 3).astype(k_BKSH.dtype), dv_BKHS.swapaxes(2, 3).astype(v_BKSH.dtype), None, None


def _add_at(sum_BKHS, tile_BKHC, at):
    old_BKHC = jax.lax.dynamic_slice_in_dim(sum_BKHS, at, tile_BKHC.shape[3], axis=3)
    return jax.lax.dynamic_update_slice_in_dim(sum_BKHS, old_BKHC + tile_BKHC, at, axis=3)


_attend.defvjp(_forward_keep, _backward)
