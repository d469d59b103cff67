"""The short convolution of new tokens, whose state is the last inputs of each request; on one device or on a mesh.

Every shard along `context` and `tensor` has a copy of the state.

Letters: B requests, T new tokens, D model, W taps, U = W - 1 earlier tokens, S = U + T.
"""

import jax
import jax.numpy as jnp

from hybrid_attn.model.short_conv import convolved
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import spec_of


def convolve(weight_WD, x_BTD: jax.Array, inputs_BUD: jax.Array, counts_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(y_BTD, inputs_BUD): the first `counts_B[b]` of the T tokens follow the inputs; the others are padding.

    The inputs of a request that begins are zeros, which add nothing. T is sharded over `context` as x is.
    """
    spec = spec_of(x_BTD)
    split = spec[1] == AXIS and jax.sharding.get_abstract_mesh().shape[AXIS] > 1

    def shard(weight_WD, x_BTD, inputs_BUD, counts_B):
        T, U = x_BTD.shape[1], inputs_BUD.shape[1]
        first = jax.lax.axis_index(AXIS) * T if split else 0
        new_BTD = jax.lax.all_gather(x_BTD, AXIS, axis=1, tiled=True) if split else x_BTD
        all_BSD = jnp.concatenate([inputs_BUD, new_BTD], 1)
        own_BSD = jax.lax.dynamic_slice_in_dim(all_BSD, first, U + T, 1)
        own_seg_BS = (first - U + jnp.arange(U + T) < counts_B[:, None]).astype(jnp.int32)
        newest_BU = counts_B[:, None] + jnp.arange(U)
        return convolved(T, weight_WD, own_BSD, own_seg_BS), jnp.take_along_axis(all_BSD, newest_BU[..., None], axis=1)

    out_specs = spec, spec_of(inputs_BUD)
    return jax.shard_map(shard, out_specs=out_specs, check_vma=False)(weight_WD, x_BTD, inputs_BUD, counts_B)
