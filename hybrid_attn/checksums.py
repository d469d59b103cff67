"""Checksums of arrays, the same on every mesh."""

import jax
import jax.numpy as jnp
import numpy as np


def checksums(leaves: list[jax.Array]) -> list[int]:
    """Of every array, the sum of its elements as unsigned integers: independent of the sharding, changed by any flipped bit.

    Orbax verifies the index of its files and not the arrays: a flipped bit would go unnoticed.
    """
    sums = []
    for x in leaves:
        with jax.set_mesh(mesh_of(x)):
            sums.append(int(_checksum(x)))  # one at a time: many collectives at once deadlock on many CPU devices
    return sums


def mesh_of(x: jax.Array) -> jax.sharding.Mesh:
    """The mesh of an array, which may differ from the mesh in force."""
    if isinstance(x.sharding, jax.sharding.NamedSharding):
        return x.sharding.mesh
    return jax.sharding.Mesh(np.array(list(x.devices())), "device")


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    integers = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(integers, dtype=jnp.uint32)
