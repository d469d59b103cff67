"""The feed-forwards of experts by kernels of an accelerator: all copies of the tokens at once, sorted by expert.

The same function as `grouped_mlp`, for blocks of one row. Arrays of m x F exist, of one layer at a time: the backward pass
computes gate and up again, and keeps none of the outputs. The gradient of a gate needs no output either: dy W^T h = (dy W^T) h.

Letters: of one device, n tokens, k experts of a token, E experts, m rows, D model, F width of an expert.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.kernels import experts
from hybrid_attn.kernels.experts import multiplied, multiplied_transposed, summed
from hybrid_attn.model.grouped import Blocks, gate_of_rows, taken
from hybrid_attn.model.mlp import ChunkedMLP


class Rows(NamedTuple):
    """The copies of tokens, sorted by expert. The last rows are of no copy: they have the token n and the expert E."""

    token_m: jax.Array
    expert_m: jax.Array
    row_nk: jax.Array  # of a copy that no row holds: a row of no copy, or m
    load_E: jax.Array


def rows_of(blocks: Blocks, tokens: int) -> Rows:
    """Blocks of one row as rows, filled up to a number that the kernels take."""
    (token_R,) = blocks.token_Ir.T
    token_m = jnp.pad(token_R, (0, -len(token_R) % experts.ROWS), constant_values=tokens)
    expert_m = jnp.searchsorted(jnp.cumsum(blocks.load_E), jnp.arange(len(token_m)), side="right")
    return Rows(token_m, expert_m, blocks.row_nk, blocks.load_E)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ragged_mlp(mlp: ChunkedMLP, x_nD, gates_nk, rows: Rows, *weights) -> jax.Array:
    """The sum over the experts of a token of gate times feed-forward, [n, D]; `weights` are those of `grouped_mlp`."""
    h_mF = mlp.hidden(*_products(taken(x_nD, rows.token_m), rows, *weights))
    out_mD = multiplied(h_mF, weights[2], rows.load_E)
    return _sums(out_mD, rows, gates_nk).astype(x_nD.dtype)


def _products(x_mD: jax.Array, rows: Rows, w_gate, w_up, _, *biases_EF) -> tuple[jax.Array, ...]:
    """(gate_mF, up_mF), with their biases if there are any."""
    products_mF = tuple(multiplied(x_mD, w, rows.load_E) for w in (w_gate, w_up))
    biases_mF = (taken(b_EF, rows.expert_m).astype(x_mD.dtype) for b_EF in biases_EF)
    return tuple(x_mF + b_mF for x_mF, b_mF in zip(products_mF, biases_mF, strict=True)) if biases_EF else products_mF


def _sums(x_mA: jax.Array, rows: Rows, gates_nk: jax.Array | float = 1.0) -> jax.Array:
    """The sum of the rows of each token, times its gates, [n, A] in float32."""
    x_nkA = taken(x_mA, rows.row_nk).astype(jnp.float32)
    return (jnp.broadcast_to(gates_nk, rows.row_nk.shape)[..., None] * x_nkA).sum(1)


def _forward(mlp: ChunkedMLP, x_nD, gates_nk, rows: Rows, *weights):
    return ragged_mlp(mlp, x_nD, gates_nk, rows, *weights), (x_nD, gates_nk, rows, weights)


def _backward(mlp: ChunkedMLP, residuals, dy_nD):
    x_nD, gates_nk, rows, weights = residuals
    (w_gate, w_up, w_down, *biases_EF), load_E, dtype = weights, rows.load_E, x_nD.dtype
    x_mD, dy_mD = (taken(x_nA, rows.token_m) for x_nA in (x_nD, dy_nD))
    h_mF, pull = jax.vjp(mlp.hidden, *_products(x_mD, rows, *weights))
    dh_mF = multiplied_transposed(dy_mD, w_down, load_E)  # of a gate of 1
    dgate_m1 = (dh_mF.astype(jnp.float32) * h_mF).sum(-1, keepdims=True)
    gate_m = gate_of_rows(gates_nk, rows.row_nk, len(x_mD))
    dproducts_mF = pull((gate_m[:, None] * dh_mF).astype(dtype))
    terms_mD = (multiplied_transposed(d_mF, w, load_E) for d_mF, w in zip(dproducts_mF, (w_gate, w_up), strict=True))
    dw_gate, dw_up = (summed(x_mD, d_mF, load_E) for d_mF in dproducts_mF)
    dw_down = summed((gate_m[:, None] * h_mF).astype(dtype), dy_mD, load_E)
    db_EF = (_summed_rows(d_mF, rows).astype(b.dtype) for d_mF, b in zip(dproducts_mF, biases_EF, strict=False))
    dgates_nk = taken(dgate_m1, rows.row_nk)[..., 0]
    return _sums(sum(terms_mD), rows).astype(dtype), dgates_nk, None, dw_gate, dw_up, dw_down, *db_EF


def _summed_rows(x_mF: jax.Array, rows: Rows) -> jax.Array:
    """The sum of the rows of each expert, [E, F] in float32."""
    number = len(rows.load_E)
    return jax.ops.segment_sum(x_mF.astype(jnp.float32), rows.expert_m, number, indices_are_sorted=True)


ragged_mlp.defvjp(_forward, _backward)
