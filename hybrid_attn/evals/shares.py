"""Shares of attention that a few queries of a row give to its keys: streamed, block of keys by block, never T x S.

Queries come from wherever on the `context` axis they lie; every shard reads its own keys, and what they found is merged as
the blocks are. A query's softmax has running sums: of e^(s - top), of e^(s - top) (s - top) for the entropy, and of the first
over the keys of each interval.

Letters: B rows, T tokens of a shard, Q queries, N query heads, K key/value heads, G = N/K, H head size, C keys of a block,
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


class Asked(NamedTuple):
    """Of each row: its first query (the others follow it), how many tokens it has, and intervals [first, end) of keys."""

    query_B: jax.Array
    length_B: jax.Array
    first_BI: jax.Array
    end_BI: jax.Array


class Shares(NamedTuple):
    """Mean over a row's queries of the share that each interval has, and of the entropy in bits; each query's greatest key.

    A logit without a key (`sink`) has a share too, which no interval has.
    """

    mass_BNI: jax.Array
    entropy_BN: jax.Array
    greatest_BNQ: jax.Array


class Sums(NamedTuple):
    """Over the keys seen so far: the greatest score, the sums below it, and the position of the greatest."""

    top_BKGQ: jax.Array
    total_BKGQ: jax.Array
    tilt_BKGQ: jax.Array
    parts_BKGQI: jax.Array
    greatest_BKGQ: jax.Array


def shares(q_BTNH, k_BTKH, asked: Asked, sinks_N, *, queries: int, kind: LayerType, scale: float) -> Shares:
    """Of queries and keys as they enter the scores, rows whose tokens are 0 to T - 1 in reading order.

    `queries` is the most that a row has. O(queries x T) time and O(queries x KEYS) memory; less time for a window or a chunk.
    """

    def shard(q_BTNH, k_BTKH, asked: Asked, *sinks):
        (B, T, N, _), K = q_BTNH.shape, k_BTKH.shape[2]
        offset = jax.lax.axis_index(AXIS) * T
        wanted_BQ, end_B1 = asked.query_B[:, None] + jnp.arange(queries), asked.length_B[:, None]
        pos_BQ = jnp.minimum(wanted_BQ, end_B1 - 1)  # past its tokens, the window of a row may hold no key
        q_BQNH = _from_all(q_BTNH, pos_BQ - offset)
        q_BKGQH = jnp.einsum("BQKGH->BKGQH", q_BQNH.reshape(B, queries, K, N // K, -1))
        sums = _over_shards(_sums(q_BKGQH, pos_BQ, k_BTKH, offset, asked, kind, scale))
        if sinks:
            sums = _with_sinks(sums, sinks[0].astype(jnp.float32).reshape(K, N // K, 1))
        counts_BQ = (wanted_BQ < end_B1).astype(jnp.float32)
        weights_BQ = counts_BQ / counts_BQ.sum(1, keepdims=True)
        mass_BKGI = jnp.einsum("BKGQI,BQ->BKGI", sums.parts_BKGQI / sums.total_BKGQ[..., None], weights_BQ)
        bits_BKGQ = (jnp.log(sums.total_BKGQ) - sums.tilt_BKGQ / sums.total_BKGQ) / math.log(2)
        entropy_BKG = jnp.einsum("BKGQ,BQ->BKG", bits_BKGQ, weights_BQ)
        return Shares(*(x.reshape(B, N, *x.shape[3:]) for x in (mass_BKGI, entropy_BKG, sums.greatest_BKGQ)))

    sinks, sink_specs = ((), ()) if sinks_N is None else ((sinks_N,), (P("tensor"),))
    rows = Asked(P(BATCH), P(BATCH), P(BATCH, None), P(BATCH, None))
    heads = Shares(P(BATCH, "tensor", None), P(BATCH, "tensor"), P(BATCH, "tensor", None))
    return jax.shard_map(
        shard, in_specs=(HEADS_BTNH, HEADS_BTNH, rows, *sink_specs), out_specs=heads, check_vma=False
    )(q_BTNH, k_BTKH, asked, *sinks)  # fmt: skip


def oldest_key(kind: LayerType, pos):
    """The first position that a query at `pos` sees."""
    if kind.chunk is not None:
        return pos // kind.chunk * kind.chunk
    return pos * 0 if kind.window is None else pos - kind.window + 1


def _from_all(q_BTNH, local_BQ) -> jax.Array:
    """The queries [B, Q, N, H] on every shard, from the one that has each; zeros where none has it."""
    T = q_BTNH.shape[1]
    here_BQ = (local_BQ >= 0) & (local_BQ < T)
    found_BQNH = jnp.take_along_axis(q_BTNH, jnp.clip(local_BQ, 0, T - 1)[..., None, None], axis=1)
    return jax.lax.psum(jnp.where(here_BQ[..., None, None], found_BQNH, 0), AXIS)


def _sums(q_BKGQH, pos_BQ, k_BTKH, offset, asked: Asked, kind: LayerType, scale: float) -> Sums:
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
        inside_BIC = (key_C >= asked.first_BI[..., None]) & (key_C < asked.end_BI[..., None])
        highest_BKGQ = jnp.where(see_B11QC, s_BKGQC, LOWEST).max(-1)
        greatest_BKGQ = key_C[jnp.where(see_B11QC, s_BKGQC, LOWEST).argmax(-1)]
        greatest_BKGQ = jnp.where(highest_BKGQ > sums.top_BKGQ, greatest_BKGQ, sums.greatest_BKGQ)
        sums = _below(sums, jnp.maximum(sums.top_BKGQ, highest_BKGQ))
        below_BKGQC = jnp.where(see_B11QC, s_BKGQC - sums.top_BKGQ[..., None], 0.0)
        p_BKGQC = jnp.where(see_B11QC, jnp.exp(below_BKGQC), 0.0)
        return Sums(
            sums.top_BKGQ,
            sums.total_BKGQ + p_BKGQC.sum(-1),
            sums.tilt_BKGQ + (p_BKGQC * below_BKGQC).sum(-1),
            sums.parts_BKGQI + jnp.einsum("BKGQC,BIC->BKGQI", p_BKGQC, inside_BIC.astype(jnp.float32), precision="highest"),
            greatest_BKGQ,
        )

    zero_BKGQ = jnp.zeros(q_BKGQH.shape[:-1])
    zero_BKGQI = jnp.zeros((*zero_BKGQ.shape, asked.first_BI.shape[1]))
    nothing = Sums(zero_BKGQ + LOWEST, zero_BKGQ, zero_BKGQ, zero_BKGQI, zero_BKGQ.astype(jnp.int32))
    first = jnp.maximum(oldest_BQ1.min() - offset, 0) // size
    last = jnp.clip((pos_BQ.max() - offset) // size, -1, (T - 1) // size)
    return jax.lax.fori_loop(first, last + 1, add, nothing)


def _below(sums: Sums, top_BKGQ) -> Sums:
    """The same sums below another, not lower, score."""
    drop_BKGQ = sums.top_BKGQ - top_BKGQ
    share_BKGQ = jnp.exp(drop_BKGQ)
    return Sums(
        top_BKGQ,
        share_BKGQ * sums.total_BKGQ,
        share_BKGQ * (sums.tilt_BKGQ + sums.total_BKGQ * drop_BKGQ),
        share_BKGQ[..., None] * sums.parts_BKGQI,
        sums.greatest_BKGQ,
    )


def _over_shards(sums: Sums) -> Sums:
    """What all shards of `context` found, on each of them."""
    top_BKGQ = jax.lax.pmax(sums.top_BKGQ, AXIS)
    greatest_BKGQ = jnp.where(sums.top_BKGQ == top_BKGQ, sums.greatest_BKGQ, jnp.iinfo(jnp.int32).max)
    _, *parts, _ = _below(sums, top_BKGQ)
    return Sums(top_BKGQ, *jax.lax.psum(parts, AXIS), jax.lax.pmin(greatest_BKGQ, AXIS))


def _with_sinks(sums: Sums, sink_KG1) -> Sums:
    """With one more score of each head, which is no key's."""
    sums = _below(sums, jnp.maximum(sums.top_BKGQ, sink_KG1))
    below_BKGQ = sink_KG1 - sums.top_BKGQ
    share_BKGQ = jnp.exp(below_BKGQ)
    total_BKGQ, tilt_BKGQ = sums.total_BKGQ + share_BKGQ, sums.tilt_BKGQ + share_BKGQ * below_BKGQ
    return sums._replace(total_BKGQ=total_BKGQ, tilt_BKGQ=tilt_BKGQ)
