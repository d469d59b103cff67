"""A short convolution adds to each token of a mixer's input a weighted sum of itself and the W - 1 tokens before it.

y_t = x_t + sum over i from 0 to W - 1 of w_i x_(t-i), over the tokens of the same document; each dimension has its own w. This
is a depthwise causal convolution with a residual on the input of the mixer, which is normed except in the block "post": the
layer Canon-A of "Physics of Language Models: Part 4.1" (arXiv 2512.17351). The weights start at zero, so that a model starts as
the one without them. Queries, keys and values, and the gate of an attention, are projected from y.

Letters: B batch, T tokens, D model, W taps, U = W - 1 earlier tokens, S tokens with those before them.
"""

import functools

import jax
import jax.numpy as jnp

from hybrid_attn.config import Model
from hybrid_attn.model.params import Weight, vector
from hybrid_attn.parallel import context


def taps(model: Model, width: int) -> Weight:
    """The weights [W, D]. Like those of norms they are used in float32, not decayed, and the same on every device."""
    return vector((width, model.d_model), ("tap", "norm"), 0.0, products=width * model.d_model)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def convolved(tokens: int, weight_WD: jax.Array, x_BSD: jax.Array, seg_BS: jax.Array) -> jax.Array:
    """y_BTD of the last `tokens` of x, in its dtype; tokens before the first of S count as zero. Padding stays as it is.

    The gradient is written by hand: on a CPU, XLA takes up to eighty times as long for sums over tokens as for a product, and a
    copy of x in float32 would be saved for each tap.
    """
    W, S = len(weight_WD), x_BSD.shape[1]
    earlier_BSD, earlier_seg_BS = (jnp.pad(x, [(0, 0), (W - 1, 0), *[(0, 0)] * (x.ndim - 2)]) for x in (x_BSD, seg_BS))
    own_BT = seg_BS[:, S - tokens :]
    y_BTD = x_BSD[:, S - tokens :].astype(jnp.float32)
    for i in range(W):
        of_tap = slice(W - 1 + S - tokens - i, W - 1 + S - i)
        same_BT = (earlier_seg_BS[:, of_tap] == own_BT) & (own_BT > 0)
        y_BTD += jnp.where(same_BT[..., None], weight_WD[i] * earlier_BSD[:, of_tap].astype(jnp.float32), 0.0)
    return y_BTD.astype(x_BSD.dtype)


def _forward(tokens: int, weight_WD: jax.Array, x_BSD: jax.Array, seg_BS: jax.Array):
    return convolved(tokens, weight_WD, x_BSD, seg_BS), (weight_WD, x_BSD, seg_BS)


def _backward(tokens: int, saved: tuple[jax.Array, jax.Array, jax.Array], dy_BTD: jax.Array):
    weight_WD, x_BSD, seg_BS = saved
    W, S, x32_BSD = len(weight_WD), x_BSD.shape[1], x_BSD.astype(jnp.float32)
    later_BSD = jnp.pad(dy_BTD.astype(jnp.float32), ((0, 0), (S - tokens, W - 1), (0, 0)))
    later_seg_BS = jnp.pad(seg_BS, ((0, 0), (0, W - 1)))
    dx_BSD, dweights = later_BSD[:, :S], []
    for i in range(W):
        same_BS, dy_BSD = (later_seg_BS[:, i : i + S] == seg_BS) & (seg_BS > 0), later_BSD[:, i : i + S]
        dx_BSD += jnp.where(same_BS[..., None], weight_WD[i] * dy_BSD, 0.0)
        dweights.append(jnp.einsum("BS,BSD->D", same_BS.astype(jnp.float32), dy_BSD * x32_BSD, precision="highest"))
    return jnp.stack(dweights), dx_BSD.astype(x_BSD.dtype), None


convolved.defvjp(_forward, _backward)


def convolve_packed(weight_WD: jax.Array, x_BTD: jax.Array, seg_BT: jax.Array, zigzag: bool) -> jax.Array:
    """y_BTD of packed sequences that the mesh may split: a shard gets the U tokens before each of its slices."""

    def of_slice(weight_WD: jax.Array, before_and_own: tuple[jax.Array, jax.Array], tokens: int) -> jax.Array:
        return convolved(tokens, weight_WD, *before_and_own)

    with jax.named_scope("short_conv"):
        return context.over_slices(of_slice, weight_WD, (x_BTD, seg_BT), len(weight_WD) - 1, zigzag)
