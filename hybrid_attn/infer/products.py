"""Products of one token with the matrices of a model, as XLA for CPUs computes them fast.

It multiplies a vector with a matrix on one core. A batch of such products takes all cores, and other work begins beside it.

Letters: P parts, C entries of a sum, F entries of the result.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from hybrid_attn.kernels.decoding import MIN_SIZE
from hybrid_attn.model.execution import Execution

PARTS = 4


def for_one_token(execution: Execution) -> Execution:
    """The execution of a decoded token: with `vector_products`, `in_parts` takes the place of the plain product."""
    is_plain = execution.dot is jax.lax.dot_general
    return execution._replace(dot=in_parts) if execution.vector_products and is_plain else execution


def in_parts(x: jax.Array, weight: jax.Array, dimension_numbers: tuple, **options) -> jax.Array:
    """`jax.lax.dot_general` without batch dimensions, as a batch of `PARTS` products where that is faster.

    That is so for a float32 vector, which is all of `x`, and a large matrix on one device. The last dimensions of `x` are
    contracted with the first, or the last, of the matrix.
    """
    (_, contracted), _ = dimension_numbers
    C = math.prod(weight.shape[i] for i in contracted)
    F, is_first = weight.size // C, contracted[0] == 0
    plain = functools.partial(jax.lax.dot_general, x, weight, dimension_numbers, **options)
    is_float32_vector = x.size == C and x.dtype == weight.dtype == jnp.float32
    splits = weight.size >= MIN_SIZE and (C if is_first else F) % PARTS == 0
    if not (is_float32_vector and splits and jax.sharding.get_abstract_mesh().size == 1):
        return plain()
    x, weight = (jax.reshard(array, PartitionSpec()) for array in (x, weight))
    if is_first:
        y_F = jnp.einsum("PC,PCF->PF", x.reshape(PARTS, -1), weight.reshape(PARTS, -1, F)).sum(0)
    else:
        y_F = jnp.einsum("PC,PFC->PF", jnp.broadcast_to(x.reshape(C), (PARTS, C)), weight.reshape(PARTS, -1, C))
    result = jax.eval_shape(plain)
    return jax.reshard(y_F.reshape(result.shape), PartitionSpec(*result.sharding.spec))
