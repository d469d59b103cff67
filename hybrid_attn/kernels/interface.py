"""The interface of a kernel: a forward and a backward function, what passes between them, and the mask as intervals of keys.

Letters: B batch, T query tokens, S key tokens, N query heads, K key/value heads, H head size.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

OUTPUTS = "attention outputs"
LAST = jnp.iinfo(jnp.int32).max
Pair = tuple[jax.Array, jax.Array]


class AttentionOptions(NamedTuple):
    """What is static in the mask and the scores.

    A query sees the keys of its own segment at positions p_q - window < p_k <= p_q, with `window` None all earlier ones.
    `softcap` c makes scores c tanh(s / c).
    """

    window: int | None
    scale: float
    softcap: float | None = None


class Queries(NamedTuple):
    """Queries with their positions and segments, [B, T, ...] each. Segment 0 is padding, which sees nothing."""

    q_BTNH: jax.Array
    pos_BT: jax.Array
    seg_BT: jax.Array


class Keys(NamedTuple):
    """Keys and values with their positions and segments, [B, S, ...] each."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    pos_BS: jax.Array
    seg_BS: jax.Array


class Kernel(NamedTuple):
    """A pair of functions, the platforms that it runs on, and the package that it needs beyond JAX.

    `forward(options, queries, keys)` gives o_BTNH in the dtype of q, and lse_BTN in float32; zeros and -inf for a query that
    sees no key. `backward(options, queries, keys, outputs, grads)` gives (dq_BTNH, dk_BSKH, dv_BSKH) in the dtypes of q, k and
    v; `grads` are those by `outputs`, (o, lse). The outputs may be merged results over more keys than `keys`: the gradients are
    then the contribution of these keys, and dq is one term of a sum over all keys.

    Without `saves_outputs`, JAX differentiates `forward`, and `jax.checkpoint` cannot save its outputs by name. `backward` may
    then be None, and ring attention cannot use the kernel. With `heads_first` the outputs are saved as [B, N, T, ...], as the
    kernel writes them: a TPU pads the last two axes of an array. Sinks need an lse that has a gradient.

    `decode` is attention of one query for each request to its cache, by default that of `decoding.py`.
    """

    forward: Callable[[AttentionOptions, Queries, Keys], Pair]
    backward: Callable[[AttentionOptions, Queries, Keys, Pair, Pair], tuple[jax.Array, jax.Array, jax.Array]] | None
    platforms: tuple[str, ...]
    needs: str | None = None
    saves_outputs: bool = True
    heads_first: bool = False
    lse_has_gradient: bool = True
    decode: Callable[[AttentionOptions, bool, jax.Array, Pair, jax.Array], Pair] | None = None


def name_outputs(*outputs: jax.Array) -> tuple[jax.Array, ...]:
    """The outputs of a forward pass, under the name by which `jax.checkpoint` can save them for the backward pass."""
    return tuple(checkpoint_name(x, OUTPUTS) for x in outputs)


def padded(x_BT: jax.Array, size: int) -> jax.Array:
    """[B, T, ...] padded with zeros along axis 1 to a multiple of `size`."""
    return jnp.pad(x_BT, [(0, 0), (0, -x_BT.shape[1] % size)] + [(0, 0)] * (x_BT.ndim - 2))


def intervals(window: int | None, queries: Queries, keys: Keys) -> Pair:
    """(first_BT, end_BT) int32: query t sees keys first <= s < end; first == end for a query that sees nothing.

    Keys come in reading order: segments never decrease along the sequence and positions increase within a segment, and padding
    lies anywhere but between the keys of a segment. What a query sees is then contiguous, and two binary searches find it.
    """
    seg_BS, pos_BS = in_search_order(keys)
    take = jax.vmap(lambda keys_S, index_T: keys_S[index_T])

    def keys_at(index_BT):
        return take(seg_BS, index_BT), take(pos_BS, index_BT)

    return search_intervals(window, queries.pos_BT, queries.seg_BT, keys_at, seg_BS.shape[1])


def in_search_order(keys: Keys) -> Pair:
    """Segments and positions of keys, in which padding counts to the segment before it and lies after all of its positions."""
    return jax.lax.cummax(keys.seg_BS, axis=1), jnp.where(keys.seg_BS > 0, keys.pos_BS, LAST)


def search_intervals(window: int | None, pos_BT, seg_BT, keys_at: Callable[[jax.Array], Pair], S: int) -> Pair:
    """`intervals` of queries among S keys; `keys_at` gives the segments and the positions `in_search_order` at indices."""
    oldest_BT = jnp.zeros_like(pos_BT) if window is None else pos_BT - window + 1
    first_BT = _count_before(seg_BT, oldest_BT, keys_at, S)
    end_BT = _count_before(seg_BT, pos_BT + 1, keys_at, S)
    padding_BT = seg_BT == 0
    return jnp.where(padding_BT, 0, first_BT), jnp.where(padding_BT, 0, jnp.maximum(first_BT, end_BT))


def _count_before(q_seg_BT, q_pos_BT, keys_at, S: int) -> jax.Array:
    """How many keys come before (q_seg, q_pos) in the order of (segment, position)."""

    def halve(_, bounds):
        low_BT, high_BT = bounds
        middle_BT = (low_BT + high_BT) // 2
        seg_BT, pos_BT = keys_at(jnp.minimum(middle_BT, S - 1))
        before_BT = (seg_BT < q_seg_BT) | ((seg_BT == q_seg_BT) & (pos_BT < q_pos_BT))
        open_BT = low_BT < high_BT
        low_BT = jnp.where(open_BT & before_BT, middle_BT + 1, low_BT)
        return low_BT, jnp.where(open_BT & ~before_BT, middle_BT, high_BT)

    start_BT = jnp.zeros_like(q_pos_BT)
    return jax.lax.fori_loop(0, S.bit_length(), halve, (start_BT, start_BT + S))[0]
