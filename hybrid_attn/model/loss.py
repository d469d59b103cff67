"""Cross-entropy over a large vocabulary in chunks: never B x T x V, forward or backward.

Letters: B batch, T tokens, D model, V vocabulary (of one `tensor` shard inside `shard_map`); n tokens of a device flattened,
I chunks of c tokens, v words of a chunk.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.kernels.softmax import soft_cap
from hybrid_attn.parallel.mesh import ACT_BTD, TOKENS_BT

WORDS = 16_384  # of the vocabulary at a time: with 1,024 tokens, 64 MiB of logits; that much of the table is gathered at a time


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

    specs = (ACT_BTD, P("tensor", "fsdp"), TOKENS_BT)
    return jax.shard_map(shard, in_specs=specs, out_specs=(TOKENS_BT, TOKENS_BT), check_vma=False)(
        jax.reshard(x_BTD, ACT_BTD), table_VD, jax.reshard(targets_BT, TOKENS_BT)
    )


def weighted_sum(nll_BT, lse_BT, weights_BT, z_loss: float) -> jax.Array:
    """Sum over the weighted tokens of their loss, to which z_loss * lse^2 is added (PaLM, arXiv 2204.02311, section 5)."""
    return (weights_BT * (nll_BT + z_loss * jnp.square(lse_BT))).sum()


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
    logits_cv, slope_cv = soft_cap(logits_cv, static.softcap)
    return logits_cv, static.scale if slope_cv is None else static.scale * slope_cv


def _words(static: Static, table_VD, i, dtype):
    """The i-th chunk of words, whole along `fsdp`; where it begins, the ids of its words, and which are new.

    The last chunk is moved back to stay inside the table.
    """
    at = jnp.minimum(i * static.words, table_VD.shape[0] - static.words)
    ids_v = at + jnp.arange(static.words)
    part_vD = jax.lax.dynamic_slice_in_dim(table_VD, at, static.words).astype(dtype)
    return jax.lax.all_gather(part_vD, "fsdp", axis=1, tiled=True), at, ids_v, ids_v >= i * static.words


def _chunks(static: Static, *arrays):
    """Arrays [n, ...] as [chunks, c, ...], padded with zeros."""
    n = arrays[0].shape[0]
    pad = -n % static.tokens
    padded = (jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)) for x in arrays)
    return tuple(x.reshape(-1, static.tokens, *x.shape[1:]) for x in padded)


def _forward(static: Static, x_nD, table_VD, targets_n):
    x_IcD, targets_Ic = _chunks(static, x_nD, targets_n)

    def words(i, sums):
        table_vD, _, ids_v, new_v = _words(static, table_VD, i, x_nD.dtype)

        def tokens(_, xs):
            x_cD, targets_c, top_c, total_c, hit_c = xs
            logits_cv, _ = _logits(static, x_cD, table_vD)
            hit_cv = (targets_c[:, None] == ids_v) & new_v
            logits_cv = jnp.where(new_v, logits_cv, -jnp.inf)
            new_c = jnp.maximum(top_c, logits_cv.max(-1))
            total_c = total_c * jnp.exp(top_c - new_c) + jnp.exp(logits_cv - new_c[:, None]).sum(-1)
            return None, (new_c, total_c, hit_c + jnp.where(hit_cv, logits_cv, 0.0).sum(-1))

        return jax.lax.scan(tokens, None, (x_IcD, targets_Ic, *sums))[1]

    zero_Ic = jnp.zeros(targets_Ic.shape, jnp.float32)
    top_Ic, total_Ic, hit_Ic = jax.lax.fori_loop(
        0, -(-table_VD.shape[0] // static.words), words, (zero_Ic - jnp.inf, zero_Ic, zero_Ic)
    )
    n = x_nD.shape[0]
    return (top_Ic + jnp.log(total_Ic)).reshape(-1)[:n], hit_Ic.reshape(-1)[:n]


def _forward_keep(static: Static, x_nD, table_VD, targets_n):
    lse_n, hit_n = _forward(static, x_nD, table_VD, targets_n)
    return (lse_n, hit_n), (x_nD, table_VD, targets_n, lse_n)


def _backward(static: Static, kept, grads):
    x_nD, table_VD, targets_n, lse_n = kept
    n, D = x_nD.shape
    chunks = _chunks(static, x_nD, targets_n, lse_n, *grads)

    def words(i, sums):
        dx_IcD, dtable_VD = sums
        table_vD, at, ids_v, new_v = _words(static, table_VD, i, x_nD.dtype)

        def tokens(dtable_vD, xs):
            x_cD, targets_c, lse_c, dlse_c, dhit_c, dx_cD = xs
            logits_cv, slope_cv = _logits(static, x_cD, table_vD)
            share_cv = jnp.exp(logits_cv - lse_c[:, None]) * dlse_c[:, None]
            share_cv += jnp.where(targets_c[:, None] == ids_v, dhit_c[:, None], 0.0)
            d_cv = jnp.where(new_v, share_cv * slope_cv, 0.0).astype(x_cD.dtype)
            dx_cD += jnp.einsum("cv,vD->cD", d_cv, table_vD, preferred_element_type=jnp.float32)
            return dtable_vD + jnp.einsum("cv,cD->vD", d_cv, x_cD, preferred_element_type=jnp.float32), dx_cD

        dtable_vD, dx_IcD = jax.lax.scan(tokens, jnp.zeros(table_vD.shape, jnp.float32), (*chunks, dx_IcD))
        add_vD = jax.lax.psum_scatter(dtable_vD.astype(x_nD.dtype), "fsdp", scatter_dimension=1, tiled=True)
        add_vD += jax.lax.dynamic_slice_in_dim(dtable_VD, at, static.words)
        return dx_IcD, jax.lax.dynamic_update_slice_in_dim(dtable_VD, add_vD, at, axis=0)

    zeros = jnp.zeros(chunks[0].shape, jnp.float32), jnp.zeros_like(table_VD)
    dx_IcD, dtable_VD = jax.lax.fori_loop(0, -(-table_VD.shape[0] // static.words), words, zeros)
    return dx_IcD.reshape(-1, D)[:n].astype(x_nD.dtype), dtable_VD, None


_local.defvjp(_forward_keep, _backward)
