"""Weight transforms: weights beside the matrices of a model, or two factors in place of one, and the products with them.

A transform adds a group of weights beside each matrix that `model.adapter.targets` names: beside periods/L0/attention/q the
group periods/L0/attention/q_adapter. The names of the matrices stay, so that a checkpoint without adapters is the base of one
with them. Inside a layer the matrix is then multiplied by the transform's `product`. Factors (`low_rank.py`) take the name of
their matrix.
"""

import dataclasses
import functools
from collections.abc import Mapping

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from hybrid_attn.config import DENSE, NO_ADAPTER
from hybrid_attn.config_model import Adapter, Model
from hybrid_attn.model.transforms import low_rank
from hybrid_attn.model.transforms.ia3 import IA3
from hybrid_attn.model.transforms.lora import LORA
from hybrid_attn.model.transforms.molora import MOLORA
from hybrid_attn.model.transforms.mov import MOV
from hybrid_attn.model.transforms.transform import SETTINGS, SUFFIX, Transform, is_plain, targets
from hybrid_attn.trees import check, choice

__all__ = ["SUFFIX", "TRANSFORMS", "attach", "changes", "dense", "is_added", "is_plain", "low_rank", "separated"]
__all__ += ["transform_of", "with_added"]
TRANSFORMS: dict[str, Transform] = {"lora": LORA, "ia3": IA3, "mov": MOV, "molora": MOLORA}


def transform_of(adapter: Adapter) -> Transform:
    """ValueError for a type that is not in `TRANSFORMS`."""
    return choice("model.adapter.type", adapter.type, TRANSFORMS)


def is_added(name: str) -> bool:
    """Whether a parameter of this name is one that a transform adds."""
    return any(part.endswith(SUFFIX) for part in name.split("/"))


def changes(model: Model) -> bool:
    """Whether a model has an adapter or factors."""
    return model.adapter.type is not None or model.low_rank.rank_fraction is not None


def dense(model: Model) -> Model:
    """The model of the matrices alone: without an adapter, and with a matrix in place of two factors."""
    return dataclasses.replace(model, adapter=NO_ADAPTER, low_rank=DENSE)


def with_added(model: Model, weights: dict, rngs: nnx.Rngs) -> dict:
    """The `Weight`s of a model, and beside each target of its adapter those that the transform adds.

    ValueError for a target that names no matrix which can have an adapter, and for a setting that the transform does not read.
    """
    adapter, numbers = model.adapter, {group: number for group, _, number in model.groups}
    for name in SETTINGS:
        value, default, is_read = getattr(adapter, name), getattr(NO_ADAPTER, name), name in transform_of(adapter).reads
        unread = f"model.adapter.{name}={value}, and the type {adapter.type!r} does not read it; leave it at {default}"
        check(is_read or value == default, unread)
    flat = flatten_dict(weights, sep="/")
    for name in targets(model, flat, "model.adapter.targets", adapter.targets, "can have an adapter"):
        make = functools.partial(transform_of(adapter).weights, adapter, flat[name].spec)
        group = name.split("/")[0]
        flat[f"{name}{SUFFIX}"] = jax.vmap(make)(rngs.split(numbers[group])) if group == "periods" else make(rngs)
    return unflatten_dict(flat, sep="/")


def separated(leaves: dict) -> tuple[dict, dict[tuple[str, ...], dict]]:
    """The leaves of a layer, one for each matrix, and what else its matrices have, by their path.

    That is what an adapter adds, or the second factor.
    """
    others, added = {}, {}
    for name, leaf in leaves.items():
        if name.endswith(SUFFIX):
            added[(name.removesuffix(SUFFIX),)] = leaf
        elif low_rank.is_factors(leaf):
            others[name], added[(name,)] = leaf[low_rank.U], leaf[low_rank.V]
        elif isinstance(leaf, Mapping):
            others[name], inside = separated(leaf)
            added |= {(name, *path): group for path, group in inside.items()}
        else:
            others[name] = leaf
    return others, added


def attach(model: Model, layer: nnx.Module, added: dict[tuple[str, ...], dict | jax.Array]) -> None:
    """Has the matrices of a layer be multiplied together with what `separated` says they have."""
    for path, of_matrix in added.items():
        if model.adapter.type is None:
            product = functools.partial(low_rank.product, v=of_matrix)
        else:
            product = functools.partial(transform_of(model.adapter).product, model.adapter, added=of_matrix)
        functools.reduce(getattr, path, layer).set_metadata(adapted=product)
