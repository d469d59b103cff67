"""The transformer: embedding, layers scanned period by period, final norm.

Letters: B batch, T tokens, D model, F feed-forward, V vocabulary. Parameters are a nested dict of float32 arrays whose
paths are names (`periods/L0/attention/q`); those under `periods` carry the period as axis 0.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from hybrid_attn import config, kernels
from hybrid_attn.config import LayerType, Model, Table, Train
from hybrid_attn.model.attention import Attend, Attention, Matrix, weight
from hybrid_attn.model.mlp import MLP
from hybrid_attn.model.norm import Norm
from hybrid_attn.parallel import context
from hybrid_attn.parallel.mesh import TOKENS_BT, gathered, spec_of

NORMS_BEFORE = {"parallel": ("norm",), "pre": ("attention_norm", "mlp_norm"), "post": ()}
NORMS_BEFORE["sandwich"] = NORMS_BEFORE["pre"]
NORMS_AFTER = {"parallel": (), "pre": (), "post": ("attention_post_norm", "mlp_post_norm")}
NORMS_AFTER["sandwich"] = NORMS_AFTER["post"]
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


class Run(NamedTuple):
    """How a model runs, which never changes the function that it computes: the `train` keys of configs/base.py, resolved."""

    dtype: jnp.dtype
    remat: Table[str, str]  # by the letter of the layer
    context: Table[str, str]
    zigzag: bool
    kernel: str
    loss_chunk: int
    mlp_chunk: int | None


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


class Block(nnx.Module):
    """One layer: attention and feed-forward around the residual stream, by `model.block`."""

    def __init__(self, model: Model, letter: str, *, rngs: nnx.Rngs):
        self.block = model.block
        self.attention = Attention(model, model.kinds[letter], rngs=rngs)
        self.mlp = MLP(model, rngs=rngs)
        for name in NORMS_BEFORE[model.block] + NORMS_AFTER[model.block]:
            setattr(self, name, Norm(model.norm, (model.d_model,), model.norm_eps, P(None)))

    def __call__(self, x_BTD: jax.Array, pos_BT: jax.Array, attend: Attend, mlp_chunk: int | None) -> tuple[jax.Array, Any]:
        """[B, T, D] of the same, and what `attend` keeps."""
        if self.block == "parallel":
            h_BTD = self.norm(x_BTD)
            y_BTD, kept = self.attention(h_BTD, pos_BT, attend)
            return x_BTD + y_BTD + self.mlp(h_BTD, mlp_chunk), kept
        h_BTD, kept = self.attention(self.before("attention", x_BTD), pos_BT, attend)
        x_BTD = x_BTD + self.after("attention", h_BTD)
        h_BTD = self.mlp(self.before("mlp", x_BTD), mlp_chunk)
        return x_BTD + self.after("mlp", h_BTD), kept

    def before(self, part: str, x_BTD: jax.Array) -> jax.Array:
        return getattr(self, f"{part}_norm")(x_BTD) if NORMS_BEFORE[self.block] else x_BTD

    def after(self, part: str, x_BTD: jax.Array) -> jax.Array:
        return getattr(self, f"{part}_post_norm")(x_BTD) if NORMS_AFTER[self.block] else x_BTD


class Period(nnx.Module):
    """One layer per letter, under the names L0, L1, … of letter and place."""

    def __init__(self, model: Model, letters: str, *, rngs: nnx.Rngs):
        self.slots = tuple(f"{letter}{i}" for i, letter in enumerate(letters))
        for slot, letter in zip(self.slots, letters, strict=True):
            setattr(self, slot, Block(model, letter, rngs=rngs))

    def __call__(self, x_BTD: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, run: Run) -> jax.Array:
        for slot in self.slots:
            attend = in_rows(pos_BT, seg_BT, run, slot[0])

            def layer(block: Block, x_BTD: jax.Array, attend: Attend = attend) -> jax.Array:
                # Named in here: what jax.checkpoint keeps of its arguments as they are stays on the device.
                return block(checkpoint_name(x_BTD, INPUT), pos_BT, attend, run.mlp_chunk)[0]

            with jax.named_scope(slot):
                x_BTD = CHECKPOINTS[run.remat[slot[0]]](layer)(getattr(self, slot), x_BTD)
        return x_BTD


def in_rows(pos_BT: jax.Array, seg_BT: jax.Array, run: Run, letter: str) -> Attend:
    """Attention of a layer of that letter to the tokens of its own rows, of which nothing is kept."""

    def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N, kind: LayerType, scale: float):
        o_BTNH = context.attend(
            q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT, sinks_N, window=kind.window, chunk=kind.chunk, scale=scale,
            softcap=kind.softcap, kernel=run.kernel, scheme=run.context[letter], zigzag=run.zigzag,
        )  # fmt: skip
        return o_BTNH, None

    return attend


class LM(nnx.Module):
    """Tokens to the final normed activations [B, T, D], which `loss` and `unembedding` take on."""

    def __init__(self, model: Model, *, rngs: nnx.Rngs):
        self.model = model
        self.embed = weight(rngs, (model.vocab_size, model.d_model), P("tensor", "fsdp"), model.init_std)
        if model.num_periods:
            stack = jax.vmap(lambda keys: Period(model, model.pattern, rngs=keys))
            self.periods = stack(rngs.split(model.num_periods))
        if model.tail:
            self.tail = Period(model, model.tail, rngs=rngs)
        self.final_norm = Norm(model.norm, (model.d_model,), model.norm_eps, P(None))
        if not model.tie_embeddings:
            self.unembed = weight(rngs, (model.vocab_size, model.d_model), P("tensor", "fsdp"), model.init_std)

    def __call__(self, tokens_BT: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, run: Run) -> jax.Array:
        x_BTD = look_up(self.embed[...], tokens_BT, run.dtype) * self.model.embed_scale
        if self.model.num_periods:
            x_BTD, _ = jax.lax.scan(lambda x, period: (period(x, pos_BT, seg_BT, run), None), x_BTD, self.periods)
        if self.model.tail:
            x_BTD = self.tail(x_BTD, pos_BT, seg_BT, run)
        return self.final_norm(x_BTD)


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


@functools.cache
def _graph(model: Model) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda key: LM(model, rngs=nnx.Rngs(params=key)), jax.random.key(0)))


def matrices(model: Model) -> dict:
    """The part of the tree of parameters that is multiplied with activations in their dtype (`Matrix`)."""
    return nnx.to_pure_dict(
        nnx.state(nnx.eval_shape(lambda key: LM(model, rngs=nnx.Rngs(params=key)), jax.random.key(0)), Matrix)
    )


def init(model: Model, key: jax.Array) -> dict:
    """Parameters as a nested dict of float32 arrays, laid out on the mesh in force (`jax.set_mesh`)."""
    return nnx.to_pure_dict(nnx.state(LM(model, rngs=nnx.Rngs(params=key))))


def apply(model: Model, params: dict, tokens_BT: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, run: Run) -> jax.Array:
    """Final normed activations [B, T, D] of int32 tokens; positions restart with each document, segment 0 is padding."""
    placed = context.to_zigzag(tuple(jax.reshard(x, TOKENS_BT) for x in (tokens_BT, pos_BT, seg_BT)), run.zigzag)
    return context.from_zigzag(apply_in_place(model, params, *placed, run), run.zigzag)


def apply_in_place(model: Model, params: dict, tokens_BT: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, run: Run):
    """`apply` where the tokens lie as `context.to_zigzag` puts them, and the activations stay there."""
    return nnx.merge(_graph(model), params)(tokens_BT, pos_BT, seg_BT, run)


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
    cap = model.logit_softcap
    return logits_BTV if cap is None else cap * jnp.tanh(logits_BTV / cap)
