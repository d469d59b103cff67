"""Low rank (arXiv 2209.13569): a matrix W that is the product U V of two factors, and is neither stored nor computed.

In place of the leaf periods/L0/attention/q the parameters have the group q/u, [fan-in, r], and q/v, [r, fan-out]; the paper
writes U V^T. What multiplies with W multiplies with U, then with V. The axis "low_rank" of both is not split.

Initial values: with the singular value decomposition P S Q of the initial W, `spectral` takes U = P_r S_r^(1/2) and
V = S_r^(1/2) Q_r, and `spectral_ones` has ones in place of S_r. `he` draws each factor from N(0, 2 / fan-in), as arXiv
1502.01852 does. The factor of µP by depth stands in V, as it does in a matrix that writes to the residual stream.

Letters: n fan-in, m fan-out, r rank, P periods.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import PartitionSpec as P

from hybrid_attn.config_model import LowRank, Model
from hybrid_attn.model.params import LOW_RANK, Linear, ParamSpec, Weight, multiply
from hybrid_attn.model.transforms.transform import is_plain, targets
from hybrid_attn.parallel.mesh import spec_of

U, V = "u", "v"


def is_factors(leaf) -> bool:
    """Whether a leaf of a layer is the group of two factors."""
    return isinstance(leaf, Mapping) and leaf.keys() == {U, V}


def can_have_factors(spec: ParamSpec) -> bool:
    """Whether a weight is a matrix of two or more rows and columns: the rank of any other is 1."""
    return is_plain(spec) and min(_sizes(spec)) > 1


def with_factors(model: Model, weights: dict, rngs: nnx.Rngs) -> dict:
    """The `Weight`s of a model with two factors in place of each target of `model.low_rank`.

    ValueError for a target that names no matrix which can have factors.
    """
    flat, low_rank = flatten_dict(weights, sep="/"), model.low_rank
    possible = {name: weight for name, weight in flat.items() if can_have_factors(weight.spec)}
    for name in targets(model, possible, "model.low_rank.targets", low_rank.targets, "can have factors"):
        weight = flat.pop(name)
        specs, decompose = factor_specs(low_rank, weight.spec), functools.partial(decomposed, low_rank, weight.spec)
        ones = low_rank.init == "spectral_ones"
        values = _drawn(specs, weight, rngs) if low_rank.init == "he" else decompose(weight[...], ones=ones)
        flat |= {f"{name}/{leaf}": Weight(values[leaf], spec=spec) for leaf, spec in specs.items()}
    return unflatten_dict(flat, sep="/")


def rank(low_rank: LowRank, spec: ParamSpec) -> int:
    """The rank of the factors of a matrix."""
    return max(1, round(low_rank.rank_fraction * min(_sizes(spec))))


def factor_specs(low_rank: LowRank, spec: ParamSpec) -> dict[str, ParamSpec]:
    """The specs of the two factors of a matrix, which are split as it is.

    The rank grows with the width, so that µP treats the sums over it as those over the fan-in of the matrix.
    """
    n, (r, axis), at = _sizes(spec)[0], (rank(low_rank, spec), LOW_RANK), spec.fan_in
    stds = ((2 / n) ** 0.5, (2 / r) ** 0.5 / spec.depth) if low_rank.init == "he" else (0.0, 0.0)
    u = {"shape": (*spec.shape[:at], r), "axes": (*spec.axes[:at], axis), "std": stds[0], "depth": 1.0}
    v = {"shape": (r, *spec.shape[at:]), "axes": (axis, *spec.axes[at:]), "std": stds[1], "fan_in": 1}
    return {U: dataclasses.replace(spec, **u), V: dataclasses.replace(spec, **v)}


def decomposed(low_rank: LowRank, spec: ParamSpec, w: jax.Array, *, ones: bool) -> dict[str, jax.Array]:
    """The factors whose product is nearest to a matrix, or to each period of stacked ones; or the same with values of 1.

    Every device decomposes the full matrix, period after period.
    """
    split = functools.partial(_decomposed, rank(low_rank, spec), spec, ones)
    u, v = jax.lax.map(split, w) if w.ndim > len(spec.shape) else split(w)
    return {U: u, V: v}


def _decomposed(r: int, spec: ParamSpec, ones: bool, w: jax.Array) -> tuple[jax.Array, jax.Array]:
    n, m = _sizes(spec)
    at, shape = spec.fan_in, spec.shape

    def local(w):
        p_nk, s_k, q_km = jnp.linalg.svd(spec.depth * w.reshape(n, m), full_matrices=False)
        root_r = jnp.ones(r) if ones else jnp.sqrt(s_k[:r])
        u_nr, v_rm = p_nk[:, :r] * root_r, root_r[:, None] * q_km[:r] / spec.depth
        return u_nr.reshape(*shape[:at], r), v_rm.reshape(r, *shape[at:])

    replicated = jax.reshard(w, P(*(None,) * w.ndim))
    u, v = jax.shard_map(local, in_specs=P(), out_specs=(P(), P()), check_vma=False)(replicated)
    split = tuple(spec.sharding)
    return jax.reshard(u, P(*split[:at], None)), jax.reshard(v, P(None, *split[at:]))


def matrix(spec: ParamSpec, u: jax.Array, v: jax.Array) -> jax.Array:
    """The product U V of two factors, or of those of each period, in float32; `spec` is that of the matrix."""
    p, n, m = "p" * (u.ndim - spec.fan_in - 1), "abc"[: spec.fan_in], "xyz"[: len(spec.shape) - spec.fan_in]
    sharding = P(*(None for _ in p), *spec.sharding)
    return jnp.einsum(f"{p}{n}r,{p}r{m}->{p}{n}{m}", u, v, precision="highest", out_sharding=sharding)


def _drawn(specs: dict[str, ParamSpec], weight: Weight, rngs: nnx.Rngs) -> dict[str, jax.Array]:
    shape = weight[...].shape
    periods = shape[: len(shape) - len(weight.spec.shape)]

    def draw(spec: ParamSpec) -> jax.Array:
        sharding = P(*(None for _ in periods), *spec.sharding)
        return spec.std * jax.random.normal(rngs.params(), (*periods, *spec.shape), jnp.float32, out_sharding=sharding)

    return {leaf: draw(spec) for leaf, spec in specs.items()}


def product(weight: Linear, v: jax.Array, x: jax.Array, sharding: P | None) -> jax.Array:
    """x U V, where the value of `weight` is U."""
    h_BTr = weight.product(x, P(*spec_of(x)[: x.ndim - weight.spec.fan_in], None))
    return multiply(weight.dot, h_BTr, v, 1, sharding)


def frobenius_gradients(specs: dict, params: dict) -> dict:
    """The parameters, and in place of factors the gradients of |U V|^2 / 2: U (V V^T) and (U^T U) V.

    The product is taken without the factor of µP by depth, so that a model of any depth forgets in the same number of steps.
    """
    if is_factors(specs):
        return _gradients(specs[V], params[U], params[V])
    if isinstance(specs, Mapping):
        return {name: frobenius_gradients(spec, params[name]) for name, spec in specs.items()}
    return params


def _gradients(spec_v: ParamSpec, u: jax.Array, v: jax.Array) -> dict[str, jax.Array]:
    p, n, m = "p" * (v.ndim - len(spec_v.shape)), "abc"[: u.ndim - 1], "xyz"[: v.ndim - 1]
    n, m = n[len(p) :], m[len(p) :]
    replicated = P(*(None for _ in f"{p}rs"))
    gram_u = jnp.einsum(f"{p}{n}r,{p}{n}s->{p}rs", u, u, out_sharding=replicated)
    gram_v = spec_v.depth**2 * jnp.einsum(f"{p}r{m},{p}s{m}->{p}rs", v, v, out_sharding=replicated)
    return {
        U: jnp.einsum(f"{p}{n}r,{p}rs->{p}{n}s", u, gram_v, out_sharding=spec_of(u)),
        V: jnp.einsum(f"{p}rs,{p}s{m}->{p}r{m}", gram_u, v, out_sharding=spec_of(v)),
    }


def _sizes(spec: ParamSpec) -> tuple[int, int]:
    """The fan-in and the fan-out of a matrix."""
    return math.prod(spec.shape[: spec.fan_in]), math.prod(spec.shape[spec.fan_in :])
