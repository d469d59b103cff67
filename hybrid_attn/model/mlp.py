"""The gated feed-forward, of all tokens at once or of some at a time.

Letters: B batch, T tokens, D model, F feed-forward; of one device, n tokens flattened, I chunks of c tokens.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from hybrid_attn.config import LayerType, Model, mlp_width
from hybrid_attn.model.execution import Chunks
from hybrid_attn.model.params import Dot, cast, linear
from hybrid_attn.parallel.mesh import all_gathered, spec_of, width_axes

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class Gating(NamedTuple):
    """How the two products of a feed-forward become its hidden activations."""

    activation: str
    limit: float | None
    alpha: float

    def __call__(self, gate: jax.Array, up: jax.Array) -> jax.Array:
        """act(gate) * up; with a limit, gate * sigmoid(alpha gate) * (up + 1) of clipped products (gpt-oss)."""
        if self.limit is None:
            return ACTIVATIONS[self.activation](gate) * up
        gate, up = jnp.minimum(gate, self.limit), jnp.clip(up, -self.limit, self.limit)
        return gate * jax.nn.sigmoid(self.alpha * gate) * (up + 1)


def gating_of(model: Model, layer_type: LayerType) -> Gating:
    return Gating(model.activation, layer_type.mlp.swiglu_limit, layer_type.mlp.swiglu_alpha)


class GatedMLP(nnx.Module):
    """Gated feed-forward: down(act(gate x) * up x)."""

    def __init__(self, model: Model, layer_type: LayerType, *, rngs: nnx.Rngs):
        D, F, std = model.d_model, mlp_width(model, layer_type), model.init_std
        self.gating = gating_of(model, layer_type)
        self.gate = linear(rngs, (D, F), ("embed", "mlp"), std)
        self.up = linear(rngs, (D, F), ("embed", "mlp"), std)
        self.down = linear(rngs, (F, D), ("mlp", "embed"), std)

    def __call__(self, x_BTD: jax.Array, seg_BT: jax.Array, chunks: Chunks | None) -> tuple[jax.Array, dict]:
        """The output [B, T, D], and no scalars. With an adapter, all tokens at once."""
        is_adapted = any(w.adapted is not None for w in (self.gate, self.up, self.down))
        if chunks is not None and not is_adapted:
            weights = (cast(w[...], x_BTD.dtype) for w in (self.gate, self.up, self.down))
            mlp = ChunkedMLP(self.gating, self.gate.dot, chunks.saves_products)
            return in_chunks(mlp, chunks.tokens, x_BTD, *weights), {}
        h_BTF = self.gating(self.gate(x_BTD), self.up(x_BTD))
        return self.down(h_BTF, spec_of(x_BTD)), {}


class ChunkedMLP(NamedTuple):
    """What is static in the feed-forward of a chunk; `dot` multiplies with weights, `saves_products` is that of `Chunks`."""

    gating: Gating
    dot: Dot
    saves_products: bool

    @property
    def is_plain(self) -> bool:
        """Whether weights are multiplied as they are, so that the gradients can be written by hand."""
        return self.dot is jax.lax.dot_general

    def product(self, x_cA: jax.Array, w_AB: jax.Array) -> jax.Array:
        return self.dot(x_cA, w_AB, (((1,), (0,)), ((), ())), preferred_element_type=x_cA.dtype)

    def hidden(self, gate_cF: jax.Array, up_cF: jax.Array) -> jax.Array:
        return self.gating(gate_cF, up_cF)

    def __call__(self, x_cD: jax.Array, *weights: jax.Array) -> jax.Array:
        return self.with_products(x_cD, *weights)[0]

    def with_products(self, x_cD: jax.Array, w_gate, w_up, w_down, *biases_F: jax.Array) -> tuple[jax.Array, tuple]:
        """The output [c, D], and (gate_cF, up_cF), to which there may be biases."""
        products_cF = self.product(x_cD, w_gate), self.product(x_cD, w_up)
        if biases_F:
            products_cF = tuple(x_cF + b_F.astype(x_cF.dtype) for x_cF, b_F in zip(products_cF, biases_F, strict=True))
        return self.product(self.hidden(*products_cF), w_down), products_cF


def in_chunks(mlp: ChunkedMLP, chunk: int, x_BTD: jax.Array, w_gate: jax.Array, w_up: jax.Array, w_down: jax.Array):
    """The feed-forward of `chunk` tokens of a device at a time: nothing of F outlives its chunk, but for saved products."""

    def shard(x_BTD, *shards):
        weights = (all_gathered(w, axes, dim) for w, dim in zip(shards, (0, 0, 1), strict=True))
        D = x_BTD.shape[-1]
        x_nD = x_BTD.reshape(-1, D)
        n = len(x_nD)
        size = min(chunk, n)
        x_IcD = jnp.pad(x_nD, ((0, -n % size), (0, 0))).reshape(-1, size, D)
        y_nD = _in_chunks(mlp, x_IcD, *weights).reshape(-1, D)[:n]
        return jax.lax.psum(y_nD.reshape(x_BTD.shape), "tensor")

    specs = tuple(map(spec_of, (x_BTD, w_gate, w_up, w_down)))
    axes = width_axes(specs[1][0])
    return jax.shard_map(shard, in_specs=specs, out_specs=specs[0], check_vma=False)(x_BTD, w_gate, w_up, w_down)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _in_chunks(mlp: ChunkedMLP, x_IcD, w_gate, w_up, w_down):
    return jax.lax.map(lambda x_cD: mlp(x_cD, w_gate, w_up, w_down), x_IcD)


def _forward(mlp: ChunkedMLP, x_IcD, *weights):
    if not (mlp.saves_products and mlp.is_plain):
        return _in_chunks(mlp, x_IcD, *weights), (x_IcD, None, weights)
    y_IcD, products_IcF = jax.lax.map(lambda x_cD: mlp.with_products(x_cD, *weights), x_IcD)
    return y_IcD, (x_IcD, products_IcF, weights)


def _backward(mlp: ChunkedMLP, residuals, dy_IcD):
    x_IcD, products_IcF, weights = residuals

    def chunk(sums, xs):
        dx_cD, *terms_DF = gradients(mlp, *xs, *weights)
        return [a + b for a, b in zip(sums, terms_DF, strict=True)], dx_cD

    zeros = [jnp.zeros(weights[0].shape, jnp.float32)] * 3
    (dw_gate, dw_up, dw_downT), dx_IcD = jax.lax.scan(chunk, zeros, (x_IcD, products_IcF, dy_IcD))
    return dx_IcD, *(dw.astype(weights[0].dtype) for dw in (dw_gate, dw_up, dw_downT.T))


def gradients(mlp: ChunkedMLP, x_cD, products_cF, dy_cD, *weights):
    """Gradients of the activations [c, D], and in float32 of the weights: matrices are transposed to [D, F]."""
    by_hand = mlp.is_plain and len(weights) == 3  # without biases
    return (_gradients_by_hand if by_hand else _gradients)(mlp, x_cD, products_cF, dy_cD, *weights)


def _gradients(mlp: ChunkedMLP, x_cD, _, dy_cD, *weights):
    _, pull = jax.vjp(mlp, x_cD, *weights)
    dx_cD, dw_gate, dw_up, dw_down, *db_F = pull(dy_cD)
    return dx_cD, *(dw.astype(jnp.float32) for dw in (dw_gate, dw_up, dw_down.T, *db_F))


def _gradients_by_hand(mlp: ChunkedMLP, x_cD, products_cF, dy_cD, w_gate, w_up, w_down):
    """`gradients` of plain products: autodiff transposes [c, F] arrays, which costs a CPU more than all else.

    `products_cF` are (gate_cF, up_cF) if the forward pass saved them, or else None.
    """
    products_cF = products_cF or (x_cD @ w_gate, x_cD @ w_up)
    h_cF, pull = jax.vjp(mlp.hidden, *products_cF)
    dgate_cF, dup_cF = pull(dy_cD @ w_down.T)
    products = ((x_cD, dgate_cF), (x_cD, dup_cF), (dy_cD, h_cF))
    terms_DF = [jnp.einsum("Dc,cF->DF", a_cD.T, b_cF, preferred_element_type=jnp.float32) for a_cD, b_cF in products]
    return dgate_cF @ w_gate.T + dup_cF @ w_up.T, *terms_DF


_in_chunks.defvjp(_forward, _backward)
