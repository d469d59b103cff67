"""Sums over the keys that a few queries see: streamed, block of keys by block, never T x S.

A query's softmax has running sums: of e^(s - max), of e^(s - max) (s - max) for the entropy, and of the first over the keys of
each interval. Every shard of the `context` axis sums over its own keys; the sums of shards are merged as those of blocks are.

Letters: B sequences, T keys per shard, Q queries, N query heads, K key/value heads, G = N/K, H head size, C keys per block,
I intervals of keys.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from hybrid_attn.kernels import AttentionOptions
from hybrid_attn.kernels.softmax import soft_cap
from hybrid_attn.parallel.context import AXIS

KEYS = 1024  # of a block: its scores are Q x N x KEYS
LOWEST = -1e30  # finite, so that a shard whose keys no query sees gives 0 and not NaN


class Sums(NamedTuple):
    """Over the keys so far: the running maximum, the sums relative to it (see above), and the key that has the maximum."""

    max_BKGQ: jax.Array
    denominator_BKGQ: jax.Array
    weighted_scores_BKGQ: jax.Array
    interval_sums_BKGQI: jax.Array
    greatest_BKGQ: jax.Array


class Block(NamedTuple):
    """Which queries see which keys of a block, which intervals have them, and their numbers, as `greatest_BKGQ` has them."""

    see_BQC: jax.Array
    inside_BIC: jax.Array
    key_C: jax.Array


def by_key_head(x_BQNH: jax.Array, K: int) -> jax.Array:
    """Queries [B, K, G, Q, H]: the G heads that share a key/value head together."""
    B, Q, N, H = x_BQNH.shape
    return jnp.einsum("BQKGH->BKGQH", x_BQNH.reshape(B, Q, K, N // K, H))


def block_size(k_BTKH: jax.Array) -> int:
    return min(KEYS, k_BTKH.shape[1])


def sums_over(
    options: AttentionOptions,
    q_BKGQH: jax.Array,
    k_BTKH: jax.Array,
    block_at: Callable[[jax.Array], Block],
    num_intervals: int,
    bounds: tuple[jax.Array | int, jax.Array | int] | None = None,
) -> Sums:
    """Over this shard's keys; `block_at(at)` describes the `block_size` keys from `at` on.

    `options` give the scale and the soft cap of the scores. `bounds` are the first block and the one after the last that any
    query sees, by default all.
    """
    T, size = k_BTKH.shape[1], block_size(k_BTKH)

    def add(i, sums: Sums) -> Sums:
        at = jnp.minimum(i * size, T - size)  # the last block is moved back to end with the keys
        k_BCKH = jax.lax.dynamic_slice_in_dim(k_BTKH, at, size, 1)
        products_BKGQC = jnp.einsum(
            "BKGQH,BCKH->BKGQC", q_BKGQH, k_BCKH, preferred_element_type=jnp.float32, precision="highest"
        )
        block, new_C = block_at(at), at + jnp.arange(size) >= i * size
        return _added(sums, soft_cap(options.scale * products_BKGQC, options.softcap)[0], block, block.see_BQC & new_C)

    zero_BKGQ = jnp.zeros(q_BKGQH.shape[:-1])
    zero_BKGQI = jnp.zeros((*zero_BKGQ.shape, num_intervals))
    nothing = Sums(zero_BKGQ + LOWEST, zero_BKGQ, zero_BKGQ, zero_BKGQI, zero_BKGQ.astype(jnp.int32))
    first, end = bounds or (0, -(-T // size))
    return jax.lax.fori_loop(first, end, add, nothing)


def _added(sums: Sums, s_BKGQC: jax.Array, block: Block, see_BQC: jax.Array) -> Sums:
    """The sums over the keys of a block too."""
    see_B11QC = see_BQC[:, None, None]
    highest_BKGQ = jnp.where(see_B11QC, s_BKGQC, LOWEST).max(-1)
    greatest_BKGQ = block.key_C[jnp.where(see_B11QC, s_BKGQC, LOWEST).argmax(-1)]
    greatest_BKGQ = jnp.where(highest_BKGQ > sums.max_BKGQ, greatest_BKGQ, sums.greatest_BKGQ)
    sums = _below(sums, jnp.maximum(sums.max_BKGQ, highest_BKGQ))
    below_BKGQC = jnp.where(see_B11QC, s_BKGQC - sums.max_BKGQ[..., None], 0.0)
    p_BKGQC = jnp.where(see_B11QC, jnp.exp(below_BKGQC), 0.0)
    intervals_BKGQI = jnp.einsum("BKGQC,BIC->BKGQI", p_BKGQC, block.inside_BIC.astype(jnp.float32), precision="highest")
    return Sums(
        sums.max_BKGQ,
        sums.denominator_BKGQ + p_BKGQC.sum(-1),
        sums.weighted_scores_BKGQ + (p_BKGQC * below_BKGQC).sum(-1),
        sums.interval_sums_BKGQI + intervals_BKGQI,
        greatest_BKGQ,
    )


def _below(sums: Sums, max_BKGQ: jax.Array) -> Sums:
    """The same sums below another, not lower, score."""
    drop_BKGQ = sums.max_BKGQ - max_BKGQ
    share_BKGQ = jnp.exp(drop_BKGQ)
    return Sums(
        max_BKGQ,
        share_BKGQ * sums.denominator_BKGQ,
        share_BKGQ * (sums.weighted_scores_BKGQ + sums.denominator_BKGQ * drop_BKGQ),
        share_BKGQ[..., None] * sums.interval_sums_BKGQI,
        sums.greatest_BKGQ,
    )


def over_shards(sums: Sums) -> Sums:
    """The sums over the keys of all shards of `context`, on each of them."""
    max_BKGQ = jax.lax.pmax(sums.max_BKGQ, AXIS)
    greatest_BKGQ = jnp.where(sums.max_BKGQ == max_BKGQ, sums.greatest_BKGQ, jnp.iinfo(jnp.int32).max)
    _, *parts, _ = _below(sums, max_BKGQ)
    return Sums(max_BKGQ, *jax.lax.psum(parts, AXIS), jax.lax.pmin(greatest_BKGQ, AXIS))


def with_sinks(sums: Sums, sinks_N: jax.Array | None) -> Sums:
    """With one more score of each head, which is no key's; `sinks_N` None adds none."""
    if sinks_N is None:
        return sums
    sink_KG1 = sinks_N.astype(jnp.float32).reshape(*sums.max_BKGQ.shape[1:3], 1)
    sums = _below(sums, jnp.maximum(sums.max_BKGQ, sink_KG1))
    below_BKGQ = sink_KG1 - sums.max_BKGQ
    share_BKGQ = jnp.exp(below_BKGQ)
    denominator_BKGQ = sums.denominator_BKGQ + share_BKGQ
    weighted_scores_BKGQ = sums.weighted_scores_BKGQ + share_BKGQ * below_BKGQ
    return sums._replace(denominator_BKGQ=denominator_BKGQ, weighted_scores_BKGQ=weighted_scores_BKGQ)


def entropy_bits(sums: Sums) -> jax.Array:
    """The entropy of each query's softmax [B, K, G, Q]."""
    return (jnp.log(sums.denominator_BKGQ) - sums.weighted_scores_BKGQ / sums.denominator_BKGQ) / math.log(2)
