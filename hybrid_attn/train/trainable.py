"""Which parameters a stage trains: those that its `trainable` names. If it names none, those of the adapter, or else all."""

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from hybrid_attn.config import Config, StageConfig
from hybrid_attn.model import transforms
from hybrid_attn.names import matching


def is_trained(config: StageConfig, params: dict) -> dict:
    """Whether the stage trains each parameter; `params` may have any leaves. ValueError for a name that none of them has."""
    names = flatten_dict(params, sep="/")
    trained = _trained(f"stages[{config.index}].trainable", config.trainable, names)
    return unflatten_dict({name: name in trained for name in names}, sep="/")


def has_state(config: Config | StageConfig, params: dict) -> dict:
    """Whether the optimiser has arrays for each parameter: every one, or with an adapter those that some stage trains."""
    names = flatten_dict(params, sep="/")
    if config.model.adapter.type is None:
        return unflatten_dict(dict.fromkeys(names, True), sep="/")
    trained = set().union(*(_trained("trainable", patterns, names) for patterns in config.trainable_of_stages))
    return unflatten_dict({name: name in trained for name in names}, sep="/")


def without_base(config: Config, params: dict) -> dict:
    """The parameters that some stage trains, without those of the base of an adapter."""
    return _those(has_state(config, params), params)


def part(config: StageConfig, params: dict) -> dict:
    """The parameters that the stage trains, without the others."""
    return _those(is_trained(config, params), params)


def joined(some: dict, others: dict) -> dict:
    """The parameters that `some` has, and the `others`."""
    return unflatten_dict(flatten_dict(others) | flatten_dict(some))


def _those(flags: dict, params: dict) -> dict:
    names, flags = flatten_dict(params), flatten_dict(flags)
    return unflatten_dict({name: x for name, x in names.items() if flags[name]})


def _trained(field: str, patterns: Sequence[str], names: Iterable[str]) -> set[str]:
    added = {name for name in names if transforms.is_added(name)}
    return matching(field, patterns, names, "this model") or added or set(names)


def only(params: dict, trains: dict) -> dict:
    """The parameters that are trained, and None in place of the others."""
    return jax.tree.map(lambda flag, x: x if flag else None, trains, params)


def merged(some: dict, others: dict) -> dict:
    """`some`, where it is not None, and else `others`."""
    return jax.tree.map(lambda x, other: other if x is None else x, some, others, is_leaf=lambda x: x is None)


def apply_gradient(
    tx: optax.GradientTransformation, grads: dict, opt_state: optax.OptState, params: dict
) -> tuple[dict, dict, optax.OptState]:
    """The update, and the parameters and the optimiser state after it.

    A parameter whose gradient is None has the update None and keeps its bits, and so do its arrays in the state, such as its
    moments.
    """
    trains = jax.tree.map(lambda x: x is not None, grads, is_leaf=lambda x: x is None)
    # The zeros cost nothing: the compiler drops what only an update that is not taken needs.
    updates, new_state = tx.update(merged(grads, jax.tree.map(jnp.zeros_like, params)), opt_state, params)
    is_new = of_state(tx, opt_state, trains)
    new_params = _chosen(trains, optax.apply_updates(params, updates), params)
    return only(updates, trains), new_params, _chosen(is_new, new_state, opt_state)


def of_state(tx: optax.GradientTransformation, opt_state: optax.OptState, flags: dict) -> optax.OptState:
    """The flag of its parameter for each array of the optimiser state, such as a moment; True for others, such as counts."""
    return optax.tree.map_params(
        tx,
        lambda x, flag: x if _is_masked(x) else flag,
        opt_state,
        flags,
        transform_non_params=lambda _: True,
        is_leaf=_is_masked,
    )


def _is_masked(x) -> bool:
    return isinstance(x, optax.MaskedNode)


def _chosen(is_new, new, old):
    return jax.tree.map(lambda flag, a, b: a if flag else b, is_new, new, old)
