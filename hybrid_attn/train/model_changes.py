"""What a changed model means for a run that continues from a checkpoint.

A change of the arrays of the state is refused. A change of the function alone that the parameters compute, such as a RoPE base,
a window or a soft cap, is refused unless the stage names the field in its `model_changes`. A field that only the initial
parameters depend on may change.
"""

import dataclasses
from collections.abc import Mapping

import jax
from flax.traverse_util import unflatten_dict

from hybrid_attn import trees
from hybrid_attn.config import Config, build_model, to_dict
from hybrid_attn.model import init
from hybrid_attn.train.optim import optimiser

OPTIMISER = "optim.optimiser"
INITIAL = ("model.init_std",)  # of the initial parameters alone
LAYOUT = ("model.prefix", "model.pattern")
Fields = dict[str, object]


def check_arrays(saved: Mapping, c: Config, checkpoint: str) -> None:
    """ValueError with the fields by which the state of `c` has other arrays than that of the `saved` config.

    `checkpoint` names the one that has this config. A mesh is in force.
    """
    try:
        old, new = fields_of(saved), fields_of(to_dict(c))
    except ValueError:  # the model of another version of this program
        lines = trees.differences(saved["model"], to_dict(c)["model"], "model.")
    else:
        lines = [change_line(key, old, new) for key in array_changes(old, new, c)]
    if lines:
        raise ValueError(
            f"{checkpoint} is of another model or optimiser (saved -> new):\n  "
            + "\n  ".join(lines)
            + "\nuse another --workdir, or the saved values"
        )


def check_function(saved: Mapping, c: Config, start: int) -> list[str]:
    """Lines for the fields by which the parameters after step `start` compute another function than in the `saved` config.

    ValueError for those that the stage of the next step does not name in its `model_changes`.
    """
    old, new = fields_of(saved), fields_of(to_dict(c))
    changed = [key for key in changed_keys(old, new) if key not in (*INITIAL, OPTIMISER)]
    if any(new.get(key) != old.get(key) for key in LAYOUT):  # it says which layer types there are
        changed = [key for key in changed if key in old and key in new]
    stage = c.at(c.stage_at(min(start, c.total_steps - 1))[0])
    unnamed = [key for key in changed if key not in stage.model_changes]
    if unnamed:
        flag = f"--config.stages[{stage.index}].model_changes={','.join([*stage.model_changes, *unnamed])}"
        raise ValueError(
            f"the parameters of step {start} would compute another function than they were trained for (saved -> new):\n  "
            + "\n  ".join(change_line(key, old, new) for key in unnamed)
            + f"\nuse the saved values; or have stages[{stage.index}] train the changed model: {flag}"
        )
    return [f"model        {change_line(key, old, new)}, as stages[{stage.index}].model_changes says" for key in changed]


def fields_of(values: Mapping) -> Fields:
    """The fields of a config's model, without layer types outside prefix and pattern, and the name of its optimiser, by key."""
    built, model = build_model(values["model"]), values["model"]
    kinds = {letter: model["kinds"][letter] for letter in sorted({*built.layers, *built.pattern})}
    return trees.flat({"model": {**model, "kinds": kinds}, "optim": {"optimiser": values["optim"]["optimiser"]}})


def changed_keys(old: Fields, new: Fields) -> list[str]:
    return [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]


def change_line(key: str, old: Fields, new: Fields) -> str:
    return f"{key}: {old.get(key)!r} -> {new.get(key)!r}"


def array_changes(old: Fields, new: Fields, c: Config) -> list[str]:
    """The fields that change the arrays by themselves. If none does but together they do, all changed fields."""
    changed, before = changed_keys(old, new), arrays(old, c)
    if not changed or before is not None and before == arrays(new, c):
        return []
    return [key for key in changed if before is None or arrays(with_change(old, new, key), c) != before] or changed


def with_change(old: Fields, new: Fields, key: str) -> Fields:
    """`old` with the value, or the absence, that `key` has in `new`."""
    others = {name: value for name, value in old.items() if name != key}
    return others | ({key: new[key]} if key in new else {})


def arrays(fields: Fields, c: Config) -> dict | None:
    """Shape and dtype of the parameters and of the optimiser's arrays by name; None where the fields do not fit together."""
    values = unflatten_dict(fields, sep=".")
    try:
        optim = dataclasses.replace(c.optim, optimiser=values["optim"]["optimiser"])
        stage = dataclasses.replace(c.at(-1), model=build_model(values["model"]), optim=optim)
        params = jax.eval_shape(lambda: init(stage.model, jax.random.key(0)))
        state = params, jax.eval_shape(optimiser(stage).init, params)
    except ValueError:
        return None
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in jax.tree.leaves_with_path(state)}
