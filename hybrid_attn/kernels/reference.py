"""Softmax attention in float32, as it is defined: the oracle of every kernel. It builds T x S arrays.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, G = N/K, H head size.
"""

import jax
import jax.numpy as jnp


def visible_BTS(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, window: int | None) -> jax.Array:
    """True where a query sees a key: same segment, not padding (0), and p_q - window < p_k <= p_q."""
    back_BTS = q_pos_BT[:, :, None] - k_pos_BS[:, None, :]
    see_BTS = (back_BTS >= 0) & (q_seg_BT[:, :, None] == k_seg_BS[:, None, :]) & (q_seg_BT[:, :, None] > 0)
    return see_BTS if window is None else see_BTS & (back_BTS < window)


def attend(q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, *, window, scale, softcap, merged=None):
    """(o_BTNH, lse_BTN float32): a query that sees no key gives zeros and a log-sum-exp of -inf."""
    B, T, N, H = q_BTNH.shape
    K = k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(B, T, K, N // K, H).astype(jnp.float32)
    scores_BKGTS = scale * jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH.astype(jnp.float32), precision="highest")
    if softcap is not None:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    see = visible_BTS(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, window)[:, None, None]
    scores_BKGTS = jnp.where(see, scores_BKGTS, -jnp.inf)
    if merged is not None:
        return _part_of(merged, scores_BKGTS, v_BSKH)
    top_BKGT = jax.lax.stop_gradient(jnp.max(scores_BKGTS, axis=-1))
    top_BKGT = jnp.where(jnp.isfinite(top_BKGT), top_BKGT, 0.0)  # rows without a key: exp(-inf - 0) = 0
    mass_BKGTS = jnp.where(see, jnp.exp(scores_BKGTS - top_BKGT[..., None]), 0.0)
    total_BKGT = mass_BKGTS.sum(-1)
    some_BKGT = jnp.where(total_BKGT > 0, total_BKGT, 1.0)
    o_BTKGH = jnp.einsum(
        "BKGTS,BSKH->BTKGH", mass_BKGTS / some_BKGT[..., None], v_BSKH.astype(jnp.float32), precision="highest"
    )
    lse_BKGT = jnp.where(total_BKGT > 0, top_BKGT + jnp.log(some_BKGT), -jnp.inf)
    return o_BTKGH.reshape(B, T, N, H).astype(q_BTNH.dtype), lse_BKGT.transpose(0, 3, 1, 2).reshape(B, T, N)


def _part_of(merged, scores_BKGTS, v_BSKH) -> tuple[jax.Array, jax.Array]:
    """`merged` as it is; with p = exp(scores - lse) its gradients are those of p v - o sum(p), and of sum(p)."""
    o_BTNH, lse_BTN = jax.lax.stop_gradient(merged)
    B, T, N, H = o_BTNH.shape
    K = v_BSKH.shape[2]
    lse_BKGT = jnp.where(jnp.isfinite(lse_BTN), lse_BTN, 0.0).reshape(B, T, K, N // K).transpose(0, 2, 3, 1)
    p_BKGTS = jnp.exp(scores_BKGTS - lse_BKGT[..., None])
    part_BTNH = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v_BSKH.astype(jnp.float32), precision="highest").reshape(B, T, N, H)
    total_BTN = p_BKGTS.sum(-1).transpose(0, 3, 1, 2).reshape(B, T, N)
    part_BTNH, total_BTN = (x - jax.lax.stop_gradient(x) for x in (part_BTNH, total_BTN))
    moved_BTNH = part_BTNH - o_BTNH.astype(jnp.float32) * total_BTN[..., None]
    return o_BTNH + moved_BTNH.astype(o_BTNH.dtype), lse_BTN + total_BTN
