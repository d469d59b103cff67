"""Our Pallas kernels for GPUs in the interpreter, and what the adapters add to the GPU libraries, with plain attention instead.

The stand-in for tokamax does as tokamax does: it returns a maximum and a denominator without gradients, and gives a query
without keys the mean of all values. That of cuDNN is the XLA implementation of jax.nn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import CASES, LAYOUTS, PAIRS, K, N, arrays, assert_same, check_merged_gradients, outcome

from hybrid_attn import kernels
from hybrid_attn.kernels import AttentionOptions, Keys, Queries, gpu, gpu_pallas, reference
from hybrid_attn.kernels.interface import intervals


def plain_tokamax(options, qkv_BSNH, bounds_BT):
    """(o, (maximum, denominator)) of attention over intervals of keys."""
    q, k, v = qkv_BSNH
    s_BNTS = options.scale * jnp.einsum("BTNH,BSNH->BNTS", q, k.repeat(N // K, 2), precision="highest")
    s_BNTS = s_BNTS if options.softcap is None else options.softcap * jnp.tanh(s_BNTS / options.softcap)
    keys, (first, end) = jnp.arange(k.shape[1]), (x[:, None, :, None] for x in bounds_BT)
    s_BNTS = jnp.where((keys >= first) & (keys < end), s_BNTS, jnp.finfo(jnp.float32).min)
    max_BNT = s_BNTS.max(-1)
    p_BNTS = jnp.exp(s_BNTS - max_BNT[..., None])
    o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", p_BNTS / p_BNTS.sum(-1, keepdims=True), v.repeat(N // K, 2), precision="highest")
    return o_BTNH.astype(q.dtype), (max_BNT, p_BNTS.sum(-1))


@pytest.fixture
def interpreted(monkeypatch):
    monkeypatch.setattr(gpu, "_call_tokamax", plain_tokamax)
    monkeypatch.setattr(gpu_pallas, "INTERPRET", True)
    monkeypatch.setattr(gpu_pallas, "BLOCK", 8)  # three blocks, six tiles, the last two of them padding


@pytest.mark.parametrize("window, softcap", CASES)
def test_tokamax_has_the_log_sum_exp_and_all_gradients_of_the_reference(interpreted, window, softcap):
    for names in PAIRS:
        q, k, v, pos, seg = arrays(*names)
        got, expected = (
            outcome(q, k, v, pos, pos, seg, seg, None, kernel, window, softcap) for kernel in ("tokamax", "reference")
        )
        assert_same(got, expected, 1e-5)
        assert not any(np.any(grad[seg == 0]) for grad in got["grads"][:3])


def test_tokamax_has_the_gradients_of_sinks_and_of_the_log_sum_exp_alone(interpreted):
    q, k, v, pos, seg = arrays("packed", "padding in front")
    sinks = jnp.linspace(-1.0, 2.0, N)
    got, expected = (outcome(q, k, v, pos, pos, seg, seg, sinks, kernel, 6) for kernel in ("tokamax", "reference"))
    assert_same(got, expected, 1e-5)

    @functools.partial(jax.jit, static_argnums=0)
    def alone(kernel, q, k, v):
        def loss(q, k, v):
            lse = kernels.attend(kernel, AttentionOptions(None, 0.4), Queries(q, pos, seg), Keys(k, v, pos, seg))[1]
            return jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0.0).sum()

        return jax.grad(loss, (0, 1, 2))(q, k, v)

    for a, b in zip(alone("tokamax", q, k, v), alone("reference", q, k, v), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_gradients_of_parts_of_the_keys_add_up_with_tokamax_too(interpreted):
    check_merged_gradients("tokamax")


@pytest.mark.parametrize("window", [None, 6])
def test_a_block_of_keys_is_visited_by_the_blocks_of_queries_that_see_it_and_no_others(window):
    _, _, _, pos, seg = arrays(*LAYOUTS)
    q_pos, q_seg = pos[:, 5:21], seg[:, 5:21]  # of a slice of the keys
    see = np.asarray(reference.visible_BTS(q_pos, pos, q_seg, seg, window))
    see = np.pad(see, ((0, 0), (0, 0), (0, 1))).reshape(len(see), 8, 2, 4, 6).any((2, 4))  # blocks of 2 queries and 6 keys
    bounds = intervals(window, Queries(None, q_pos, q_seg), Keys(None, None, pos, seg))
    for got_from, got_to, see_IJ in zip(*gpu_pallas.visited_blocks(*bounds, 2, 6, 24), see, strict=True):
        visited = np.arange(8)[:, None]
        np.testing.assert_array_equal((got_from <= visited) & (visited < got_to), see_IJ)


@pytest.mark.parametrize("window, document, percent", [(None, 8192, 50.8), (4096, 8192, 38.7), (None, 1024, 7.0)])
def test_the_tiles_of_the_backward_pass_are_a_triangle_a_band_or_one_square_for_each_document(window, document, percent):
    T, Q, C = 8192, *reversed(gpu_pallas.block_sizes(128, 2))
    index_BT = jnp.arange(T, dtype=jnp.int32)[None]
    pos, seg = index_BT % document, 1 + index_BT // document
    bounds = intervals(window, Queries(None, pos, seg), Keys(None, None, pos, seg))
    from_BJ, to_BJ = gpu_pallas.visited_blocks(*bounds, Q, C, T)
    assert round(100 * Q * C * int((to_BJ - from_BJ).sum()) / T**2, 1) == percent  # 100 with tokamax's backward kernels


@pytest.fixture
def xla_cudnn(monkeypatch):
    monkeypatch.setattr(gpu, "CUDNN", "xla")


@pytest.mark.parametrize("window", [None, 1, 6, 40])
def test_cudnn_sees_exactly_the_keys_of_the_window_and_no_padding(xla_cudnn, window):
    q, k, v, pos, seg = arrays("one document", "one document")
    seg[1, 17:] = 0
    pos[1] += 5 * (seg[1] > 0)  # a document that goes on from an earlier sequence

    @functools.partial(jax.jit, static_argnums=0)
    def run(kernel, q, k, v):
        def loss(q, k, v):
            o, lse = kernels.attend(kernel, AttentionOptions(window, 0.4), Queries(q, pos, seg), Keys(k, v, pos, seg))
            return (jnp.cos(jnp.arange(o.size)).reshape(o.shape) * o).sum(), (o, lse)

        grads, (o, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        return {"o": o, "lse": lse, "grads": grads}

    assert_same(jax.device_get(run("cudnn", q, k, v)), jax.device_get(run("reference", q, k, v)), 1e-5)


@pytest.mark.slow
def test_cudnn_gives_nan_for_sequences_whose_mask_it_cannot_express_and_for_a_gradient_that_it_drops(xla_cudnn):
    q, k, v, pos, seg = arrays("one document", "packed", "padding in front", "padding between")
    options, keys = AttentionOptions(None, 0.4), Keys(k, v, pos, seg)
    o, lse = kernels.attend("cudnn", options, Queries(q, pos, seg), keys)
    np.testing.assert_array_equal(np.isnan(o).all((1, 2, 3)), [False, True, True, True])
    np.testing.assert_array_equal(np.isnan(lse).any((1, 2)), [False, True, True, True])

    def loss(q):
        return kernels.attend("cudnn", options, Queries(q, pos, seg), keys)[1][0].sum()

    assert np.isnan(jax.grad(loss)(q)[0]).any()


def test_cudnn_is_refused_what_it_cannot_do():
    q, k, v, pos, seg = arrays("one document")
    attend, options = functools.partial(kernels.attend, "cudnn"), AttentionOptions(None, 1.0)
    queries, keys = Queries(q, pos, seg), Keys(k, v, pos, seg)
    with pytest.raises(NotImplementedError, match=r"9 queries of 23 keys; use train.kernel=\"tokamax\""):
        attend(options, Queries(*(x[:, -9:] for x in queries)), keys)
    with pytest.raises(NotImplementedError, match="no soft cap, and this layer has 2.0"):
        attend(options._replace(softcap=2.0), queries, keys)
    with pytest.raises(NotImplementedError, match="no gradient by the log-sum-exp"):
        attend(options, queries, keys, jnp.zeros(N))


@pytest.mark.parametrize(
    "dtype, length, size", [("float32", 64, 64), ("bfloat16", 64, 256), ("bfloat16", 64, 60), ("bfloat16", 63, 64)]
)
def test_cudnn_refuses_the_shapes_that_it_does_not_take_with_the_cure(dtype, length, size):
    q, tokens = jnp.zeros((1, length, 2, size), dtype), [jnp.zeros((1, length), jnp.int32)] * 2
    with pytest.raises(NotImplementedError, match=f'{dtype}, heads of {size} and {length} tokens; use train.kernel="blocked"'):
        kernels.attend("cudnn", AttentionOptions(None, 1.0), Queries(q, *tokens), Keys(q, q, *tokens))
