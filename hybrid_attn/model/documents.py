"""Sums over the documents of packed sequences. P documents of a sequence, numbered by their segment, from 1."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.parallel.mesh import BATCH, TOKENS_BT


def sums_of_documents(values_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The sums of `values_BT` over the tokens of documents [B, P], P = T: document p is at p - 1; 0 where there is none."""
    T = values_BT.shape[1]

    def shard(values_Bt, segments_Bt):
        add = jax.vmap(lambda values_t, segments_t: jax.ops.segment_sum(values_t, segments_t, T + 1))
        return jax.lax.psum(add(values_Bt, segments_Bt), "context")[:, 1:]  # segment 0 is padding

    sums = jax.shard_map(shard, in_specs=(TOKENS_BT, TOKENS_BT), out_specs=P(BATCH, None))
    return sums(jax.reshard(values_BT, TOKENS_BT), jax.reshard(segments_BT, TOKENS_BT))


def of_each_token(values_BP: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """The value [B, T] of the document of each token, of `values_BP` as `sums_of_documents` gives them; 0 for padding."""

    def shard(values_BP, segments_Bt):
        return jnp.take_along_axis(jnp.pad(values_BP, ((0, 0), (1, 0))), segments_Bt, axis=1)

    take = jax.shard_map(shard, in_specs=(P(BATCH, None), TOKENS_BT), out_specs=TOKENS_BT)
    return take(values_BP, jax.reshard(segments_BT, TOKENS_BT))


def halves_of_pairs(values_BT: jax.Array, segments_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The sums over the chosen and over the rejected completion of each pair [B, T // 2]; 0 where there is none.

    Of pair j of a sequence, counted from 1, the chosen completion is document 2j - 1 and the rejected one 2j.
    """
    sums_BP = sums_of_documents(values_BT, segments_BT)
    halves = sums_BP.shape[1] // 2 * 2
    return sums_BP[:, 0:halves:2], sums_BP[:, 1:halves:2]
