"""LoRA (arXiv 2106.09685): x W + (alpha / r) (x A) B, with A from N(0, 0.02^2) and B of zeros.

W + (alpha / r) A B is never formed: its gradient would be as large as that of W, which stays as it is. Letters: r rank.
"""

import jax
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config_model import Adapter
from hybrid_attn.model.params import Linear, ParamSpec, Weight, linear, multiply
from hybrid_attn.model.transforms.transform import Transform
from hybrid_attn.parallel.mesh import spec_of

STD = 0.02


def weights(adapter: Adapter, spec: ParamSpec, rngs: nnx.Rngs) -> dict[str, Weight]:
    """A [fan-in, r] and B [r, fan-out] beside a matrix [fan-in, fan-out]; both are split as it is."""
    fan_in, r = spec.fan_in, adapter.rank
    return {
        "a": linear(rngs, (*spec.shape[:fan_in], r), (*spec.axes[:fan_in], "rank"), STD, fan_in),
        "b": linear(rngs, (r, *spec.shape[fan_in:]), ("rank", *spec.axes[fan_in:]), 0.0),
    }


def product(adapter: Adapter, weight: Linear, added: dict[str, jax.Array], x: jax.Array, sharding: P | None) -> jax.Array:
    fan_in = weight.spec.fan_in
    h_BTr = multiply(weight.dot, x, added["a"], fan_in, P(*spec_of(x)[: x.ndim - fan_in], None))
    return weight.product(x, sharding) + adapter.alpha / adapter.rank * multiply(weight.dot, h_BTr, added["b"], 1, sharding)


def merged(adapter: Adapter, spec: ParamSpec, weight: np.ndarray, added: dict[str, np.ndarray]) -> np.ndarray:
    return weight + np.float32(adapter.alpha / adapter.rank) * np.tensordot(added["a"], added["b"], 1)


LORA = Transform(weights, product, merged, reads=("rank", "alpha"))
