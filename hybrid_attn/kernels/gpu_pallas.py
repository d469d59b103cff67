"""Our Pallas kernels for GPUs, which Triton compiles: the keys that each query sees, and the backward pass of attention.

tokamax's own backward kernels visit all keys on Hopper, and on other GPUs read a mask of queries by keys. These take what its
forward kernels take, the first key and the end of the keys of each query, and visit only tiles that the mask needs: a window
costs O(T W), a prefix the lower triangle, and tiles between two packed documents are skipped. Scores are computed again from
the log-sum-exp ("FlashAttention", arXiv 2205.14135, algorithm 4), so the outputs may be merged results over more keys than
these.

Each program of a grid writes one block of one gradient, summed over all tiles and over the query heads of a group.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K, H head size; Q queries and C keys of
a block or a tile, I query blocks, J key blocks.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from hybrid_attn.kernels.interface import LAST, AttentionOptions, Keys, Pair, Queries, in_search_order, padded, search_intervals
from hybrid_attn.kernels.softmax import finite_or_zero, gradient_shift, soft_cap

BLOCK = 128  # tokens of the block that a program writes, at most; queries and keys are padded to a multiple of it
INTERPRET = False  # tests run the kernels on CPU


def backward(options: AttentionOptions, queries: Queries, keys: Keys, outputs: Pair, grads: Pair):
    """(dq_BTNH, dk_BSKH, dv_BSKH)."""
    (o_BTNH, lse_BTN), (do_BTNH, dlse_BTN) = outputs, grads
    (T, _, H), S = queries.q_BTNH.shape[1:], keys.k_BSKH.shape[1]
    # The gradient by the log-sum-exp of a query that sees no key may be anything.
    shift_BTN = jnp.where(jnp.isfinite(lse_BTN), gradient_shift(do_BTNH, o_BTNH, dlse_BTN), 0.0)
    of_queries = queries.q_BTNH, do_BTNH, finite_or_zero(lse_BTN), shift_BTN
    q_BTNH, do_BTNH, *sums_BTN = (padded(x, BLOCK) for x in of_queries)
    bounds_BT = padded_intervals(options.window, queries, keys)
    k_BSKH, v_BSKH = padded(keys.k_BSKH, BLOCK), padded(keys.v_BSKH, BLOCK)
    q_BTNH, k_BSKH, v_BSKH, do_BTNH = (_with_power_of_two_heads(x) for x in (q_BTNH, k_BSKH, v_BSKH, do_BTNH))
    arrays = q_BTNH, k_BSKH, v_BSKH, do_BTNH, *sums_BTN, *bounds_BT
    with jax.named_scope("query gradients"):
        dq_BTNH = _query_gradients(options, *arrays)
    with jax.named_scope("key gradients"):
        dk_BSKH, dv_BSKH = _key_gradients(options, *arrays)
    return dq_BTNH[:, :T, :, :H], dk_BSKH[:, :S, :, :H], dv_BSKH[:, :S, :, :H]


def padded_intervals(window: int | None, queries: Queries, keys: Keys) -> Pair:
    """`interface.intervals` of queries padded to a multiple of `BLOCK`, in one kernel: XLA launches five for each halving."""
    pos_BT, seg_BT = padded(queries.pos_BT, BLOCK), padded(queries.seg_BT, BLOCK)
    (B, T), S = seg_BT.shape, keys.seg_BS.shape[1]

    def kernel(q_pos_ref, q_seg_ref, k_seg_ref, k_pos_ref, first_ref, end_ref):
        def keys_at(index_Q):
            return k_seg_ref[index_Q], k_pos_ref[index_Q]

        first_ref[...], end_ref[...] = search_intervals(window, q_pos_ref[...], q_seg_ref[...], keys_at, S)

    block_Q, all_S = pl.BlockSpec((None, BLOCK), lambda i, b: (b, i)), pl.BlockSpec((None, S), lambda i, b: (b, 0))
    specs = [block_Q, block_Q, all_S, all_S], [block_Q, block_Q]
    out_shape = [jax.ShapeDtypeStruct((B, T), jnp.int32)] * 2
    with jax.named_scope("visible keys"):
        return _call(kernel, (T // BLOCK, B), specs, out_shape, (pos_BT, seg_BT, *in_search_order(keys)))


def _with_power_of_two_heads(x_BTNH: jax.Array) -> jax.Array:
    """Heads padded with zeros to a size that Triton takes."""
    H = x_BTNH.shape[-1]
    return jnp.pad(x_BTNH, [(0, 0)] * 3 + [(0, max(16, pl.next_power_of_2(H)) - H)])


def block_sizes(H: int, itemsize: int) -> tuple[int, int]:
    """Tokens of the block that a program holds, and of the tiles that it visits: two stages of them fit in shared memory."""
    rows = min(BLOCK, max(32, 2**15 // (H * itemsize)))
    return rows, rows // 2


def _call(kernel, grid: tuple[int, ...], specs: tuple[list, list], out_shape: list, arrays: tuple):
    from jax.experimental.pallas import triton

    in_specs, out_specs = specs
    params = triton.CompilerParams(num_warps=8, num_stages=2)
    call = pl.pallas_call(
        kernel, out_shape, grid=grid, in_specs=in_specs, out_specs=out_specs, compiler_params=params, interpret=INTERPRET
    )
    return call(*arrays)


def _query_gradients(options: AttentionOptions, *arrays) -> jax.Array:
    """dq_BTNH: a program for each block of queries and each head loops over the tiles of keys that the block sees."""
    q_BTNH, k_BSKH = arrays[:2]
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    Q, C = block_sizes(H, q_BTNH.dtype.itemsize)
    block_QH = pl.BlockSpec((None, Q, None, H), lambda i, n, b: (b, i, n, 0))
    all_SH = pl.BlockSpec((None, S, None, H), lambda i, n, b: (b, 0, n // (N // K), 0))
    sums_Q, bounds_Q = pl.BlockSpec((None, Q, None), lambda i, n, b: (b, i, n)), pl.BlockSpec((None, Q), lambda i, n, b: (b, i))
    in_specs = [block_QH, all_SH, all_SH, block_QH, sums_Q, sums_Q, bounds_Q, bounds_Q]
    kernel = functools.partial(_query_kernel, options, C)
    out_shape = [jax.ShapeDtypeStruct(q_BTNH.shape, q_BTNH.dtype)]
    return _call(kernel, (T // Q, N, B), (in_specs, [block_QH]), out_shape, arrays)[0]


def _query_kernel(options, C, q_ref, k_ref, v_ref, do_ref, lse_ref, shift_ref, first_ref, end_ref, dq_ref):
    q_QH, do_QH, lse_Q, shift_Q = q_ref[...], do_ref[...], lse_ref[...], shift_ref[...]
    first_Q, end_Q = first_ref[...], end_ref[...]
    sees_key_Q = first_Q < end_Q
    start = jnp.min(jnp.where(sees_key_Q, first_Q, LAST)) // C
    end = pl.cdiv(jnp.max(jnp.where(sees_key_Q, end_Q, 0)), C)

    def add_tile(j, dq_QH):
        tile = pl.ds(j * C, C)
        k_CH, v_CH, key_C = k_ref[tile], v_ref[tile], j * C + jnp.arange(C)
        see_QC = (key_C[None] >= first_Q[:, None]) & (key_C[None] < end_Q[:, None])
        products_QC, dp_QC = _dot(q_QH, k_CH.T), _dot(do_QH, v_CH.T)
        _, ds_QC = _score_gradients(options, products_QC, dp_QC, lse_Q[:, None], shift_Q[:, None], see_QC)
        return dq_QH + _dot(ds_QC.astype(k_CH.dtype), k_CH)

    dq_QH = jax.lax.fori_loop(start, end, add_tile, jnp.zeros(q_QH.shape, jnp.float32))
    dq_ref[...] = (options.scale * dq_QH).astype(dq_ref.dtype)


def _key_gradients(options: AttentionOptions, *arrays) -> tuple[jax.Array, jax.Array]:
    """(dk_BSKH, dv_BSKH): a program for each block of keys and its head loops over the blocks of queries that see them."""
    (q_BTNH, k_BSKH), (first_BT, end_BT) = arrays[:2], arrays[-2:]
    (B, T, N, H), (_, S, K, _) = q_BTNH.shape, k_BSKH.shape
    C, Q = block_sizes(H, q_BTNH.dtype.itemsize)
    all_TGH = pl.BlockSpec((None, T, N // K, H), lambda j, k, b: (b, 0, k, 0))
    block_CH = pl.BlockSpec((None, C, None, H), lambda j, k, b: (b, j, k, 0))
    sums_TG = pl.BlockSpec((None, T, N // K), lambda j, k, b: (b, 0, k))
    bounds_T = pl.BlockSpec((None, T), lambda j, k, b: (b, 0))
    visited = pl.BlockSpec((None, None), lambda j, k, b: (b, j))
    in_specs = [all_TGH, block_CH, block_CH, all_TGH, sums_TG, sums_TG, bounds_T, bounds_T, visited, visited]
    kernel = functools.partial(_key_kernel, options, Q)
    out_shape = [jax.ShapeDtypeStruct(k_BSKH.shape, k_BSKH.dtype)] * 2
    arrays = *arrays, *visited_blocks(first_BT, end_BT, Q, C, S)
    return _call(kernel, (S // C, K, B), (in_specs, [block_CH, block_CH]), out_shape, arrays)


def visited_blocks(first_BT, end_BT, Q: int, C: int, S: int) -> Pair:
    """The first block of queries, and the end of the blocks, that see any key of each block of keys, [B, J] int32 each.

    Where queries are in reading order, every block in between sees a key too. In another order, and in padding, some do not.
    """
    sees_key_BT = first_BT < end_BT
    start_BI = jnp.where(sees_key_BT, first_BT, LAST).reshape(len(first_BT), -1, Q).min(-1)
    end_BI = jnp.where(sees_key_BT, end_BT, 0).reshape(len(end_BT), -1, Q).max(-1)
    key_J = jnp.arange(0, S, C, dtype=jnp.int32)
    search = functools.partial(jnp.searchsorted, method="scan_unrolled")
    from_BJ = jax.vmap(lambda end_I: search(end_I, key_J, side="right"))(jax.lax.cummax(end_BI, axis=1))
    to_BJ = jax.vmap(lambda start_I: search(start_I, key_J + C, side="left"))(jax.lax.cummin(start_BI, axis=1, reverse=True))
    return from_BJ, jnp.maximum(from_BJ, to_BJ)


def _key_kernel(
    options, Q, q_ref, k_ref, v_ref, do_ref, lse_ref, shift_ref, first_ref, end_ref, from_ref, to_ref, dk_ref, dv_ref
):
    k_CH, v_CH, G = k_ref[...], v_ref[...], jnp.int32(q_ref.shape[1])
    C = len(k_CH)
    key_C, start = pl.program_id(0) * C + jnp.arange(C), from_ref[...]

    def add_block(step, sums):
        dk_CH, dv_CH = sums
        block, g = pl.ds((start + jax.lax.div(step, G)) * Q, Q), jax.lax.rem(step, G)
        q_QH, do_QH, lse_Q, shift_Q = q_ref[block, g], do_ref[block, g], lse_ref[block, g], shift_ref[block, g]
        see_CQ = (key_C[:, None] >= first_ref[block][None]) & (key_C[:, None] < end_ref[block][None])
        products_CQ, dp_CQ = _dot(k_CH, q_QH.T), _dot(v_CH, do_QH.T)
        p_CQ, ds_CQ = _score_gradients(options, products_CQ, dp_CQ, lse_Q[None], shift_Q[None], see_CQ)
        return dk_CH + _dot(ds_CQ.astype(q_QH.dtype), q_QH), dv_CH + _dot(p_CQ.astype(do_QH.dtype), do_QH)

    zeros_CH = jnp.zeros(k_CH.shape, jnp.float32)
    dk_CH, dv_CH = jax.lax.fori_loop(0, G * (to_ref[...] - start), add_block, (zeros_CH, zeros_CH))
    dk_ref[...], dv_ref[...] = (options.scale * dk_CH).astype(dk_ref.dtype), dv_CH.astype(dv_ref.dtype)


def _dot(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def _score_gradients(options: AttentionOptions, products, dp, lse, shift, see) -> Pair:
    """Probabilities, and the gradients of the scores less their scale, of a tile and of its transpose alike."""
    s, slope = soft_cap(options.scale * products, options.softcap)
    p = jnp.where(see, jnp.exp(s - lse), 0.0)
    ds = p * (dp - shift)
    return p, (ds if slope is None else ds * slope)
