"""The layers one by one: for caches, and for whoever watches each layer. `transformer.apply` scans them period by period.

Letters: B requests, T tokens, D model.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_attn.config import Model
from hybrid_attn.model.attention import Attend
from hybrid_attn.model.execution import Execution
from hybrid_attn.model.params import map_specs
from hybrid_attn.model.transformer import bind, final_norm, layer_names, look_up, specs


def unstacked(model: Model, params: dict, dtype: jnp.dtype) -> dict:
    """Parameters as `layer_by_layer` takes them: a dict for each layer under `layers`, cast as the `ParamSpec` says.

    Layer by layer, because a loop over stacked weights copies each before it is used, which is most of a decode step.
    """
    # What a transform reads stays as it is stored; the leaf that it makes is cast where it is multiplied.
    params = map_specs(lambda spec, x: x.astype(dtype) if spec.cast and isinstance(x, jax.Array) else x, specs(model), params)
    layers = []
    for group, letters, repetitions in model.groups:
        for period, (name, _) in itertools.product(range(repetitions), layer_names(letters)):
            leaves = params[group][name]
            layers.append(jax.tree.map(lambda x, period=period: x[period], leaves) if group == "periods" else leaves)
    others = {name: x for name, x in params.items() if name not in ("prefix", "periods", "tail")}
    return others | {"layers": tuple(layers)}


def layer_by_layer(
    model: Model, weights: dict, tokens_BT: jax.Array, pos_BT: jax.Array, attends: Sequence[Attend], execution: Execution
) -> tuple[jax.Array, list[Any]]:
    """Final normed activations [B, T, D], and what else each layer's own `attend` returns. `weights` are `unstacked`'s."""
    x_BTD = look_up(weights["embed"], tokens_BT, execution.dtype) * model.embed_scale
    states = []
    for letter, leaves, attend in zip(model.layers, weights["layers"], attends, strict=True):
        mlp_chunk = execution.mlp_chunk if tokens_BT.shape[1] > 1 else None
        x_BTD, _, state = bind(model, letter, leaves, execution)(x_BTD, pos_BT, attend, mlp_chunk)
        states.append(state)
    return final_norm(model, weights, x_BTD), states
