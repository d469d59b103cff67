"""A mixture of vectors (MoV, arXiv 2309.05444): (IA)^3 with E vectors, mixed for each token by a router.

The vector of a token is the sum over e of p_e l_e, where p = softmax(z W) and z is what is scaled. The paper has a router on
the representation of the token; its code, and this, route on z: of heads each by itself, with one W. All E are computed.

Letters: N heads, or no axis; H entries of what is scaled; E vectors.
"""

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config_model import Adapter
from hybrid_attn.model.params import Linear, ParamSpec, Weight, linear, vector
from hybrid_attn.model.transforms.ia3 import scaled
from hybrid_attn.model.transforms.transform import ROUTER_STD, Transform, gates


def weights(adapter: Adapter, spec: ParamSpec, rngs: nnx.Rngs) -> dict[str, Weight]:
    """The vectors [N, E, H], of ones, and the router [H, E]."""
    (*heads, H), (*head_axes, axis) = spec.shape[scaled(spec)], spec.axes[scaled(spec)]
    return {
        "scales": vector((*heads, adapter.experts, H), (*head_axes, "mixture", axis), 1.0),
        "router": linear(rngs, (H, adapter.experts), (axis, "mixture"), ROUTER_STD, exact=True),
    }


def product(adapter: Adapter, weight: Linear, added: dict[str, jax.Array], x: jax.Array, sharding: P | None) -> jax.Array:
    if weight.spec.writes_residual:
        return weight.product(_mixed(added, x), sharding)
    return _mixed(added, weight.product(x, sharding))


def _mixed(added: dict[str, jax.Array], z_BTNH: jax.Array) -> jax.Array:
    """What is scaled, times the vector of its token."""
    p_BTNE, scales_NEH = gates(z_BTNH, added["router"], 1).astype(z_BTNH.dtype), added["scales"].astype(z_BTNH.dtype)
    # Not one product over E: each term is fused with the sum, and nothing of size E x H is made for a token.
    return z_BTNH * sum(p_BTNE[..., e, None] * scales_NEH[..., e, :] for e in range(p_BTNE.shape[-1]))


MOV = Transform(weights, product, None, reads=("experts",))
