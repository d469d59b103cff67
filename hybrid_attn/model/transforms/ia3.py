"""(IA)^3 (arXiv 2205.05638): a vector of ones scales what a matrix makes, or what a matrix that ends a branch takes."""

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config_model import Adapter
from hybrid_attn.model.params import Linear, ParamSpec, Weight, vector
from hybrid_attn.model.transforms.transform import Transform


def scaled(spec: ParamSpec) -> slice:
    """The axes of a matrix that are scaled: those that it contracts if it writes to the residual stream, or the others."""
    return slice(spec.fan_in) if spec.writes_residual else slice(spec.fan_in, None)


def weights(adapter: Adapter, spec: ParamSpec, rngs: nnx.Rngs) -> dict[str, Weight]:
    axes = scaled(spec)
    return {"scale": vector(spec.shape[axes], spec.axes[axes], 1.0)}


def product(adapter: Adapter, weight: Linear, added: dict[str, jax.Array], x: jax.Array, sharding: P | None) -> jax.Array:
    scale = added["scale"].astype(x.dtype)
    if weight.spec.writes_residual:
        return weight.product(x * scale, sharding)
    return weight.product(x, sharding) * scale


def merged(adapter: Adapter, spec: ParamSpec, weight: np.ndarray, added: dict[str, np.ndarray]) -> np.ndarray:
    scale, others = added["scale"], (1,) * (weight.ndim - spec.fan_in)
    return weight * (scale.reshape(*scale.shape, *others) if spec.writes_residual else scale)


IA3 = Transform(weights, product, merged, reads=())
