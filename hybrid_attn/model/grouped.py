"""The feed-forwards of experts, each for the tokens that are routed to it: dropless, a block of rows of one expert at a time.

The copies of the tokens are sorted by expert, and those of an expert fill whole blocks of rows, the last with rows of zeros.
Only blocks that have rows are computed, so that few tokens read the matrices of few experts. Nothing of F outlives its block:
the backward pass computes it again, which on a CPU takes less time than keeping it.

Letters: of one device, n tokens, k experts of a token, E experts, I blocks of r rows, R rows of all blocks, D model, F width of
an expert.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.model.mlp import ChunkedMLP, gradients

ITERATIONS = "iterations_"  # begins the name of the scope of a loop whose length depends on the tokens; its mean follows
ROWS = 8, 256  # of a block: below, a product costs as much; above, it is no faster on a CPU, and wastes more


class Blocks(NamedTuple):
    """Where each copy of a token is computed. A row without a copy has the token n, a token of padding the row R."""

    expert_I: jax.Array
    token_Ir: jax.Array
    row_nk: jax.Array
    used: jax.Array  # how many blocks have rows; they come first
    load_E: jax.Array  # copies that the blocks of each expert hold


def rows_of_block(tokens: int, copies: int, experts: int) -> int:
    """A power of two near half the mean load of an expert, and no more than the tokens: none has an expert twice."""
    least, most = ROWS
    half = max(copies // (2 * experts), 1)
    return min(max(least, min(most, 1 << (half - 1).bit_length())), tokens)


def blocks_of(expert_nk: jax.Array, experts: int, rows: int) -> Blocks:
    """The blocks of tokens with experts from 0 to `experts` - 1; copies with the number `experts` are in none."""
    tokens, k = expert_nk.shape
    copies, most = expert_nk.size, tokens * min(k, experts)
    expert_m = expert_nk.reshape(-1)
    order_m = jnp.argsort(expert_m, stable=True)
    load = jnp.bincount(expert_m, length=experts + 1)
    blocks_E = -(-load[:experts] // rows)
    ends_E = jnp.cumsum(blocks_E)
    number = (most + min(experts, most) * (rows - 1)) // rows  # the most: every last block has one row
    first = jnp.append((ends_E - blocks_E) * rows, number * rows) - (jnp.cumsum(load) - load)
    sorted_m = expert_m[order_m]
    row_m = jnp.where(sorted_m < experts, first[sorted_m] + jnp.arange(copies), number * rows)
    token_R = jnp.full(number * rows, tokens).at[row_m].set(order_m // k, mode="drop")
    row_nk = jnp.zeros_like(row_m).at[order_m].set(row_m).reshape(expert_nk.shape)
    expert_I = jnp.searchsorted(ends_E, jnp.arange(number), side="right")
    held_E = jnp.zeros(experts, jnp.int32).at[expert_I].add((token_R < tokens).reshape(number, rows).sum(1), mode="drop")
    return Blocks(expert_I, token_R.reshape(number, rows), row_nk, ends_E[-1], held_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def grouped_mlp(mlp: ChunkedMLP, x_nD, gates_nk, blocks: Blocks, *weights) -> jax.Array:
    """The sum over the experts of a token of gate times feed-forward, [n, D]; matrices are [E, D, F], the last [E, F, D].

    After them there may be the biases [E, F] of the first two.
    """
    return _forward(mlp, x_nD, gates_nk, blocks, *weights)[0]


def _rows(x_nA: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of an array, and zeros where the index is its length."""
    return x_nA.at[index].get(mode="fill", fill_value=0)


def _of_expert(weights: tuple, expert: jax.Array) -> tuple:
    return tuple(jax.lax.dynamic_index_in_dim(w, expert, keepdims=False) for w in weights)


def _put(arrays: tuple, i: jax.Array, parts: tuple) -> tuple:
    """Arrays with `parts` as their i-th entries."""
    pairs = zip(arrays, parts, strict=True)
    return tuple(jax.lax.dynamic_update_index_in_dim(x, part, i, 0) for x, part in pairs)


def _forward(mlp: ChunkedMLP, x_nD, gates_nk, blocks: Blocks, *weights):
    def block(i, carry):
        return _put(carry, i, (mlp(_rows(x_nD, blocks.token_Ir[i]), *_of_expert(weights, blocks.expert_I[i])),))

    zeros_IrD = jnp.zeros((*blocks.token_Ir.shape, x_nD.shape[1]), x_nD.dtype)
    (out_IrD,) = jax.lax.fori_loop(0, blocks.used, block, (zeros_IrD,))
    terms_nkD = gates_nk[..., None] * _copies(out_IrD, blocks)
    return terms_nkD.sum(1).astype(x_nD.dtype), (x_nD, gates_nk, blocks, weights, out_IrD)


def _copies(x_IrD: jax.Array, blocks: Blocks) -> jax.Array:
    """What the blocks computed of each copy of each token, [n, k, D] in float32."""
    return _rows(x_IrD.reshape(-1, x_IrD.shape[-1]), blocks.row_nk).astype(jnp.float32)


def _backward(mlp: ChunkedMLP, residuals, dy_nD):
    x_nD, gates_nk, blocks, weights, out_IrD = residuals
    dgates_nk = (dy_nD[:, None].astype(jnp.float32) * _copies(out_IrD, blocks)).sum(-1)
    gate_R = jnp.zeros(blocks.token_Ir.size, gates_nk.dtype).at[blocks.row_nk].set(gates_nk, mode="drop")
    gate_Ir1 = gate_R.reshape(*blocks.token_Ir.shape, 1)

    def block(i, carry):
        dx_IrD, sums_EDF = carry
        expert, token_r = blocks.expert_I[i], blocks.token_Ir[i]
        dy_rD = (gate_Ir1[i] * _rows(dy_nD, token_r)).astype(dy_nD.dtype)
        dx_rD, *terms_DF = gradients(mlp, _rows(x_nD, token_r), None, dy_rD, *_of_expert(weights, expert))
        added_DF = [a + b for a, b in zip(_of_expert(sums_EDF, expert), terms_DF, strict=True)]
        return *_put((dx_IrD,), i, (dx_rD,)), _put(sums_EDF, expert, added_DF)

    sizes = [weights[0].shape] * 3 + [bias_EF.shape for bias_EF in weights[3:]]
    zeros = jnp.zeros(out_IrD.shape, x_nD.dtype), tuple(jnp.zeros(size, jnp.float32) for size in sizes)
    dx_IrD, (dw_gate, dw_up, dw_downT, *db_EF) = jax.lax.fori_loop(0, blocks.used, block, zeros)
    gradients_E = (dw_gate, dw_up, dw_downT.mT, *db_EF)
    dweights = (dw.astype(w.dtype) for dw, w in zip(gradients_E, weights, strict=True))
    return _copies(dx_IrD, blocks).sum(1).astype(x_nD.dtype), dgates_nk, None, *dweights


grouped_mlp.defvjp(_forward, _backward)
