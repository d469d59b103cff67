"""The edge between two stages whose models differ in their factors of low rank: the arrays of the second, made of the first's.

A matrix becomes the two factors whose product is nearest to it, and two factors become their product; factors of another rank
are made by way of it. What the optimiser holds of a parameter that stays goes on, and so do its counts of steps; what it holds
of a new parameter starts from its initial value.
"""

import functools

import jax
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from hybrid_attn.config import Config, Model, StageConfig
from hybrid_attn.model import specs, transforms
from hybrid_attn.model.transforms import low_rank
from hybrid_attn.train import trainable
from hybrid_attn.train.optim import optimiser


def changes_arrays(c: Config, stage: int) -> bool:
    """Whether a stage has parameters of other names or shapes than the stage before it."""
    if stage == 0:
        return False
    before, after = (jax.tree.map(lambda spec: spec.shape, specs(c.at(i).model)) for i in (stage - 1, stage))
    return before != after


def converted(model: Model, params: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The parameters of `model`, by name, from those of a model that differs from it in its factors alone.

    `params` may be some of them. A parameter that has the same name and shape in both models is the same array.
    """
    own, matrices = (flatten_dict(specs(x), sep="/") for x in (model, transforms.dense(model)))
    out = {name: x for name, x in params.items() if name in own and x.shape[x.ndim - len(own[name].shape) :] == own[name].shape}
    for name in sorted({x if x in matrices else x.rpartition("/")[0] for x in params.keys() - out.keys()}):
        if name in params:
            w = params[name]
        else:
            w = low_rank.matrix(matrices[name], *(params[f"{name}/{x}"] for x in (low_rank.U, low_rank.V)))
        if name in own:
            out[name] = w
        else:
            pair = low_rank.decomposed(model.low_rank, matrices[name], w, ones=False)
            out |= {f"{name}/{factor}": x for factor, x in pair.items()}
    return out


@functools.partial(jax.jit, static_argnums=0)
def arrays_of(stage: StageConfig, params: dict, opt_state: optax.OptState) -> tuple[dict, optax.OptState]:
    """The parameters and the optimiser state with which a stage begins, from those at the end of the stage before it."""
    before, tx = flatten_dict(params, sep="/"), optimiser(stage)
    after = converted(stage.model, before)
    new_params = unflatten_dict(after, sep="/")
    stays = unflatten_dict({name: x is before.get(name) for name, x in after.items()}, sep="/")
    new_state = tx.init(new_params)
    old_arrays, goes_on = dict(jax.tree.leaves_with_path(opt_state)), trainable.of_state(tx, new_state, stays)
    return new_params, jax.tree.map_with_path(lambda path, flag, x: old_arrays[path] if flag else x, goes_on, new_state)
