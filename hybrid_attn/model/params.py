"""Parameters: what a weight is, declared once, the one place where it is cast, gathered and multiplied, and norms.

A layer makes its weights with `linear`, `embedding` and `vector`. Whatever else depends on a weight (its sharding, weight
decay, precision in inference, FLOPs) reads its `ParamSpec`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx, traverse_util
from jax.sharding import PartitionSpec as P

from hybrid_attn.parallel.mesh import WIDTH, gathered, split_of

# The mesh axis, or axes, over which each logical axis of a weight is split.
MESH_AXES = {"embed": WIDTH, "vocab": "tensor", "heads": "tensor", "mlp": "tensor"}
MESH_AXES |= {"head_dim": None, "norm": None, "tap": None, "expert": "expert", "score": None}
MESH_AXES |= {"rank": None, "mixture": None}  # of adapters
LOW_RANK = "low_rank"  # the axis between two factors of a matrix
MESH_AXES |= {LOW_RANK: None}
WIDE = ("embed", "heads", "mlp", LOW_RANK)  # logical axes that grow with the width of the model
MATRIX, EMBEDDING, VECTOR = "matrix", "embedding", "vector"
# How activations are multiplied with a weight: a function that is called as `jax.lax.dot_general` is, with the weight, gathered
# and in the dtype of the activations, as the second factor. It has derivatives.
Dot = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """A weight of one layer; where layers are stacked, the array has the period as one more axis before these.

    `axes` are logical names (`MESH_AXES`). Tables and matrices start from N(0, std^2). The first `fan_in` axes are contracted
    with activations; with `active` they follow an axis that counts the matrices of experts, of which a token is multiplied with
    so many. `exact` weights are used in float32 everywhere, as vectors are. A matrix that makes other weights, and a short
    convolution, have `products`: the multiplications that a token has because of them. `group` is the optimiser's: matrices are
    decayed; embeddings, norms, short convolutions and scalars of heads are not. With `sign_rate` no optimiser has the weight: a
    step moves each entry by so much, against the sign of its gradient. `width` and `depth` are those of the model over those of
    the base model of µP, where this weight depends on them, or else 1.
    """

    shape: tuple[int, ...]
    axes: tuple[str, ...]
    group: str
    std: float
    fan_in: int
    active: int | None = None
    exact: bool = False
    sign_rate: float | None = None
    products: int | None = None
    width: float = 1.0
    depth: float = 1.0

    @property
    def sharding(self) -> P:
        """On the mesh in force."""
        entries = [MESH_AXES[axis] for axis in self.axes]
        return P(*(split_of(size, entry, entries) for size, entry in zip(self.shape, entries, strict=True)))

    @property
    def decay(self) -> bool:
        return self.group == MATRIX

    @property
    def cast(self) -> bool:
        """Whether it is used in the dtype of the activations."""
        return self.group != VECTOR and not self.exact

    @property
    def first(self) -> int:
        """The first axis of a matrix; the axis before it counts experts."""
        return 0 if self.active is None else 1

    @property
    def reads_width(self) -> bool:
        """Whether the sums over its fan-in have more terms in a wider model."""
        return any(axis in WIDE for axis in self.axes[self.first : self.first + self.fan_in])

    @property
    def writes_residual(self) -> bool:
        """Whether its products are added to the residual stream."""
        return self.group == MATRIX and self.axes[self.first + self.fan_in :] == ("embed",)

    @property
    def rate(self) -> float:
        """The factor of µP on the learning rate of an optimiser that moves every entry by about the rate, such as Adam."""
        return 1 / (self.width * self.depth)

    @property
    def multiplications(self) -> int:
        """Multiplications of one token by this weight."""
        if self.products is not None:
            return self.products
        return self.active_size if self.fan_in else 0

    @property
    def active_size(self) -> int:
        """The number of its entries that one token uses: all, but for experts."""
        return math.prod(self.shape) if self.active is None else self.active * math.prod(self.shape[1:])


class Weight(nnx.Param):
    """A float32 parameter that carries its `ParamSpec` as `spec`."""


class Linear(Weight):
    """A matrix that is multiplied with activations, by its `dot`; if it is `adapted`, by that function."""

    def __call__(self, x: jax.Array, sharding: P | None = None) -> jax.Array:
        """The product with `x`, in its dtype, with what a weight transform adds to it; it lies as `sharding` says."""
        return self.product(x, sharding) if self.adapted is None else self.adapted(self, x=x, sharding=sharding)

    def product(self, x: jax.Array, sharding: P | None) -> jax.Array:
        """The product of `x` with the matrix alone."""
        return multiply(self.dot, x, self[...], self.spec.fan_in, sharding)


def multiply(dot: Dot, x: jax.Array, weight: jax.Array, fan_in: int, sharding: P | None) -> jax.Array:
    """The product over the last `fan_in` axes of `x` and the first of a weight, in the dtype of `x`.

    It lies as `sharding` says. Not by einsum, which contracts H before N in [B,T,N,H] x [N,H,D]: compilers then copy both.
    """
    contracted = tuple(range(x.ndim - fan_in, x.ndim)), tuple(range(fan_in))
    return dot(x, gathered(cast(weight, x.dtype)), (contracted, ((), ())), out_sharding=sharding)


def cast(weight: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`weight` in `dtype`, for one layer or one part of a table at a time.

    It is rounded first, which changes nothing, but else libtpu reads that only its bfloat16 is used, and casts the weights of
    all layers before the loop over them.
    """
    if weight.dtype == dtype:
        return weight
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(weight, kind.nexp, kind.nmant).astype(dtype)


def linear(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float, fan_in: int = 1, *, exact: bool = False
) -> Linear:
    """A matrix drawn from N(0, std^2)."""
    return _linear(rngs, ParamSpec(shape, axes, MATRIX, std, fan_in, exact=exact))


def experts(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float, active: int) -> Linear:
    """The matrices [E, fan-in, fan-out] of experts, of which a token uses so many, drawn from N(0, std^2)."""
    return _linear(rngs, ParamSpec(shape, axes, MATRIX, std, 1, active))


def projection(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str, ...], std: float, products: int) -> Linear:
    """A matrix that makes weights of weights, drawn from N(0, std^2)."""
    return _linear(rngs, ParamSpec(shape, axes, MATRIX, std, 1, exact=True, products=products))


def _linear(rngs: nnx.Rngs, spec: ParamSpec) -> Linear:
    return Linear(_normal(rngs, spec), spec=spec, dot=jax.lax.dot_general, adapted=None)


def embedding(
    rngs: nnx.Rngs, shape: tuple[int, ...], std: float, axes: tuple[str, ...] = ("vocab", "embed"), *, exact: bool = False
) -> Weight:
    """A table, by default [V, D], drawn from N(0, std^2)."""
    spec = ParamSpec(shape, axes, EMBEDDING, std, 0, exact=exact)
    return Weight(_normal(rngs, spec), spec=spec)


def vector(
    shape: tuple[int, ...], axes: tuple[str, ...], value: float, sign_rate: float | None = None, active: int | None = None,
    *, products: int | None = None,
) -> Weight:  # fmt: skip
    """A weight that starts at one value: of a norm, a scalar of each head, a bias, or a short convolution.

    `active` and `products` as in `ParamSpec`.
    """
    spec = ParamSpec(shape, axes, VECTOR, 0.0, 0, active, sign_rate=sign_rate, products=products)
    return Weight(jnp.full(shape, value, jnp.float32, out_sharding=spec.sharding), spec=spec)


def biased(x: jax.Array, bias: Weight) -> jax.Array:
    """`x` plus a vector, in the dtype of `x`."""
    return x + bias[...].astype(x.dtype)


def _normal(rngs: nnx.Rngs, spec: ParamSpec) -> jax.Array:
    return spec.std * jax.random.normal(rngs.params(), spec.shape, jnp.float32, out_sharding=spec.sharding)


class Norm(nnx.Module):
    """The norms of the families, in float32 over the last `dims` dimensions, without bias.

    layernorm: w (x - mean) / sqrt(var + eps), population variance. rms: w x / sqrt(mean(x^2) + eps). rms_plus1 stores w - 1,
    and rms_weightless has no w.
    """

    def __init__(self, norm_type: str, shape: tuple[int, ...], axes: tuple[str, ...], eps: float, *, dims: int = 1):
        self.norm_type, self.eps, self.axes = norm_type, eps, tuple(range(-dims, 0))
        if norm_type != "rms_weightless":
            self.weight = vector(shape, axes, 0.0 if norm_type == "rms_plus1" else 1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        weight = None
        if self.norm_type != "rms_weightless":
            weight = self.weight[...] + (1.0 if self.norm_type == "rms_plus1" else 0.0)
        return _normed(self.norm_type == "layernorm", self.axes, self.eps, x, weight)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _normed(centred: bool, axes: tuple[int, ...], eps: float, x: jax.Array, weight: jax.Array | None) -> jax.Array:
    """x over its root mean square along the axes, minus its mean before that if `centred`, times the weight."""
    z, _ = _normalised(centred, axes, eps, x)
    return (z if weight is None else z * weight).astype(x.dtype)


def _normalised(centred: bool, axes: tuple[int, ...], eps: float, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What the weight multiplies, in float32, and the factor of x in it."""
    z = x.astype(jnp.float32)
    if centred:
        z -= z.mean(axes, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(z).mean(axes, keepdims=True) + eps)
    return z * factor, factor


def _normed_forward(centred, axes, eps, x, weight):
    return _normed(centred, axes, eps, x, weight), (x, weight)


def _normed_backward(centred, axes, eps, residuals, dy):
    """Four times as fast on a CPU as the gradient of autodiff, of which XLA computes the factor again in every sum."""
    x, weight = residuals
    z, factor = _normalised(centred, axes, eps, x)
    dy = dy.astype(jnp.float32)
    dz = dy if weight is None else dy * weight
    dx = dz - z * (dz * z).mean(axes, keepdims=True)
    if centred:
        dx -= dz.mean(axes, keepdims=True)
    dweight = None if weight is None else (dy * z).sum(range(x.ndim - weight.ndim))
    return (factor * dx).astype(x.dtype), dweight


_normed.defvjp(_normed_forward, _normed_backward)


def weights_of(module: nnx.Module) -> dict:
    """Every `Weight` of a module, as a nested dict whose paths are their names."""
    return traverse_util.unflatten_dict(dict(nnx.to_flat_state(nnx.state(module))))


def map_weights(function: Callable[[Weight], Any], weights: dict) -> dict:
    """`function` of every `Weight` of a nested dict."""
    return jax.tree.map(function, weights, is_leaf=lambda x: isinstance(x, Weight))
