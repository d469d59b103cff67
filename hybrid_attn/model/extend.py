"""The layers one by one: for caches, and for whoever watches each layer. `transformer.apply` scans them period by period.

Letters: B requests, T tokens, D model.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from hybrid_attn.config import Model
from hybrid_attn.model.attention import Attend
from hybrid_attn.model.execution import Execution
from hybrid_attn.model.params import map_specs
from hybrid_attn.model.transformer import bind, final_norm, look_up, specs


def unstacked(model: Model, params: dict, dtype: jnp.dtype) -> dict:
    """Parameters as `layer_by_layer` takes them: a dict for each layer under `layers`, cast as the `ParamSpec` says.

    Layer by layer, because a loop over stacked weights copies each before it is used, which is most of a decode step.
    """
    params = map_specs(lambda spec, x: x.astype(dtype) if spec.cast else x, specs(model), params)
    layers = []
    for i in range(model.num_layers):
        period, index = divmod(i, len(model.pattern))
        slot = f"{model.layers[i]}{index}"
        if period < model.num_periods:
            layers.append(jax.tree.map(lambda x, period=period: x[period], params["periods"][slot]))
        else:
            layers.append(params["tail"][slot])
    others = {name: x for name, x in params.items() if name not in ("periods", "tail")}
    return others | {"layers": tuple(layers)}


def layer_by_layer(
    model: Model, weights: dict, tokens_BT: jax.Array, pos_BT: jax.Array, attends: Sequence[Attend], execution: Execution
) -> tuple[jax.Array, list[Any]]:
    """Final normed activations [B, T, D], and what else each layer's own `attend` returns. `weights` are `unstacked`'s."""
    x_BTD = look_up(weights["embed"], tokens_BT, execution.dtype) * model.embed_scale
    states = []
    for letter, leaves, attend in zip(model.layers, weights["layers"], attends, strict=True):
        mlp_chunk = execution.mlp_chunk if tokens_BT.shape[1] > 1 else None
        x_BTD, _, state = bind(model, letter, execution.transform(leaves))(x_BTD, pos_BT, attend, mlp_chunk)
        states.append(state)
    return final_norm(model, weights, x_BTD), states
