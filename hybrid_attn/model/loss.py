"""Cross-entropy over a large vocabulary in chunks: never B x T x V, forward or backward.

Letters: B batch, T tokens, D model, V vocabulary (of one `tensor` shard inside `shard_map`); n tokens of a device flattened,
c tokens of a chunk, v words of a chunk.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.model.transformer import Run, apply_in_place, unembedding
from hybrid_attn.parallel import context
from hybrid_attn.parallel.mesh import ACT_BTD, TOKENS_BT, gathered

WORDS = 16_384  # of the vocabulary at a time: with 1,024 tokens, 64 MiB of logits


def losses(model: Model, params: dict, batch: dict, run: Run) -> tuple[jax.Array, jax.Array]:
    """Negative log-probability of each target of a batch and log-sum-exp of its logits, [B, T] float32."""
    names = ("tokens", "positions", "segments", "targets")
    *inputs, targets_BT = context.balance(tuple(jax.reshard(batch[name], TOKENS_BT) for name in names), run.balance)
    x_BTD = apply_in_place(model, params, *inputs, run)
    found = token_losses(model, unembedding(model, params), x_BTD, targets_BT, run.loss_chunk)
    return context.unbalance(found, run.balance)


def token_losses(model: Model, table_VD: jax.Array, x_BTD: jax.Array, targets_BT: jax.Array, chunk: int):
    """Per token, in float32: the negative log-probability of its target [B, T] and the log-sum-exp of its logits [B, T].

    Logits are logit_scale x E^T, soft-capped where the model says so; products in the dtype of x, sums in float32.
    `chunk` is the number of tokens of a device whose logits exist at a time.
    """

    def shard(x_BTD, table_VD, targets_BT):
        B, T, D = x_BTD.shape
        static = Static(model.logit_scale, model.logit_softcap, min(chunk, B * T), min(table_VD.shape[0], WORDS))
        local_n = targets_BT.reshape(-1) - jax.lax.axis_index("tensor") * table_VD.shape[0]
        lse_n, hit_n = _local(static, x_BTD.reshape(-1, D), table_VD, local_n)
        top_n = jax.lax.pmax(jax.lax.stop_gradient(lse_n), "tensor")
        lse_n = top_n + jnp.log(jax.lax.psum(jnp.exp(lse_n - top_n), "tensor"))
        return (lse_n - jax.lax.psum(hit_n, "tensor")).reshape(B, T), lse_n.reshape(B, T)

    specs = (ACT_BTD, P("tensor", None), TOKENS_BT)
    return jax.shard_map(shard, in_specs=specs, out_specs=(TOKENS_BT, TOKENS_BT), check_vma=False)(
        jax.reshard(x_BTD, ACT_BTD), gathered(table_VD.astype(x_BTD.dtype)), jax.reshard(targets_BT, TOKENS_BT)
    )


def mean_loss(nll_BT, lse_BT, weights_BT, z_loss: float, total_weight=None) -> jax.Array:
    """Mean over the weighted tokens of the whole batch, with z_loss * lse^2 (PaLM, arXiv 2204.02311, section 5) added.

    Of a part of a batch, with the `total_weight` of all its parts, it is what the part adds to the mean.
    """
    total = (weights_BT * (nll_BT + z_loss * jnp.square(lse_BT))).sum()
    return total / jnp.maximum(weights_BT.sum() if total_weight is None else total_weight, 1.0)


def bits_per_byte(nll_sum, num_bytes):
    """Bits per UTF-8 byte of text, from a sum of negative log-probabilities in nats."""
    return nll_sum / (math.log(2) * num_bytes)


class Static(NamedTuple):
    """What is known while tracing; `tokens` and `words` are the sizes of a chunk."""

    scale: float
    softcap: float | None
    tokens: int
    words: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local(static: Static, x_nD, table_VD, targets_n):
    """Over the words of one shard: log-sum-exp [n], and the target's logit [n] (0 where another shard has the word)."""
    return _forward(static, x_nD, table_VD, targets_n)


def _logits(static: Static, x_cD, table_vD):
    """Scaled and capped logits [c, v] in float32, and their derivative by the plain products."""
    logits_cv = static.scale * jnp.einsum("cD,vD->cv", x_cD, table_vD, preferred_element_type=jnp.float32)
    if static.softcap is None:
        return logits_cv, static.scale
    t_cv = jnp.tanh(logits_cv / static.softcap)
    return static.softcap * t_cv, static.scale * (1 - t_cv**2)


def _words(static: Static, table_VD, i):
    """The i-th chunk of words, their ids, and which are new: the last chunk is moved back to stay inside the table."""
    at = jnp.minimum(i * static.words, table_VD.shape[0] - static.words)
    ids_v = at + jnp.arange(static.words)
    return jax.lax.dynamic_slice_in_dim(table_VD, at, static.words), at, ids_v, ids_v >= i * static.words


def _chunks(static: Static, *arrays):
    """Arrays [n, ...] as [chunks, c, ...], padded with zeros."""
    n = arrays[0].shape[0]
    pad = -n % static.tokens
    padded = (jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)) for x in arrays)
    return tuple(x.reshape(-1, static.tokens, *x.shape[1:]) for x in padded)


def _forward(static: Static, x_nD, table_VD, targets_n):
    num_words = -(-table_VD.shape[0] // static.words)

    def tokens(_, xs):
        x_cD, targets_c = xs

        def words(i, carry):
            top_c, total_c, hit_c = carry
            table_vD, _, ids_v, new_v = _words(static, table_VD, i)
            logits_cv, _ = _logits(static, x_cD, table_vD)
            hit_cv = (targets_c[:, None] == ids_v) & new_v
            logits_cv = jnp.where(new_v, logits_cv, -jnp.inf)
            new_c = jnp.maximum(top_c, logits_cv.max(-1))
            total_c = total_c * jnp.exp(top_c - new_c) + jnp.exp(logits_cv - new_c[:, None]).sum(-1)
            return new_c, total_c, hit_c + jnp.where(hit_cv, logits_cv, 0.0).sum(-1)

        zero_c = jnp.zeros(x_cD.shape[0], jnp.float32)
        top_c, total_c, hit_c = jax.lax.fori_loop(0, num_words, words, (zero_c - jnp.inf, zero_c, zero_c))
        return None, (top_c + jnp.log(total_c), hit_c)

    _, (lse, hit) = jax.lax.scan(tokens, None, _chunks(static, x_nD, targets_n))
    n = x_nD.shape[0]
    return lse.reshape(-1)[:n], hit.reshape(-1)[:n]


def _forward_keep(static: Static, x_nD, table_VD, targets_n):
    lse_n, hit_n = _forward(static, x_nD, table_VD, targets_n)
    return (lse_n, hit_n), (x_nD, table_VD, targets_n, lse_n)


def _backward(static: Static, kept, grads):
    x_nD, table_VD, targets_n, lse_n = kept
    num_words = -(-table_VD.shape[0] // static.words)
    n, D = x_nD.shape
    chunks = _chunks(static, x_nD, targets_n, lse_n, *grads)

    def tokens(dtable_VD, xs):
        x_cD, targets_c, lse_c, dlse_c, dhit_c = xs

        def words(i, carry):
            dx_cD, dtable_VD = carry
            table_vD, at, ids_v, new_v = _words(static, table_VD, i)
            logits_cv, slope_cv = _logits(static, x_cD, table_vD)
            share_cv = jnp.exp(logits_cv - lse_c[:, None]) * dlse_c[:, None]
            share_cv += jnp.where(targets_c[:, None] == ids_v, dhit_c[:, None], 0.0)
            d_cv = jnp.where(new_v, share_cv * slope_cv, 0.0).astype(x_cD.dtype)
            dx_cD += jnp.einsum("cv,vD->cD", d_cv, table_vD, preferred_element_type=jnp.float32)
            add_vD = jnp.einsum("cv,cD->vD", d_cv, x_cD, preferred_element_type=jnp.float32)
            old_vD = jax.lax.dynamic_slice_in_dim(dtable_VD, at, static.words)
            return dx_cD, jax.lax.dynamic_update_slice_in_dim(dtable_VD, old_vD + add_vD, at, axis=0)

        dx_cD, dtable_VD = jax.lax.fori_loop(0, num_words, words, (jnp.zeros_like(x_cD, jnp.float32), dtable_VD))
        return dtable_VD, dx_cD.astype(x_cD.dtype)

    dtable_VD, dx = jax.lax.scan(tokens, jnp.zeros_like(table_VD, jnp.float32), chunks)
    return dx.reshape(-1, D)[:n], dtable_VD.astype(table_VD.dtype), None


_local.defvjp(_forward_keep, _backward)
