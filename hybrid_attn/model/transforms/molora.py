"""A mixture of LoRAs (MoLoRA, arXiv 2309.05444): x W + (alpha / r) sum over e of p_e (x A_e) B_e, with p = softmax(x R).

The router R sees what the matrix is multiplied with. All E adapters compute every token. Letters: E adapters, r rank.
"""

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config_model import Adapter
from hybrid_attn.model.params import Linear, ParamSpec, Weight, linear, multiply
from hybrid_attn.model.transforms.lora import STD
from hybrid_attn.model.transforms.transform import ROUTER_STD, SETTINGS, Transform, gates
from hybrid_attn.parallel.mesh import spec_of


def weights(adapter: Adapter, spec: ParamSpec, rngs: nnx.Rngs) -> dict[str, Weight]:
    """A [fan-in, E, r], B [E, r, fan-out] and the router [fan-in, E] beside a matrix [fan-in, fan-out]."""
    fan_in, inner = spec.fan_in, (adapter.experts, adapter.rank)
    shape, axes = spec.shape[:fan_in], spec.axes[:fan_in]
    return {
        "a": linear(rngs, (*shape, *inner), (*axes, "mixture", "rank"), STD, fan_in),
        "b": linear(rngs, (*inner, *spec.shape[fan_in:]), ("mixture", "rank", *spec.axes[fan_in:]), 0.0, 2),
        "router": linear(rngs, (*shape, adapter.experts), (*axes, "mixture"), ROUTER_STD, fan_in, exact=True),
    }


def product(adapter: Adapter, weight: Linear, added: dict[str, jax.Array], x: jax.Array, sharding: P | None) -> jax.Array:
    fan_in = weight.spec.fan_in
    p_BTE = gates(x, added["router"], fan_in).astype(x.dtype)
    h_BTEr = multiply(weight.dot, x, added["a"], fan_in, P(*spec_of(x)[: x.ndim - fan_in], None, None))
    y = multiply(weight.dot, p_BTE[..., None] * h_BTEr, added["b"], 2, sharding)
    return weight.product(x, sharding) + adapter.alpha / adapter.rank * y


MOLORA = Transform(weights, product, None, reads=SETTINGS)
