"""What a forward pass tells about a layer: its attention logits, from a sample of queries, and its activations.

The numbers of each sequence stay apart here; `train/statistics.py` sums them over layers, microbatches and sequences.

Letters: B sequences, T tokens (in a shard: of this shard), Q sampled queries, N query heads, K key/value heads, H head size,
D model.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.kernels import AttentionOptions
from hybrid_attn.kernels.reference import visible_BTS
from hybrid_attn.model import attention_sums
from hybrid_attn.model.attention_sums import Block
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import BATCH, HEADS_BTNH, TOKENS_BT

QUERIES = 64  # sampled of each sequence, evenly spaced; of each context shard an equal number, and two at least
TINY = 1e-20  # beside a number that may be zero
OUTLIER = 6.0  # root mean squares of a token's activations; of numbers from a normal distribution one in 5e8 is beyond


class AttentionStatistics(NamedTuple):
    """Of the sampled queries of each sequence: the largest score, and sums of the entropy and of the first token's share.

    A score counts after the soft cap. The first token is that of the query's document; where the window does not reach it, its
    share is 0. Padding is no query. A learned logit (`sink`) takes part in the softmax and is no score.
    """

    max_logit_BN: jax.Array
    entropy_bits_BN: jax.Array
    first_token_share_BN: jax.Array
    queries_B: jax.Array


class ActivationStatistics(NamedTuple):
    """Of each sequence's tokens but for padding: sums of the mean square and of the number of outliers, beyond `OUTLIER`."""

    mean_square_B: jax.Array
    outliers_B: jax.Array
    tokens_B: jax.Array


class LayerStatistics(NamedTuple):
    """`attention` is None of a layer that compares no queries with keys; `aux` is that of its mixer and of its feed-forward."""

    attention: AttentionStatistics | None
    activations: ActivationStatistics
    aux: dict[str, jax.Array]


def of_attention(
    options: AttentionOptions, q_BTNH: jax.Array, k_BTKH: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, sinks_N
) -> AttentionStatistics:
    """Of queries and keys as they enter the scores. O(Q x T) time, O(Q x KEYS) memory; nothing is differentiated.

    Each shard of `context` gathers the sampled queries of all of them.
    """

    def shard(q_BTNH, k_BTKH, pos_BT, seg_BT, sinks_N):
        (B, T, N, _), size = q_BTNH.shape, attention_sums.block_size(k_BTKH)
        sample_Q = sampled(T, jax.lax.axis_size(AXIS))
        local = (x[:, sample_Q] for x in (q_BTNH, pos_BT, seg_BT))
        q_BQNH, pos_BQ, seg_BQ = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in local)

        def block_at(at) -> Block:
            pos_BC, seg_BC = (jax.lax.dynamic_slice_in_dim(x, at, size, 1) for x in (pos_BT, seg_BT))
            see_BQC = visible_BTS(pos_BQ, pos_BC, seg_BQ, seg_BC, options.window)
            return Block(see_BQC, (pos_BC == 0)[:, None], at + jnp.arange(size))

        q_BKGQH = attention_sums.by_key_head(q_BQNH, k_BTKH.shape[2])
        sums = attention_sums.over_shards(attention_sums.sums_over(options, q_BKGQH, k_BTKH, block_at, 1))
        max_logit_BN = sums.max_BKGQ.max(-1).reshape(B, N)
        sums, real_BQ = attention_sums.with_sinks(sums, sinks_N), seg_BQ > 0
        shares_BKGQ = sums.interval_sums_BKGQI[..., 0] / sums.denominator_BKGQ
        parts = (jnp.where(real_BQ[:, None, None], x, 0.0) for x in (attention_sums.entropy_bits(sums), shares_BKGQ))
        totals = (x.sum(-1).reshape(B, N) for x in parts)
        return AttentionStatistics(max_logit_BN, *totals, real_BQ.sum(1).astype(jnp.float32))

    heads = P(BATCH, "tensor")
    return jax.shard_map(
        shard,
        in_specs=(HEADS_BTNH, HEADS_BTNH, TOKENS_BT, TOKENS_BT, P("tensor")),
        out_specs=AttentionStatistics(heads, heads, heads, P(BATCH)),
        check_vma=False,
    )(*jax.lax.stop_gradient((q_BTNH, k_BTKH, pos_BT, seg_BT, sinks_N)))


def sampled(T: int, shards: int) -> np.ndarray:
    """The indices of the sampled queries among the T tokens of one of so many context shards.

    They are evenly spaced. Of a shard in zigzag order, whose two halves lie apart in the sequence, each half has some.
    """
    count = min(max(QUERIES // shards, 2), T)
    return (2 * np.arange(count) + 1) * T // (2 * count)


def mean_over_tokens(x_BTA: jax.Array, real_BT: jax.Array) -> jax.Array:
    """The mean [A] over all real tokens of a batch; zeros where there are none."""
    return jnp.where(real_BT[..., None], x_BTA, 0.0).sum((0, 1)) / jnp.maximum(real_BT.sum(), 1.0)


def mean_entropy_bits(probability_BTE: jax.Array, real_BT: jax.Array) -> jax.Array:
    """The entropy of the probabilities of a token's experts, a mean over all real tokens."""
    return -mean_over_tokens(probability_BTE * jnp.log2(probability_BTE + TINY), real_BT).sum()


def of_activations(x_BTD: jax.Array, seg_BT: jax.Array) -> ActivationStatistics:
    """Of the output of a layer; nothing is differentiated."""
    square_BTD = jnp.square(jax.lax.stop_gradient(x_BTD).astype(jnp.float32))
    mean_BT, real_BT = square_BTD.mean(-1), (seg_BT > 0).astype(jnp.float32)
    outliers_BT = (square_BTD > OUTLIER**2 * mean_BT[..., None]).sum(-1)
    return ActivationStatistics((real_BT * mean_BT).sum(1), (real_BT * outliers_BT).sum(1), real_BT.sum(1))
