"""The feed-forwards of experts, each for the tokens that are routed to it: dropless, some rows of one expert at a time.

The copies of the tokens are sorted by expert, and those of an expert fill whole blocks of rows, the last with rows of zeros.
One loop goes over the experts that have rows, so that few tokens read the matrices of few experts. Inside, two loops go over
the blocks of an expert: `JOINED` at a time, and those that are left one by one. Nothing of F outlives its blocks: the backward
pass computes it again, which on a CPU takes less time than keeping it.

Letters: of one device, n tokens, k experts of a token, E experts, I blocks of r rows, R rows of all blocks, D model, F width of
an expert; s rows of the blocks that are computed at a time.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.model.mlp import ChunkedMLP, gradients

ITERATIONS = "iterations_"  # begins the name of the scope of a loop whose length depends on the tokens; its mean follows
ROWS = 8, 64  # of a block: below, a product costs as much; above, rows of zeros cost more
JOINED = 4  # blocks that are computed at a time: of more rows a product is no faster on a CPU


class Blocks(NamedTuple):
    """Where each copy of a token is computed. A row without a copy has the token n, a token of padding the row R."""

    token_Ir: jax.Array
    row_nk: jax.Array
    expert_E: jax.Array  # the numbers of the experts; those that have rows come first
    used: jax.Array  # how many have rows
    span_E2: jax.Array  # the first block of each expert, and the one after its last
    load_E: jax.Array  # copies that the blocks of each expert hold


def rows_of_block(tokens: int, mean: int) -> int:
    """A power of two, such that `JOINED` blocks are near the mean load of an expert, and no more than the tokens.

    No expert has a token twice.
    """
    least, most = ROWS
    return min(max(least, min(most, 1 << (mean // JOINED).bit_length() >> 1)), tokens)


def blocks_of(expert_nk: jax.Array, experts: int, rows: int) -> Blocks:
    """The blocks of tokens with experts from 0 to `experts` - 1; copies with the number `experts` are in none."""
    tokens, k = expert_nk.shape
    copies, most = expert_nk.size, tokens * min(k, experts)
    expert_m = expert_nk.reshape(-1)
    order_m = jnp.argsort(expert_m, stable=True)
    load = jnp.bincount(expert_m, length=experts + 1)
    blocks_E = -(-load[:experts] // rows)
    end_E = jnp.cumsum(blocks_E)
    number = (most + min(experts, most) * (rows - 1)) // rows  # the most: every last block has one row
    first = jnp.append((end_E - blocks_E) * rows, number * rows) - (jnp.cumsum(load) - load)
    sorted_m = expert_m[order_m]
    row_m = jnp.where(sorted_m < experts, first[sorted_m] + jnp.arange(copies), number * rows)
    token_R = jnp.full(number * rows, tokens).at[row_m].set(order_m // k, mode="drop")
    row_nk = jnp.zeros_like(row_m).at[order_m].set(row_m).reshape(expert_nk.shape)
    expert_I = jnp.searchsorted(end_E, jnp.arange(number), side="right")
    held_E = jnp.zeros(experts, jnp.int32).at[expert_I].add((token_R < tokens).reshape(number, rows).sum(1), mode="drop")
    span_E2 = jnp.stack((end_E - blocks_E, end_E), 1)
    order_E = jnp.argsort(blocks_E == 0, stable=True)
    return Blocks(token_R.reshape(number, rows), row_nk, order_E, (blocks_E > 0).sum(), span_E2, held_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def grouped_mlp(mlp: ChunkedMLP, mean: int, x_nD, gates_nk, blocks: Blocks, *weights) -> jax.Array:
    """The sum over the experts of a token of gate times feed-forward, [n, D]; matrices are [E, D, F], the last [E, F, D].

    After them there may be the biases [E, F] of the first two. `mean` is the load of an expert of a balanced router.
    """
    return _forward(mlp, mean, x_nD, gates_nk, blocks, *weights)[0]


def taken(x_nA: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of an array, and zeros where the index is its length."""
    return x_nA.at[index].get(mode="fill", fill_value=0)


def gate_of_rows(gates_nk: jax.Array, row_nk: jax.Array, number: int) -> jax.Array:
    """The gate of each of so many rows, and 0 of a row without a copy."""
    return jnp.zeros(number, gates_nk.dtype).at[row_nk].set(gates_nk, mode="drop")


def _of_expert(weights: tuple, expert: jax.Array) -> tuple:
    return tuple(jax.lax.dynamic_index_in_dim(w, expert, keepdims=False) for w in weights)


def _over_experts(mean: int, blocks: Blocks, visit: Callable, carry):
    """The carry after `visit(expert, over_rows, carry)` of all experts that have rows."""

    def expert(j, carry):
        number = blocks.expert_E[j]
        return visit(number, functools.partial(_over_rows, mean, blocks, number), carry)

    with jax.named_scope(f"{ITERATIONS}{len(blocks.expert_E)}"):
        return jax.lax.fori_loop(0, blocks.used, expert, carry)


def _over_rows(mean: int, blocks: Blocks, expert: jax.Array, compute: Callable, carry):
    """The carry after `compute(at, token_s, carry)` of all rows of an expert, s of them at a time from the row `at`."""
    rows, token_R = blocks.token_Ir.shape[1], blocks.token_Ir.reshape(-1)
    first, end = blocks.span_E2[expert]
    joined = JOINED if JOINED * rows <= mean else 1  # of a smaller mean, few experts fill them

    def loop(first, joined, trips, carry):
        def some(i, carry):
            at = (first + i * joined) * rows
            return compute(at, jax.lax.dynamic_slice_in_dim(token_R, at, joined * rows), carry)

        with jax.named_scope(f"{ITERATIONS}{trips}"):
            return jax.lax.fori_loop(0, (end - first) // joined, some, carry)

    if joined == 1:
        return loop(first, 1, -(-mean // rows), carry)
    carry = loop(first, joined, mean // (joined * rows), carry)
    return loop(end - (end - first) % joined, 1, joined // 2, carry)


def _forward(mlp: ChunkedMLP, mean: int, x_nD, gates_nk, blocks: Blocks, *weights):
    def visit(expert, over_rows, out_RD):
        of_expert = _of_expert(weights, expert)

        def compute(at, token_s, out_RD):
            return jax.lax.dynamic_update_slice_in_dim(out_RD, mlp(taken(x_nD, token_s), *of_expert), at, 0)

        return over_rows(compute, out_RD)

    zeros_RD = jnp.zeros((blocks.token_Ir.size, x_nD.shape[1]), x_nD.dtype)
    out_RD = _over_experts(mean, blocks, visit, zeros_RD)
    terms_nkD = gates_nk[..., None] * _copies(out_RD, blocks)
    return terms_nkD.sum(1).astype(x_nD.dtype), (x_nD, gates_nk, blocks, weights, out_RD)


def _copies(x_RD: jax.Array, blocks: Blocks) -> jax.Array:
    """What the blocks computed of each copy of each token, [n, k, D] in float32."""
    return taken(x_RD, blocks.row_nk).astype(jnp.float32)


def _backward(mlp: ChunkedMLP, mean: int, residuals, dy_nD):
    x_nD, gates_nk, blocks, weights, out_RD = residuals
    dgates_nk = (dy_nD[:, None].astype(jnp.float32) * _copies(out_RD, blocks)).sum(-1)
    gate_R = gate_of_rows(gates_nk, blocks.row_nk, blocks.token_Ir.size)

    def visit(expert, over_rows, carry):
        dx_RD, sums_E = carry
        of_expert = _of_expert(weights, expert)

        def compute(at, token_s, carry):
            dx_RD, sums = carry
            gate_s1 = jax.lax.dynamic_slice_in_dim(gate_R, at, len(token_s))[:, None]
            dy_sD = (gate_s1 * taken(dy_nD, token_s)).astype(dy_nD.dtype)
            dx_sD, *terms = gradients(mlp, taken(x_nD, token_s), None, dy_sD, *of_expert)
            added = tuple(a + b for a, b in zip(sums, terms, strict=True))
            return jax.lax.dynamic_update_slice_in_dim(dx_RD, dx_sD, at, 0), added

        zeros = tuple(jnp.zeros(of_all.shape[1:], jnp.float32) for of_all in sums_E)
        dx_RD, sums = over_rows(compute, (dx_RD, zeros))
        pairs = zip(sums_E, sums, strict=True)
        return dx_RD, tuple(jax.lax.dynamic_update_index_in_dim(of_all, x, expert, 0) for of_all, x in pairs)

    sizes = [weights[0].shape] * 3 + [bias_EF.shape for bias_EF in weights[3:]]
    zeros = jnp.zeros(out_RD.shape, x_nD.dtype), tuple(jnp.zeros(size, jnp.float32) for size in sizes)
    dx_RD, (dw_gate, dw_up, dw_downT, *db_EF) = _over_experts(mean, blocks, visit, zeros)
    gradients_E = (dw_gate, dw_up, dw_downT.mT, *db_EF)  # transposed here: as [F, D], XLA sums it over devices by all-reduces
    dweights = (dw.astype(w.dtype) for dw, w in zip(gradients_E, weights, strict=True))
    return _copies(dx_RD, blocks).sum(1).astype(x_nD.dtype), dgates_nk, None, *dweights


grouped_mlp.defvjp(_forward, _backward)
