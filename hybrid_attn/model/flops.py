"""What a config costs: parameters, FLOPs and cache bytes, exact for windows, chunks and causality.

A multiply and an add are two FLOPs. A training step is three forward passes; recomputation (remat) is not counted, so that
model FLOPs utilisation says what the model needed. Norms, rotations and softmax are not counted, nor is the embedding lookup.
"""

import math
from collections.abc import Container

import jax
from flax.traverse_util import flatten_dict

from hybrid_attn.config import Model
from hybrid_attn.config_model import attention_heads
from hybrid_attn.model.attention import visible_tokens
from hybrid_attn.model.transformer import MIXERS, abstract_params, specs

TRAIN = 3  # forward passes that a training step costs: one forward, and twice that backward


def parameters(model: Model) -> int:
    """Number of parameters, without making them."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(abstract_params(model)))


def active_parameters(model: Model) -> int:
    """Number of parameters that one token uses: of experts those that a router chooses."""
    numbers = {name: number for name, _, number in model.groups}
    return sum(
        numbers.get(name, 1) * sum(spec.active_size for spec in jax.tree.leaves(of_group))
        for name, of_group in specs(model).items()
    )


def sequence_flops(model: Model, length: int) -> float:
    """FLOPs of one document of `length` in all layers beyond its products with weights, such as those of scores."""
    return sum(
        number * MIXERS[model.kinds[letter].mixer].sequence_flops(model, model.kinds[letter], length)
        for _, letters, number in model.groups
        for letter in letters
    )


def forward_flops_per_token(model: Model, length: int) -> float:
    """FLOPs of a forward pass over one document of `length` tokens, by token."""
    return product_flops_per_token(model) + sequence_flops(model, length) / length


def decode_flops(model: Model, length: int) -> float:
    """FLOPs of the forward pass of the last of `length` tokens, whose predecessors are in the KV cache."""
    return product_flops_per_token(model) + sequence_flops(model, length) - sequence_flops(model, length - 1)


def product_flops_per_token(model: Model, names: Container[str] | None = None) -> int:
    """FLOPs of the products of a token with the matrices, the short convolutions and the table of the logits.

    With `names`, of those weights alone.
    """
    multiplications = {"embed" if model.tie_embeddings else "unembed": model.vocab_size * model.d_model}
    for group, _, number in model.groups:
        of_group = flatten_dict(specs(model)[group], sep="/").items()
        multiplications |= {f"{group}/{name}": number * spec.multiplications for name, spec in of_group}
    return 2 * sum(number for name, number in multiplications.items() if names is None or name in names)


def train_flops_per_token(model: Model, length: int) -> float:
    """FLOPs of a training step by token, if all parameters train and the objective needs one forward pass."""
    return TRAIN * forward_flops_per_token(model, length)


def cache_bytes(model: Model, length: int, bytes_per_value: int = 2) -> int:
    """Bytes that decoding needs after `length` tokens of one sequence: keys, values, and inputs of short convolutions."""
    layer_types = [model.kinds[letter] for letter in model.layers]
    heads = sum(min(length, visible_tokens(x) or length) * attention_heads(model, x)[1] for x in layer_types)
    inputs = sum(min(length, x.short_conv - 1) for x in layer_types if x.short_conv is not None)
    return (2 * heads * model.head_dim + inputs * model.d_model) * bytes_per_value
