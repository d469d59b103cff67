"""Weight transforms: weights beside the matrices of a model, and the products with both.

A transform adds a group of weights beside each matrix that `model.adapter.targets` names: beside periods/L0/attention/q the
group periods/L0/attention/q_adapter. The names of the matrices stay, so that a checkpoint without adapters is the base of one
with them. Inside a layer the matrix is then multiplied by the transform's `product`.
"""

import functools
from collections.abc import Mapping

import jax
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from hybrid_attn.config_model import Adapter, Model
from hybrid_attn.model.params import MATRIX, ParamSpec
from hybrid_attn.model.transforms.ia3 import IA3
from hybrid_attn.model.transforms.lora import LORA
from hybrid_attn.model.transforms.molora import MOLORA
from hybrid_attn.model.transforms.mov import MOV
from hybrid_attn.model.transforms.transform import SUFFIX, Transform
from hybrid_attn.names import matching
from hybrid_attn.trees import choice

__all__ = ["SUFFIX", "TRANSFORMS", "attach", "is_added", "separated", "takes_adapter", "transform_of", "with_added"]
TRANSFORMS: dict[str, Transform] = {"lora": LORA, "ia3": IA3, "mov": MOV, "molora": MOLORA}


def transform_of(adapter: Adapter) -> Transform:
    """ValueError for a type that is not in `TRANSFORMS`."""
    return choice("model.adapter.type", adapter.type, TRANSFORMS)


def is_added(name: str) -> bool:
    """Whether a parameter of this name is one that a transform adds."""
    return any(part.endswith(SUFFIX) for part in name.split("/"))


def takes_adapter(spec: ParamSpec) -> bool:
    """Whether a weight is a matrix that activations are multiplied with as it is: no matrix of experts or of a router."""
    return spec.group == MATRIX and spec.active is None and spec.products is None and not spec.exact


def with_added(model: Model, weights: dict, rngs: nnx.Rngs) -> dict:
    """The `Weight`s of a model, and beside each target of its adapter those that the transform adds.

    ValueError for a target that names no matrix which can have an adapter.
    """
    adapter, numbers = model.adapter, {group: number for group, _, number in model.groups}
    flat = flatten_dict(weights, sep="/")
    specs = {name: w.spec for name, w in flat.items() if name.split("/")[0] in numbers and takes_adapter(w.spec)}
    owner = "this model, among the matrices that can have an adapter,"
    for name in sorted(matching("model.adapter.targets", adapter.targets, specs, owner)):
        make = functools.partial(transform_of(adapter).weights, adapter, specs[name])
        group = name.split("/")[0]
        flat[f"{name}{SUFFIX}"] = jax.vmap(make)(rngs.split(numbers[group])) if group == "periods" else make(rngs)
    return unflatten_dict(flat, sep="/")


def separated(leaves: dict) -> tuple[dict, dict[tuple[str, ...], dict]]:
    """The leaves of a layer without those that a transform adds, and these by the path of their matrix."""
    others, added = {}, {}
    for name, leaf in leaves.items():
        if name.endswith(SUFFIX):
            added[(name.removesuffix(SUFFIX),)] = leaf
        elif isinstance(leaf, Mapping):
            others[name], inside = separated(leaf)
            added |= {(name, *path): group for path, group in inside.items()}
        else:
            others[name] = leaf
    return others, added


def attach(adapter: Adapter, layer: nnx.Module, added: dict[tuple[str, ...], dict]) -> None:
    """Has the matrices of a layer be multiplied together with what is added beside them."""
    for path, group in added.items():
        product = functools.partial(transform_of(adapter).product, adapter, added=group)
        functools.reduce(getattr, path, layer).set_metadata(adapted=product)
