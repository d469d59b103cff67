"""Effective ranks: how many singular values of a matrix matter, whatever its sizes.

stable: the sum of the squares of the singular values over the square of the largest. entropy: exp of the entropy of the
singular values over their sum (Roy and Vetterli, EUSIPCO 2007). Both are 1 for a product of two vectors and n for an orthogonal
matrix of n columns. Of two factors the ranks are those of their product, which is not computed.

Letters: n fan-in, m fan-out, r rank.
"""

import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.model.params import ParamSpec
from hybrid_attn.model.transformer import specs
from hybrid_attn.model.transforms import is_added
from hybrid_attn.model.transforms.low_rank import can_have_factors, is_factors

NAMES = "stable_rank", "entropy_rank"
TINY = 1e-20  # beside a number that may be zero


def effective_ranks(model: Model, params: dict) -> dict[str, jax.Array]:
    """The ranks of each matrix, a mean over the layers of a type, and of each layer type, a mean over its matrices.

    Every device decomposes the full matrix of one layer at a time. Matrices of experts and of routers, those of one column and
    those of an adapter are left out.
    """
    by_matrix, by_letter = {}, {}
    for group, _, _ in model.groups:
        for layer, of_layer in specs(model)[group].items():
            for name, spec, leaf in _matrices(of_layer, params[group][layer]):
                by_matrix.setdefault(f"{layer[0]}/{name}", []).append(_of_layers(spec, leaf))
    means = {name: jnp.concatenate(values).mean(0) for name, values in by_matrix.items()}
    for name, mean in means.items():
        by_letter.setdefault(name[0], []).append(mean)
    means |= {letter: jnp.stack(values).mean(0) for letter, values in by_letter.items()}
    return {f"{rank}/{name}": mean[i] for i, rank in enumerate(NAMES) for name, mean in means.items()}


def of_matrix(*factors: jax.Array) -> jax.Array:
    """The two ranks of a matrix [n, m], or of the product of [n, r] and [r, m]."""
    w, *others = factors
    for v_rm in others:
        w = jnp.linalg.qr(w, mode="r") @ jnp.linalg.qr(v_rm.T, mode="r").T
    s = jnp.linalg.svd(w, compute_uv=False)
    p = s / jnp.maximum(s.sum(), TINY)
    stable = jnp.square(s).sum() / jnp.maximum(jnp.square(s).max(), TINY)
    return jnp.stack([stable, jnp.exp(-(p * jnp.log(p + TINY)).sum())])


Leaf = jax.Array | Mapping[str, jax.Array]
Specs = ParamSpec | Mapping[str, ParamSpec]


def _matrices(of_layer: dict, leaves: dict, path: str = "") -> Iterator[tuple[str, Specs, Leaf]]:
    """The name, the spec and the array of each matrix of a layer, or those of its two factors."""
    for name, spec in of_layer.items():
        if is_added(name):
            continue
        if isinstance(spec, Mapping) and not is_factors(spec):
            yield from _matrices(spec, leaves[name], f"{path}{name}/")
        elif is_factors(spec) or can_have_factors(spec):
            yield f"{path}{name}", spec, leaves[name]


def _of_layers(of_leaf: Specs, leaf: Leaf) -> jax.Array:
    """The ranks [periods, 2] of a matrix or its factors in each period; one row of what is not stacked."""
    all_specs, arrays = jax.tree.leaves(of_leaf), jax.tree.leaves(leaf)
    shapes = [(math.prod(spec.shape[: spec.fan_in]), -1) for spec in all_specs]

    def one(arrays: list[jax.Array]) -> jax.Array:
        replicated = [jax.reshard(x, P(*(None,) * x.ndim)).reshape(shape) for x, shape in zip(arrays, shapes, strict=True)]
        return jax.shard_map(of_matrix, in_specs=P(), out_specs=P(), check_vma=False)(*replicated)

    stacked = arrays[0].ndim > len(all_specs[0].shape)
    return jax.lax.map(one, arrays) if stacked else one(arrays)[None]
