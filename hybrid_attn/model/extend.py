"""New tokens against the caches of those before them: `apply` for a row that comes piece by piece.

Letters: B rows, T new tokens, D model.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.model.attention import Attend
from hybrid_attn.model.norm import Norm
from hybrid_attn.model.transformer import Block, Run, look_up, matrices


def unstacked(model: Model, params: dict, dtype: jnp.dtype) -> dict:
    """Parameters as `extend` takes them: a dict for each layer under `layers`, matrices (`model.attention.Matrix`) in `dtype`.

    Layer by layer, because a loop over stacked weights copies each before it is used, which is most of a decode step.
    """
    cast = {path for path, _ in jax.tree.leaves_with_path(matrices(model))}
    params = jax.tree.map_with_path(lambda path, x: x.astype(dtype) if path in cast else x, params)
    layers = []
    for i in range(model.num_layers):
        period, place = divmod(i, len(model.pattern))
        slot = f"{model.layers[i]}{place}"
        whole = period < model.num_periods
        layers.append(jax.tree.map(lambda x, at=period: x[at], params["periods"][slot]) if whole else params["tail"][slot])
    rest = {name: x for name, x in params.items() if name not in ("periods", "tail")}
    return rest | {"layers": tuple(layers)}


def layer_by_layer(
    model: Model, weights: dict, tokens_BT: jax.Array, pos_BT: jax.Array, attends: Sequence[Attend], run: Run
) -> tuple[jax.Array, list[Any]]:
    """Final normed activations [B, T, D], and what each layer's own `attend` keeps. `weights` are `unstacked`'s."""
    x_BTD = look_up(weights["embed"], tokens_BT, run.dtype) * model.embed_scale
    kept = []
    for letter, params, attend in zip(model.layers, weights["layers"], attends, strict=True):
        block = nnx.merge(_graph(model, letter), params)
        x_BTD, new = block(x_BTD, pos_BT, attend, run.mlp_chunk if tokens_BT.shape[1] > 1 else None)
        kept.append(new)
    return nnx.merge(_final_norm(model), weights["final_norm"])(x_BTD), kept


@functools.cache
def _graph(model: Model, letter: str) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda key: Block(model, letter, rngs=nnx.Rngs(params=key)), jax.random.key(0)))


@functools.cache
def _final_norm(model: Model) -> nnx.GraphDef:
    return nnx.graphdef(nnx.eval_shape(lambda: Norm(model.norm, (model.d_model,), model.norm_eps, P(None))))
