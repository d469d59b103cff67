"""What the adapters add to the GPU libraries, on CPU with plain attention in place of the libraries.

The stand-in for tokamax does as tokamax does: it returns a maximum and a denominator without gradients, gives a query without
keys the mean of all values, and computes the backward pass from the output that is passed to it. That of cuDNN is the XLA
implementation of jax.nn.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_kernels import CASES, PAIRS, K, N, S, arrays, assert_same, check_merged_gradients, outcome

from hybrid_attn import kernels
from hybrid_attn.kernels import AttentionOptions, Keys, Queries, gpu


class Plain:
    """Attention over intervals of keys with the calls of a tokamax op."""

    def scores(self, q, k, mask, scale, cap):
        s_BNTS = scale * jnp.einsum("BTNH,BSNH->BNTS", q, k.repeat(N // K, 2), precision="highest")
        t_BNTS = jnp.zeros_like(s_BNTS) if cap is None else jnp.tanh(s_BNTS / cap)
        s_BNTS = s_BNTS if cap is None else cap * t_BNTS
        keys, (first, end) = jnp.arange(k.shape[1]), (x[:, None, :, None] for x in mask)
        return jnp.where((keys >= first) & (keys < end), s_BNTS, jnp.finfo(jnp.float32).min), t_BNTS

    def __call__(self, q, k, v, *, mask, scale, cap, return_residuals):
        s_BNTS, _ = self.scores(q, k, mask, scale, cap)
        max_BNT = s_BNTS.max(-1)
        p_BNTS = jnp.exp(s_BNTS - max_BNT[..., None])
        o_BTNH = jnp.einsum("BNTS,BSNH->BTNH", p_BNTS / p_BNTS.sum(-1, keepdims=True), v.repeat(N // K, 2), precision="highest")
        return o_BTNH.astype(q.dtype), (max_BNT, p_BNTS.sum(-1))

    def vjp(self, residuals, o, do, q, k, v, *, mask, scale, cap):
        (s_BNTS, t_BNTS), (max_BNT, denominator_BNT) = self.scores(q, k, mask, scale, cap), residuals
        p_BNTS = jnp.exp(s_BNTS - max_BNT[..., None]) / denominator_BNT[..., None]
        shift_BNT = jnp.einsum("BTNH,BTNH->BNT", o, do, precision="highest")
        dp_BNTS = jnp.einsum("BTNH,BSNH->BNTS", do, v.repeat(N // K, 2), precision="highest")
        ds_BNTS = scale * p_BNTS * (dp_BNTS - shift_BNT[..., None]) * (1 - t_BNTS**2)
        dq = jnp.einsum("BNTS,BSNH->BTNH", ds_BNTS, k.repeat(N // K, 2), precision="highest")
        pairs = (ds_BNTS, q), (p_BNTS, do)
        dk, dv = (jnp.einsum("BNTS,BTNH->BSNH", x, y, precision="highest") for x, y in pairs)
        dk, dv = (x.reshape(*x.shape[:2], K, N // K, -1).sum(3) for x in (dk, dv))
        return {"q": dq, "k": dk, "v": dv}


@pytest.fixture
def plain_tokamax(monkeypatch):
    def call_plain(options, call, qkv, bounds):
        return call(Plain(), qkv, {"mask": bounds, "scale": options.scale, "cap": options.softcap})

    monkeypatch.setattr(gpu, "_call_tokamax", call_plain)


@pytest.mark.parametrize("window, softcap", CASES)
def test_tokamax_has_the_log_sum_exp_and_all_gradients_of_the_reference(plain_tokamax, window, softcap):
    for names in PAIRS:
        q, k, v, pos, seg = arrays(*names)
        got, expected = (
            outcome(q, k, v, pos, pos, seg, seg, None, kernel, window, softcap) for kernel in ("tokamax", "reference")
        )
        assert_same(got, expected, 1e-5)
        assert not any(np.any(grad[seg == 0]) for grad in got["grads"][:3])


def test_tokamax_has_the_gradients_of_sinks_and_of_the_log_sum_exp_alone(plain_tokamax):
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


def test_gradients_of_parts_of_the_keys_add_up_with_tokamax_too(plain_tokamax):
    check_merged_gradients("tokamax")


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


def test_the_output_passed_on_has_the_product_that_the_gradient_needs():
    rng = np.random.default_rng(0)
    do = rng.normal(size=(2, S, N, 8)).astype(np.float32) * 10.0 ** rng.integers(-12, 3, (2, S, N, 1))
    do[0, :4] = 0
    shift = rng.normal(size=(2, S, N)).astype(np.float32)
    shift[0, 0] = 0
    for dtype in (jnp.float32, jnp.bfloat16):
        passed_do, o = gpu.output_with_product(shift, do.astype(dtype))
        passed_do = np.asarray(passed_do, np.float64)
        np.testing.assert_allclose((passed_do * np.asarray(o, np.float64)).sum(-1), shift, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(passed_do, np.asarray(do.astype(dtype), np.float64), rtol=0, atol=1e-18)


@pytest.mark.parametrize(
    "dtype, length, size", [("float32", 64, 64), ("bfloat16", 64, 256), ("bfloat16", 64, 60), ("bfloat16", 63, 64)]
)
def test_cudnn_refuses_the_shapes_that_it_does_not_take_with_the_cure(dtype, length, size):
    q, tokens = jnp.zeros((1, length, 2, size), dtype), [jnp.zeros((1, length), jnp.int32)] * 2
    with pytest.raises(NotImplementedError, match=f'{dtype}, heads of {size} and {length} tokens; use train.kernel="blocked"'):
        kernels.attend("cudnn", AttentionOptions(None, 1.0), Queries(q, *tokens), Keys(q, q, *tokens))
