"""A short convolution: to each token of a layer's mixer it adds weighted tokens right before it, dimension by dimension.

y_t = x_t + sum over i from 0 to W - 1 of w_i x_(t-i), over the tokens of the same document. This is a depthwise causal
convolution with a residual on the input of the mixer, which is normed except in the block "post": the layer Canon-A of "Physics
of Language Models: Part 4.1" (arXiv 2512.17351). The weights start at zero, so that a model starts as the one without them.
Queries, keys and values, and the gate of an attention, are projected from y.

Letters: B batch, T tokens, D model, W taps, U = W - 1 earlier tokens, S tokens with those before them.
"""

import jax
import jax.numpy as jnp

from hybrid_attn.config import Model
from hybrid_attn.model.params import Weight, vector
from hybrid_attn.parallel import context


def taps(model: Model, width: int) -> Weight:
    """The weights [W, D]. Like those of norms they are used in float32, not decayed, and the same on every device."""
    return vector((width, model.d_model), ("tap", "norm"), 0.0, products=width * model.d_model)


def convolved(tokens: int, weight_WD: jax.Array, x_BSD: jax.Array, seg_BS: jax.Array) -> jax.Array:
    """y_BTD of the last `tokens` of x, in its dtype; before the first of S there is nothing, and segment 0 is unchanged."""
    W, T = len(weight_WD), tokens
    missing = max(W - 1 + T - x_BSD.shape[1], 0)
    x_BSD, seg_BS = jnp.pad(x_BSD, ((0, 0), (missing, 0), (0, 0))), jnp.pad(seg_BS, ((0, 0), (missing, 0)))
    first, own_BT = x_BSD.shape[1] - T, seg_BS[:, -T:]
    y_BTD = x_BSD[:, first:].astype(jnp.float32)
    for i in range(W):
        same_BT = (seg_BS[:, first - i :][:, :T] == own_BT) & (own_BT > 0)
        y_BTD += _tap(weight_WD[i], x_BSD[:, first - i :][:, :T].astype(jnp.float32), same_BT)
    return y_BTD.astype(x_BSD.dtype)


@jax.custom_vjp
def _tap(weight_D: jax.Array, x_BTD: jax.Array, same_BT: jax.Array) -> jax.Array:
    """weight * x where `same` says that the token is of the same document, else 0.

    The gradient of the weight is a product of matrices: XLA's sums over tokens take ten times as long on a CPU.
    """
    return jnp.where(same_BT[..., None], weight_D * x_BTD, 0.0)


def _tap_forward(weight_D, x_BTD, same_BT):
    return _tap(weight_D, x_BTD, same_BT), (weight_D, x_BTD, same_BT)


def _tap_backward(saved, dy_BTD):
    weight_D, x_BTD, same_BT = saved
    return jnp.einsum("BT,BTD->D", same_BT.astype(jnp.float32), dy_BTD * x_BTD), _tap(weight_D, dy_BTD, same_BT), None


_tap.defvjp(_tap_forward, _tap_backward)


def in_packed(weight_WD: jax.Array, x_BTD: jax.Array, seg_BT: jax.Array, zigzag: bool) -> jax.Array:
    """y_BTD of packed sequences that the mesh may split: a shard gets the U tokens before each of its slices."""

    def of_slice(weight_WD: jax.Array, before_and_own: tuple[jax.Array, jax.Array], tokens: int) -> jax.Array:
        return convolved(tokens, weight_WD, *before_and_own)

    with jax.named_scope("short_conv"):
        return context.over_slices(of_slice, weight_WD, (x_BTD, seg_BT), len(weight_WD) - 1, zigzag)
