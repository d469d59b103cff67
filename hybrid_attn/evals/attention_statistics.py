"""Shares of attention that a few queries of a sequence give to its keys: streamed, block of keys by block, never T x S.

Queries are gathered from all shards of the `context` axis; every shard reads its own keys (`model/attention_sums.py`).

Letters: B sequences, T tokens per shard, Q queries, N query heads, K key/value heads, G = N/K, H head size, C keys per block,
I intervals of keys.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import LayerType
from hybrid_attn.kernels import AttentionOptions
from hybrid_attn.model import attention_sums
from hybrid_attn.model.attention_sums import Block, Sums
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import BATCH, HEADS_BTNH


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
        q_BKGQH, options = attention_sums.by_key_head(q_BQNH, K), AttentionOptions(None, scale, kind.softcap)
        sums = attention_sums.over_shards(_sums(options, q_BKGQH, k_BTKH, queries, (kind, pos_BQ, offset)))
        sums = attention_sums.with_sinks(sums, sinks_N)
        counts_BQ = (unclipped_BQ < end_B1).astype(jnp.float32)
        weights_BQ = counts_BQ / counts_BQ.sum(1, keepdims=True)
        mass_BKGI = jnp.einsum("BKGQI,BQ->BKGI", sums.interval_sums_BKGQI / sums.denominator_BKGQ[..., None], weights_BQ)
        entropy_BKG = jnp.einsum("BKGQ,BQ->BKG", attention_sums.entropy_bits(sums), weights_BQ)
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


def _sums(options: AttentionOptions, q_BKGQH, k_BTKH, queries: Queries, where: tuple) -> Sums:
    """Over this shard's keys; `where` has the layer type, the queries' positions and that of the shard's first key."""
    (kind, pos_BQ, offset), size = where, attention_sums.block_size(k_BTKH)
    oldest_BQ1, pos_BQ1 = oldest_key(kind, pos_BQ)[..., None], pos_BQ[..., None]

    def block_at(at) -> Block:
        key_C = offset + at + jnp.arange(size)
        inside_BIC = (key_C >= queries.first_BI[..., None]) & (key_C < queries.end_BI[..., None])
        return Block((key_C <= pos_BQ1) & (key_C >= oldest_BQ1), inside_BIC, key_C)

    first = jnp.maximum(oldest_BQ1.min() - offset, 0) // size
    last = jnp.clip((pos_BQ.max() - offset) // size, -1, (k_BTKH.shape[1] - 1) // size)
    return attention_sums.sums_over(options, q_BKGQH, k_BTKH, block_at, queries.first_BI.shape[1], (first, last + 1))
