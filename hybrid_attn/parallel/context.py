"""A sequence over devices: each shard of the `context` axis holds a slice of the tokens and gathers the keys that it sees."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn import kernels
from hybrid_attn.parallel.mesh import HEADS_BTNH, TOKENS_BT


def attend(q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT, sinks_N=None, *, window, chunk, scale, softcap, kernel) -> jax.Array:
    """o_BTNH of causal self-attention over a sequence that the mesh splits; the contract of the mask is `kernels.attend`'s.

    `chunk` (tokens) keeps each query to the keys of its own chunk of positions: a chunk is a segment of its document.
    """
    if chunk is not None:
        most = jnp.int32(pos_BT.shape[1] // chunk + 1)
        seg_BT = jnp.where(seg_BT > 0, seg_BT * most + pos_BT // chunk, 0)
        window = chunk

    def shard(q_BTNH, k_BSKH, v_BSKH, pos_BT, seg_BT, *sinks):
        def whole(x):
            return jax.lax.all_gather(x, "context", axis=1, tiled=True)

        return kernels.attend(
            q_BTNH, whole(k_BSKH), whole(v_BSKH), pos_BT, whole(pos_BT), seg_BT, whole(seg_BT),
            window=window, scale=scale, softcap=softcap, sinks_N=sinks[0] if sinks else None, kernel=kernel,
        )[0]  # fmt: skip

    sinks, specs = ((), ()) if sinks_N is None else ((sinks_N,), (P("tensor"),))
    in_specs = (HEADS_BTNH, HEADS_BTNH, HEADS_BTNH, TOKENS_BT, TOKENS_BT, *specs)
    return jax.shard_map(shard, in_specs=in_specs, out_specs=HEADS_BTNH, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT, *sinks
    )
