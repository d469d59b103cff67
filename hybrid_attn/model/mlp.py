"""The gated feed-forward, of all tokens at once or of some at a time.

Letters: B batch, T tokens, D model, F feed-forward; of one device, n tokens flattened, I chunks of c tokens.
"""

import functools

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.model.params import linear
from hybrid_attn.parallel.mesh import spec_of

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class GatedMLP(nnx.Module):
    """Gated feed-forward: down(act(gate x) * up x)."""

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        D, F, std = model.d_model, model.d_ff, model.init_std
        self.activation = model.activation
        self.gate = linear(rngs, (D, F), ("embed", "mlp"), std)
        self.up = linear(rngs, (D, F), ("embed", "mlp"), std)
        self.down = linear(rngs, (F, D), ("mlp", "embed"), std)

    def __call__(self, x_BTD: jax.Array, chunk: int | None) -> tuple[jax.Array, dict]:
        """[B, T, D] of the same, and no scalars.

        With `chunk`, the hidden activations of so many tokens of a device exist at a time; the backward pass makes them again.
        """
        if chunk is not None:
            weights = (w.cast(x_BTD.dtype) for w in (self.gate, self.up, self.down))
            return in_chunks(self.activation, chunk, x_BTD, *weights), {}
        h_BTF = ACTIVATIONS[self.activation](self.gate(x_BTD)) * self.up(x_BTD)
        return self.down(h_BTF, spec_of(x_BTD)), {}


def in_chunks(activation: str, chunk: int, x_BTD: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array):
    """The feed-forward of `chunk` tokens of a device at a time: nothing of F outlives its chunk, forward or backward."""

    def shard(x_BTD, *shards):
        weights = (jax.lax.all_gather(w, "fsdp", axis=dim, tiled=True) for w, dim in zip(shards, (0, 0, 1), strict=True))
        D = x_BTD.shape[-1]
        x_nD = x_BTD.reshape(-1, D)
        n = len(x_nD)
        size = min(chunk, n)
        x_IcD = jnp.pad(x_nD, ((0, -n % size), (0, 0))).reshape(-1, size, D)
        y_nD = _in_chunks(activation, x_IcD, *weights).reshape(-1, D)[:n]
        return jax.lax.psum(y_nD.reshape(x_BTD.shape), "tensor")

    tokens = spec_of(x_BTD)
    specs = (tokens, P("fsdp", "tensor"), P("fsdp", "tensor"), P("tensor", "fsdp"))
    return jax.shard_map(shard, in_specs=specs, out_specs=tokens, check_vma=False)(x_BTD, w_gate, w_up, w_down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(activation: str, x_IcD, w_gate, w_up, w_down):
    return _forward(activation, x_IcD, w_gate, w_up, w_down)[0]


def _hidden(activation: str, gate_cF, up_cF):
    return ACTIVATIONS[activation](gate_cF) * up_cF


def _forward(activation: str, x_IcD, w_gate, w_up, w_down):
    y_IcD = jax.lax.map(lambda x_cD: _hidden(activation, x_cD @ w_gate, x_cD @ w_up) @ w_down, x_IcD)
    return y_IcD, (x_IcD, w_gate, w_up, w_down)


def _backward(activation: str, residuals, dy_IcD):
    """By hand, for the gradients of the weights: autodiff transposes [c, F] arrays, which costs a CPU more than the rest."""
    x_IcD, w_gate, w_up, w_down = residuals

    def chunk(sums, xs):
        x_cD, dy_cD = xs
        h_cF, pull = jax.vjp(functools.partial(_hidden, activation), x_cD @ w_gate, x_cD @ w_up)
        dgate_cF, dup_cF = pull(dy_cD @ w_down.T)
        products = ((x_cD, dgate_cF), (x_cD, dup_cF), (dy_cD, h_cF))
        terms_DF = [jnp.einsum("Dc,cF->DF", a_cD.T, b_cF, preferred_element_type=jnp.float32) for a_cD, b_cF in products]
        return [a + b for a, b in zip(sums, terms_DF, strict=True)], dgate_cF @ w_gate.T + dup_cF @ w_up.T

    zeros = [jnp.zeros(w_gate.shape, jnp.float32)] * 3
    (dw_gate, dw_up, dw_downT), dx_IcD = jax.lax.scan(chunk, zeros, (x_IcD, dy_IcD))
    return dx_IcD, *(dw.astype(w_gate.dtype) for dw in (dw_gate, dw_up, dw_downT.T))


_in_chunks.defvjp(_forward, _backward)
