"""Checks of a resumed run against its checkpoint: a changed model, a jump of the learning rate, skipped steps.

A change of the arrays of the state is refused. A change of the function alone that the parameters compute, such as a RoPE base,
a window or a soft cap, is refused unless the stage names the field in its `model_changes`. A field that only the initial
parameters depend on may change. Steps are numbered from 1 in the printed lines; a range of steps includes both ends.
"""

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import jax
from flax.traverse_util import unflatten_dict

from hybrid_attn import trees
from hybrid_attn.config import DENSE, Config, Model, build_checkpoint_config, build_model, to_dict, with_override
from hybrid_attn.model import init
from hybrid_attn.stored import digest
from hybrid_attn.train.objectives.objective import SETTINGS
from hybrid_attn.train.optim import optimiser
from hybrid_attn.train.schedule import schedule
from hybrid_attn.trees import check

OPTIMISER = "optim.optimiser"
# Of initial parameters and rates alone.
INITIAL = ("model.init_std", "model.unembed_init_std", "model.depth_init", "model.mup_base_depth", "model.low_rank.init")
LATER = ("short_conv",)  # newer fields of a layer type, left out of the digest where they are None: older digests stay valid
LAYOUT = ("model.prefix", "model.pattern")
# Of checkpoints that do not name these of their stage, or of its preference.
OLDER_STAGE = {"objective": "next_token", "batch_ramp": [], "batch_ramp_tokens": None, "trainable": []} | SETTINGS
OLDER_PREFERENCE = {"reference": "frozen"}
Fields = dict[str, object]
LR_JUMP = 0.1  # a larger change, relative to the saved schedule at the same step, is a jump
Range = tuple[int, int]


def check_arrays(saved: Mapping, c: Config, step: int, checkpoint: str) -> None:
    """ValueError with the fields by which `c` has other arrays after `step` than the `saved` config of `checkpoint`."""
    try:
        old, new = (fields_of(with_override(x, stage_before(x, step))) for x in (saved, to_dict(c)))
    except ValueError:  # the model of another version of this program
        lines = trees.differences(saved["model"], to_dict(c)["model"], "model.")
    else:
        lines = array_changes(old, new, c)
    problem = f"{checkpoint} is of another model or optimiser (saved -> new):"
    check(not lines, "\n  ".join([problem, *lines]) + "\nuse another --workdir, or the saved values")


def check_overrides(c: Config) -> None:
    """ValueError for a stage whose override changes the arrays of the state but for factors, on the mesh in force."""
    values, dense = to_dict(c), {"model": {"low_rank": to_dict(DENSE)}}
    of_run = fields_of(trees.merged(values, dense))
    for index in range(len(c.stages)):
        lines = array_changes(of_run, fields_of(trees.merged(with_override(values, index), dense)), c)
        problem = f"stages[{index}].override changes the arrays of the state, which stages share except factors (run -> stage):"
        check(not lines, "\n  ".join([problem, *lines]))


def check_function(saved: Mapping, c: Config, start: int) -> list[str]:
    """Lines for the fields by which the parameters after step `start` compute another function than in the `saved` config.

    ValueError for those that the stage of the next step does not name in its `model_changes`. At its first step a stage may
    also change what its `override` names, and what the saved config would have changed there.
    """
    index, done = c.stage_at(min(start, c.total_steps - 1))
    stage, trained, planned = c.at(index), stage_before(saved, start), index < len(saved["stages"])
    old, new = fields_of(with_override(saved, trained)), fields_of(with_override(to_dict(c), index))
    changed = {key: line for key, line in changes(old, new).items() if key not in (*INITIAL, OPTIMISER)}
    if any(key in changed for key in LAYOUT):  # it says which layer types there are
        changed = {key: line for key, line in changed.items() if key in old and key in new}
    if done == 0:
        as_saved = fields_of(with_override(saved, index)) if planned else {}
        changed = {key: line for key, line in changed.items() if key not in as_saved or as_saved[key] != new[key]}
    overridden = trees.flat(stage.override) if done == 0 else ()
    unnamed = [key for key in changed if key not in (*stage.model_changes, *overridden)]
    problem = f"the parameters of step {start} would compute another function than they were trained for (saved -> new):"
    flag = f"--config.stages[{stage.index}].model_changes={','.join([*stage.model_changes, *unnamed])}"
    cure = f"\nuse the saved values; or have stages[{stage.index}] train the changed model: {flag}"
    check(not unnamed, "\n  ".join([problem, *(changed[key] for key in unnamed)]) + cure)
    named = {key: "model_changes" if key in stage.model_changes else "override" for key in changed}
    return [f"model        {line}, as stages[{index}].{named[key]} says" for key, line in changed.items()]


def stage_before(saved: Mapping, step: int) -> int:
    """The index of the stage of a saved config that step `step`, counted from 1, is in; the last one after its end."""
    ends = itertools.accumulate(stage["steps"] for stage in saved["stages"])
    return next((index for index, end in enumerate(ends) if step <= end), len(saved["stages"]) - 1)


def fields_of(values: Mapping) -> Fields:
    """The fields of a config's model, without layer types outside prefix and pattern, and the name of its optimiser, by key."""
    return trees.flat({"model": _of_layers(values["model"]), "optim": {"optimiser": values["optim"]["optimiser"]}})


def _of_layers(model: Mapping) -> dict:
    """The fields of a model without layer types outside prefix and pattern."""
    built = build_model(model)
    return {**model, "kinds": {letter: model["kinds"][letter] for letter in sorted({*built.layers, *built.pattern})}}


def function_of(model: Model) -> str:
    """A digest of the fields that say what the parameters of a model compute."""
    fields = trees.flat({"model": _of_layers(to_dict(model))})
    unset = [key for key, x in fields.items() if key.endswith(LATER) and x is None]
    return digest({key: x for key, x in fields.items() if key not in (*INITIAL, *unset)})


def changes(old: Fields, new: Fields) -> dict[str, str]:
    """A line for each changed field, by its key."""
    keys = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    return {key: f"{key}: {old.get(key)!r} -> {new.get(key)!r}" for key in keys}


def array_changes(old: Fields, new: Fields, c: Config) -> list[str]:
    """Lines for the fields that change the arrays by themselves. If none does but together they do, for all changed fields."""
    changed, before = changes(old, new), arrays(old, c)
    if not changed or before is not None and before == arrays(new, c):
        return []
    alone = [line for key, line in changed.items() if before is None or arrays(with_change(old, new, key), c) != before]
    return alone or [*changed.values()]


def with_change(old: Fields, new: Fields, key: str) -> Fields:
    """`old` with the value, or the absence, that `key` has in `new`."""
    others = {name: value for name, value in old.items() if name != key}
    return others | ({key: new[key]} if key in new else {})


def arrays(fields: Fields, c: Config) -> dict | None:
    """Shape and dtype of parameters and optimiser state, on the mesh in force; None where the fields do not fit together."""
    values = unflatten_dict(fields, sep=".")
    try:
        optim = dataclasses.replace(c.optim, optimiser=values["optim"]["optimiser"])
        stage = dataclasses.replace(c.at(-1), model=build_model(values["model"]), optim=optim)
        params = jax.eval_shape(lambda: init(stage.model, jax.random.key(0)))
        state = params, jax.eval_shape(optimiser(stage).init, params)
    except ValueError:
        return None
    return {jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in jax.tree.leaves_with_path(state)}


def rate_jump(saved: Mapping, c: Config, start: int) -> tuple[float, float] | None:
    """Old and new learning rate of the step after `start`, if they differ by more than `LR_JUMP` of the old one.

    The old one is that of the `saved` schedule at the same step, or its last one if that run was finished.
    """
    pieces = build_checkpoint_config(saved).pieces
    old_steps = sum(piece.steps for piece in pieces)
    # A checkpoint of another version has other keys.
    before = dataclasses.replace(c.optim, **{key: x for key, x in saved["optim"].items() if hasattr(c.optim, key)})
    old = float(schedule(before, pieces)(min(start, old_steps - 1)))
    new = float(schedule(c.optim, c.pieces)(start))
    return None if abs(new - old) <= LR_JUMP * abs(old) else (old, new)


def check_rate(saved: Mapping, c: Config, start: int, allowed: bool) -> list[str]:
    """A line for a jump of the learning rate after step `start` if it is `allowed`; otherwise ValueError.

    Where a stage with a schedule of its own begins, the schedule says whether the rate jumps, and every rate is right.
    """
    stage, done = c.stage_at(start)
    begins = done == 0 and c.stages[stage].lr_schedule is not None
    jump = None if begins else rate_jump(saved, c, start)
    if jump is None:
        return []
    old, new = jump
    change = f"from {old:.4g} to {new:.4g} at step {start + 1}"
    if allowed:
        return [f"rate         jumps {change}, as --allow_lr_jump allows"]
    changed = [line for line in trees.differences(saved, to_dict(c)) if line.startswith(("optim.", "stages"))]
    lines = [f"the learning rate would jump {change} (saved -> new):", *(f"  {line}" for line in changed)]
    if old > 0 and c.stages[stage].lr_schedule is None:
        lines.append(f"to go on at the rate of step {start}: {' '.join(held_rate(c, start, old))}")
    raise ValueError("\n".join([*lines, "to let it jump: --allow_lr_jump"]))


def held_rate(c: Config, start: int, rate: float) -> list[str]:
    """Flags with which the rate after step `start` is `rate`, until the final decay begins."""
    share = min(c.optim.decay_fraction, (c.total_steps - start) / c.total_steps)
    values = {"lr": f"{rate:.6g}", "schedule": "wsd", "warmup_steps": "0", "decay_fraction": f"{share:.6g}"}
    values |= {} if c.optim.warmup_tokens is None else {"warmup_tokens": "None"}
    return [f"--config.optim.{name}={value}" for name, value in values.items()]


def parse_steps(text: str) -> list[Range]:
    """The ranges of "40" or "40:42,100:120"; ValueError for anything else."""
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        try:
            ranges.append((int(first), int(last or first)))
        except ValueError:
            raise ValueError(f"--skip_steps={text}: {part!r} is no range of steps; write 40, or 40:42, or 40:42,50") from None
    return ranges


def merge_skipped(requested: Sequence[Range], recorded: Iterable[Sequence[int]], start: int, total: int) -> list[Range]:
    """The ranges that a run skips: those `recorded` in the checkpoint of step `start` and those `requested`, in order.

    ValueError for a range outside of steps 1 to `total`, and for steps that the checkpoint was trained on.
    """
    recorded = _joined(recorded)
    for first, last in requested:
        flag = f"--skip_steps={first}:{last}"
        check(1 <= first <= last <= total, f"{flag} must be a range of the steps 1 to {total}, with the first one first")
        done = min(last, start)
        was_skipped = any(a <= first and done <= b for a, b in recorded)
        check(
            first > done or was_skipped,
            f"{flag}: the checkpoint of step {start} was trained on steps {first} to {done}; skip steps after {start}, or "
            "start anew in another --workdir",
        )
    return _joined([*recorded, *requested])


def _joined(ranges: Iterable[Sequence[int]]) -> list[Range]:
    """The same steps as sorted ranges that neither overlap nor touch."""
    joined: list[Range] = []
    for first, last in sorted(map(tuple, ranges)):
        if joined and first <= joined[-1][1] + 1:
            first, last = joined[-1][0], max(last, joined.pop()[1])
        joined.append((first, last))
    return joined


def is_skipped(step: int, skipped: Iterable[Range]) -> bool:
    return any(first <= step <= last for first, last in skipped)


def text_of(skipped: Iterable[Range]) -> str:
    """The form that `parse_steps` reads."""
    return ",".join(f"{first}" if first == last else f"{first}:{last}" for first, last in skipped)


def completed(stage: Mapping) -> dict:
    """The identity of a stage in a checkpoint of any version, with what older versions do not name."""
    stage = OLDER_STAGE | stage
    preference = stage["preference"]
    return stage | {"preference": None if preference is None else OLDER_PREFERENCE | preference}


def other_steps(c: Config, step: int, done: Sequence[int], expected: Sequence[int]) -> str:
    """The error for a checkpoint with `done` steps of each stage, where this config has `expected` steps at the same `step`."""
    last = len(done) - 1
    if last < len(c.stages) and all(stage.steps == n for stage, n in zip(c.stages[:last], done, strict=False)):
        flag = "--steps" if last == len(c.stages) - 1 else f"--config.stages[{last}].steps"
        return (
            f"the checkpoint of step {step} has done {done[last]} steps of stages[{last}], and this config has "
            f"{c.stages[last].steps} there; give {flag}={done[last]} or more{without_tokens(c)}"
        )
    needed = ", ".join(f"stages[{i}].steps={n}" for i, n in enumerate(done[:last]))
    return (
        f"the checkpoint of step {step} has done {list(done)} steps of each stage, and this config's stages would have done "
        f"{list(expected)}; a stage that is over keeps its steps; give {needed} and stages[{last}].steps={done[last]} or more"
        f"{without_tokens(c)}"
    )


def without_tokens(c: Config) -> str:
    """What the steps of a stage need beside them where the config gives lengths in tokens."""
    return " (and tokens=None there)" if any(stage.tokens is not None for stage in c.stages) else ""
