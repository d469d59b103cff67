"""The maintained kernels for GPUs: tokamax's, and cuDNN's through jax.nn.

tokamax (Mosaic on Hopper and Blackwell, else Triton) takes an interval of keys for each query, and every mask here is one:
packed documents, windows, padding and context shards alike. Only its forward kernels skip the keys outside of the intervals, so
the backward pass is ours (`gpu_pallas.py`).

cuDNN knows causal masks, windows and lengths, and would attend across packed documents. Whether a sequence is packed is data,
so a sequence of which it cannot express the mask gives NaN, never a wrong mask.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head size.
"""

import jax
import jax.numpy as jnp

from hybrid_attn.kernels import gpu_pallas
from hybrid_attn.kernels.interface import AttentionOptions, Keys, Pair, Queries, padded

TOKAMAX = ("mosaic_gpu", "triton")  # the first that supports the device and the dtype
CUDNN = "cudnn"  # the implementation of jax.nn; tests on CPU use "xla"


def tokamax_forward(options: AttentionOptions, queries: Queries, keys: Keys) -> Pair:
    """(o_BTNH, lse_BTN float32); NotImplementedError where tokamax does not support the device, the dtype or the head size."""
    T = queries.q_BTNH.shape[1]
    bounds_BT = gpu_pallas.padded_intervals(options.window, queries, keys)
    qkv_BSNH = [padded(x, gpu_pallas.BLOCK) for x in (queries.q_BTNH, keys.k_BSKH, keys.v_BSKH)]
    sees_key_BT = bounds_BT[0] < bounds_BT[1]
    o_BTNH, (running_max_BNT, denominator_BNT) = _call_tokamax(options, qkv_BSNH, bounds_BT)
    o_BTNH = jnp.where(sees_key_BT[..., None, None], o_BTNH, 0)
    lse_BNT = running_max_BNT + jnp.log(jnp.where(sees_key_BT[:, None], denominator_BNT, 1.0))
    lse_BNT = jnp.where(sees_key_BT[:, None], lse_BNT, -jnp.inf)
    return o_BTNH[:, :T], lse_BNT.swapaxes(1, 2)[:, :T]


def _call_tokamax(options: AttentionOptions, qkv_BSNH: list[jax.Array], bounds_BT: Pair):
    """o_BTNH, and the running maximum and the denominator [B, N, T], of the first kernel that supports the arguments."""
    from tokamax._src.ops.attention import api, base

    mask, errors = base.Mask(k_start=bounds_BT[0][:, None], k_end=bounds_BT[1][:, None]), []
    for name in TOKAMAX:
        op = api.IMPLEMENTATIONS[name]
        try:
            bound = op.bind(*qkv_BSNH, mask=mask, logits_scale=options.scale, logits_soft_cap=options.softcap)
            return op(*bound.args, **bound.kwargs | {"return_residuals": True})
        except NotImplementedError as error:
            errors.append(f"{name}: {error}")
    raise NotImplementedError(f'tokamax has no kernel for this ({"; ".join(errors)}); use train.kernel="blocked"')


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
