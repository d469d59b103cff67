"""Every mask as one interval of key indices per query.

Keys come in reading order: segments never decrease along the sequence and positions increase within a segment, with padding
(segment 0) anywhere. Then the keys that a query sees are contiguous, and two binary searches find them.
"""

import jax
import jax.numpy as jnp

from hybrid_attn.kernels.interface import Keys, Pair, Queries

LAST = jnp.iinfo(jnp.int32).max


def intervals(window: int | None, queries: Queries, keys: Keys) -> Pair:
    """(first_BT, end_BT) int32: query t sees keys first <= s < end; first == end for a query that sees nothing.

    Padding between the keys of one segment would fall inside the interval; padding at either end of a segment does not.
    """
    (_, q_pos_BT, q_seg_BT), (_, _, k_pos_BS, k_seg_BS) = queries, keys
    seg_BS = jax.lax.cummax(k_seg_BS, axis=1)
    pos_BS = jnp.where(k_seg_BS > 0, k_pos_BS, LAST)
    oldest_BT = jnp.zeros_like(q_pos_BT) if window is None else q_pos_BT - window + 1
    first_BT = _count_before(seg_BS, pos_BS, q_seg_BT, oldest_BT)
    end_BT = _count_before(seg_BS, pos_BS, q_seg_BT, q_pos_BT + 1)
    padding_BT = q_seg_BT == 0
    return jnp.where(padding_BT, 0, first_BT), jnp.where(padding_BT, 0, jnp.maximum(first_BT, end_BT))


def _count_before(seg_BS, pos_BS, q_seg_BT, q_pos_BT) -> jax.Array:
    """How many keys come before (q_seg, q_pos) in the order of (segment, position)."""
    S = seg_BS.shape[1]
    take = jax.vmap(lambda keys_S, index_T: keys_S[index_T])

    def halve(_, bounds):
        low_BT, high_BT = bounds
        middle_BT = (low_BT + high_BT) // 2
        index_BT = jnp.minimum(middle_BT, S - 1)
        seg_BT, pos_BT = take(seg_BS, index_BT), take(pos_BS, index_BT)
        before_BT = (seg_BT < q_seg_BT) | ((seg_BT == q_seg_BT) & (pos_BT < q_pos_BT))
        open_BT = low_BT < high_BT
        return (
            jnp.where(open_BT & before_BT, middle_BT + 1, low_BT),
            jnp.where(open_BT & ~before_BT, middle_BT, high_BT),
        )

    start_BT = jnp.zeros_like(q_pos_BT)
    return jax.lax.fori_loop(0, S.bit_length(), halve, (start_BT, start_BT + S))[0]
