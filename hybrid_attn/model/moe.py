"""The mixture of experts: a router chooses a few feed-forwards for each token. No token is dropped.

Letters: B batch, T tokens, D model, F width of an expert, E experts, k experts of a token; of one device, n tokens flattened
and E its own experts.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import MLP, LayerType, Model, mlp_width, shared_width
from hybrid_attn.kernels.experts import choose
from hybrid_attn.model.domain_router import DomainRouter
from hybrid_attn.model.execution import Chunks, Execution
from hybrid_attn.model.grouped import blocks_of, grouped_mlp, rows_of_block
from hybrid_attn.model.mlp import ChunkedMLP, GatedMLP, gating_of
from hybrid_attn.model.params import biased, cast, experts, linear, vector
from hybrid_attn.model.ragged import ragged_mlp, rows_of
from hybrid_attn.model.statistics import TINY, mean_entropy_bits, mean_over_tokens
from hybrid_attn.parallel.mesh import BATCH, all_gathered, reduce_scattered, spec_of, width_axes

EXPERT = ("expert",)  # the mesh axis that splits experts
LAYERS = "moe_layers"  # of which the scalars below are sums
METRICS = "expert_load", "router_entropy_bits", "router_z", "dropped_copies"
SHARES = "expert_shares"  # of the copies of tokens that each expert computes


class MoE(nnx.Module):
    """Gated feed-forwards of which the router chooses `top_k` for each token, beside shared ones of every token."""

    def __init__(self, model: Model, layer_type: LayerType, *, rngs: nnx.Rngs):
        self.settings, self.kernel = layer_type.mlp, "blocked"
        E, k, std = self.settings.experts, self.settings.top_k, model.init_std
        D, F = model.d_model, mlp_width(model, layer_type)
        self.gating = gating_of(model, layer_type)
        if self.settings.domain_dim is None:
            self.router = linear(rngs, (D, E), ("embed", "score"), std, exact=True)
        else:
            self.router = DomainRouter(model, E, self.settings.domain_dim, rngs=rngs)
        self.gate = experts(rngs, (E, D, F), ("expert", "embed", "mlp"), std, k)
        self.up = experts(rngs, (E, D, F), ("expert", "embed", "mlp"), std, k)
        self.down = experts(rngs, (E, F, D), ("expert", "mlp", "embed"), std, k)
        if self.settings.biases:
            self.router_bias = vector((E,), ("score",), 0.0)
            self.gate_bias, self.up_bias = (vector((E, F), ("expert", "mlp"), 0.0, active=k) for _ in range(2))
            self.down_bias = vector((E, D), ("score", "norm"), 0.0, active=k)
        if self.settings.shared_experts:
            shared = dataclasses.replace(self.settings, d_ff=shared_width(model, layer_type))
            self.shared = GatedMLP(model, dataclasses.replace(layer_type, mlp=shared), rngs=rngs)
        if self.settings.shared_gate:
            self.shared_gate = linear(rngs, (D, 1), ("embed", "norm"), std)
        if self.settings.bias_rate is not None:
            self.bias = vector((E,), ("score",), 0.0, self.settings.bias_rate)

    def __call__(self, x_BTD: jax.Array, seg_BT: jax.Array, chunks: Chunks | None) -> tuple[jax.Array, dict]:
        """The output [B, T, D], and what the router tells: its loss, `LAYERS`, `METRICS` and `SHARES`.

        Padding is routed nowhere: its output is that of the shared experts, and zero without these.
        """
        with jax.default_matmul_precision("float32"):
            logits_BTE = self.router(x_BTD.astype(jnp.float32))
        if self.settings.biases:
            logits_BTE = biased(logits_BTE, self.router_bias)
        bias_E = None if self.settings.bias_rate is None else self.bias[...]
        gates_BTk, expert_BTk = routed(self.settings, logits_BTE, bias_E)
        weights = [cast(w[...], x_BTD.dtype) for w in (self.gate, self.up, self.down)]
        if self.settings.biases:
            weights += [self.gate_bias[...], self.up_bias[...]]
        mlp = ChunkedMLP(self.gating, self.gate.dot, saves_products=False)
        y_BTD, load_E = of_experts(mlp, self.kernel, x_BTD, gates_BTk, expert_BTk, seg_BT > 0, *weights)
        if self.settings.biases:
            y_BTD += self._of_biases(gates_BTk, expert_BTk, seg_BT > 0).astype(x_BTD.dtype)
        if self.settings.shared_experts:
            y_BTD += self._of_shared(x_BTD, seg_BT, chunks)
        if self.settings.shared_combine == "average":
            y_BTD = y_BTD / 2
        return y_BTD, scalars(self.settings, logits_BTE, seg_BT > 0, load_E, bias_E)

    def _of_biases(self, gates_BTk: jax.Array, expert_BTk: jax.Array, real_BT: jax.Array) -> jax.Array:
        """What the biases of the last products of a token's experts add to it, [B, T, D] in float32."""
        chosen_BTkE = jax.nn.one_hot(expert_BTk, self.settings.experts) * real_BT[..., None, None]
        gates_BTE = (gates_BTk[..., None] * chosen_BTkE).sum(2)
        return jax.lax.dot_general(gates_BTE, self.down_bias[...], (((2,), (0,)), ((), ())), precision="highest")

    def _of_shared(self, x_BTD: jax.Array, seg_BT: jax.Array, chunks: Chunks | None) -> jax.Array:
        y_BTD, _ = self.shared(x_BTD, seg_BT, chunks)
        return jax.nn.sigmoid(self.shared_gate(x_BTD)) * y_BTD if self.settings.shared_gate else y_BTD


def scores(settings: MLP, logits_BTE: jax.Array) -> jax.Array:
    """What the router's logits say of each expert, between 0 and 1."""
    return jax.nn.softmax(logits_BTE, -1) if settings.router == "softmax" else jax.nn.sigmoid(logits_BTE)


def routed(settings: MLP, logits_BTE: jax.Array, bias_E: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """The gates [B, T, k] and the indices of the experts of each token; of equal scores the first expert's counts as larger.

    Experts are chosen by score, or logit, plus bias (arXiv 2408.15664, equation 3); gates are made of the scores alone.
    """

    def shard(logits_BTE, *biases):
        scores_BTE = scores(settings, logits_BTE)
        chosen_by_BTE = logits_BTE if settings.bias_on == "logit" else scores_BTE
        gates_BTk, expert_BTk = jax.lax.top_k(sum(biases, chosen_by_BTE), settings.top_k)
        if biases:
            gates_BTk = jnp.take_along_axis(scores_BTE, expert_BTk, -1)
        if settings.renormalise:
            gates_BTk /= gates_BTk.sum(-1, keepdims=True) + TINY
        return settings.route_scale * gates_BTk, expert_BTk

    biases = () if bias_E is None else (jax.lax.stop_gradient(bias_E),)
    spec = spec_of(logits_BTE)
    specs = (spec, *map(spec_of, biases))
    return jax.shard_map(shard, in_specs=specs, out_specs=(spec, spec), check_vma=False)(logits_BTE, *biases)


def by_kernel(model: Model, execution: Execution, tensor: int) -> set[str]:
    """The letters of the layer types whose experts tokamax computes on a mesh with so many `tensor` shards."""
    letters = {letter for letter in model.layers if model.kinds[letter].mlp.type == "moe"}
    is_plain, widths = execution.dot is jax.lax.dot_general, {x: mlp_width(model, model.kinds[x]) // tensor for x in letters}
    choices = {x: choose(execution.moe_kernel, is_plain, execution.dtype, (model.d_model, widths[x])) for x in letters}
    return {letter for letter, kernel in choices.items() if kernel == "tokamax"}


def of_experts(mlp: ChunkedMLP, kernel: str, x_BTD, gates_BTk, expert_BTk, real_BT, *weights) -> tuple[jax.Array, jax.Array]:
    """The output of the experts [B, T, D], and how many copies of tokens each of them computed, [E], on every device.

    Every device computes the tokens of all `expert` shards beside it with its own experts, whose matrices it gathers over other
    axes as those of other layers; what these add to a token is summed where the token is. `kernel` is that of `Execution`.
    """

    def shard(x_BTD, gates_BTk, expert_BTk, real_BT, *shards):
        weights = [all_gathered(w, axes, dim) for w, dim in zip(shards, (1, 1, 2), strict=False)] + [*shards[3:]]
        E, of_all = len(weights[0]), len(weights[0]) * jax.lax.axis_size("expert")
        expert_BTk = jnp.where(real_BT[..., None], expert_BTk, of_all)
        tokens = (x.reshape(-1, x.shape[-1]) for x in (x_BTD, gates_BTk, expert_BTk))
        x_nD, gates_nk, expert_nk = (all_gathered(x, EXPERT, 0) for x in tokens)
        expert_nk -= E * jax.lax.axis_index("expert")
        own_nk = jnp.where((expert_nk >= 0) & (expert_nk < E), expert_nk, E)
        if choose(kernel, mlp.is_plain, x_nD.dtype, weights[0].shape[1:]) == "tokamax":
            blocks = blocks_of(own_nk, E, 1)
            y_nD = ragged_mlp(mlp, x_nD, gates_nk, rows_of(blocks, len(x_nD)), *weights)
        else:
            mean = -(-own_nk.size // of_all)
            blocks = blocks_of(own_nk, E, rows_of_block(len(x_nD), mean))
            y_nD = grouped_mlp(mlp, mean, x_nD, gates_nk, blocks, *weights)
        y_nD = reduce_scattered(y_nD, EXPERT, 0)
        load_E = jax.lax.psum(blocks.load_E, tuple(axis for axis in (*BATCH, "context") if axis not in EXPERT))
        return jax.lax.psum(y_nD.reshape(x_BTD.shape), "tensor"), all_gathered(load_E, EXPERT, 0)

    specs = [spec_of(x) for x in (x_BTD, gates_BTk, expert_BTk, real_BT, *weights)]
    axes, arrays = width_axes(specs[4][1]), (x_BTD, gates_BTk, expert_BTk, real_BT, *weights)
    return jax.shard_map(shard, in_specs=tuple(specs), out_specs=(specs[0], P(None)), check_vma=False)(*arrays)


def scalars(settings: MLP, logits_BTE, real_BT, load_E: jax.Array, bias_E: jax.Array | None = None) -> dict[str, jax.Array]:
    """The router's loss as "aux_loss", and `METRICS` and `SHARES` of one layer, over all real tokens of the batch."""
    number, copies_E = jnp.maximum(real_BT.sum(), 1.0), load_E.astype(jnp.float32)
    scores_BTE = scores(settings, logits_BTE)
    probability_BTE = scores_BTE / (scores_BTE.sum(-1, keepdims=True) + TINY)
    share_E = copies_E / (settings.top_k * number)
    balance = balance_loss(share_E, mean_over_tokens(probability_BTE, real_BT))
    z = mean_over_tokens(jnp.square(jax.nn.logsumexp(logits_BTE, -1, keepdims=True)), real_BT).sum()
    entropy = mean_entropy_bits(probability_BTE, real_BT)
    load = copies_E.max() / jnp.maximum(copies_E.mean(), 1 / settings.experts)
    dropped = settings.top_k * real_BT.sum() - load_E.sum()
    values = dict(zip(METRICS, (load, entropy, z, dropped.astype(jnp.float32)), strict=True))
    values = {name: jax.lax.stop_gradient(x) for name, x in values.items()}
    loss = settings.balance_loss * balance + settings.z_loss * z
    if bias_E is not None:
        loss += excess(bias_E, copies_E)
    return {"aux_loss": loss, LAYERS: jnp.float32(1), SHARES: share_E, **values}


def excess(bias_E: jax.Array, copies_E: jax.Array) -> jax.Array:
    """Zero, whose gradient is E times what the load of each expert is above the mean, an integer: no rounding is a load.

    So gradients sum the loads of all microbatches, and a step against their sign is that of arXiv 2408.15664, algorithm 1.
    """
    return ((bias_E - jax.lax.stop_gradient(bias_E)) * (len(copies_E) * copies_E - copies_E.sum())).sum()


def balance_loss(share_E: jax.Array, probability_E: jax.Array) -> jax.Array:
    """E times the sum of share of the copies times mean probability; 1 where both are equal (arXiv 2101.03961, equation 4)."""
    return len(share_E) * (share_E * probability_E).sum()
