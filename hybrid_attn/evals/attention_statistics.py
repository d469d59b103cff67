"""Shares of attention that a few queries of a sequence give to its keys: streamed, block of keys by block, never T x S.

Queries are gathered from all shards of the `context` axis; every shard reads its own keys, and the results of shards are merged
as those of blocks are. A query's softmax has running sums: of e^(s - max), of e^(s - max) (s - max) for the entropy, and of the
first over the keys of each interval.

Letters: B sequences, T tokens per shard, Q queries, N query heads, K key/value heads, G = N/K, H head size, C keys per block,
I intervals of keys.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import LayerType
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import BATCH, HEADS_BTNH

KEYS = 1024  # of a block: its scores are Q x N x KEYS
LOWEST = -1e30  # finite, so that a shard whose keys no query sees gives 0 and not NaN


class Queries(NamedTuple):
    """Of each sequence: its first query (the others follow it), how many tokens it has, and intervals [first, end) of keys."""

    query_B: jax.Array
    length_B: jax.Array
    first_BI: jax.Array
    end_BI: jax.Array


class AttentionStatistics(NamedTuple):
    """Mean over a sequence's queries of the share that each interval has, and of the entropy in bits; each query's top key.

    A logit without a key (`sink`) has a share too, which no interval has.
    """

    mass_BNI: jax.Array
    entropy_BN: jax.Array
    greatest_BNQ: jax.Array


class Sums(NamedTuple):
    """Over the keys so far: the running maximum, the sums relative to it (see above), and the position of the maximum."""

    max_BKGQ: jax.Array
    denominator_BKGQ: jax.Array
    weighted_scores_BKGQ: jax.Array
    interval_sums_BKGQI: jax.Array
    greatest_BKGQ: jax.Array


def statistics_of(
    q_BTNH, k_BTKH, queries: Queries, sinks_N, *, num_queries: int, kind: LayerType, scale: float
) -> AttentionStatistics:
    """Of queries and keys as they enter the scores, sequences whose tokens are 0 to T - 1 in reading order.

    `num_queries` is the most that a sequence has. O(queries x T) time, less for a window or a chunk; O(queries x KEYS) memory.
    """

    def shard(q_BTNH, k_BTKH, queries: Queries, sinks_N):
        (B, T, N, _), K = q_BTNH.shape, k_BTKH.shape[2]
        offset = jax.lax.axis_index(AXIS) * T
        unclipped_BQ, end_B1 = queries.query_B[:, None] + jnp.arange(num_queries), queries.length_B[:, None]
        pos_BQ = jnp.minimum(unclipped_BQ, end_B1 - 1)  # past its tokens, the window of a sequence may hold no key
        q_BQNH = _from_all(q_BTNH, pos_BQ - offset)
        q_BKGQH = jnp.einsum("BQKGH->BKGQH", q_BQNH.reshape(B, num_queries, K, N // K, -1))
        sums = _over_shards(_sums(q_BKGQH, pos_BQ, k_BTKH, offset, queries, kind, scale))
        if sinks_N is not None:
            sums = _with_sinks(sums, sinks_N.astype(jnp.float32).reshape(K, N // K, 1))
        counts_BQ = (unclipped_BQ < end_B1).astype(jnp.float32)
        weights_BQ = counts_BQ / counts_BQ.sum(1, keepdims=True)
        mass_BKGI = jnp.einsum("BKGQI,BQ->BKGI", sums.interval_sums_BKGQI / sums.denominator_BKGQ[..., None], weights_BQ)
        bits_BKGQ = (jnp.log(sums.denominator_BKGQ) - sums.weighted_scores_BKGQ / sums.denominator_BKGQ) / math.log(2)
        entropy_BKG = jnp.einsum("BKGQ,BQ->BKG", bits_BKGQ, weights_BQ)
        return AttentionStatistics(*(x.reshape(B, N, *x.shape[3:]) for x in (mass_BKGI, entropy_BKG, sums.greatest_BKGQ)))

    sequences = Queries(P(BATCH), P(BATCH), P(BATCH, None), P(BATCH, None))
    heads = AttentionStatistics(P(BATCH, "tensor", None), P(BATCH, "tensor"), P(BATCH, "tensor", None))
    return jax.shard_map(
        shard, in_specs=(HEADS_BTNH, HEADS_BTNH, sequences, P("tensor")), out_specs=heads, check_vma=False
    )(q_BTNH, k_BTKH, queries, sinks_N)  # fmt: skip


def oldest_key(kind: LayerType, pos):
    """The first position that a query at `pos` sees."""
    if kind.chunk is not None:
        return pos // kind.chunk * kind.chunk
    return pos * 0 if kind.window is None else pos - kind.window + 1


def _from_all(q_BTNH, local_BQ) -> jax.Array:
    """The queries [B, Q, N, H] on every shard, from the one that has each; zeros where none has it."""
    T = q_BTNH.shape[1]
    here_BQ = (local_BQ >= 0) & (local_BQ < T)
    local_BQNH = jnp.take_along_axis(q_BTNH, jnp.clip(local_BQ, 0, T - 1)[..., None, None], axis=1)
    return jax.lax.psum(jnp.where(here_BQ[..., None, None], local_BQNH, 0), AXIS)


def _sums(q_BKGQH, pos_BQ, k_BTKH, offset, queries: Queries, kind: LayerType, scale: float) -> Sums:
    """Over this shard's keys, the first of which stands at `offset`."""
    T, size = k_BTKH.shape[1], min(KEYS, k_BTKH.shape[1])
    oldest_BQ1, pos_BQ1 = oldest_key(kind, pos_BQ)[..., None], pos_BQ[..., None]

    def add(i, sums: Sums) -> Sums:
        at = jnp.minimum(i * size, T - size)  # the last block is moved back to end with the keys
        k_BCKH = jax.lax.dynamic_slice_in_dim(k_BTKH, at, size, 1)
        s_BKGQC = scale * jnp.einsum(
            "BKGQH,BCKH->BKGQC", q_BKGQH, k_BCKH, preferred_element_type=jnp.float32, precision="highest"
        )
        if kind.softcap is not None:
            s_BKGQC = kind.softcap * jnp.tanh(s_BKGQC / kind.softcap)
        key_C = offset + at + jnp.arange(size)
        see_BQC = (key_C <= pos_BQ1) & (key_C >= oldest_BQ1) & (key_C >= offset + i * size)
        see_B11QC = see_BQC[:, None, None]
        highest_BKGQ = jnp.where(see_B11QC, s_BKGQC, LOWEST).max(-1)
        greatest_BKGQ = key_C[jnp.where(see_B11QC, s_BKGQC, LOWEST).argmax(-1)]
        greatest_BKGQ = jnp.where(highest_BKGQ > sums.max_BKGQ, greatest_BKGQ, sums.greatest_BKGQ)
        sums = _below(sums, jnp.maximum(sums.max_BKGQ, highest_BKGQ))
        below_BKGQC = jnp.where(see_B11QC, s_BKGQC - sums.max_BKGQ[..., None], 0.0)
        p_BKGQC = jnp.where(see_B11QC, jnp.exp(below_BKGQC), 0.0)
        inside_BIC = ((key_C >= queries.first_BI[..., None]) & (key_C < queries.end_BI[..., None])).astype(jnp.float32)
        intervals_BKGQI = jnp.einsum("BKGQC,BIC->BKGQI", p_BKGQC, inside_BIC, precision="highest")
        return Sums(
            sums.max_BKGQ,
            sums.denominator_BKGQ + p_BKGQC.sum(-1),
            sums.weighted_scores_BKGQ + (p_BKGQC * below_BKGQC).sum(-1),
            sums.interval_sums_BKGQI + intervals_BKGQI,
            greatest_BKGQ,
        )

    zero_BKGQ = jnp.zeros(q_BKGQH.shape[:-1])
    zero_BKGQI = jnp.zeros((*zero_BKGQ.shape, queries.first_BI.shape[1]))
    nothing = Sums(zero_BKGQ + LOWEST, zero_BKGQ, zero_BKGQ, zero_BKGQI, zero_BKGQ.astype(jnp.int32))
    first = jnp.maximum(oldest_BQ1.min() - offset, 0) // size
    last = jnp.clip((pos_BQ.max() - offset) // size, -1, (T - 1) // size)
    return jax.lax.fori_loop(first, last + 1, add, nothing)


def _below(sums: Sums, max_BKGQ) -> Sums:
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


def _over_shards(sums: Sums) -> Sums:
    """The sums over the keys of all shards of `context`, on each of them."""
    max_BKGQ = jax.lax.pmax(sums.max_BKGQ, AXIS)
    greatest_BKGQ = jnp.where(sums.max_BKGQ == max_BKGQ, sums.greatest_BKGQ, jnp.iinfo(jnp.int32).max)
    _, *parts, _ = _below(sums, max_BKGQ)
    return Sums(max_BKGQ, *jax.lax.psum(parts, AXIS), jax.lax.pmin(greatest_BKGQ, AXIS))


def _with_sinks(sums: Sums, sink_KG1) -> Sums:
    """With one more score of each head, which is no key's."""
    sums = _below(sums, jnp.maximum(sums.max_BKGQ, sink_KG1))
    below_BKGQ = sink_KG1 - sums.max_BKGQ
    share_BKGQ = jnp.exp(below_BKGQ)
    denominator_BKGQ = sums.denominator_BKGQ + share_BKGQ
    weighted_scores_BKGQ = sums.weighted_scores_BKGQ + share_BKGQ * below_BKGQ
    return sums._replace(denominator_BKGQ=denominator_BKGQ, weighted_scores_BKGQ=weighted_scores_BKGQ)
