"""The maintained kernels for GPUs behind the contract of `kernels.attend`: tokamax's, and cuDNN's through jax.nn.

tokamax (Mosaic on Hopper and Blackwell, else Triton) takes an interval of keys for each query, and every mask here is one:
packed documents, windows, padding and context shards alike. Its log-sum-exp has no gradient and its backward kernels compute
shift = sum(do o) themselves, from an output that we hand them. So they are handed an output whose product with `do` is
sum(do o) - dlse, which is what the gradient by the log-sum-exp asks for. Where do is zero and dlse is not, do is 2^-60 in one
dimension instead.

cuDNN knows causal masks, windows and lengths, and would attend across packed documents. Whether rows are packed is data, so a
row of which it cannot express the mask gives NaN, never a wrong mask.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head size.
"""

import functools
import importlib
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.kernels import kept
from hybrid_attn.kernels.intervals import intervals

TOKAMAX = ("mosaic_gpu", "triton")  # the first that supports the device and the dtype
BLOCK = 128


class Static(NamedTuple):
    """What is known while tracing."""

    scale: float
    softcap: float | None
    names: tuple[str, ...]


def attend_tokamax(q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, *, window, scale, softcap, merged=None):
    """(o_BTNH, lse_BTN float32): a query that sees no key gives zeros and a log-sum-exp of -inf.

    Raises NotImplementedError where no kernel of tokamax supports the device, the dtype or the head size.
    """
    first_BT, end_BT = intervals(q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS, window)
    T = q_BTNH.shape[1]
    q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT = map(_whole_blocks, (q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT))
    if merged is not None:
        merged = _whole_blocks(merged[0]), _whole_blocks(merged[1]).swapaxes(1, 2)
    o_BTNH, lse_BNT = _attend(Static(scale, softcap, TOKAMAX), q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT, merged)
    return o_BTNH[:, :T], lse_BNT.swapaxes(1, 2)[:, :T]


def _whole_blocks(x_BS: jax.Array) -> jax.Array:
    """Padded along axis 1 to the multiple that tokamax compiles for; no interval reaches the keys that come with it."""
    return jnp.pad(x_BS, [(0, 0), (0, -x_BS.shape[1] % BLOCK)] + [(0, 0)] * (x_BS.ndim - 2))


def _bound(static: Static, call, q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT):
    """call(op, bound arguments) of the first kernel that takes them."""
    api = importlib.import_module("tokamax._src.ops.attention.api")
    base = importlib.import_module("tokamax._src.ops.attention.base")
    mask, refusals = base.Mask(k_start=first_BT[:, None], k_end=end_BT[:, None]), []
    for name in static.names:
        op = api.IMPLEMENTATIONS[name]
        try:
            arguments = op.bind(q_BTNH, k_BSKH, v_BSKH, mask=mask, logits_scale=static.scale, logits_soft_cap=static.softcap)
            return call(op, arguments)
        except NotImplementedError as refusal:
            refusals.append(f"{name}: {refusal}")
    raise NotImplementedError(f'tokamax has no kernel for this ({"; ".join(refusals)}); use train.kernel="blocked"')


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT, merged):
    return merged or _forward(static, q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT)


def _forward(static: Static, q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT):
    def call(op, arguments):
        named = {name: x for name, x in arguments.kwargs.items() if name != "return_residuals"}
        return op(*arguments.args, **named, return_residuals=True)

    o_BTNH, (top_BNT, total_BNT) = _bound(static, call, q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT)
    some_BT = first_BT < end_BT
    o_BTNH = jnp.where(some_BT[..., None, None], o_BTNH, 0)
    lse_BNT = top_BNT + jnp.log(jnp.where(some_BT[:, None], total_BNT, 1.0))
    return o_BTNH, jnp.where(some_BT[:, None], lse_BNT, -jnp.inf)


def _forward_keep(static: Static, q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT, merged):
    o_BTNH, lse_BNT = merged or kept(*_forward(static, q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT))
    return (o_BTNH, lse_BNT), (q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT, o_BTNH, lse_BNT)


def _backward(static: Static, residuals, grads):
    q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT, o_BTNH, lse_BNT = residuals
    do_BTNH, dlse_BNT = grads
    some_BT = first_BT < end_BT
    shift_BTN = jnp.einsum("BTNH,BTNH->BTN", do_BTNH, o_BTNH, preferred_element_type=jnp.float32) - dlse_BNT.swapaxes(1, 2)
    shift_BTN = jnp.where(some_BT[..., None], shift_BTN, 0.0)
    do_BTNH, o_BTNH = output_of(shift_BTN, jnp.where(some_BT[..., None, None], do_BTNH, 0))
    stand_in_BNT = jnp.where(some_BT[:, None], lse_BNT, 0.0)  # of the running maximum, with a sum of 1

    def call(op, arguments):
        named = {name: x for name, x in arguments.kwargs.items() if name != "return_residuals"}
        return op.vjp((stand_in_BNT, jnp.ones_like(stand_in_BNT)), o_BTNH, do_BTNH, *arguments.args, **named)

    grads = _bound(static, call, q_BTNH, k_BSKH, v_BSKH, first_BT, end_BT)
    return grads["q"], grads["k"], grads["v"], None, None, None


def output_of(shift_BTN, do_BTNH) -> tuple[jax.Array, jax.Array]:
    """do, and the float32 o along it for which sum(do o) is `shift`; a do of zero becomes 2^-60 in its first dimension."""
    size_BTN = jnp.einsum("BTNH,BTNH->BTN", do_BTNH, do_BTNH, preferred_element_type=jnp.float32)
    least = jnp.zeros(do_BTNH.shape[-1], do_BTNH.dtype).at[0].set(2.0**-60)
    none_BTN = (size_BTN < 2.0**-120) & (shift_BTN != 0)
    do_BTNH = jnp.where(none_BTN[..., None], least, do_BTNH)
    size_BTN = jnp.where(none_BTN, 2.0**-120, jnp.where(size_BTN > 0, size_BTN, 1.0))
    return do_BTNH, (shift_BTN / size_BTN)[..., None] * do_BTNH.astype(jnp.float32)


_attend.defvjp(_forward_keep, _backward)


def attend_cudnn(
    q_BTNH, k_BSKH, v_BSKH, q_pos_BT, k_pos_BS, q_seg_BT, k_seg_BS,
    *, window, scale, softcap, merged=None, implementation="cudnn",
):  # fmt: skip
    """(o_BTNH, lse_BTN float32) of rows that hold one document each, with padding after it or none.

    A row that is packed or padded in front gives NaN, and so do gradients where the log-sum-exp has one: cuDNN drops it.
    Raises NotImplementedError for a soft cap, for queries that are not the keys' own tokens, and for dtypes, head sizes and
    lengths that cuDNN does not take.
    """
    if merged is not None:
        raise NotImplementedError('cudnn takes no log-sum-exp for its gradients; use train.kernel="tokamax"')
    if softcap is not None:
        raise NotImplementedError(f'cudnn has no soft cap, and this layer has {softcap}; use train.kernel="tokamax"')
    if q_BTNH.shape[1] != k_BSKH.shape[1]:
        raise NotImplementedError(
            f"cudnn aligns queries with the first keys, and here are {q_BTNH.shape[1]} queries of {k_BSKH.shape[1]} keys; "
            'use train.kernel="tokamax"'
        )
    H = q_BTNH.shape[-1]
    if implementation == "cudnn" and (
        q_BTNH.dtype not in (jnp.bfloat16, jnp.float16) or H > 128 or H % 8 or q_BTNH.shape[1] % 2
    ):
        raise NotImplementedError(
            f"cudnn takes bfloat16 or float16, heads of at most 128 by eights and even lengths, and here are {q_BTNH.dtype}, "
            f'heads of {H} and {q_BTNH.shape[1]} tokens; use train.kernel="blocked"'
        )
    real_BT = q_seg_BT > 0
    length_B = real_BT.sum(1, dtype=jnp.int32)
    place_T = jnp.arange(q_seg_BT.shape[1])
    one_B = jnp.all(
        (real_BT == (place_T < length_B[:, None]))
        & (~real_BT | ((q_seg_BT == q_seg_BT[:, :1]) & (q_pos_BT == q_pos_BT[:, :1] + place_T)))
        & (q_seg_BT == k_seg_BS)
        & (~real_BT | (q_pos_BT == k_pos_BS)),
        axis=1,
    )
    o_BTNH, lse_BTN = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, scale=scale, is_causal=True,
        query_seq_lengths=length_B, key_value_seq_lengths=length_B,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation, return_residual=True,
    )  # fmt: skip
    o_BTNH, lse_BTN = _lse_has_no_gradient(jnp.where(real_BT[..., None, None], o_BTNH, 0), lse_BTN.astype(jnp.float32))
    lse_BTN = jnp.where(real_BT[..., None], lse_BTN, -jnp.inf)
    return jnp.where(one_B[:, None, None, None], o_BTNH, jnp.nan), jnp.where(one_B[:, None, None], lse_BTN, jnp.nan)


@jax.custom_vjp
def _lse_has_no_gradient(o_BTNH, lse_BTN):
    """The same, with a gradient of NaN where the log-sum-exp's is not zero."""
    return o_BTNH, lse_BTN


def _spoil(_, grads):
    do_BTNH, dlse_BTN = grads
    return jnp.where((dlse_BTN != 0)[..., None], jnp.nan, do_BTNH), jnp.zeros_like(dlse_BTN)


_lse_has_no_gradient.defvjp(lambda o_BTNH, lse_BTN: ((o_BTNH, lse_BTN), None), _spoil)
