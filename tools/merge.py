"""Merges checkpoints into a new one: python tools/merge.py --checkpoint=runs/hybrid_8k --last=5 --out=merged

With --last or --steps the checkpoints are those of one run; --decay weights them as if the learning rate had decayed over them
(a run with a constant rate then needs no decay of its own: WSM). Without these every --checkpoint is one model, the newest of
its directory, or DIR/STEP. --out becomes a directory of checkpoints with step 0, like that of tools/import_hf.py: evaluate it,
export it, or start a run from it with --config.init_from.path. It records the recipe.

With --ema the moving averages of the parameters are merged instead of the parameters (optim.ema_half_life); with one checkpoint
this makes a model of its average.

Methods: linear (--weights), slerp of two models (--t), and ties and dare, which add to --base what the models differ from it
(--weights, --density, --scale; dare draws at random: --seed). Each layer is merged by itself; one tensor of every model is in
memory at a time, and the result. Exit codes: 2 for a wrong flag or input.
"""

import contextlib
import dataclasses
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from absl import app, flags
from flax.traverse_util import unflatten_dict

from hybrid_attn import checkpoint, config, files, merge, programs, stored, trees
from hybrid_attn.checkpoint import Checkpoints
from hybrid_attn.convert import hf
from hybrid_attn.infer import loading
from hybrid_attn.stored import first_eight
from hybrid_attn.train import average
from hybrid_attn.trees import check

CHECKPOINT = flags.DEFINE_multi_string("checkpoint", None, "Workdir, directory of checkpoints, or DIR/STEP.", required=True)
OUT = flags.DEFINE_string("out", None, "New directory of checkpoints.", required=True)
LAST = flags.DEFINE_integer("last", None, "Merge the newest checkpoints of the run, so many.", 1)
STEPS = flags.DEFINE_list("steps", None, "Merge the checkpoints of these steps of the run.")
EMA = flags.DEFINE_bool("ema", False, "Merge the moving averages that the checkpoints hold.")
METHOD = flags.DEFINE_enum("method", "linear", list(merge.METHODS), "How tensors are merged.")
WEIGHTS = flags.DEFINE_list("weights", None, "Weight of each model; by default all are equal.")
DECAY = flags.DEFINE_enum("decay", None, list(merge.DECAYS), "Weights of checkpoints that stand for this decay.")
BASE = flags.DEFINE_string("base", None, "The model that the others were trained from, for ties and dare.")
T = flags.DEFINE_float("t", merge.Recipe.t, "slerp: share of the way from the first model to the second.")
DENSITY = flags.DEFINE_float("density", merge.Recipe.density, "ties, dare: share of the differences that is kept.")
SCALE = flags.DEFINE_float("scale", merge.Recipe.scale, "ties, dare: factor on the merged differences.")
SEED = flags.DEFINE_integer("seed", merge.Recipe.seed, "dare: seed of the random choice.", 0)
OPTIONS = {"linear": (WEIGHTS, DECAY), "slerp": (T,), "ties": (WEIGHTS, BASE, DENSITY, SCALE)}
OPTIONS["dare"] = (*OPTIONS["ties"], SEED)


class Model(NamedTuple):
    """A checkpoint that is merged, and the group of its arrays that are."""

    directory: str
    step: int
    group: str
    saved: loading.Saved

    @property
    def name(self) -> str:
        return f"{self.directory}/{self.step}"


def numbers(flag: str, texts: Sequence[str], kind: type) -> list:
    """The numbers of a flag; ValueError for another text."""
    try:
        return [kind(text) for text in texts]
    except ValueError:
        raise ValueError(f"--{flag}={','.join(texts)} must be numbers with commas between them") from None


def model_at(path: str, step: int | None = None, group: str = checkpoint.PARAMS) -> Model:
    """The checkpoint at a path, which may end with its step; ValueError where there is none."""
    if step is None:
        path, step = loading.split_step(path)
    directory = loading.find(path)
    step = loading.step_of(directory, step)
    saved = loading.saved_of(directory, step)
    adapter, cure = saved.config.model.adapter.type, "export it merged with tools/export_hf.py, and import that"
    check(adapter is None, f"{path} has an adapter of type {adapter!r}, whose matrices have no mean; {cure}")
    return Model(directory, step, group, saved)


def models() -> list[Model]:
    """The checkpoints that the flags name, oldest first where they are of one run."""
    group = f"{stored.EXTRAS}/{average.NAME}" if EMA.value else checkpoint.PARAMS
    if LAST.value is None and STEPS.value is None:
        return [model_at(path, group=group) for path in CHECKPOINT.value]
    check(LAST.value is None or STEPS.value is None, "--last and --steps both choose checkpoints; give one of them")
    check(len(CHECKPOINT.value) == 1, "--last and --steps are of one run; give one --checkpoint")
    directory = loading.find(CHECKPOINT.value[0])
    steps = checkpoint.steps(directory)
    if LAST.value is not None:
        check(LAST.value <= len(steps), f"--last={LAST.value}: {directory} has {len(steps)} checkpoints; train.keep keeps more")
        return [model_at(directory, step, group) for step in steps[-LAST.value :]]
    steps = numbers("steps", STEPS.value, int)
    check(
        steps == sorted(set(steps)), f"--steps={','.join(STEPS.value)} must increase: --weights and --decay are in their order"
    )
    return [model_at(directory, step, group) for step in steps]


def recipe_for(number: int) -> merge.Recipe:
    """The recipe that the flags give for so many models; ValueError for flags of another method."""
    method = METHOD.value
    every = {flag.name: flag for options in OPTIONS.values() for flag in options}
    allowed = {flag.name for flag in OPTIONS[method]}
    for name, flag in every.items():
        check(name in allowed or not flag.present, f"--{name} does not belong to --method={method}")
    check(not (WEIGHTS.present and DECAY.present), "--weights and --decay both give weights; give one of them")
    of_one_run = LAST.value is not None or STEPS.value is not None
    check(DECAY.value is None or of_one_run, "--decay is of the checkpoints of one run; choose them with --last or --steps")
    has_base = merge.METHODS[method].has_base
    check(
        not has_base or BASE.value is not None, f"--method={method} needs --base, the model before the training of the others"
    )
    weights = tuple(numbers("weights", WEIGHTS.value, float)) if WEIGHTS.value else (1.0,) * number
    weights = merge.decay_weights(DECAY.value, number) if DECAY.value else weights
    check(len(weights) == number, f"--weights has {len(weights)} numbers for {number} models")
    return merge.Recipe(method, weights, T.value, DENSITY.value, SCALE.value, SEED.value)


def shapes_in(model: Model) -> dict[str, tuple[int, ...]]:
    shapes = checkpoint.read_shapes(model.directory, model.step, model.group)
    check(bool(shapes), f"{model.name} has no moving average; a run with optim.ema_half_life keeps one")
    return shapes


def shapes_of(merged: Sequence[Model]) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter; ValueError where models have other parameters, shapes or tokenizers."""
    first = merged[0]
    shapes = shapes_in(first)
    for model in merged[1:]:
        other = shapes_in(model)
        names = sorted(name for name in shapes.keys() | other.keys() if shapes.get(name) != other.get(name))
        lines = [f"{name}: {shapes.get(name, 'none')} -> {other.get(name, 'none')}" for name in names]
        check(not names, f"{first.name} and {model.name} have other parameters: {first_eight(lines)}")
        hashes = {x.saved.tokenizer_hash for x in (first, model)} - {None}
        check(len(hashes) < 2, f"{first.name} and {model.name} were trained with different tokenizers")
    return shapes


def check_same_factors(merged: Sequence[Model]) -> None:
    """ValueError for factors of several runs, or of one run before and after an edge at which factors were made anew.

    U and V of two runs may differ though U V is the same; the product of their means is then another matrix.
    """
    with_factors = [x for x in merged if x.saved.config.model.low_rank.rank_fraction is not None]
    if with_factors and (len({x.directory for x in merged}) > 1 or len(factors_between(with_factors)) > 1):
        cure = "merge checkpoints of one stage of one run, or export each with tools/export_hf.py, and import that"
        raise ValueError(f"{with_factors[0].name} has factors of low rank; {cure}")


def factors_between(models: Sequence[Model]) -> set[config.LowRank]:
    """What the stages have as `model.low_rank` from the first to the last stage of checkpoints of one run."""
    stages = [max(len(x.saved.stage_steps) - 1, 0) for x in models]
    if len(set(stages)) == 1:
        return {models[0].saved.config.model.low_rank}
    newest = max(models, key=lambda model: model.step)
    c = config.build_checkpoint_config(checkpoint.read_config(newest.directory, newest.step))
    return {c.of_stage(stage).model.low_rank for stage in range(min(stages), max(stages) + 1)}


def differences(merged: Sequence[Model]) -> list[str]:
    """Lines for the fields of the model in which checkpoints differ from the first; they have the same arrays."""
    first, *others = (config.to_dict(x.saved.config.model) for x in merged)
    notes = zip(merged[1:], (trees.differences(first, other, "model.") for other in others), strict=True)
    return [f"{merged[0].name} -> {model.name}: {line}" for model, lines in notes for line in lines]


def merged_slices(merged: Sequence[Model], base: Model | None, recipe: merge.Recipe, name: str, shape) -> Iterator[np.ndarray]:
    """The merged periods of a stacked parameter, or all of an unstacked one."""
    sources = [*merged, *([base] if base else [])]
    slices = [checkpoint.read_slices(x.directory, name, shape, x.step, x.group) for x in sources]
    for index, tensors in enumerate(zip(*slices, strict=True)):
        rng = np.random.default_rng([recipe.seed, zlib.crc32(name.encode()), index])
        yield merge.merge(recipe, tensors[: len(merged)], tensors[-1] if base else None, rng)


def merge_models() -> None:
    merged = models()
    recipe = recipe_for(len(merged))
    base = model_at(BASE.value) if BASE.value else None
    sources = [*merged, *([base] if base else [])]
    check_same_factors(sources)
    shapes = shapes_of(sources)
    last = max(merged, key=lambda model: sum(model.saved.stage_steps))  # the first of those that were trained longest
    values = checkpoint.read_config(last.directory, last.step)
    data = {"stage_steps": last.saved.stage_steps, "stage": {"tokenizer": last.saved.tokenizer_hash}}
    data |= {checkpoint.CHAT_TEMPLATE: template} if (template := last.saved.chat_template) is not None else {}
    data |= {"imported": f"a {recipe.method} merge of {len(merged)} checkpoints", "merge": recorded(merged, base, recipe)}
    with hf.new_directory(OUT.value) as directory:
        params = {}
        for name, shape in shapes.items():
            slices = list(merged_slices(merged, base, recipe, name, shape))
            params[name] = jax.device_put(np.stack(slices) if name.startswith("periods/") else slices[0])
        with contextlib.closing(Checkpoints(directory, keep=1, every=1)) as checkpoints:
            checkpoints.save(0, {"params": unflatten_dict(params, sep="/")}, data, values, wait=True)
        companions = Path(last.directory) / files.IMPORTED_FILES
        if companions.is_dir():
            shutil.copytree(companions, directory / files.IMPORTED_FILES)
    for line in differences([last, *(x for x in sources if x is not last)]):
        print(line)
    show(merged, base, recipe)


def recorded(merged: Sequence[Model], base: Model | None, recipe: merge.Recipe) -> dict:
    """What the data item of the merged checkpoint says about its sources."""

    def source(model: Model) -> dict:
        fingerprint = checkpoint.fingerprint(model.directory, model.step, model.group)
        return {"path": model.directory, "step": model.step, "group": model.group, "fingerprint": fingerprint}

    return {**dataclasses.asdict(recipe), "models": [source(x) for x in merged], "base": source(base) if base else None}


def show(merged: Sequence[Model], base: Model | None, recipe: merge.Recipe) -> None:
    weights = (1 - recipe.t, recipe.t) if recipe.method == "slerp" else recipe.weights
    for model, weight in zip(merged, weights, strict=True):
        print(f"{weight / sum(weights):8.4f}  {model.name}")
    onto = f", added to {base.name}" if base else ""
    print(f"{OUT.value}: {recipe.method} merge of {len(merged)} checkpoint{'s' if len(merged) > 1 else ''}{onto}")


def main(argv):
    programs.run(merge_models, argv, "the merged model")


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
