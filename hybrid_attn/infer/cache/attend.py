"""Attention of new tokens to one layer's cache, on one device or on a mesh.

Where the mesh has a `context` axis of c shards, every shard has a copy of a ring. The slots of other layers are distributed
block-cyclically: `span` slots to the first shard, `span` to the next, and so on in turn. A chunk of c x span new tokens, of
which each shard computes a part, then fills the same slots of every shard, and the shards hold equally many. Queries go to
all shards, and the partial results are merged by their log-sum-exp; the communication is the same at any length.

Letters: B requests, T new tokens, S slots, N query heads, K key/value heads, G = N/K, H head size.
"""

import jax
from jax.sharding import PartitionSpec as P

from hybrid_attn import kernels
from hybrid_attn.infer.cache.read import attend_ring, attend_slots
from hybrid_attn.infer.cache.shapes import LayerCache, LayerSettings, partition_specs
from hybrid_attn.infer.cache.write import written
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import BATCH, spec_of


def attend(
    qkv: tuple[jax.Array, jax.Array, jax.Array],
    layer: LayerCache,
    settings: LayerSettings,
    lengths_B: jax.Array,
    counts_B: jax.Array,
    sinks_N: jax.Array | None = None,
) -> tuple[jax.Array, LayerCache]:
    """(o_BTNH, layer): new tokens (q_BTNH, k_BTKH, v_BTKH) see the cache and each other, and are written to it.

    Request b had `lengths_B[b]` tokens. The first `counts_B[b]` of its T tokens are new; the others are padding and give zeros.
    The layer must have room for the new tokens. T is sharded over `context` as q is; or T is at most `span`, and every shard
    has all of it.
    """
    spec, layer_specs = spec_of(qkv[0]), partition_specs(layer)
    split = spec[1] == AXIS

    def shard(qkv, layer, lengths_B, counts_B, *sinks):
        q_BTNH, k_BTKH, v_BTKH = qkv
        c = jax.lax.axis_size(AXIS)
        if split and c > 1:
            k_BTKH, v_BTKH = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k_BTKH, v_BTKH))
        layer = written(settings, layer, (k_BTKH, v_BTKH), lengths_B, counts_B)
        read = attend_ring if settings.is_ring else attend_slots
        o_BTNH, lse_BTN, segment_BT = read(settings, split and c > 1, q_BTNH, layer, lengths_B, counts_B)
        if sinks:
            o_BTNH, _ = kernels.with_sinks(o_BTNH, lse_BTN, segment_BT, sinks[0])
        return o_BTNH.astype(q_BTNH.dtype), layer

    sinks, sink_specs = ((), ()) if sinks_N is None else ((sinks_N,), (P("tensor"),))
    in_specs = ((spec, spec, spec), layer_specs, P(BATCH), P(BATCH), *sink_specs)
    return jax.shard_map(shard, in_specs=in_specs, out_specs=(spec, layer_specs), check_vma=False)(
        qkv, layer, lengths_B, counts_B, *sinks
    )
