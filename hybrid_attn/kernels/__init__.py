"""One contract, `attend`, and the table of the kernels that fulfil it."""

import functools
import importlib
import importlib.util
import logging
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Kernel(NamedTuple):
    """Where a kernel is (imported when it is used), the platforms it runs on, and the package it needs beyond JAX."""

    module: str
    function: str
    platforms: tuple[str, ...]
    needs: str | None = None
    keeps: bool = True  # its outputs go through `kept`


KERNELS = {
    "reference": Kernel("reference", "attend", ("cpu", "gpu", "tpu"), keeps=False),
    "blocked": Kernel("blocked", "attend", ("cpu", "gpu", "tpu")),
    "splash": Kernel("tpu", "attend", ("tpu",)),
    "tokamax": Kernel("gpu", "attend_tokamax", ("gpu",), "tokamax"),
    "cudnn": Kernel("gpu", "attend_cudnn", ("gpu",), keeps=False),
}
OUTPUTS = "attention outputs"
PLATFORMS = {"cpu": "blocked", "gpu": "tokamax", "tpu": "splash"}


def kept(*outputs: jax.Array) -> tuple[jax.Array, ...]:
    """What a kernel's backward pass takes from its forward pass, under the name by which `jax.checkpoint` can keep it."""
    return tuple(checkpoint_name(x, OUTPUTS) for x in outputs)


@functools.cache
def choose(kernel: str, platform: str) -> str:
    """The name in `KERNELS` that `kernel` ("auto" or a name) means on `platform`; logged once.

    Raises NotImplementedError for a named kernel that does not run there; "auto" then means blocked, with a warning.
    """
    log = logging.getLogger(__name__)
    chosen = PLATFORMS[platform] if kernel == "auto" else kernel
    platforms, needs = KERNELS[chosen].platforms, KERNELS[chosen].needs
    if platform not in platforms:
        raise NotImplementedError(f'kernel "{chosen}" runs on {" and ".join(platforms)}, not on {platform}; use "blocked"')
    if needs is not None and importlib.util.find_spec(needs) is None:
        if kernel != "auto":
            raise NotImplementedError(f'kernel "{chosen}" needs the package {needs}: pip install "hybrid-attn[{platform}]"')
        log.warning('%s is not installed: attention falls back to the slower "blocked" on %s', needs, platform)
        chosen = "blocked"
    log.info("attention kernel on %s: %s", platform, chosen)
    return chosen


def attend(
    q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS,
    *, window, scale, softcap=None, sinks_N=None, merged=None, kernel,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    """Attention of queries to the keys of their own segment at positions p_q - window < p_k <= p_q.

    Returns o_BTNH in the dtype of q and lse_BTN, the float32 log of the sum of exponentiated scores, by which results over
    parts of the keys merge. Segment 0 is padding: it sees nothing, gives zeros, and its lse is -inf. `window` None is the
    whole prefix; `softcap` c makes scores c tanh(s / c); `sinks_N` are logits that take part in the softmax with no value.
    Keys are in reading order (`intervals`). `kernel` is a name in `KERNELS`. With `merged`, an (o, lse) over these keys among
    others, nothing is computed but the part of these keys in its gradients.
    """
    if sinks_N is not None and kernel == "cudnn":
        raise NotImplementedError('cudnn has no gradient by the log-sum-exp, which sinks need; use train.kernel="tokamax"')
    place = KERNELS[kernel]
    attend_here = getattr(importlib.import_module(f"hybrid_attn.kernels.{place.module}"), place.function)
    o_BTNH, lse_BTN = attend_here(
        q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS,
        window=window, scale=scale, softcap=softcap, merged=merged,
    )  # fmt: skip
    return (o_BTNH, lse_BTN) if sinks_N is None else with_sinks(o_BTNH, lse_BTN, q_seg_BT, sinks_N)


def with_sinks(o_BTNH, lse_BTN, q_seg_BT, sinks_N) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exp of attention to which one more key of score `sinks_N` and value zero is added."""
    share_BTN = jax.nn.sigmoid(lse_BTN - sinks_N.astype(jnp.float32))
    o_with_BTNH = (o_BTNH * share_BTN[..., None]).astype(o_BTNH.dtype)
    return o_with_BTNH, jnp.where(q_seg_BT[..., None] > 0, jnp.logaddexp(lse_BTN, sinks_N.astype(jnp.float32)), -jnp.inf)
