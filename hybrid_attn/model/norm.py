"""Layer norm without bias and the root-mean-square norms of the families, in float32."""

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_attn.model.params import vector


class Norm(nnx.Module):
    """Normalises over the last `dims` dimensions; `norm_type` is layernorm, rms, rms_plus1 or rms_weightless.

    layernorm: w (x - mean) / sqrt(var + eps), population variance. rms: w x / sqrt(mean(x^2) + eps). rms_plus1 stores w - 1.
    """

    def __init__(self, norm_type: str, shape: tuple[int, ...], axes: tuple[str, ...], eps: float, *, dims: int = 1):
        self.norm_type, self.eps, self.axes = norm_type, eps, tuple(range(-dims, 0))
        if norm_type != "rms_weightless":
            self.weight = vector(shape, axes, 0.0 if norm_type == "rms_plus1" else 1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        z = x.astype(jnp.float32)
        if self.norm_type == "layernorm":
            z -= z.mean(self.axes, keepdims=True)
        z *= jax.lax.rsqrt(jnp.square(z).mean(self.axes, keepdims=True) + self.eps)
        if self.norm_type != "rms_weightless":
            z *= self.weight[...] + (1.0 if self.norm_type == "rms_plus1" else 0.0)
        return z.astype(x.dtype)
