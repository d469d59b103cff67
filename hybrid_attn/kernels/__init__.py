"""Attention as one function, `attend`, and the table of the kernels that compute it."""

import functools
import importlib.util
import logging

import jax
import jax.numpy as jnp

from hybrid_attn.kernels import blocked, gpu, reference, tpu
from hybrid_attn.kernels.interface import OUTPUTS, AttentionOptions, Kernel, Pair, Residuals, name_outputs

__all__ = ["KERNELS", "OUTPUTS", "AttentionOptions", "Kernel", "Residuals", "attend", "choose", "name_outputs", "with_sinks"]
KERNELS = {
    "reference": Kernel(reference.forward, reference.backward, ("cpu", "gpu", "tpu"), saves_outputs=False),
    "blocked": Kernel(blocked.forward, blocked.backward, ("cpu", "gpu", "tpu")),
    "splash": Kernel(tpu.forward, tpu.backward, ("tpu",), heads_first=True),
    "tokamax": Kernel(gpu.tokamax_forward, gpu.tokamax_backward, ("gpu",), "tokamax"),
    "cudnn": Kernel(gpu.cudnn_forward, None, ("gpu",), saves_outputs=False, lse_has_gradient=False),
}
PLATFORMS = {"cpu": "blocked", "gpu": "tokamax", "tpu": "splash"}


@functools.cache
def choose(kernel: str, platform: str) -> str:
    """The name in `KERNELS` that `kernel` ("auto" or a name) means on `platform`; logged once.

    Raises NotImplementedError for a named kernel that does not run there; "auto" then means blocked, with a warning.
    """
    log = logging.getLogger(__name__)
    name = PLATFORMS[platform] if kernel == "auto" else kernel
    platforms, needs = KERNELS[name].platforms, KERNELS[name].needs
    if platform not in platforms:
        raise NotImplementedError(f'kernel "{name}" runs on {" and ".join(platforms)}, not on {platform}; use "blocked"')
    if needs is not None and importlib.util.find_spec(needs) is None:
        if kernel != "auto":
            raise NotImplementedError(f'kernel "{name}" needs the package {needs}: pip install "hybrid-attn[{platform}]"')
        log.warning('%s is not installed: attention falls back to the slower "blocked" on %s', needs, platform)
        name = "blocked"
    log.info("attention kernel on %s: %s", platform, name)
    return name


def attend(
    q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS,
    *, window, scale, softcap=None, sinks_N=None, kernel,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attention of queries to the keys of their own segment at positions p_q - window < p_k <= p_q.

    Returns o_BTNH in the dtype of q and lse_BTN, the float32 log of the sum of exponentiated scores, by which results over
    parts of the keys merge. Segment 0 is padding: it sees nothing, gives zeros, and its lse is -inf. `window` None means
    all earlier tokens; `softcap` c makes scores c tanh(s / c); `sinks_N` are logits that enter the softmax with no value. Keys
    are in reading order (`intervals`). `kernel` is a name in `KERNELS`.
    """
    pair, options = KERNELS[kernel], AttentionOptions(window, scale, softcap)
    if sinks_N is not None and not pair.lse_has_gradient:
        raise NotImplementedError(f'{kernel} has no gradient by the log-sum-exp, which sinks need; use train.kernel="tokamax"')
    arrays = q_BTNH, k_BSKH, v_BSKH, (q_pos_BT, k_pos_BS), (q_seg_BT, k_seg_BS)
    o_BTNH, lse_BTN = _attend(pair, options, *arrays) if pair.saves_outputs else pair.forward(*arrays, options)
    return (o_BTNH, lse_BTN) if sinks_N is None else with_sinks(o_BTNH, lse_BTN, q_seg_BT, sinks_N)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel: Kernel, options: AttentionOptions, q_BTNH, k_BSKH, v_BSKH, positions: Pair, segments: Pair):
    return kernel.forward(q_BTNH, k_BSKH, v_BSKH, positions, segments, options)


def _forward(kernel: Kernel, options: AttentionOptions, *arrays):
    saved = name_outputs(*_in_saved_order(kernel, *kernel.forward(*arrays, options)))
    return _in_saved_order(kernel, *saved), (arrays, saved)


def _backward(kernel: Kernel, options: AttentionOptions, residuals, grads):
    arrays, saved = residuals
    return *kernel.backward(Residuals(*arrays, *_in_saved_order(kernel, *saved)), *grads, options), None, None


def _in_saved_order(kernel: Kernel, o_BTNH, lse_BTN) -> tuple[jax.Array, jax.Array]:
    """The outputs as they are saved for the backward pass, and back again."""
    return (o_BTNH.swapaxes(1, 2), lse_BTN.swapaxes(1, 2)) if kernel.heads_first else (o_BTNH, lse_BTN)


_attend.defvjp(_forward, _backward)


def with_sinks(o_BTNH, lse_BTN, q_seg_BT, sinks_N) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of attention with one more key, of score `sinks_N` and value zero."""
    share_BTN = jax.nn.sigmoid(lse_BTN - sinks_N.astype(jnp.float32))
    with_sinks_BTNH = (o_BTNH * share_BTN[..., None]).astype(o_BTNH.dtype)
    return with_sinks_BTNH, jnp.where(q_seg_BT[..., None] > 0, jnp.logaddexp(lse_BTN, sinks_N.astype(jnp.float32)), -jnp.inf)
