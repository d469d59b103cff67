"""Attention as one function, `attend`, and the table of the kernels that compute it."""

import functools
import importlib.util
import logging

import jax
import jax.numpy as jnp

from hybrid_attn.kernels import blocked, decoding, experts, gpu, gpu_pallas, native, reference, tpu
from hybrid_attn.kernels.interface import OUTPUTS, AttentionOptions, Kernel, Keys, Pair, Queries, name_outputs

__all__ = [
    "KERNELS",
    "OUTPUTS",
    "AttentionOptions",
    "Keys",
    "Queries",
    "attend",
    "choose",
    "choose_experts",
    "decode",
    "name_outputs",
    "with_sinks",
]
KERNELS = {
    "reference": Kernel(reference.forward, reference.backward, ("cpu", "gpu", "tpu"), saves_outputs=False),
    "blocked": Kernel(blocked.forward, blocked.backward, ("cpu", "gpu", "tpu")),
    "native": Kernel(native.forward, native.backward, ("cpu",), native.MODULE, decode=native.decode),
    "splash": Kernel(tpu.forward, tpu.backward, ("tpu",), heads_first=True),
    "tokamax": Kernel(gpu.tokamax_forward, gpu_pallas.backward, ("gpu",), "tokamax"),
    "cudnn": Kernel(gpu.cudnn_forward, None, ("gpu",), saves_outputs=False, lse_has_gradient=False),
}
PLATFORMS = {"cpu": "native", "gpu": "tokamax", "tpu": "splash"}


@functools.cache
def choose(kernel: str, platform: str) -> str:
    """The name in `KERNELS` that `kernel` ("auto" or a name) means on `platform`; logged once.

    Raises NotImplementedError for a named kernel that does not run there. "auto" means blocked where the kernel of the platform
    is not installed, which is logged, on a GPU as a warning.
    """
    name = PLATFORMS[platform] if kernel == "auto" else kernel
    chosen = KERNELS[name]
    _check_platform(f'kernel "{name}"', chosen.platforms, platform)
    name = name if _is_installed(f'kernel "{name}"', chosen.needs, platform, kernel == "auto", "attention") else "blocked"
    logging.getLogger(__name__).info("attention kernel on %s: %s", platform, name)
    return name


@functools.cache
def choose_experts(kernel: str, platform: str) -> str:
    """What `kernel` ("auto", "blocked" or "tokamax") means on `platform`; refused and logged as `choose` does.

    "auto" stays where `experts.choose` has a choice for each layer: on accelerators with tokamax.
    """
    if kernel == "blocked" or (kernel == "auto" and platform == "cpu"):
        return "blocked"
    _check_platform('moe_kernel "tokamax"', experts.PLATFORMS, platform)
    is_installed = _is_installed('moe_kernel "tokamax"', "tokamax", platform, kernel == "auto", "the product of experts")
    return kernel if is_installed else "blocked"


def _check_platform(what: str, platforms: tuple[str, ...], platform: str) -> None:
    if platform not in platforms:
        raise NotImplementedError(f'{what} runs on {" and ".join(platforms)}, not on {platform}; use "blocked"')


def _is_installed(what: str, needs: str | None, platform: str, is_auto: bool, purpose: str) -> bool:
    """Whether the package is there that a kernel needs; a warning where `auto` does without, and refused where it is named."""
    if needs is None or importlib.util.find_spec(needs) is not None:
        return True
    cure = "hybrid-build-kernel" if platform == "cpu" else f'pip install "hybrid-attn[{platform}]"'
    if not is_auto:
        raise NotImplementedError(f"{what} needs the package {needs}: {cure}")
    level = logging.INFO if platform == "cpu" else logging.WARNING
    message = '%s is not installed: %s falls back to the slower "blocked" on %s; %s'
    logging.getLogger(__name__).log(level, message, needs, purpose, platform, cure)
    return False


def attend(kernel: str, options: AttentionOptions, queries: Queries, keys: Keys, sinks_N: jax.Array | None = None) -> Pair:
    """o_BTNH in the dtype of q, and lse_BTN, the float32 log of the sum of exponentiated scores.

    Results over parts of the keys merge by the lse. Queries of padding give zeros and -inf. `sinks_N` are logits that enter the
    softmax with no value. Keys are in reading order (`intervals`). `kernel` is a name in `KERNELS`.
    """
    chosen = KERNELS[kernel]
    if sinks_N is not None and not chosen.lse_has_gradient:
        raise NotImplementedError(f'{kernel} has no gradient by the log-sum-exp, which sinks need; use train.kernel="tokamax"')
    run = functools.partial(_attend, chosen) if chosen.saves_outputs else chosen.forward
    o_BTNH, lse_BTN = run(options, queries, keys)
    return (o_BTNH, lse_BTN) if sinks_N is None else with_sinks(o_BTNH, lse_BTN, queries.seg_BT, sinks_N)


def decode(kernel: str, options: AttentionOptions, vector_products: bool, q_BKGH, kv_BKSH: Pair, visible_BKS) -> Pair:
    """(o_BKGH, lse_BKG) in float32 of one query for each request to a cache of S slots, of which it sees `visible_BKS`.

    Where K of `visible_BKS` is 1, it is that of all heads. `Execution` explains `vector_products`.
    """
    of_kernel = KERNELS[kernel].decode or decoding.decode
    return of_kernel(options, vector_products, q_BKGH, kv_BKSH, visible_BKS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(kernel: Kernel, options: AttentionOptions, queries: Queries, keys: Keys) -> Pair:
    return kernel.forward(options, queries, keys)


def _forward(kernel: Kernel, options: AttentionOptions, queries: Queries, keys: Keys):
    saved = name_outputs(*_in_saved_order(kernel, *kernel.forward(options, queries, keys)))
    return _in_saved_order(kernel, *saved), (queries, keys, saved)


def _backward(kernel: Kernel, options: AttentionOptions, residuals, grads: Pair) -> tuple[Queries, Keys]:
    queries, keys, saved = residuals
    dq_BTNH, *dkv_BSKH = kernel.backward(options, queries, keys, _in_saved_order(kernel, *saved), grads)
    return Queries(dq_BTNH, None, None), Keys(*dkv_BSKH, None, None)


def _in_saved_order(kernel: Kernel, o_BTNH, lse_BTN) -> Pair:
    """The outputs as they are saved for the backward pass, and back again."""
    return (o_BTNH.swapaxes(1, 2), lse_BTN.swapaxes(1, 2)) if kernel.heads_first else (o_BTNH, lse_BTN)


_attend.defvjp(_forward, _backward)


def with_sinks(o_BTNH, lse_BTN, q_seg_BT, sinks_N) -> Pair:
    """Output and log-sum-exp of attention with one more key, of score `sinks_N` and value zero."""
    share_BTN = jax.nn.sigmoid(lse_BTN - sinks_N.astype(jnp.float32))
    with_sinks_BTNH = (o_BTNH * share_BTN[..., None]).astype(o_BTNH.dtype)
    return with_sinks_BTNH, jnp.where(q_seg_BT[..., None] > 0, jnp.logaddexp(lse_BTN, sinks_N.astype(jnp.float32)), -jnp.inf)
