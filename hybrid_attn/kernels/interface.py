"""The interface of a kernel: a forward and a backward function, and what passes between them.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head size.
"""

from typing import NamedTuple, Protocol

import jax
from jax.ad_checkpoint import checkpoint_name

OUTPUTS = "attention outputs"
Pair = tuple[jax.Array, jax.Array]  # of the queries [B, T] and of the keys [B, S]


class AttentionOptions(NamedTuple):
    """The static arguments: `window` None means all earlier tokens; `softcap` c makes scores c tanh(s / c)."""

    window: int | None
    scale: float
    softcap: float | None


class Residuals(NamedTuple):
    """The inputs of attention and its results, from which the gradients are computed."""

    q_BTNH: jax.Array
    k_BSKH: jax.Array
    v_BSKH: jax.Array
    positions: Pair
    segments: Pair
    o_BTNH: jax.Array
    lse_BTN: jax.Array


class Forward(Protocol):
    def __call__(
        self, q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array,
        positions: Pair, segments: Pair, options: AttentionOptions,
    ) -> tuple[jax.Array, jax.Array]:  # fmt: skip
        """o_BTNH in the dtype of q, and lse_BTN in float32. A query that sees no key gives zeros and -inf."""
        ...


class Backward(Protocol):
    def __call__(
        self, residuals: Residuals, do_BTNH: jax.Array, dlse_BTN: jax.Array, options: AttentionOptions
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """The gradients (dq_BTNH, dk_BSKH, dv_BSKH), in the dtypes of q, k and v.

        o and lse may be merged results over more keys than those of the residuals. The gradients are then the contribution
        of these keys: dq is one term of a sum over all keys.
        """
        ...


class Kernel(NamedTuple):
    """A pair of functions, the platforms that it runs on, and the package that it needs beyond JAX.

    `backward` None means that ring attention cannot use the kernel. Without `saves_outputs`, JAX differentiates `forward`, and
    `jax.checkpoint` cannot save its outputs by name. With `heads_first` they are saved as [B, N, T, ...], the order in which
    the kernel writes them: a TPU pads the last two axes of an array. Sinks need an lse that has a gradient.
    """

    forward: Forward
    backward: Backward | None
    platforms: tuple[str, ...]
    needs: str | None = None
    saves_outputs: bool = True
    heads_first: bool = False
    lse_has_gradient: bool = True


def name_outputs(*outputs: jax.Array) -> tuple[jax.Array, ...]:
    """The outputs of a forward pass, under the name by which `jax.checkpoint` can save them for the backward pass."""
    return tuple(checkpoint_name(x, OUTPUTS) for x in outputs)
