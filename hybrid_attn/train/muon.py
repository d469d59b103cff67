"""Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon): momentum whose matrices are orthogonalised.

A matrix here is what one head, one expert, or one layer without these multiplies with: heads, experts and the periods of
stacked layers count separate matrices.
"""

import math

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from hybrid_attn.model.params import WIDE, ParamSpec
from hybrid_attn.parallel.mesh import WIDTH, width_axes

STEPS = 5
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # of the post above: the steepest slope at zero that stays near one
RMS = 0.2  # root mean square of an update, that of AdamW in practice (Moonlight, arXiv 2502.16982): one rate serves both
EPS = 1e-8


def batch_axes(spec: ParamSpec) -> tuple[int, ...]:
    """The axes of one layer's weight that count separate matrices; the two others are those of a matrix."""
    counting = {axis for axis, of_matrix in (("heads", "head_dim"), ("mixture", "rank")) if of_matrix in spec.axes}
    return tuple(i for i, axis in enumerate(spec.axes) if i < spec.first or axis in counting)


def rate(spec: ParamSpec) -> float:
    """The factor of µP on the learning rate of a matrix: an update must have a spectral norm of sqrt(fan-out / fan-in).

    So says arXiv 2310.17813. Of updates here it is `RMS` * sqrt(the longer axis). Where both axes of a matrix grow with the
    width m that makes a factor of 1 / sqrt(m); where one does, as in the matrix of a head, 1 / m.
    """
    matrix = [axis for i, axis in enumerate(spec.axes) if i not in batch_axes(spec)]
    both = all(axis in WIDE for axis in matrix)
    return 1 / (spec.depth * (spec.width**0.5 if both else spec.width))


def newton_schulz(x: jax.Array) -> jax.Array:
    """Matrices [..., M, N] with nearly the same singular vectors, and singular values between about 0.7 and 1.2.

    A zero matrix stays zero.
    """
    transposed = x.shape[-2] > x.shape[-1]
    x = x.mT if transposed else x
    x /= jnp.sqrt(jnp.sum(x * x, (-2, -1), keepdims=True)) + EPS
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if transposed else x


def orthogonalise(spec: ParamSpec, x: jax.Array) -> jax.Array:
    """The update of a weight, sharded as the weight is: each matrix orthogonalised, its root mean square about `RMS`.

    A product of matrices that are split would be summed over devices. So every device gets whole matrices: an all-gather over
    `tensor`, then an all-to-all that moves the axes of `WIDTH` from the matrices to the period, and back the same way. Experts
    stay where they are. Periods that these axes do not divide are padded with zeros. A weight that is not stacked is gathered.
    """
    batch = batch_axes(spec)
    matrix = [axis for axis in range(len(spec.shape)) if axis not in batch]
    scale = RMS * max(spec.shape[axis] for axis in matrix) ** 0.5
    split = tuple(spec.sharding)
    no_tensor = tuple(name if width_axes(name) or axis in batch else None for axis, name in enumerate(split))
    owned = tuple(name if axis in batch else None for axis, name in enumerate(split))
    if x.ndim == len(spec.shape):
        return jax.reshard(scale * _of_matrices(jax.reshard(x, P(*owned)), matrix), P(*split))
    periods = x.shape[0]
    moved = tuple(axis for axis in WIDTH if axis not in owned)
    padding = -periods % math.prod(jax.sharding.get_abstract_mesh().shape[axis] for axis in moved)
    x = jnp.pad(jax.reshard(x, P(None, *no_tensor)), [(0, padding)] + [(0, 0)] * len(split))
    x = scale * _of_matrices(jax.reshard(x, P(moved, *owned)), [axis + 1 for axis in matrix])
    return jax.reshard(jax.reshard(x, P(None, *no_tensor))[:periods], P(None, *split))


def _of_matrices(x: jax.Array, axes: list[int]) -> jax.Array:
    """`newton_schulz` of the matrices in those two axes."""
    return jnp.moveaxis(newton_schulz(jnp.moveaxis(x, axes, (-2, -1))), (-2, -1), axes)


def scale_by_muon(specs: dict, momentum: float, dtype: str) -> optax.GradientTransformation:
    """Orthogonalised Nesterov momentum of every matrix; the momentum has this dtype and is sharded as the weights are."""
    accumulate = optax.trace(momentum, nesterov=True, accumulator_dtype=dtype)

    def update(updates, state, params=None):
        updates, state = accumulate.update(updates, state)
        return jax.tree.map(orthogonalise, specs, updates), state

    return optax.GradientTransformation(accumulate.init, update)
