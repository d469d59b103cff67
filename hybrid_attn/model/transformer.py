"""The transformer: a layer, and the stack of them between embedding and final norm.

Letters: B batch, T tokens, D model, F feed-forward, V vocabulary. Parameters are a nested dict of float32 arrays whose
paths are names (`periods/L0/attention/q`); those under `periods` carry the period as axis 0.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from hybrid_attn import kernels
from hybrid_attn.config import LayerType, Model, output_scale
from hybrid_attn.kernels.softmax import soft_cap
from hybrid_attn.model import short_conv, statistics, transforms
from hybrid_attn.model.attention import Attend, Attention
from hybrid_attn.model.attention_experts import AttentionExperts
from hybrid_attn.model.execution import Chunks, Execution
from hybrid_attn.model.loss import most_likely, token_losses
from hybrid_attn.model.mlp import GatedMLP
from hybrid_attn.model.moe import MoE
from hybrid_attn.model.parametrisation import parametrised
from hybrid_attn.model.params import Dot, Linear, Norm, ParamSpec, embedding, map_weights, weights_of
from hybrid_attn.model.statistics import LayerStatistics
from hybrid_attn.model.token_mixing import LayerState, TokenMixing, packed_mixing
from hybrid_attn.parallel import context
from hybrid_attn.parallel.mesh import TOKENS_BT, abstract_mesh, for_inference, gathered, spec_of, width_axes
from hybrid_attn.trees import choice

INPUT = "layer input"
KEEP = jax.checkpoint_policies.save_only_these_names(kernels.OUTPUTS)
OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=(), names_which_can_be_offloaded=(INPUT, kernels.OUTPUTS),
    offload_src="device", offload_dst="pinned_host",
)  # fmt: skip
CHECKPOINTS = {
    "none": lambda layer: layer,
    "layer": jax.checkpoint,
    "attention": functools.partial(jax.checkpoint, policy=KEEP),
    "offload": functools.partial(jax.checkpoint, policy=OFFLOAD),
}
STATISTICS = "statistics"  # beside the scalars of the layers: the `LayerStatistics` of each layer, by group and name
Aux = dict[str, Any]


class Mixer(Protocol):
    """How the tokens of a sequence exchange information; its weights stand in a layer's parameters under its name."""

    def __init__(self, model: Model, layer_type: LayerType, *, rngs: nnx.Rngs): ...

    def __call__(self, x_BTD: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, attend: Attend) -> tuple[jax.Array, Aux, Any]:
        """What the layer adds to the residual stream, [B, T, D], its aux, and what else `attend` returns beside its output.

        `x_BTD` is the input of the mixer: normed except in the block "post", and after the short convolution if there is one.
        `attend` compares queries with the keys of packed sequences or of a cache. The aux is as that of a `FeedForward`.
        """

    @staticmethod
    def sequence_flops(model: Model, layer_type: LayerType, length: int) -> int:
        """FLOPs of a forward pass over one document of `length` tokens, beyond the products with its weights."""


class FeedForward(Protocol):
    """What a layer does with each token by itself. Its weights stand in a layer's parameters under `mlp`."""

    def __init__(self, model: Model, layer_type: LayerType, *, rngs: nnx.Rngs): ...

    def __call__(self, x_BTD: jax.Array, seg_BT: jax.Array, chunks: Chunks | None) -> tuple[jax.Array, Aux]:
        """What the layer adds to the residual stream, [B, T, D], and its aux: scalars, which are summed over the layers.

        The scalar "aux_loss" is added to the loss. Arrays in the aux are of this layer alone, and only `LayerStatistics` have
        them. Segment 0 is padding. `chunks`: how many tokens to compute at a time, which bounds the memory and changes nothing
        else; None for all at once. A class that cannot do so computes all at once.
        """


MIXERS: dict[str, type[Mixer]] = {"attention": Attention, "attention_experts": AttentionExperts}
MLPS: dict[str, type[FeedForward]] = {"gated": GatedMLP, "moe": MoE}


class Block(nnx.Module):
    """A layer of the type that `letter` names, in the form that `model.block` names."""

    def __init__(self, model: Model, letter: str, *, rngs: nnx.Rngs):
        layer_type = model.kinds[letter]
        self.form, self.mixer_name, self.residual_scale = model.block, layer_type.mixer, layer_type.residual_scale
        mixer = choice(f"model.kinds.{letter}.mixer", layer_type.mixer, MIXERS)
        setattr(self, self.mixer_name, mixer(model, layer_type, rngs=rngs))
        self.convolves = layer_type.short_conv is not None
        if self.convolves:
            self.short_conv = short_conv.taps(model, layer_type.short_conv)
        self.mlp = choice(f"model.kinds.{letter}.mlp.type", layer_type.mlp.type, MLPS)(model, layer_type, rngs=rngs)
        if self.form == "parallel":
            self.norm = residual_norm(model)
        if self.form in ("pre", "sandwich"):
            self.attention_norm, self.mlp_norm = residual_norm(model), residual_norm(model)
        if self.form in ("post", "sandwich"):
            self.attention_post_norm, self.mlp_post_norm = residual_norm(model), residual_norm(model)

    def __call__(
        self, x_BTD: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, mixing: TokenMixing, chunks: Chunks | None
    ) -> tuple[jax.Array, Aux, LayerState]:
        """The residual stream after the layer, the aux of mixer and feed-forward, and what else the `mixing` returns."""
        tokens = pos_BT, seg_BT, mixing
        if self.form == "parallel":  # x + mixer(norm x) + mlp(norm x)
            h_BTD = self.norm(x_BTD)
            y_BTD, aux, state = self._mixed(h_BTD, *tokens)
            z_BTD, mlp_aux = self.mlp(h_BTD, seg_BT, chunks)
            return self._sum(self._sum(x_BTD, y_BTD), z_BTD), added(aux, mlp_aux), state
        # x + norm(mixer(norm x)), then x + norm(mlp(norm x)): pre has the inner norms, post the outer ones, sandwich both.
        inner, outer = self.form != "post", self.form != "pre"
        y_BTD, aux, state = self._mixed(self.attention_norm(x_BTD) if inner else x_BTD, *tokens)
        x_BTD = self._sum(x_BTD, self.attention_post_norm(y_BTD) if outer else y_BTD)
        z_BTD, mlp_aux = self.mlp(self.mlp_norm(x_BTD) if inner else x_BTD, seg_BT, chunks)
        return self._sum(x_BTD, self.mlp_post_norm(z_BTD) if outer else z_BTD), added(aux, mlp_aux), state

    def _mixed(
        self, x_BTD: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, mixing: TokenMixing
    ) -> tuple[jax.Array, Aux, LayerState]:
        """What the mixer makes of its input, which the short convolution has changed if there is one."""
        x_BTD, inputs_BUD = mixing.convolve(self.short_conv[...], x_BTD) if self.convolves else (x_BTD, None)
        y_BTD, aux, state = getattr(self, self.mixer_name)(x_BTD, pos_BT, seg_BT, mixing.attend)
        return y_BTD, aux, LayerState(state, inputs_BUD)

    def _sum(self, x_BTD: jax.Array, y_BTD: jax.Array) -> jax.Array:
        """The residual stream with the output of a branch."""
        return x_BTD + (y_BTD if self.residual_scale == 1.0 else self.residual_scale * y_BTD)


def residual_norm(model: Model) -> Norm:
    """The norm of activations [B, T, D], by `model.norm`."""
    return Norm(model.norm, (model.d_model,), ("norm",), model.norm_eps)


def added(total: Aux, new: Aux) -> Aux:
    """The sum of two layers' scalars; a name that one of them lacks counts as zero there."""
    return total | {name: total[name] + value if name in total else value for name, value in new.items()}


def look_up(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Embeddings [B, T, D] from a table whose vocabulary is split over `tensor`, and whose width over axes of `WIDTH`.

    The table never moves. Each shard looks up its part of the width for the tokens of all shards along those axes, and an
    all-to-all hands them over. Embeddings that another `tensor` shard has are zeros, and summed. The gradient is summed in the
    table's precision.
    """

    def shard(embed_VD, tokens_BT):
        local_BT = jax.lax.all_gather(tokens_BT, axes, axis=0, tiled=True)
        local_BT -= jax.lax.axis_index("tensor") * embed_VD.shape[0]
        is_local_BT = (local_BT >= 0) & (local_BT < embed_VD.shape[0])
        x_BTD = jnp.where(is_local_BT[..., None], embed_VD[jnp.where(is_local_BT, local_BT, 0)].astype(dtype), 0)
        return jax.lax.psum(jax.lax.all_to_all(x_BTD, axes, split_axis=0, concat_axis=2, tiled=True), "tensor")

    table, tokens = spec_of(embed_VD), spec_of(tokens_BT)
    axes = width_axes(table[1])
    return jax.shard_map(shard, in_specs=(table, tokens), out_specs=P(*tokens, None))(embed_VD, tokens_BT)


def _weights(model: Model, rngs: nnx.Rngs) -> dict:
    """Every `Weight` of the model, as a nested dict whose paths are their names."""

    def of_layers(letters: str, rngs: nnx.Rngs) -> dict:
        return {name: weights_of(Block(model, letter, rngs=rngs)) for name, letter in layer_names(letters)}

    weights = {"embed": embedding(rngs, (model.vocab_size, model.d_model), model.init_std)}
    for group, letters, repetitions in model.groups:
        make = functools.partial(of_layers, letters)
        weights[group] = jax.vmap(make)(rngs.split(repetitions)) if group == "periods" else make(rngs)
    weights["final_norm"] = weights_of(residual_norm(model))
    if not model.tie_embeddings:
        std = model.init_std if model.unembed_init_std is None else model.unembed_init_std
        weights["unembed"] = embedding(rngs, (model.vocab_size, model.d_model), std)
    if model.adapter.type is not None:
        weights = transforms.with_added(model, weights, rngs)
    weights = map_weights(functools.partial(parametrised, model), weights)
    return weights if model.low_rank.rank_fraction is None else transforms.low_rank.with_factors(model, weights, rngs)


def layer_names(letters: str) -> list[tuple[str, str]]:
    """The names of successive layers in the parameters, L0, L1, …, and the letters of their types."""
    return [(f"{letter}{i}", letter) for i, letter in enumerate(letters)]


def layer_paths(model: Model) -> list[tuple[str, str, int]]:
    """Where each layer stands, from the first to the last: its group, its name there, and its period."""
    return [
        (group, name, period)
        for group, letters, repetitions in model.groups
        for period, (name, _) in itertools.product(range(repetitions), layer_names(letters))
    ]


def init(model: Model, key: jax.Array) -> dict:
    """Parameters as a nested dict of float32 arrays, laid out on the mesh in force (`jax.set_mesh`)."""
    return map_weights(lambda weight: weight[...], _weights(model, nnx.Rngs(params=key)))


def abstract_params(model: Model) -> dict:
    """Shapes, dtypes and shardings of the parameters, as `init` makes them on the mesh in force, or else on one device."""
    return _eval_shape(lambda: init(model, jax.random.key(0)))


@functools.cache
def specs(model: Model) -> dict:
    """The `ParamSpec` of every parameter, as a nested dict like that of `init`; those under `periods` are of one period."""
    weights = _eval_shape(lambda: _weights(model, nnx.Rngs(params=jax.random.key(0))))
    return map_weights(lambda weight: weight.spec, weights)


def _eval_shape(function: Callable[[], dict]) -> dict:
    """What `function` returns, without computing it."""
    mesh = jax.sharding.get_abstract_mesh()
    with jax.sharding.use_abstract_mesh(abstract_mesh() if mesh.empty else mesh):
        return jax.eval_shape(function)


def apply(
    model: Model, params: dict, tokens_BT: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, execution: Execution
) -> jax.Array:
    """Final normed activations [B, T, D] of int32 tokens; positions restart with each document, segment 0 is padding."""
    inputs = context.to_zigzag(tuple(jax.reshard(x, TOKENS_BT) for x in (tokens_BT, pos_BT, seg_BT)), execution.zigzag)
    return context.from_zigzag(apply_in_zigzag(model, params, *inputs, execution)[0], execution.zigzag)


def apply_in_zigzag(
    model: Model, params: dict, tokens_BT: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, execution: Execution
) -> tuple[jax.Array, Aux]:
    """`apply` to tokens that `context.to_zigzag` has ordered, whose activations keep that order; and the layers' scalars.

    With `execution.statistics` these have `STATISTICS` too: of the layers of the periods, with the period as axis 0.
    """
    mixings = {letter: packed_mixing(model, letter, pos_BT, seg_BT, execution) for letter in sorted(set(model.layers))}

    def layers(letters: str, x_BTD: jax.Array, leaves: dict) -> tuple[jax.Array, tuple[Aux, dict]]:
        total, measured = {}, {}
        for name, letter in layer_names(letters):

            def layer(leaves: dict, x_BTD: jax.Array, letter: str = letter) -> tuple[jax.Array, Aux, LayerStatistics | None]:
                # Named in here: what jax.checkpoint keeps of its arguments as they are stays on the device.
                x_BTD = checkpoint_name(x_BTD, INPUT)
                block = bind(model, letter, leaves, execution)
                x_BTD, aux, state = block(x_BTD, pos_BT, seg_BT, mixings[letter], execution.mlp_chunks(letter))
                scalars = {name: x for name, x in aux.items() if x.ndim == 0}
                if not execution.statistics:
                    return x_BTD, scalars, None
                return x_BTD, scalars, LayerStatistics(state.attention, statistics.of_activations(x_BTD, seg_BT), aux)

            with jax.named_scope(letter), jax.named_scope(name):  # a profile sums over the layers of a type
                x_BTD, aux, measured[name] = CHECKPOINTS[execution.remat[letter]](layer)(leaves[name], x_BTD)
            total = added(total, aux)
        return x_BTD, (total, measured)

    x_BTD, total, measured = look_up(params["embed"], tokens_BT, execution.dtype) * model.embed_scale, {}, {}
    for group, letters, _ in model.groups:
        if group == "periods":
            scanned = functools.partial(layers, letters)
            x_BTD, (by_period, measured[group]) = jax.lax.scan(scanned, x_BTD, params[group], unroll=execution.unroll)
            aux = jax.tree.map(lambda values: values.sum(0), by_period)
        else:
            x_BTD, (aux, measured[group]) = layers(letters, x_BTD, params[group])
        total = added(total, aux)
    return final_norm(model, params, x_BTD), total | ({STATISTICS: measured} if execution.statistics else {})


def unstacked(model: Model, params: dict, dtype: jnp.dtype) -> dict:
    """Parameters as `layer_by_layer` takes them: a dict for each layer under `layers`, cast and laid out for inference.

    Layer by layer, because a loop over stacked weights copies each before it is used, which is most of a decode step.
    """

    # What a transform reads stays as it is stored; the leaf that it makes is cast where it is multiplied.
    def cast(spec: ParamSpec, x: jax.Array | dict) -> jax.Array | dict:
        return for_inference(x.astype(dtype) if spec.cast else x) if isinstance(x, jax.Array) else x

    params = jax.tree.map(cast, specs(model), params)
    layers = []
    for group, name, period in layer_paths(model):
        leaves = params[group][name]
        layers.append(jax.tree.map(lambda x, period=period: x[period], leaves) if group == "periods" else leaves)
    others = {name: x for name, x in params.items() if name not in ("prefix", "periods", "tail")}
    return others | {"layers": tuple(layers)}


class Tokens(NamedTuple):
    """Tokens [B, T], their positions and their segments, of which 0 is padding."""

    ids_BT: jax.Array
    pos_BT: jax.Array
    seg_BT: jax.Array


def layer_by_layer(
    model: Model, weights: dict, tokens: Tokens, mixings: Sequence[TokenMixing], execution: Execution
) -> tuple[jax.Array, list[LayerState]]:
    """Final normed activations [B, T, D], and what else each layer's own `mixing` returns. `weights` are `unstacked`'s."""
    x_BTD = look_up(weights["embed"], tokens.ids_BT, execution.dtype) * model.embed_scale
    states = []
    for letter, leaves, mixing in zip(model.layers, weights["layers"], mixings, strict=True):
        chunks = execution.mlp_chunks(letter) if tokens.ids_BT.shape[1] > 1 else None
        block = bind(model, letter, leaves, execution)
        x_BTD, _, state = block(x_BTD, tokens.pos_BT, tokens.seg_BT, mixing, chunks)
        states.append(state)
    return final_norm(model, weights, x_BTD), states


def losses(model: Model, params: dict, batch: dict, execution: Execution) -> tuple[jax.Array, jax.Array]:
    """Negative log-probability of each target of a batch and log-sum-exp of its logits, [B, T] float32."""
    return losses_and_aux(model, params, batch, execution)[:2]


def losses_and_aux(model: Model, params: dict, batch: dict, execution: Execution) -> tuple[jax.Array, jax.Array, Aux]:
    """`losses`, and the scalars of the layers (`FeedForward`), summed over them."""
    x_BTD, targets_BT, aux = _read_in_zigzag(model, params, batch, execution)
    table_VD = unembedding(model, params)
    nll_BT, lse_BT = token_losses(model, table_VD, x_BTD, targets_BT, execution.loss_chunk, execution.dot)
    return *context.from_zigzag((nll_BT, lse_BT), execution.zigzag), aux


def losses_and_most_likely(
    model: Model, params: dict, batch: dict, execution: Execution, k: int
) -> tuple[jax.Array, jax.Array]:
    """Negative log-probability of each target [B, T], and log-probabilities of the k most likely tokens there [B, T, k]."""
    x_BTD, targets_BT, _ = _read_in_zigzag(model, params, batch, execution)
    table_VD = unembedding(model, params)
    nll_BT, _ = token_losses(model, table_VD, x_BTD, targets_BT, execution.loss_chunk, execution.dot)
    best_BTk = most_likely(model, table_VD, x_BTD, k, execution.loss_chunk, execution.dot)
    return context.from_zigzag((nll_BT, best_BTk), execution.zigzag)


def _read_in_zigzag(model: Model, params: dict, batch: dict, execution: Execution) -> tuple[jax.Array, jax.Array, Aux]:
    """Final activations [B, T, D] of a batch and its targets [B, T], in zigzag order, and what the layers measure."""
    names = ("tokens", "positions", "segments", "targets")
    *inputs, targets_BT = context.to_zigzag(tuple(jax.reshard(batch[name], TOKENS_BT) for name in names), execution.zigzag)
    x_BTD, aux = apply_in_zigzag(model, params, *inputs, execution)
    return x_BTD, targets_BT, aux


def bind(model: Model, letter: str, leaves: dict, execution: Execution) -> Block:
    """The layer of a type, with the execution's `dot` and `moe_kernel`, and with what its `transform` makes of `leaves`."""
    graph, leaves = _graph(model, letter, execution.dot, execution.moe_kernel), execution.transform(leaves)
    if not transforms.changes(model):
        return nnx.merge(graph, leaves)
    leaves, added = transforms.separated(leaves)
    block = nnx.merge(graph, leaves)
    transforms.attach(model, block, added)
    return block


@functools.cache
def _graph(model: Model, letter: str, dot: Dot, moe_kernel: str) -> nnx.GraphDef:
    block = nnx.eval_shape(lambda key: Block(model, letter, rngs=nnx.Rngs(params=key)), jax.random.key(0))
    for _, node in nnx.iter_graph(block):
        if isinstance(node, Linear):
            node.set_metadata(dot=dot)
        if isinstance(node, MoE):
            node.kernel = moe_kernel
    return nnx.graphdef(block)


def final_norm(model: Model, params: dict, x_BTD: jax.Array) -> jax.Array:
    """What the logits are made of."""
    return nnx.merge(_final_norm_graph(model), params["final_norm"])(x_BTD)


@functools.cache
def _final_norm_graph(model: Model) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: residual_norm(model)))


def unembedding(model: Model, params: dict) -> jax.Array:
    """The [V, D] table whose products with the activations are the logits, before `output_scale` and `logit_softcap`."""
    return params["embed"] if model.tie_embeddings else params["unembed"]


def logits(model: Model, params: dict, x_BTD: jax.Array, dot: Dot = jax.lax.dot_general) -> jax.Array:
    """All logits [B, T, V] in float32 of the final normed activations; the loss never builds them (`loss.token_losses`)."""
    table_VD = gathered(unembedding(model, params).astype(x_BTD.dtype))
    spec, contracted = P(*spec_of(x_BTD)[:2], "tensor"), (((2,), (1,)), ((), ()))
    products_BTV = dot(x_BTD, table_VD, contracted, preferred_element_type=jnp.float32, out_sharding=spec)
    return soft_cap(output_scale(model) * products_BTV, model.logit_softcap)[0]
