"""A soft mixture of attentions: every expert computes every token (MoA of BAM, arXiv 2408.08274, section 3.2).

The output is the sum over experts of gate times attention; the gates are a softmax over the experts, of logits W x in float32.
With shared keys and values each expert has queries and an output of its own, and the KV cache is that of one.

Letters: B batch, T tokens, D model, E experts, K key/value heads of one expert, G query heads of one of these, N = K x G,
H head size, M = K x E x G.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import LayerType, Model
from hybrid_attn.config_model import shares_kv
from hybrid_attn.model.attention import KEYS, QUERIES, Attend, Attention
from hybrid_attn.model.params import linear
from hybrid_attn.model.statistics import mean_entropy_bits, mean_over_tokens
from hybrid_attn.parallel.mesh import spec_of

LAYERS = "attention_expert_layers"  # of which the scalars below are sums
METRICS = ("gate_entropy_bits",)
SHARES = "gate_shares"  # the mean gate of each expert


class AttentionExperts(nnx.Module):
    """Attentions of one layer type inside `model`: `expert0`, `expert1`, …, beside keys and values that they may share."""

    sequence_flops = staticmethod(Attention.sequence_flops)

    def __init__(self, model: Model, layer_type: LayerType, *, rngs: nnx.Rngs):
        self.number, self.shares, self.kv_heads = layer_type.attention_experts, shares_kv(layer_type), model.num_kv_heads
        self.router = linear(rngs, (model.d_model, self.number), ("embed", "score"), model.init_std, exact=True)
        for i in range(self.number):
            parts = (QUERIES,) if self.shares else (QUERIES, KEYS)
            setattr(self, f"expert{i}", Attention(model, layer_type, rngs=rngs, parts=parts))
        if self.shares:
            self.shared = Attention(model, layer_type, rngs=rngs, parts=(KEYS,))

    def __call__(
        self, x_BTD: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, attend: Attend
    ) -> tuple[jax.Array, dict[str, jax.Array], Any]:
        """The output [B, T, D], what the gates tell, and what else `attend` returns, which is called once with all heads."""
        experts = [getattr(self, f"expert{i}") for i in range(self.number)]
        angles = experts[0].angles(pos_BT)
        queries = [expert.queries(x_BTD, pos_BT, angles) for expert in experts]
        keys, values = zip(*(owner.keys(x_BTD, angles) for owner in ([self.shared] if self.shares else experts)), strict=True)
        sinks = None if experts[0].sinks is None else self._joined([expert.sinks for expert in experts], 0)
        o_BTMH, state = attend(*(self._joined(heads, 2) for heads in (queries, keys, values)), sinks)
        exact_BTE = self.gates(x_BTD)
        gates_BTE = exact_BTE.astype(x_BTD.dtype)
        terms_BTD = [
            gates_BTE[..., i, None] * expert.output(x_BTD, o_BTNH)
            for i, (expert, o_BTNH) in enumerate(zip(experts, self._separated(o_BTMH), strict=True))
        ]
        return sum(terms_BTD), statistics_of(jax.lax.stop_gradient(exact_BTE), seg_BT > 0), state

    def gates(self, x_BTD: jax.Array) -> jax.Array:
        """The gate of each expert [B, T, E], float32."""
        with jax.default_matmul_precision("float32"):
            return jax.nn.softmax(self.router(x_BTD.astype(jnp.float32)), -1)

    def _joined(self, arrays: Sequence[jax.Array], axis: int) -> jax.Array:
        """Arrays of experts with heads along an axis, as one: the heads that share a key/value head come together."""
        before, after = arrays[0].shape[:axis], arrays[0].shape[axis + 1 :]
        by_key_head = [split_heads(x, axis, self.kv_heads, -1) for x in arrays]
        joined = jnp.stack(by_key_head, axis + 1).reshape(*before, -1, *after)
        return jax.reshard(joined, spec_of(arrays[0]))

    def _separated(self, o_BTMH: jax.Array) -> list[jax.Array]:
        """The heads [B, T, N, H] of each expert, joined as `_joined` does."""
        B, T, _, H = o_BTMH.shape
        o_BTKEGH = split_heads(o_BTMH, 2, self.kv_heads, self.number, -1)
        parts = (o_BTKEGH[:, :, :, i].reshape(B, T, -1, H) for i in range(self.number))
        return [jax.reshard(o_BTNH, spec_of(o_BTMH)) for o_BTNH in parts]


def split_heads(x: jax.Array, axis: int, *sizes: int) -> jax.Array:
    """Heads along an axis as axes of these sizes, sharded by the first, that of key/value heads.

    A reshape alone loses the sharding of a dimension of one entry.
    """
    split, spec = x.reshape(*x.shape[:axis], *sizes, *x.shape[axis + 1 :]), spec_of(x)
    return jax.reshard(split, P(*spec[: axis + 1], *[None] * (len(sizes) - 1), *spec[axis + 1 :]))


def statistics_of(gates_BTE: jax.Array, real_BT: jax.Array) -> dict[str, jax.Array]:
    """`LAYERS`, `METRICS` and `SHARES` of one layer, over all real tokens of the batch."""
    entropy = mean_entropy_bits(gates_BTE, real_BT)
    return {LAYERS: jnp.float32(1), "gate_entropy_bits": entropy, SHARES: mean_over_tokens(gates_BTE, real_BT)}
