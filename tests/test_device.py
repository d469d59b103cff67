"""Every kernel of the platform the tests run on, at sizes its hardware takes, against the reference.

`make test` runs this on CPU; `make test-gpu` and `make test-tpu` run it on the device of this machine.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from conftest import assert_close, layout

from hybrid_attn import kernels
from hybrid_attn.kernels import experts
from hybrid_attn.model.grouped import blocks_of, grouped_mlp
from hybrid_attn.model.mlp import ChunkedMLP, Gating
from hybrid_attn.model.ragged import ragged_mlp, rows_of

S, N, K, H = 700, 4, 2, 128  # no multiple of a block
LAYOUTS = {"one document": "a" * S, "padding at the end": "a" * 600 + "." * 100}
COPIES, EXPERTS, WIDTHS = (700, 2), 8, (256, 384)  # tokens and experts of a token; model and expert
MLP = ChunkedMLP(Gating("silu", 7.0, 1.7), jax.lax.dot_general, saves_products=False)
PACKED = {"packed": "a" * 250 + "b" + "c" * 400 + "." * 49, "only padding": "." * S}

if not flags.FLAGS.is_parsed():  # tokamax would parse those of pytest
    flags.FLAGS.mark_as_parsed()


def runs_here(kernel: kernels.Kernel) -> bool:
    installed = kernel.needs is None or importlib.util.find_spec(kernel.needs) is not None
    return installed and jax.default_backend() in kernel.platforms


HERE = [name for name, kernel in kernels.KERNELS.items() if name != "reference" and runs_here(kernel)]


@functools.partial(jax.jit, static_argnames=("kernel", "window"))
def outcome(q, k, v, pos, seg, kernel, window):
    """o, lse and the gradients by q, k and v of a loss of o, as one array: under a window of 1 only v has one."""

    def loss(q, k, v):
        queries, keys = kernels.Queries(q, pos, seg), kernels.Keys(k, v, pos, seg)
        o, lse = kernels.attend(kernel, kernels.AttentionOptions(window, H**-0.5), queries, keys)
        return (jnp.cos(jnp.arange(o.size)).reshape(o.shape) * o).sum(), (o, jnp.where(jnp.isfinite(lse), lse, 0.0))

    grads, (o, lse) = jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
    return {"o": o, "lse": lse, "grads": jnp.concatenate([grad.ravel() for grad in grads])}


WINDOWS = (130,) if jax.default_backend() == "cpu" else (None, 1, 130, 2 * S)  # tests/test_kernels.py has more of a CPU


@pytest.mark.parametrize("kernel, window", [(kernel, window) for kernel in HERE for window in WINDOWS])
def test_the_kernels_of_this_device_equal_the_reference_in_bfloat16(kernel, window):
    rng, layouts = np.random.default_rng(0), LAYOUTS | ({} if kernel == "cudnn" else PACKED)
    pos, seg = (np.stack(x) for x in zip(*map(layout, layouts.values()), strict=True))
    q, k, v = (rng.normal(size=(len(layouts), S, heads, H)).astype(jnp.bfloat16) for heads in (N, K, K))
    got = outcome(q, k, v, pos, seg, kernel, window)
    with jax.default_matmul_precision("highest"):
        expected = outcome(*(np.asarray(x, np.float32) for x in (q, k, v)), pos, seg, "reference", window)
    assert_close(got, expected, 1e-2)


@functools.partial(jax.jit, static_argnames="kernel")
def outcome_of_experts(expert_nk, x_nD, gates_nk, *weights, kernel):
    """The output of experts, and the gradients of a loss of it."""

    def loss(x_nD, gates_nk, *weights):
        if kernel == "tokamax":
            y_nD = ragged_mlp(MLP, x_nD, gates_nk, rows_of(blocks_of(expert_nk, EXPERTS, 1), len(x_nD)), *weights)
        else:
            y_nD = grouped_mlp(MLP, 256, x_nD, gates_nk, blocks_of(expert_nk, EXPERTS, 64), *weights)
        return (jnp.cos(jnp.arange(y_nD.size)).reshape(y_nD.shape) * y_nD).sum(), y_nD

    return jax.grad(loss, range(2 + len(weights)), has_aux=True)(x_nD, gates_nk, *weights)


@pytest.mark.skipif(jax.default_backend() not in experts.PLATFORMS, reason="a CPU computes experts by blocks")
@pytest.mark.skipif(importlib.util.find_spec("tokamax") is None, reason="tokamax is not installed")
def test_experts_by_tokamax_equal_blocks_in_float32():
    """Expert 0 has no token, some tokens have one expert or none, and there are biases."""
    rng, (D, F) = np.random.default_rng(0), WIDTHS
    expert_nk = rng.integers(1, EXPERTS // 2, COPIES, np.int32) + np.asarray([0, EXPERTS // 2 - 1], np.int32)
    expert_nk[rng.random(COPIES) < 0.2] = EXPERTS
    matrices = [rng.normal(size=(EXPERTS, *size)) * size[0] ** -0.5 for size in ((D, F), (D, F), (F, D))]
    inputs = rng.normal(size=(COPIES[0], D)), rng.random(COPIES), *matrices, *rng.normal(size=(2, EXPERTS, F))
    rounded = [np.asarray(x, np.float32 if i == 1 else jnp.bfloat16) for i, x in enumerate(inputs)]
    got = jax.device_get(outcome_of_experts(expert_nk, *rounded, kernel="tokamax"))
    with jax.default_matmul_precision("highest"):
        exact = (np.asarray(x, np.float32) for x in rounded)
        expected = jax.device_get(outcome_of_experts(expert_nk, *exact, kernel="blocked"))
    assert_close(got, expected, 2e-2)
