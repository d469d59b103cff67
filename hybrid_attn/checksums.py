"""Sums by which arrays are known again, whatever mesh they lie on."""

import jax
import jax.numpy as jnp
import numpy as np


def checksums(leaves: list[jax.Array]) -> list[int]:
    """For every array the sum of its bits as 32-bit words, which no sharding changes and any flipped bit does.

    Orbax verifies the index of its files and not the arrays themselves: a flipped bit would train on unnoticed.
    """
    sums = []
    for x in leaves:
        with jax.set_mesh(mesh_of(x)):
            sums.append(int(_checksum(x)))  # one at a time: many collectives at once deadlock on many CPU devices
    return sums


def mesh_of(x: jax.Array) -> jax.sharding.Mesh:
    """The mesh that `x` lies on, which need not be the one in force."""
    if isinstance(x.sharding, jax.sharding.NamedSharding):
        return x.sharding.mesh
    return jax.sharding.Mesh(np.array(list(x.devices())), "device")


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(words, dtype=jnp.uint32)
