"""The maintained kernels for GPUs: tokamax's, and cuDNN's through jax.nn.

tokamax (Mosaic on Hopper and Blackwell, else Triton) takes an interval of keys for each query, and every mask here is one:
packed documents, windows, padding and context shards alike. Its log-sum-exp has no gradient, and its backward kernels compute
sum(do o) themselves, from an output that we pass to them. We pass an output whose product with `do` is sum(do o) - dlse, which
is what the gradient by the log-sum-exp needs (`gradient_shift`). Where do is zero and dlse is not, do is 2^-60 in one dimension
instead.

cuDNN knows causal masks, windows and lengths, and would attend across packed documents. Whether a sequence is packed is data,
so a sequence of which it cannot express the mask gives NaN, never a wrong mask.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head size.
"""

import jax
import jax.numpy as jnp

from hybrid_attn.kernels.interface import AttentionOptions, Keys, Pair, Queries, intervals, padded
from hybrid_attn.kernels.softmax import gradient_shift

TOKAMAX = ("mosaic_gpu", "triton")  # the first that supports the device and the dtype
BLOCK = 128
CUDNN = "cudnn"  # the implementation of jax.nn; tests on CPU use "xla"


def tokamax_forward(options: AttentionOptions, queries: Queries, keys: Keys) -> Pair:
    """(o_BTNH, lse_BTN float32); NotImplementedError where tokamax does not support the device, the dtype or the head size."""

    def call(op, qkv_BSNH, named: dict):
        return op(*qkv_BSNH, **named, return_residuals=True)

    T, (qkv_BSNH, bounds_BT) = queries.q_BTNH.shape[1], _padded_inputs(options, queries, keys)
    sees_key_BT = bounds_BT[0] < bounds_BT[1]
    o_BTNH, (running_max_BNT, denominator_BNT) = _call_tokamax(options, call, qkv_BSNH, bounds_BT)
    o_BTNH = jnp.where(sees_key_BT[..., None, None], o_BTNH, 0)
    lse_BNT = running_max_BNT + jnp.log(jnp.where(sees_key_BT[:, None], denominator_BNT, 1.0))
    lse_BNT = jnp.where(sees_key_BT[:, None], lse_BNT, -jnp.inf)
    return o_BTNH[:, :T], lse_BNT.swapaxes(1, 2)[:, :T]


def tokamax_backward(options: AttentionOptions, queries: Queries, keys: Keys, outputs: Pair, grads: Pair):
    """(dq_BTNH, dk_BSKH, dv_BSKH)."""
    T, S = queries.q_BTNH.shape[1], keys.k_BSKH.shape[1]
    qkv_BSNH, bounds_BT = _padded_inputs(options, queries, keys)
    sees_key_BT = bounds_BT[0] < bounds_BT[1]
    o_BTNH, lse_BTN, do_BTNH, dlse_BTN = (padded(x, BLOCK) for x in (*outputs, *grads))
    shift_BTN = jnp.where(sees_key_BT[..., None], gradient_shift(do_BTNH, o_BTNH, dlse_BTN), 0.0)
    do_BTNH, o_BTNH = output_with_product(shift_BTN, jnp.where(sees_key_BT[..., None, None], do_BTNH, 0))
    # The kernel takes the running maximum and the denominator: the log-sum-exp and 1 give the same probabilities.
    lse_BNT = jnp.where(sees_key_BT[:, None], lse_BTN.swapaxes(1, 2), 0.0)

    def call(op, qkv_BSNH, named: dict):
        return op.vjp((lse_BNT, jnp.ones_like(lse_BNT)), o_BTNH, do_BTNH, *qkv_BSNH, **named)

    dqkv = _call_tokamax(options, call, qkv_BSNH, bounds_BT)
    return dqkv["q"][:, :T], dqkv["k"][:, :S], dqkv["v"][:, :S]


def _padded_inputs(options: AttentionOptions, queries: Queries, keys: Keys) -> tuple[list[jax.Array], list[jax.Array]]:
    """(q, k, v), and the first key and the end of the keys of each query, in the full blocks that tokamax compiles for."""
    inputs = (queries.q_BTNH, keys.k_BSKH, keys.v_BSKH), intervals(options.window, queries, keys)
    return tuple([padded(x, BLOCK) for x in arrays] for arrays in inputs)


def _call_tokamax(options: AttentionOptions, call, qkv_BSNH, bounds_BT):
    """call(op, (q, k, v), other arguments) of the first kernel that supports them, bound by it."""
    from tokamax._src.ops.attention import api, base

    mask, errors = base.Mask(k_start=bounds_BT[0][:, None], k_end=bounds_BT[1][:, None]), []
    for name in TOKAMAX:
        op = api.IMPLEMENTATIONS[name]
        try:
            bound = op.bind(*qkv_BSNH, mask=mask, logits_scale=options.scale, logits_soft_cap=options.softcap)
            return call(op, bound.args, {name: x for name, x in bound.kwargs.items() if name != "return_residuals"})
        except NotImplementedError as error:
            errors.append(f"{name}: {error}")
    raise NotImplementedError(f'tokamax has no kernel for this ({"; ".join(errors)}); use train.kernel="blocked"')


def output_with_product(shift_BTN, do_BTNH) -> tuple[jax.Array, jax.Array]:
    """do, and the float32 o along it for which sum(do o) is `shift`; a do of zero becomes 2^-60 in its first dimension."""
    square_BTN = jnp.einsum("BTNH,BTNH->BTN", do_BTNH, do_BTNH, preferred_element_type=jnp.float32)
    tiny_H = jnp.zeros(do_BTNH.shape[-1], do_BTNH.dtype).at[0].set(2.0**-60)
    is_zero_BTN = (square_BTN < 2.0**-120) & (shift_BTN != 0)
    do_BTNH = jnp.where(is_zero_BTN[..., None], tiny_H, do_BTNH)
    square_BTN = jnp.where(is_zero_BTN, 2.0**-120, jnp.where(square_BTN > 0, square_BTN, 1.0))
    return do_BTNH, (shift_BTN / square_BTN)[..., None] * do_BTNH.astype(jnp.float32)


def cudnn_forward(options: AttentionOptions, queries: Queries, keys: Keys) -> Pair:
    """(o_BTNH, lse_BTN float32) of sequences that hold one document each, with padding after it or none.

    JAX differentiates it. A sequence that is packed or padded in front gives NaN, and so do gradients where the log-sum-exp has
    one: cuDNN drops it. Raises NotImplementedError for what `_check_cudnn` refuses.
    """
    (q_BTNH, q_pos_BT, q_seg_BT), (k_BSKH, v_BSKH, k_pos_BS, k_seg_BS) = queries, keys
    _check_cudnn(options, q_BTNH, k_BSKH)
    real_BT = q_seg_BT > 0
    length_B = real_BT.sum(1, dtype=jnp.int32)
    index_T = jnp.arange(q_seg_BT.shape[1])
    one_document_B = jnp.all(
        (real_BT == (index_T < length_B[:, None]))
        & (~real_BT | ((q_seg_BT == q_seg_BT[:, :1]) & (q_pos_BT == q_pos_BT[:, :1] + index_T)))
        & (q_seg_BT == k_seg_BS)
        & (~real_BT | (q_pos_BT == k_pos_BS)),
        axis=1,
    )
    o_BTNH, lse_BTN = jax.nn.dot_product_attention(
        q_BTNH, k_BSKH, v_BSKH, scale=options.scale, is_causal=True,
        query_seq_lengths=length_B, key_value_seq_lengths=length_B,
        local_window_size=None if options.window is None else (options.window - 1, 0),
        implementation=CUDNN, return_residual=True,
    )  # fmt: skip
    o_BTNH, lse_BTN = _lse_has_no_gradient(jnp.where(real_BT[..., None, None], o_BTNH, 0), lse_BTN.astype(jnp.float32))
    lse_BTN = jnp.where(real_BT[..., None], lse_BTN, -jnp.inf)
    return (
        jnp.where(one_document_B[:, None, None, None], o_BTNH, jnp.nan),
        jnp.where(one_document_B[:, None, None], lse_BTN, jnp.nan),
    )


def _check_cudnn(options: AttentionOptions, q_BTNH, k_BSKH) -> None:
    """Raises NotImplementedError for a soft cap, for fewer queries than keys, and for dtypes, head sizes and lengths."""
    if options.softcap is not None:
        raise NotImplementedError(f'cudnn has no soft cap, and this layer has {options.softcap}; use train.kernel="tokamax"')
    (T, S), H, dtype = (q_BTNH.shape[1], k_BSKH.shape[1]), q_BTNH.shape[-1], q_BTNH.dtype
    if T != S:
        raise NotImplementedError(
            f'cudnn aligns queries with the first keys, and here are {T} queries of {S} keys; use train.kernel="tokamax"'
        )
    if CUDNN == "cudnn" and (dtype not in (jnp.bfloat16, jnp.float16) or H > 128 or H % 8 or T % 2):
        raise NotImplementedError(
            f"cudnn takes bfloat16 or float16, heads of at most 128 by eights and even lengths, and here are {dtype}, "
            f'heads of {H} and {T} tokens; use train.kernel="blocked"'
        )


@jax.custom_vjp
def _lse_has_no_gradient(o_BTNH, lse_BTN):
    """The same, with a gradient of NaN where the log-sum-exp's is not zero."""
    return o_BTNH, lse_BTN


def _nan_where_lse_has_a_gradient(_, grads):
    do_BTNH, dlse_BTN = grads
    return jnp.where((dlse_BTN != 0)[..., None], jnp.nan, do_BTNH), jnp.zeros_like(dlse_BTN)


_lse_has_no_gradient.defvjp(lambda o_BTNH, lse_BTN: ((o_BTNH, lse_BTN), None), _nan_where_lse_has_a_gradient)
