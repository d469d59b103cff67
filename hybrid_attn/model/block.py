"""One layer: a mixer and a feed-forward around the residual stream, and the tables that name both.

Letters: B batch, T tokens, D model.
"""

from typing import Any, Protocol

import jax
from flax import nnx

from hybrid_attn.config import LayerType, Model
from hybrid_attn.model.attention import Attend, Attention
from hybrid_attn.model.mlp import GatedMLP
from hybrid_attn.model.norm import Norm
from hybrid_attn.trees import choice

Aux = dict[str, jax.Array]


class Mixer(Protocol):
    """How the tokens of a sequence exchange information; its weights stand in a layer's parameters under its name."""

    def __init__(self, model: Model, layer_type: LayerType, *, rngs: nnx.Rngs): ...

    def __call__(self, x_BTD: jax.Array, pos_BT: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        """[B, T, D] of the same, and what else `attend` returns.

        `attend` compares queries with the keys that this program reads: those of packed sequences, or of a cache.
        """

    @staticmethod
    def sequence_flops(model: Model, layer_type: LayerType, length: int) -> int:
        """FLOPs of a forward pass over one document of `length` tokens, beyond the products with its weights."""


class FeedForward(Protocol):
    """What a layer does with each token by itself. Its weights stand in a layer's parameters under `mlp`."""

    def __init__(self, model: Model, *, rngs: nnx.Rngs): ...

    def __call__(self, x_BTD: jax.Array, chunk: int | None) -> tuple[jax.Array, Aux]:
        """[B, T, D] of the same, `chunk` tokens of a device at a time; and scalars by name, which are summed over layers.

        The scalar "aux_loss" is added to the loss.
        """


MIXERS: dict[str, type[Mixer]] = {"attention": Attention}
MLPS: dict[str, type[FeedForward]] = {"gated": GatedMLP}


class Block(nnx.Module):
    """A layer of the type that `letter` names, in the form that `model.block` names."""

    def __init__(self, model: Model, letter: str, *, rngs: nnx.Rngs):
        layer_type = model.kinds[letter]
        self.form, self.mixer_name = model.block, layer_type.mixer
        mixer = choice(f"model.kinds.{letter}.mixer", layer_type.mixer, MIXERS)
        setattr(self, self.mixer_name, mixer(model, layer_type, rngs=rngs))
        self.mlp = choice(f"model.kinds.{letter}.mlp", layer_type.mlp, MLPS)(model, rngs=rngs)
        if self.form == "parallel":
            self.norm = residual_norm(model)
        if self.form in ("pre", "sandwich"):
            self.attention_norm, self.mlp_norm = residual_norm(model), residual_norm(model)
        if self.form in ("post", "sandwich"):
            self.attention_post_norm, self.mlp_post_norm = residual_norm(model), residual_norm(model)

    def __call__(
        self, x_BTD: jax.Array, pos_BT: jax.Array, attend: Attend, mlp_chunk: int | None
    ) -> tuple[jax.Array, Aux, Any]:
        """[B, T, D] of the same, the scalars of the feed-forward, and what else `attend` returns."""
        mixer = getattr(self, self.mixer_name)
        if self.form == "parallel":  # x + mixer(norm x) + mlp(norm x)
            h_BTD = self.norm(x_BTD)
            y_BTD, state = mixer(h_BTD, pos_BT, attend)
            z_BTD, aux = self.mlp(h_BTD, mlp_chunk)
            return x_BTD + y_BTD + z_BTD, aux, state
        if self.form == "pre":  # x + mixer(norm x), then x + mlp(norm x)
            y_BTD, state = mixer(self.attention_norm(x_BTD), pos_BT, attend)
            x_BTD = x_BTD + y_BTD
            z_BTD, aux = self.mlp(self.mlp_norm(x_BTD), mlp_chunk)
            return x_BTD + z_BTD, aux, state
        if self.form == "post":  # x + norm(mixer x), then x + norm(mlp x)
            y_BTD, state = mixer(x_BTD, pos_BT, attend)
            x_BTD = x_BTD + self.attention_post_norm(y_BTD)
            z_BTD, aux = self.mlp(x_BTD, mlp_chunk)
            return x_BTD + self.mlp_post_norm(z_BTD), aux, state
        # sandwich: x + norm(mixer(norm x)), then x + norm(mlp(norm x))
        y_BTD, state = mixer(self.attention_norm(x_BTD), pos_BT, attend)
        x_BTD = x_BTD + self.attention_post_norm(y_BTD)
        z_BTD, aux = self.mlp(self.mlp_norm(x_BTD), mlp_chunk)
        return x_BTD + self.mlp_post_norm(z_BTD), aux, state


def residual_norm(model: Model) -> Norm:
    """The norm of activations [B, T, D], by `model.norm`."""
    return Norm(model.norm, (model.d_model,), ("norm",), model.norm_eps)


def added(total: Aux, new: Aux) -> Aux:
    """The sum of two layers' scalars; a name that one of them lacks counts as zero there."""
    return total | {name: total[name] + value if name in total else value for name, value in new.items()}
