"""The statistics of a step: norms of parameters, gradients and updates, attention and activations, by layer type.

A name is a statistic and what it is of: a layer type (`logit_max/L`), a leaf in all layers of a type
(`grad_norm/L/attention/q`), a leaf outside the layers (`grad_norm/embed`), or the experts of one layer
(`expert_shares/L/layer3`).
"""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from hybrid_attn.config import Model
from hybrid_attn.model import expert_metrics
from hybrid_attn.model.statistics import AttentionStatistics, LayerStatistics
from hybrid_attn.model.transformer import STATISTICS, layer_paths

BY_LAYER_TYPE = (
    "logit_max", "entropy_bits", "first_token_share", "activation_rms", "activation_outliers",
    "param_norm", "grad_norm", "update_norm",
)  # fmt: skip


def of_step(model: Model, sums: Mapping, norms_of: Mapping[str, dict]) -> dict[str, jax.Array]:
    """All statistics of a step from the sums of its objective, and from trees like the parameters by the name of their norm."""
    values = {}
    for name, tree in norms_of.items():
        values |= {f"{name}/{of}": norm for of, norm in norms(model, tree).items()}
    return values | of_layers(sums[STATISTICS]) | of_experts(model, sums[STATISTICS])


def norms(model: Model, tree: dict) -> dict[str, jax.Array]:
    """The norm of the leaves of each layer type, of each leaf of them, and of each leaf outside the layers."""
    groups, squares = {name for name, _, _ in model.groups}, {}
    for path, leaf in jax.tree.leaves_with_path(tree):
        group, *names = (key.key for key in path)
        of = [names[0][0], "/".join([names[0][0], *names[1:]])] if group in groups else [group]
        for name in of:
            squares[name] = squares.get(name, 0.0) + jnp.square(leaf.astype(jnp.float32)).sum()
    return {name: jnp.sqrt(total) for name, total in squares.items()}


def taken_out(sums: Mapping) -> tuple[dict, dict]:
    """The sums of an objective without the statistics of its layers, and these, which cannot be added up."""
    return {k: x for k, x in sums.items() if k != STATISTICS}, {k: x for k, x in sums.items() if k == STATISTICS}


def of_layers(measured: Mapping[str, Mapping[str, LayerStatistics]]) -> dict[str, jax.Array]:
    """The statistics by layer type over all layers, sequences and microbatches: means but for the largest logit.

    Those of attention are means over sampled queries and heads. `activation_rms` is over all tokens; `activation_outliers` is
    the mean number of a token.
    """
    by_letter, values = {}, {}
    for layers in measured.values():
        for name, layer in layers.items():
            by_letter.setdefault(name[0], []).append(layer)
    for letter, layers in by_letter.items():
        of_letter = _of_attention([layer.attention for layer in layers]) if layers[0].attention is not None else {}
        square, outliers, tokens = (_total(x) for x in zip(*(layer.activations for layer in layers), strict=True))
        tokens = jnp.maximum(tokens, 1.0)
        of_letter |= {"activation_rms": jnp.sqrt(square / tokens), "activation_outliers": outliers / tokens}
        of_letter |= expert_metrics.metrics({name: _total(layer.aux[name] for layer in layers) for name in layers[0].aux})
        values |= {f"{name}/{letter}": x for name, x in of_letter.items()}
    return values


def of_experts(model: Model, measured: Mapping[str, Mapping[str, LayerStatistics]]) -> dict[str, jax.Array]:
    """Of each layer with experts its metrics, and the array of the shares of its experts: means over the microbatches."""
    values = {}
    for i, (group, name, period) in enumerate(layer_paths(model)):
        aux, axes = measured[group][name].aux, int(group == "periods")
        for metric in (*sum(expert_metrics.OF_LAYERS.values(), ()), *expert_metrics.SHARES):
            if metric in aux:
                own = aux[metric].ndim - axes - (metric in expert_metrics.SHARES)  # the axis of microbatches, if there are more
                mean = aux[metric].mean(tuple(range(own)))
                values[f"{metric}/{name[0]}/layer{i}"] = mean[period] if axes else mean
    return values


def numbers(values: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Statistics as numbers: of an array one for each expert, `expert_shares/L/layer3/expert0`."""
    flat = {}
    for name, x in values.items():
        flat |= {f"{name}/expert{e}": float(y) for e, y in enumerate(x)} if np.ndim(x) else {name: float(x)}
    return flat


def _of_attention(layers: list[AttentionStatistics]) -> dict[str, jax.Array]:
    logits, *sums = zip(*layers, strict=True)
    entropy, share, queries = (_total(x) for x in sums)
    pairs = jnp.maximum(queries * logits[0].shape[-1], 1.0)  # of a query and a head
    largest = jnp.stack([x.max() for x in logits]).max()
    return {"logit_max": largest, "entropy_bits": entropy / pairs, "first_token_share": share / pairs}


def _total(arrays: Iterable[jax.Array]) -> jax.Array:
    return jnp.stack([x.sum() for x in arrays]).sum()
