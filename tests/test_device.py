"""Every attention kernel of the platform the tests run on, at sizes its hardware takes, against the reference.

`make test` runs this on CPU; `make test-gpu` and `make test-tpu` run it on the device of this machine.
"""

import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import assert_close, layout

from hybrid_attn import kernels

S, N, K, H = 700, 4, 2, 128  # no multiple of a block
LAYOUTS = {"one document": "a" * S, "padding at the end": "a" * 600 + "." * 100}
PACKED = {"packed": "a" * 250 + "b" + "c" * 400 + "." * 49, "only padding": "." * S}


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


WINDOWS = (None, 130) if jax.default_backend() == "cpu" else (None, 1, 130, 2 * S)  # tests/test_kernels.py has more of a CPU


@pytest.mark.parametrize("kernel, window", [(kernel, window) for kernel in HERE for window in WINDOWS])
def test_the_kernels_of_this_device_equal_the_reference_in_bfloat16(kernel, window):
    rng, layouts = np.random.default_rng(0), LAYOUTS | ({} if kernel == "cudnn" else PACKED)
    pos, seg = (np.stack(x) for x in zip(*map(layout, layouts.values()), strict=True))
    q, k, v = (rng.normal(size=(len(layouts), S, heads, H)).astype(jnp.bfloat16) for heads in (N, K, K))
    got = outcome(q, k, v, pos, seg, kernel, window)
    with jax.default_matmul_precision("highest"):
        expected = outcome(*(np.asarray(x, np.float32) for x in (q, k, v)), pos, seg, "reference", window)
    assert_close(got, expected, 1e-2)
