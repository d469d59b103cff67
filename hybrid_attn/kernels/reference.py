"""Softmax attention in float32, as it is defined: the reference of every kernel. It builds T x S arrays.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K, H head size.
"""

import jax
import jax.numpy as jnp

from hybrid_attn.kernels.interface import AttentionOptions, Keys, Pair, Queries
from hybrid_attn.kernels.softmax import finite_or_zero, gradient_shift, log_sum_exp, soft_cap


def visible_BTS(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, window: int | None) -> jax.Array:
    """True where a query sees a key: same segment, not padding (0), and p_q - window < p_k <= p_q."""
    distance_BTS = q_pos_BT[..., None] - k_pos_BS[..., None, :]
    see_BTS = (distance_BTS >= 0) & (q_seg_BT[..., None] == k_seg_BS[..., None, :]) & (q_seg_BT[..., None] > 0)
    return see_BTS if window is None else see_BTS & (distance_BTS < window)


def forward(options: AttentionOptions, queries: Queries, keys: Keys) -> Pair:
    """(o_BTNH, lse_BTN float32), which JAX can differentiate."""
    q_BTNH, scores_BKGTS = queries.q_BTNH, _scores(options, queries, keys)
    max_BKGT = finite_or_zero(jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1)))
    mass_BKGTS = jnp.where(jnp.isneginf(scores_BKGTS), 0.0, jnp.exp(scores_BKGTS - max_BKGT[..., None]))
    safe_denominator_BKGT, lse_BKGT = log_sum_exp(max_BKGT, mass_BKGTS.sum(-1))
    p_BKGTS = mass_BKGTS / safe_denominator_BKGT[..., None]
    o_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, keys.v_BSKH.astype(jnp.float32), precision="highest")
    return o_BTKGH.reshape(q_BTNH.shape).astype(q_BTNH.dtype), lse_BKGT.transpose(0, 3, 1, 2).reshape(q_BTNH.shape[:3])


def backward(options: AttentionOptions, queries: Queries, keys: Keys, outputs: Pair, grads: Pair):
    """(dq_BTNH, dk_BSKH, dv_BSKH) of the keys' part in a result, by the probabilities exp(score - lse)."""
    (o_BTNH, lse_BTN), (do_BTNH, dlse_BTN) = outputs, grads
    K, v_BSKH = keys.k_BSKH.shape[2], keys.v_BSKH

    def grouped(x_BTN):  # [B, T, N, ...] to [B, K, G, T, ...]
        return jnp.moveaxis(x_BTN.reshape(*x_BTN.shape[:2], K, -1, *x_BTN.shape[3:]), 1, 3)

    def scores(q_BTNH, k_BSKH):
        return _scores(options, queries._replace(q_BTNH=q_BTNH), keys._replace(k_BSKH=k_BSKH))

    scores_BKGTS, pull = jax.vjp(scores, queries.q_BTNH, keys.k_BSKH)
    do_BKGTH, o_BKGTH, lse_BKGT, dlse_BKGT = map(grouped, (do_BTNH.astype(jnp.float32), o_BTNH, lse_BTN, dlse_BTN))
    p_BKGTS = jnp.exp(scores_BKGTS - finite_or_zero(lse_BKGT)[..., None])
    dp_BKGTS = jnp.einsum("BKGTH,BSKH->BKGTS", do_BKGTH, v_BSKH.astype(jnp.float32), precision="highest")
    shift_BKGT = gradient_shift(do_BKGTH, o_BKGTH.astype(jnp.float32), dlse_BKGT)
    dq_BTNH, dk_BSKH = pull(p_BKGTS * (dp_BKGTS - shift_BKGT[..., None]))
    dv_BSKH = jnp.einsum("BKGTS,BKGTH->BSKH", p_BKGTS, do_BKGTH, precision="highest")
    return dq_BTNH, dk_BSKH, dv_BSKH.astype(v_BSKH.dtype)


def _scores(options: AttentionOptions, queries: Queries, keys: Keys) -> jax.Array:
    """Scores [B, K, G, T, S] in float32, -inf where a query does not see a key."""
    (q_BTNH, q_pos_BT, q_seg_BT), (k_BSKH, _, k_pos_BS, k_seg_BS) = queries, keys
    B, T, N, H = q_BTNH.shape
    q_BTKGH = q_BTNH.reshape(B, T, k_BSKH.shape[2], -1, H).astype(jnp.float32)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32), precision="highest")
    scores_BKGTS, _ = soft_cap(options.scale * scores_BKGTS, options.softcap)
    see_BTS = visible_BTS(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, options.window)
    return jnp.where(see_BTS[:, None, None], scores_BKGTS, -jnp.inf)
