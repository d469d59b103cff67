"""One contract, `attend`, and the table of the kernels that fulfil it."""

import functools
import logging

import jax
import jax.numpy as jnp

from hybrid_attn.kernels import blocked, reference

KERNELS = {"reference": reference.attend, "blocked": blocked.attend}
PLATFORMS = {"cpu": "blocked", "gpu": "blocked", "tpu": "blocked"}


@functools.cache
def choose(kernel: str, platform: str) -> str:
    """The name in `KERNELS` that `kernel` ("auto" or a name) means on `platform`; logged once."""
    chosen = PLATFORMS[platform] if kernel == "auto" else kernel
    logging.getLogger(__name__).info("attention kernel on %s: %s", platform, chosen)
    return chosen


def attend(
    q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, *, window, scale, softcap=None, sinks_N=None, kernel
) -> tuple[jax.Array, jax.Array]:
    """Attention of queries to the keys of their own segment at positions p_q - window < p_k <= p_q.

    Returns o_BTNH in the dtype of q and lse_BTN, the float32 log of the sum of exponentiated scores, by which results over
    parts of the keys merge. Segment 0 is padding: it sees nothing, gives zeros, and its lse is -inf. `window` None is the
    whole prefix; `softcap` c makes scores c tanh(s / c); `sinks_N` are logits that take part in the softmax with no value.
    Keys are in reading order (`intervals`). `kernel` is a name in `KERNELS`.
    """
    o_BTNH, lse_BTN = KERNELS[kernel](
        q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, window=window, scale=scale, softcap=softcap
    )
    if sinks_N is None:
        return o_BTNH, lse_BTN
    share_BTN = jax.nn.sigmoid(lse_BTN - sinks_N.astype(jnp.float32))
    o_BTNH = (o_BTNH * share_BTN[..., None]).astype(q_BTNH.dtype)
    return o_BTNH, jnp.where(q_seg_BT[..., None] > 0, jnp.logaddexp(lse_BTN, sinks_N.astype(jnp.float32)), -jnp.inf)
