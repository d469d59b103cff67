"""The router of Nexus (arXiv 2408.15901): the embedding of each expert is projected from that of the domain it was trained on.

Letters: B batch, T tokens, D model, E experts, m size of a domain embedding.
"""

import jax
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.model.params import embedding, projection
from hybrid_attn.parallel.mesh import spec_of


class DomainRouter(nnx.Module):
    """Logits x . e of the experts, with e = W2 (silu(W1 d) * V1 d) of the embedding d of a domain, which is not trained.

    An expert that is added brings its d; it changes neither the projection nor the logits of the others.
    """

    def __init__(self, model: Model, experts: int, domain_dim: int, *, rngs: nnx.Rngs):
        D, m = model.d_model, domain_dim
        self.domains = embedding(rngs, (experts, m), 1.0, ("score", "norm"), exact=True)
        self.gate = projection(rngs, (m, D), ("norm", "norm"), model.init_std, 0)
        self.up = projection(rngs, (m, D), ("norm", "norm"), model.init_std, 0)
        self.out = projection(rngs, (D, D), ("embed", "norm"), model.init_std, experts * D)

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """The logits [B, T, E] of activations in float32."""
        contracted = (((2,), (1,)), ((), ()))
        return self.out.dot(x_BTD, self.experts(), contracted, out_sharding=P(*spec_of(x_BTD)[:2], None))

    def experts(self) -> jax.Array:
        """The embedding of each expert [E, D], the same on every device."""
        gate, up, out = (jax.reshard(w[...], P(None, None)) for w in (self.gate, self.up, self.out))
        domains_Em = jax.lax.stop_gradient(self.domains[...])
        return (jax.nn.silu(domains_Em @ gate) * (domains_Em @ up)) @ out
