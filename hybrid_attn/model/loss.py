"""Cross-entropy over a large vocabulary in chunks: never B x T x V, forward or backward.

Letters: B batch, T tokens, D model, V vocabulary (of one `tensor` shard inside `shard_map`); n tokens of a device flattened,
I chunks of c tokens, v vocabulary entries of a chunk.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model, output_scale
from hybrid_attn.kernels.softmax import soft_cap
from hybrid_attn.model.params import Dot, cast
from hybrid_attn.parallel.mesh import ACT_BTD, TOKENS_BT, all_gathered, reduce_scattered, spec_of, width_axes

# Of the vocabulary at a time: with 1,024 tokens, 64 MiB of logits; that much of the table is gathered at a time.
ENTRIES = 16_384


def token_losses(
    model: Model, table_VD: jax.Array, x_BTD: jax.Array, targets_BT: jax.Array, chunk: int, dot: Dot = jax.lax.dot_general
):
    """Per token, in float32: the negative log-probability of its target [B, T] and the log-sum-exp of its logits [B, T].

    Logits are output_scale x E^T, soft-capped where the model says so; products in the dtype of x, sums in float32.
    `chunk` is the number of tokens of a device whose logits exist at a time. `dot` multiplies with parts of the table.
    """

    def shard(x_BTD, table_VD, targets_BT):
        B, T, D = x_BTD.shape
        chunk_size = min(chunk, B * T), min(table_VD.shape[0], ENTRIES)
        settings = LogitSettings(dot, output_scale(model), model.logit_softcap, axes, *chunk_size)
        local_n = targets_BT.reshape(-1) - jax.lax.axis_index("tensor") * table_VD.shape[0]
        lse_n, target_logit_n = _local(settings, x_BTD.reshape(-1, D), table_VD, local_n)
        max_n = jax.lax.pmax(jax.lax.stop_gradient(lse_n), "tensor")
        lse_n = max_n + jnp.log(jax.lax.psum(jnp.exp(lse_n - max_n), "tensor"))
        return (lse_n - jax.lax.psum(target_logit_n, "tensor")).reshape(B, T), lse_n.reshape(B, T)

    table = spec_of(table_VD)
    specs, axes = (ACT_BTD, table, TOKENS_BT), width_axes(table[1])
    return jax.shard_map(shard, in_specs=specs, out_specs=(TOKENS_BT, TOKENS_BT), check_vma=False)(
        jax.reshard(x_BTD, ACT_BTD), table_VD, jax.reshard(targets_BT, TOKENS_BT)
    )


def most_likely(
    model: Model, table_VD: jax.Array, x_BTD: jax.Array, k: int, chunk: int, dot: Dot = jax.lax.dot_general
) -> jax.Array:
    """The log-probabilities [B, T, k] of the k most likely tokens after each, the largest first, in float32.

    The arguments are those of `token_losses`; where the vocabulary is split, k entries of each shard are compared.
    """

    def shard(x_BTD, table_VD):
        B, T, D = x_BTD.shape
        chunk_size = min(chunk, B * T), min(table_VD.shape[0], ENTRIES)
        settings = LogitSettings(dot, output_scale(model), model.logit_softcap, axes, *chunk_size)
        (x_IcD,) = _chunks(settings, x_BTD.reshape(-1, D))

        def add_entries(i, sums):
            table_vD, _, _, is_new_v = _entries(settings, table_VD, i, x_BTD.dtype)

            def add_tokens(_, xs):
                x_cD, best_ck, lse_c = xs
                logits_cv = jnp.where(is_new_v, _logits(settings, x_cD, table_vD)[0], -jnp.inf)
                lse_c = jnp.logaddexp(lse_c, jax.nn.logsumexp(logits_cv, -1))
                return None, (jax.lax.top_k(jnp.concatenate([best_ck, logits_cv], 1), k)[0], lse_c)

            return jax.lax.scan(add_tokens, None, (x_IcD, *sums))[1]

        start = jnp.full((*x_IcD.shape[:2], k), -jnp.inf), jnp.full(x_IcD.shape[:2], -jnp.inf)
        best_Ick, lse_Ic = jax.lax.fori_loop(0, -(-table_VD.shape[0] // settings.entries), add_entries, start)
        best_Ick = jax.lax.top_k(jax.lax.all_gather(best_Ick, "tensor", axis=2, tiled=True), k)[0]
        lse_Ic = jax.nn.logsumexp(jax.lax.all_gather(lse_Ic, "tensor"), 0)
        return (best_Ick - lse_Ic[..., None]).reshape(-1, k)[: B * T].reshape(B, T, k)

    table = spec_of(table_VD)
    axes = width_axes(table[1])
    return jax.shard_map(shard, in_specs=(ACT_BTD, table), out_specs=P(*TOKENS_BT, None), check_vma=False)(
        jax.reshard(x_BTD, ACT_BTD), table_VD
    )


def weighted_sum(nll_BT, lse_BT, weights_BT, z_loss: float) -> jax.Array:
    """Sum over the weighted tokens of their loss, to which z_loss * lse^2 is added (PaLM, arXiv 2204.02311, section 5)."""
    return (weights_BT * (nll_BT + z_loss * jnp.square(lse_BT))).sum()


def bits_per_byte(nll_sum, num_bytes):
    """Bits per UTF-8 byte of text, from a sum of negative log-probabilities in nats."""
    return nll_sum / (math.log(2) * num_bytes)


class LogitSettings(NamedTuple):
    """How logits are made, the mesh axes that split the table's width, and the size of a chunk: `tokens` times `entries`."""

    dot: Dot
    scale: float
    softcap: float | None
    axes: tuple[str, ...]
    tokens: int
    entries: int


def _logits(settings: LogitSettings, x_cD, table_vD):
    """Scaled and capped logits [c, v] in float32, and their derivative by the plain products."""
    logits_cv = settings.scale * _products(settings.dot, x_cD, table_vD)
    logits_cv, slope_cv = soft_cap(logits_cv, settings.softcap)
    return logits_cv, settings.scale if slope_cv is None else settings.scale * slope_cv


def _products(dot: Dot, x_cD, table_vD):
    return dot(x_cD, table_vD, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)


def _product_gradients(dot: Dot, x_cD, table_vD, dproducts_cv):
    """Gradients of activations and table, in float32. By hand for the plain product, which autodiff sums in the dtype of x."""
    if dot is not jax.lax.dot_general:
        _, pull = jax.vjp(functools.partial(_products, dot), x_cD, table_vD)
        dx_cD, dtable_vD = pull(dproducts_cv)
        return dx_cD.astype(jnp.float32), dtable_vD.astype(jnp.float32)
    dproducts_cv = dproducts_cv.astype(x_cD.dtype)
    dx_cD = jnp.einsum("cv,vD->cD", dproducts_cv, table_vD, preferred_element_type=jnp.float32)
    return dx_cD, jnp.einsum("cv,cD->vD", dproducts_cv, x_cD, preferred_element_type=jnp.float32)


def _entries(settings: LogitSettings, table_VD, i, dtype):
    """The i-th chunk of entries, gathered along `axes`; where it begins, the ids of its entries, and which are new."""
    at = jnp.minimum(i * settings.entries, table_VD.shape[0] - settings.entries)  # the last chunk stays inside the table
    ids_v = at + jnp.arange(settings.entries)
    part_vD = cast(jax.lax.dynamic_slice_in_dim(table_VD, at, settings.entries), dtype)
    return all_gathered(part_vD, settings.axes, 1), at, ids_v, ids_v >= i * settings.entries


def _chunks(settings: LogitSettings, *arrays):
    """Arrays [n, ...] as [chunks, c, ...], padded with zeros."""
    padding = -len(arrays[0]) % settings.tokens
    padded = (jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1)) for x in arrays)
    return tuple(x.reshape(-1, settings.tokens, *x.shape[1:]) for x in padded)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _local(settings: LogitSettings, x_nD, table_VD, targets_n):
    """Over the vocabulary of one shard: log-sum-exp [n], and the target's logit [n] (0 where another shard has the target)."""
    x_IcD, targets_Ic = _chunks(settings, x_nD, targets_n)

    def add_entries(i, sums):
        table_vD, _, ids_v, is_new_v = _entries(settings, table_VD, i, x_nD.dtype)

        def add_tokens(_, xs):
            x_cD, targets_c, max_c, denominator_c, target_logit_c = xs
            logits_cv, _ = _logits(settings, x_cD, table_vD)
            is_target_cv = (targets_c[:, None] == ids_v) & is_new_v
            logits_cv = jnp.where(is_new_v, logits_cv, -jnp.inf)
            new_max_c = jnp.maximum(max_c, logits_cv.max(-1))
            denominator_c = denominator_c * jnp.exp(max_c - new_max_c) + jnp.exp(logits_cv - new_max_c[:, None]).sum(-1)
            return None, (new_max_c, denominator_c, target_logit_c + jnp.where(is_target_cv, logits_cv, 0.0).sum(-1))

        return jax.lax.scan(add_tokens, None, (x_IcD, targets_Ic, *sums))[1]

    zero_Ic = jnp.zeros(targets_Ic.shape, jnp.float32)
    start, n = (zero_Ic - jnp.inf, zero_Ic, zero_Ic), x_nD.shape[0]
    chunks = -(-table_VD.shape[0] // settings.entries)
    max_Ic, denominator_Ic, target_logit_Ic = jax.lax.fori_loop(0, chunks, add_entries, start)
    return (max_Ic + jnp.log(denominator_Ic)).reshape(-1)[:n], target_logit_Ic.reshape(-1)[:n]


def _forward(settings: LogitSettings, x_nD, table_VD, targets_n):
    lse_n, target_logit_n = _local(settings, x_nD, table_VD, targets_n)
    return (lse_n, target_logit_n), (x_nD, table_VD, targets_n, lse_n)


def _backward(settings: LogitSettings, residuals, grads):
    x_nD, table_VD, targets_n, lse_n = residuals
    n, D = x_nD.shape
    chunks = _chunks(settings, x_nD, targets_n, lse_n, *grads)

    def add_entries(i, sums):
        dx_IcD, dtable_VD = sums
        table_vD, at, ids_v, is_new_v = _entries(settings, table_VD, i, x_nD.dtype)

        def add_tokens(dtable_vD, xs):
            x_cD, targets_c, lse_c, dlse_c, dtarget_logit_c, dx_cD = xs
            logits_cv, slope_cv = _logits(settings, x_cD, table_vD)
            dlogits_cv = jnp.exp(logits_cv - lse_c[:, None]) * dlse_c[:, None]
            dlogits_cv += jnp.where(targets_c[:, None] == ids_v, dtarget_logit_c[:, None], 0.0)
            dproducts_cv = jnp.where(is_new_v, dlogits_cv * slope_cv, 0.0)
            dx_new_cD, dtable_new_vD = _product_gradients(settings.dot, x_cD, table_vD, dproducts_cv)
            return dtable_vD + dtable_new_vD, dx_cD + dx_new_cD

        dtable_vD, dx_IcD = jax.lax.scan(add_tokens, jnp.zeros(table_vD.shape, jnp.float32), (*chunks, dx_IcD))
        add_vD = reduce_scattered(dtable_vD.astype(x_nD.dtype), settings.axes, 1)
        add_vD += jax.lax.dynamic_slice_in_dim(dtable_VD, at, settings.entries)
        return dx_IcD, jax.lax.dynamic_update_slice_in_dim(dtable_VD, add_vD, at, axis=0)

    zeros = jnp.zeros(chunks[0].shape, jnp.float32), jnp.zeros_like(table_VD)
    dx_IcD, dtable_VD = jax.lax.fori_loop(0, -(-table_VD.shape[0] // settings.entries), add_entries, zeros)
    return dx_IcD.reshape(-1, D)[:n].astype(x_nD.dtype), dtable_VD, None


_local.defvjp(_forward, _backward)
