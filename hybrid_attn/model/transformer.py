"""The transformer: embedding, layers scanned period by period, final norm.

Letters: B batch, T tokens, D model, F feed-forward, V vocabulary. Parameters are a nested dict of float32 arrays whose
paths are names (`periods/L0/attention/q`); those under `periods` carry the period as axis 0.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from hybrid_attn import config, kernels
from hybrid_attn.config import LayerType, Model, Table, Train
from hybrid_attn.kernels.softmax import soft_cap
from hybrid_attn.model.attention import Attend
from hybrid_attn.model.block import Aux, Block, added, residual_norm
from hybrid_attn.model.loss import token_losses
from hybrid_attn.model.params import embedding, map_weights, weights_of
from hybrid_attn.parallel import context
from hybrid_attn.parallel.mesh import TOKENS_BT, abstract_mesh, gathered, spec_of

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
CPU_MLP_CHUNK = 512  # 512 x 768 in float32 stay in 2 MiB of cache: 2x as fast as whole rows, recomputation included


def unchanged(leaves: dict) -> dict:
    return leaves


class Run(NamedTuple):
    """How a model runs, which never changes the function that it computes: the `train` keys of configs/base.py, resolved."""

    dtype: jnp.dtype
    remat: Table[str, str]  # by the letter of the layer
    context: Table[str, str]
    zigzag: bool
    kernel: str
    loss_chunk: int
    mlp_chunk: int | None
    transform: Callable[[dict], dict] = unchanged  # of the leaves of a layer, of any structure, into those that it takes


def run_on(platform: str, model: Model, train: Train) -> Run:
    """The `Run` of `model` that `train` means on a platform ("cpu", "gpu" or "tpu").

    NotImplementedError where the kernel does not run there, or does not give what the choice of remat keeps.
    """
    dtype = ("float32" if platform == "cpu" else "bfloat16") if train.dtype == "auto" else train.dtype
    mlp_chunk = CPU_MLP_CHUNK if train.mlp_chunk is None and platform == "cpu" else train.mlp_chunk
    kernel = kernels.choose(train.kernel, platform)
    remat, schemes = config.remat(model, train), config.context(model, train)
    if not kernels.KERNELS[kernel].saves_outputs and (wanted := {"attention", "offload"} & {*remat.values()}):
        able = " or ".join(f'"{name}"' for name, x in kernels.KERNELS.items() if x.saves_outputs and platform in x.platforms)
        raise NotImplementedError(
            f'the kernel "{kernel}" runs again in the backward pass, and train.remat={" and ".join(sorted(wanted))} keeps '
            f"its outputs so that it does not; use train.kernel={able}, or remat none or layer"
        )
    return Run(jnp.dtype(dtype), remat, schemes, train.zigzag, kernel, train.loss_chunk, mlp_chunk)


def in_packed(pos_BT: jax.Array, seg_BT: jax.Array, run: Run, letter: str) -> Attend:
    """Attention of a layer of that type to the tokens of its own packed sequences."""

    def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N, kind: LayerType, scale: float):
        o_BTNH = context.attend(
            q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT, sinks_N, window=kind.window, chunk=kind.chunk, scale=scale,
            softcap=kind.softcap, kernel=run.kernel, scheme=run.context[letter], zigzag=run.zigzag,
        )  # fmt: skip
        return o_BTNH, None

    return attend


def look_up(embed_VD: jax.Array, tokens_BT: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows [B, T, D] of a table split over `tensor` by words and over `fsdp` by dimensions; the table never moves.

    Each shard looks up its part of the rows that its `fsdp` group wants, and they exchange them; those of words that another
    `tensor` shard has are zeros, and summed. The gradient is added up in the table's own precision.
    """

    def shard(embed_VD, tokens_BT):
        local_BT = jax.lax.all_gather(tokens_BT, "fsdp", axis=0, tiled=True)
        local_BT -= jax.lax.axis_index("tensor") * embed_VD.shape[0]
        here_BT = (local_BT >= 0) & (local_BT < embed_VD.shape[0])
        x_BTD = jnp.where(here_BT[..., None], embed_VD[jnp.where(here_BT, local_BT, 0)].astype(dtype), 0)
        return jax.lax.psum(jax.lax.all_to_all(x_BTD, "fsdp", split_axis=0, concat_axis=2, tiled=True), "tensor")

    tokens = spec_of(tokens_BT)
    return jax.shard_map(shard, in_specs=(P("tensor", "fsdp"), tokens), out_specs=P(*tokens, None))(embed_VD, tokens_BT)


def _weights(model: Model, rngs: nnx.Rngs) -> dict:
    """Every `Weight` of the model, as a nested dict whose paths are their names."""
    weights = {"embed": embedding(rngs, model.vocab_size, model.d_model, model.init_std)}
    if model.num_periods:
        stack = jax.vmap(lambda rngs: _weights_of_layers(model, model.pattern, rngs))
        weights["periods"] = stack(rngs.split(model.num_periods))
    if model.tail:
        weights["tail"] = _weights_of_layers(model, model.tail, rngs)
    weights["final_norm"] = weights_of(residual_norm(model))
    if not model.tie_embeddings:
        weights["unembed"] = embedding(rngs, model.vocab_size, model.d_model, model.init_std)
    return weights


def _weights_of_layers(model: Model, letters: str, rngs: nnx.Rngs) -> dict:
    return {slot: weights_of(Block(model, letter, rngs=rngs)) for slot, letter in slots(letters)}


def slots(letters: str) -> list[tuple[str, str]]:
    """The names of successive layers in the parameters, L0, L1, …, and the letters of their types."""
    return [(f"{letter}{i}", letter) for i, letter in enumerate(letters)]


def init(model: Model, key: jax.Array) -> dict:
    """Parameters as a nested dict of float32 arrays, laid out on the mesh in force (`jax.set_mesh`)."""
    return map_weights(lambda weight: weight[...], _weights(model, nnx.Rngs(params=key)))


@functools.cache
def specs(model: Model) -> dict:
    """The `ParamSpec` of every parameter, as a nested dict like that of `init`; those under `periods` are of one period."""
    mesh = jax.sharding.get_abstract_mesh()
    with jax.sharding.use_abstract_mesh(abstract_mesh() if mesh.empty else mesh):
        weights = jax.eval_shape(lambda: _weights(model, nnx.Rngs(params=jax.random.key(0))))
    return map_weights(lambda weight: weight.spec, weights)


def layer_specs(model: Model) -> list[tuple[str, int, dict]]:
    """The letter of each layer of a period and of the tail, how many layers there are like it, and the specs of one."""
    of_groups = specs(model)
    groups = (("periods", model.pattern, model.num_periods), ("tail", model.tail, 1))
    return [
        (letter, number, of_groups[group][slot])
        for group, letters, number in groups if group in of_groups
        for slot, letter in slots(letters)
    ]  # fmt: skip


def apply(model: Model, params: dict, tokens_BT: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, run: Run) -> jax.Array:
    """Final normed activations [B, T, D] of int32 tokens; positions restart with each document, segment 0 is padding."""
    inputs = context.to_zigzag(tuple(jax.reshard(x, TOKENS_BT) for x in (tokens_BT, pos_BT, seg_BT)), run.zigzag)
    return context.from_zigzag(apply_in_zigzag(model, params, *inputs, run)[0], run.zigzag)


def apply_in_zigzag(
    model: Model, params: dict, tokens_BT: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, run: Run
) -> tuple[jax.Array, Aux]:
    """`apply` to tokens that `context.to_zigzag` has ordered, whose activations keep that order; and the layers' scalars."""
    attends = {letter: in_packed(pos_BT, seg_BT, run, letter) for letter in sorted(set(model.layers))}

    def layers(x_BTD: jax.Array, leaves: dict, letters: str) -> tuple[jax.Array, Aux]:
        total: Aux = {}
        for slot, letter in slots(letters):

            def layer(leaves: dict, x_BTD: jax.Array, letter: str = letter) -> tuple[jax.Array, Aux]:
                # Named in here: what jax.checkpoint keeps of its arguments as they are stays on the device.
                x_BTD = checkpoint_name(x_BTD, INPUT)
                return bind(model, letter, run.transform(leaves))(x_BTD, pos_BT, attends[letter], run.mlp_chunk)[:2]

            with jax.named_scope(slot):
                x_BTD, aux = CHECKPOINTS[run.remat[letter]](layer)(leaves[slot], x_BTD)
            total = added(total, aux)
        return x_BTD, total

    x_BTD, aux = look_up(params["embed"], tokens_BT, run.dtype) * model.embed_scale, {}
    if model.num_periods:
        x_BTD, by_period = jax.lax.scan(lambda x, leaves: layers(x, leaves, model.pattern), x_BTD, params["periods"])
        aux = jax.tree.map(lambda values: values.sum(0), by_period)
    if model.tail:
        x_BTD, of_tail = layers(x_BTD, params["tail"], model.tail)
        aux = added(aux, of_tail)
    return final_norm(model, params, x_BTD), aux


def losses(model: Model, params: dict, batch: dict, run: Run) -> tuple[jax.Array, jax.Array]:
    """Negative log-probability of each target of a batch and log-sum-exp of its logits, [B, T] float32."""
    return losses_and_aux(model, params, batch, run)[:2]


def losses_and_aux(model: Model, params: dict, batch: dict, run: Run) -> tuple[jax.Array, jax.Array, Aux]:
    """`losses`, and the scalars of the layers (`block.FeedForward`), summed over them."""
    names = ("tokens", "positions", "segments", "targets")
    *inputs, targets_BT = context.to_zigzag(tuple(jax.reshard(batch[name], TOKENS_BT) for name in names), run.zigzag)
    x_BTD, aux = apply_in_zigzag(model, params, *inputs, run)
    nll_BT, lse_BT = token_losses(model, unembedding(model, params), x_BTD, targets_BT, run.loss_chunk)
    return *context.from_zigzag((nll_BT, lse_BT), run.zigzag), aux


def bind(model: Model, letter: str, leaves: dict) -> Block:
    """The layer of a type with these parameters."""
    return nnx.merge(_graph(model, letter), leaves)


@functools.cache
def _graph(model: Model, letter: str) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda key: Block(model, letter, rngs=nnx.Rngs(params=key)), jax.random.key(0)))


def final_norm(model: Model, params: dict, x_BTD: jax.Array) -> jax.Array:
    """What the logits are made of."""
    return nnx.merge(_final_norm_graph(model), params["final_norm"])(x_BTD)


@functools.cache
def _final_norm_graph(model: Model) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: residual_norm(model)))


def unembedding(model: Model, params: dict) -> jax.Array:
    """The [V, D] table whose products with the activations are the logits, before `logit_scale` and `logit_softcap`."""
    return params["embed"] if model.tie_embeddings else params["unembed"]


def logits(model: Model, params: dict, x_BTD: jax.Array) -> jax.Array:
    """All logits [B, T, V] in float32 of the final normed activations; the loss never builds them (`loss.token_losses`)."""
    table_VD = gathered(unembedding(model, params).astype(x_BTD.dtype))
    spec = P(*spec_of(x_BTD)[:2], "tensor")
    logits_BTV = model.logit_scale * jnp.einsum(
        "BTD,VD->BTV", x_BTD, table_VD, preferred_element_type=jnp.float32, out_sharding=spec
    )
    return soft_cap(logits_BTV, model.logit_softcap)[0]
