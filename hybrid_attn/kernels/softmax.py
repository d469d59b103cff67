"""The formulas that kernels share: the soft cap, the softmax over parts of the keys, and its gradient.

Letters: B batch, T query tokens, N query heads, C keys of a tile, H head size.
"""

import jax
import jax.numpy as jnp

LOWEST = jnp.finfo(jnp.float32).min  # finite, so that a query without keys gives exp(-inf) = 0 and not NaN


def add_scores(max_BT: jax.Array, denominator_BT: jax.Array, s_BTC: jax.Array) -> tuple[jax.Array, ...]:
    """The running maximum and the denominator after the scores of more keys; p_BTC, and the factor of the earlier sums.

    Algorithm 1 of "FlashAttention" (arXiv 2205.14135). It starts with `LOWEST` and 0.
    """
    new_max_BT = jnp.maximum(max_BT, s_BTC.max(-1))
    p_BTC = jnp.exp(s_BTC - new_max_BT[..., None])
    decay_BT = jnp.exp(max_BT - new_max_BT)
    return new_max_BT, decay_BT * denominator_BT + p_BTC.sum(-1), p_BTC, decay_BT


def log_sum_exp(max_BT: jax.Array, denominator_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """A denominator that is safe to divide by, and the log-sum-exp; for a query that sees no key, 1 and -inf."""
    safe_denominator_BT = jnp.where(denominator_BT > 0, denominator_BT, 1.0)
    return safe_denominator_BT, jnp.where(denominator_BT > 0, max_BT + jnp.log(safe_denominator_BT), -jnp.inf)


def finite_or_zero(lse_BT: jax.Array) -> jax.Array:
    """A log-sum-exp that is safe to subtract: exp(-inf - 0) is 0 where a query sees no key."""
    return jnp.where(jnp.isfinite(lse_BT), lse_BT, 0.0)


def merged(a: tuple[jax.Array, jax.Array], b: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(o_BTNH, lse_BTN) of attention to the keys of both results, in float32; zeros and -inf where neither saw a key."""
    (a_BTNH, a_BTN), (b_BTNH, b_BTN) = a, b
    lse_BTN = jnp.logaddexp(a_BTN, b_BTN)
    shares = (jnp.exp(x_BTN - finite_or_zero(lse_BTN))[..., None] for x_BTN in (a_BTN, b_BTN))
    return sum(share * x_BTNH.astype(jnp.float32) for share, x_BTNH in zip(shares, (a_BTNH, b_BTNH), strict=True)), lse_BTN


def soft_cap(scores: jax.Array, softcap: float | None) -> tuple[jax.Array, jax.Array | None]:
    """Scores bounded by +-softcap, and the derivative of that; the scores as they are, and None, without a soft cap."""
    if softcap is None:
        return scores, None
    tanh = jnp.tanh(scores / softcap)
    return softcap * tanh, 1 - tanh**2


def gradient_shift(do: jax.Array, o: jax.Array, dlse: jax.Array) -> jax.Array:
    """For each query sum(do o) - dlse, in float32.

    The gradient by a score is p (do v - shift) with p = exp(score - lse), which is d lse / d score ("FlashAttention", 4).
    """
    return jnp.einsum("...H,...H->...", do, o, preferred_element_type=jnp.float32) - dlse
