"""New tokens against what a layer keeps of the tokens before them: the cache of one layer, over devices too.

A bounded kind (a window or a chunk) keeps a ring: the token at position p stands in slot p % R. Any other keeps all slots:
the token at position p stands in slot p - dropped, of which compression leaves fewer than there were tokens. Where the mesh
has a `context` axis of c shards, a ring is on each of them, and slots go round: `span` of them to the first shard, `span` to
the next, ... A chunk of c x span new tokens, each shard with its part, then fills the same slots of every shard, so that all
hold as much; queries go to all shards and what they found is merged by the log-sum-exp, which costs the same at any length.

Letters: B rows, T new tokens, S slots, N query heads, K key/value heads, G = N/K, H head size.
"""

import jax
from jax.sharding import PartitionSpec as P

from hybrid_attn import kernels
from hybrid_attn.config import LayerType
from hybrid_attn.infer.cache.read import in_ring, in_slots
from hybrid_attn.infer.cache.shapes import Layer, Static, reach, specs
from hybrid_attn.infer.cache.write import written
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import BATCH, spec_of


def attend(
    q_BTNH, k_BTKH, v_BTKH, layer: Layer, lengths_B, counts_B, sinks_N=None,
    *, kind: LayerType, scale: float, kernel: str, span: int,
) -> tuple[jax.Array, Layer]:  # fmt: skip
    """o_BTNH of new tokens that see the cache and each other, and the layer with them in it.

    Row b had `lengths_B[b]` tokens; the first `counts_B[b]` of its T are new, the others padding, which gives zeros. The layer
    must have room for them. T is split over `context` as q is, or, then with T at most `span`, on every shard.
    """
    static = Static(reach(kind) is not None, reach(kind), kind.chunk, scale, kind.softcap, kernel, span)
    spec = spec_of(q_BTNH)
    split = spec[1] == AXIS
    places = specs(layer)

    def shard(q_BTNH, k_BTKH, v_BTKH, layer, lengths_B, counts_B, *sinks):
        c = jax.lax.axis_size(AXIS)
        if split and c > 1:
            k_BTKH, v_BTKH = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k_BTKH, v_BTKH))
        layer = written(static, layer, k_BTKH, v_BTKH, lengths_B, counts_B)
        found = (in_ring if static.bounded else in_slots)(static, split and c > 1, q_BTNH, layer, lengths_B, counts_B)
        o_BTNH, lse_BTN, seg_BT = found
        if sinks:
            o_BTNH, _ = kernels.with_sinks(o_BTNH, lse_BTN, seg_BT, sinks[0])
        return o_BTNH.astype(q_BTNH.dtype), layer

    sinks, sink_specs = ((), ()) if sinks_N is None else ((sinks_N,), (P("tensor"),))
    in_specs = (spec, spec, spec, places, P(BATCH), P(BATCH), *sink_specs)
    return jax.shard_map(shard, in_specs=in_specs, out_specs=(spec, places), check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, layer, lengths_B, counts_B, *sinks
    )
