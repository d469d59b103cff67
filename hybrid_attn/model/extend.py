"""New tokens against the caches of those before them: `apply` for a row that comes piece by piece.

Letters: B rows, T new tokens, D model, S slots, K key/value heads, N query heads, H head size.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import LayerType, Model
from hybrid_attn.model.attention import Attend
from hybrid_attn.model.params import map_specs
from hybrid_attn.model.transformer import Run, bind, final_norm, look_up, specs
from hybrid_attn.parallel import cached
from hybrid_attn.parallel.mesh import BATCH, spec_of


class Cache(NamedTuple):
    """What B rows have read: each layer's keys and values, and how many tokens."""

    layers: tuple[cached.Layer, ...]
    lengths_B: jax.Array


def unstacked(model: Model, params: dict, dtype: jnp.dtype) -> dict:
    """Parameters as `extend` takes them: a dict for each layer under `layers`, in `dtype` where the `ParamSpec` says so.

    Layer by layer, because a loop over stacked weights copies each before it is used, which is most of a decode step.
    """
    params = map_specs(lambda spec, x: x.astype(dtype) if spec.cast else x, specs(model), params)
    layers = []
    for i in range(model.num_layers):
        period, place = divmod(i, len(model.pattern))
        slot = f"{model.layers[i]}{place}"
        whole = period < model.num_periods
        layers.append(jax.tree.map(lambda x, at=period: x[at], params["periods"][slot]) if whole else params["tail"][slot])
    rest = {name: x for name, x in params.items() if name not in ("periods", "tail")}
    return rest | {"layers": tuple(layers)}


def extend(
    model: Model, weights: dict, tokens_BT: jax.Array, counts_B: jax.Array, cache: Cache, run: Run, span: int
) -> tuple[jax.Array, Cache, tuple[jax.Array | None, ...]]:
    """Final normed activations [B, T, D] of the next `counts_B` tokens of each row, and the cache that has read them.

    Tokens beyond a row's count are padding. `weights` are `unstacked`'s; the cache must have room (`cached.attend`, which says
    what `span` is). Last come each layer's queries [B, T, N, H] as they enter the scores; None for a ring.
    """
    spec = spec_of(tokens_BT)
    T = tokens_BT.shape[1]
    pos_BT = jax.reshard(jax.reshard(cache.lengths_B, P(BATCH))[:, None] + jnp.arange(T), spec)

    def in_cache(layer: cached.Layer) -> Attend:
        def attend(q_BTNH, k_BTKH, v_BTKH, sinks_N, kind: LayerType, scale: float):
            o_BTNH, new = cached.attend(
                q_BTNH, k_BTKH, v_BTKH, layer, cache.lengths_B, counts_B, sinks_N,
                kind=kind, scale=scale, kernel=run.kernel, span=span,
            )  # fmt: skip
            return o_BTNH, (new, None if new.dropped_BK is None else q_BTNH)

        return attend

    x_BTD, kept = layer_by_layer(model, weights, tokens_BT, pos_BT, [in_cache(layer) for layer in cache.layers], run)
    layers, queries = zip(*kept, strict=True)
    return x_BTD, Cache(layers, cache.lengths_B + counts_B), queries


def layer_by_layer(
    model: Model, weights: dict, tokens_BT: jax.Array, pos_BT: jax.Array, attends: Sequence[Attend], run: Run
) -> tuple[jax.Array, list[Any]]:
    """Final normed activations [B, T, D], and what each layer's own `attend` keeps. `weights` are `unstacked`'s."""
    x_BTD = look_up(weights["embed"], tokens_BT, run.dtype) * model.embed_scale
    states = []
    for letter, leaves, attend in zip(model.layers, weights["layers"], attends, strict=True):
        mlp_chunk = run.mlp_chunk if tokens_BT.shape[1] > 1 else None
        x_BTD, _, state = bind(model, letter, run.transform(leaves))(x_BTD, pos_BT, attend, mlp_chunk)
        states.append(state)
    return final_norm(model, weights, x_BTD), states
