"""The first parameters of a run, copied from the checkpoint of another run or of an imported model.

Every parameter is accounted for: one of this model is copied, or `init_from.new` names it; one of the checkpoint is copied, or
`init_from.ignore` names it, in the form of `names.matching`. An adapter that the checkpoint lacks is new. Two factors of low
rank here come from one matrix there, by its largest singular vectors. Only parameters are taken: the optimiser state is new.
"""

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from hybrid_attn import checkpoint, trees
from hybrid_attn.config import Config, InitFrom, to_dict, with_override
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.infer import loading
from hybrid_attn.model import abstract_params, transforms
from hybrid_attn.model.params import EMBEDDING
from hybrid_attn.model.transformer import specs
from hybrid_attn.names import matching, nearest, prefixes
from hybrid_attn.stored import first_eight, inside
from hybrid_attn.train import edge
from hybrid_attn.train.step import TrainState, abstract_on, abstract_state, init_state
from hybrid_attn.train.trainable import has_state
from hybrid_attn.trees import check

Shapes = Mapping[str, tuple[int, ...]]


def first_state(c: Config, mesh: Mesh, tokenizer_hash: str) -> tuple[TrainState, dict]:
    """The state before the first step with the parameters that `c.init_from` names, on `mesh`; and a record of their origin.

    ValueError where there is no such checkpoint, where it cannot be read, and where a parameter is not accounted for.
    """
    directory, step = locate(c.init_from)
    source = loading.name_of(directory, step)
    own = flatten_dict(abstract_state(c, mesh).params, sep="/")
    try:
        saved, data = checkpoint.read_config(directory, step), checkpoint.read_data(directory, step)
        shapes_there = checkpoint.read_shapes(directory, step)
        expected = with_matrices(c, mesh, own, shapes_there)
        shapes_here = {name: x.shape for name, x in expected.items()}
        copied, new, ignored = assign(c.init_from, shapes_here, shapes_there, source)
        params = read_copied(directory, step, copied, expected)
        fingerprint = checkpoint.fingerprint(directory, step)
    except checkpoint.UnreadableError as cause:
        cure = "use another init_from.step, or copy it again"
        raise ValueError(f"init_from: {source} cannot be read: {cause}; {cure}") from cause
    trained = with_override(saved, max(len(data.get("stage_steps", ())) - 1, 0))
    notes = trees.differences(trained["model"], to_dict(c.at(0).model), "model.")
    embeddings = {name for name, spec in flatten_dict(specs(c.model), sep="/").items() if spec.group == EMBEDDING}
    if embeddings & copied.keys():
        notes += tokenizer_note(directory, data, tokenizer_hash)
    counts = {"copied": len(copied), "factorised": len(copied.keys() - own.keys())}
    record = {"path": directory, "step": step, "fingerprint": fingerprint, **counts}
    if (template := checkpoint.chat_template(data)) is not None:
        record |= {checkpoint.CHAT_TEMPLATE: template}
    if is_base(c, expected, copied):
        record |= {"path": checkpoint.absolute(directory), checkpoint.IS_BASE: True}
    return started(c, params), record | {"new": new, "ignored": ignored, "notes": notes}


def with_matrices(c: Config, mesh: Mesh, expected: dict, there: Shapes) -> dict:
    """The `expected` parameters, with a matrix in place of two factors where the checkpoint has it."""
    model = c.at(0).model
    if model.low_rank.rank_fraction is None:
        return expected
    of_dense = flatten_dict(abstract_on(mesh, abstract_params(transforms.dense(model))), sep="/")
    matrices = {name: x for name, x in of_dense.items() if name not in expected and source_of(c.init_from, name) in there}
    return {name: x for name, x in expected.items() if name.rpartition("/")[0] not in matrices} | matrices


def is_base(c: Config, here: Mapping, copied: Mapping[str, str]) -> bool:
    """Whether checkpoints leave out the parameters that never train: all were copied from parameters of the same name."""
    fixed = [name for name, trains in flatten_dict(has_state(c, unflatten_dict(here, sep="/")), sep="/").items() if not trains]
    return bool(fixed) and all(copied.get(name) == name for name in fixed)


def lines(init: InitFrom, recorded: Mapping, new: bool) -> list[str]:
    """What a run prints about `init`, whose data state has `recorded`; `init` is ignored unless the run is `new`."""
    if init.path is None:
        return []
    if not new:
        return [f"parameters   from this run's own checkpoint; init_from.path={init.path} is ignored"]
    record = recorded["init_from"]
    names = {key: first_eight(record[key]) or "none" for key in ("new", "ignored")}
    origin = f"{record['copied']} leaves copied from {record['path']} step {record['step']}"
    if record["factorised"]:
        origin += f"; {record['factorised']} matrices taken apart into factors, whose products are the nearest of their rank"
    first = f"parameters   {origin}; new: {names['new']}; ignored: {names['ignored']}"
    header = ["             differs from that checkpoint (saved -> new):"] if record["notes"] else []
    return [first, *header, *(f"               {note}" for note in record["notes"])]


def locate(init: InitFrom) -> tuple[str, int]:
    """The directory of checkpoints and the step that `init` names, the same in every process; ValueError if there is none."""
    path, step = loading.split_step(init.path)
    if step is not None:
        check(init.step in (None, step), f"init_from.path={init.path} is of step {step}, and init_from.step={init.step}")
        return path, step
    try:
        directory = loading.find(path)
        step = loading.step_of(directory, init.step)
    except ValueError as cause:
        raise ValueError(f"init_from: {cause}") from None
    return directory, int(multihost_utils.broadcast_one_to_all(np.int32(step)))  # another run may be writing a newer one


def assign(init: InitFrom, here: Shapes, there: Shapes, checkpoint_name: str) -> tuple[dict[str, str], list[str], list[str]]:
    """The name `there` of every parameter `here` that is copied, the new ones here, and those there that go nowhere.

    ValueError if a parameter here or there is not accounted for, or has another shape.
    """
    added = {name for name in here if transforms.is_added(name) and name not in there}
    new = matching("init_from.new", init.new, here, "this model") | added
    ignored = matching("init_from.ignore", init.ignore, there, checkpoint_name)
    for old, today in init.renamed:
        for name, names, owner in ((old, there, checkpoint_name), (today, here, "this model")):
            known = any(inside(x, name) for x in names)
            check(known, f"init_from.rename names {name!r}, and {owner} has no such parameter{nearest(name, names)}")
    sources = {name: source_of(init, name) for name in here if name not in new}
    copied = {name: source for name, source in sources.items() if source in there and source not in ignored}
    missing = [name for name in sources if name not in copied]
    unused = sorted(there.keys() - ignored - set(copied.values()))
    problems = [
        *unaccounted("this model has", missing, here, "new", init.new),
        *unaccounted("the checkpoint has", unused, there, "ignore", init.ignore),
        *rename_hint(init, {name: here[name] for name in missing}, {name: there[name] for name in unused}),
        *other_shapes(copied, here, there),
    ]
    check(not problems, "\n  ".join([f"init_from: {checkpoint_name} does not have the parameters of this model:", *problems]))
    check(bool(copied), f"init_from: nothing is copied from {checkpoint_name}; if that is intended, leave out init_from.path")
    return copied, sorted(new), sorted(ignored)


def source_of(init: InitFrom, name: str) -> str:
    """The name in the checkpoint of a parameter of this model; the last entry of `rename` that has it counts."""
    names = [old + name.removeprefix(today) for old, today in init.renamed if inside(name, today)]
    return names[-1] if names else name


def unaccounted(owner: str, names: Sequence[str], of: Iterable[str], key: str, patterns: Sequence[str]) -> list[str]:
    """A line about parameters that are not accounted for, with the line of a config that does it.

    It has the shortest names of groups that together hold these parameters, and no others `of` the model.
    """
    if not names:
        return []
    others, groups = set(of) - set(names), []
    for name in names:
        group = next(prefix for prefix in prefixes(name) if not any(inside(other, prefix) for other in others))
        groups += [group] if group not in groups else []
    what = "initial values for them" if key == "new" else "without them"
    return [f"only {owner} {first_eight(names)}; {what}: c.init_from.{key} = {(*patterns, *groups)}"]


def rename_hint(init: InitFrom, missing: Shapes, unused: Shapes) -> list[str]:
    """A line with a likely entry of `rename`, where the first parameters of the same shape have different names."""
    for name, shape in missing.items():
        alike = [other for other in unused if unused[other] == shape and other.rpartition("/")[2] == name.rpartition("/")[2]]
        if alike:
            old, new = alike[0].split("/"), name.split("/")
            while old[1:] and new[1:] and old[-1] == new[-1]:
                old, new = old[:-1], new[:-1]
            entry = f"{'/'.join(old)} -> {'/'.join(new)}"
            return [f"if they are the same under other names: c.init_from.rename = {(*init.rename, entry)}"]
    return []


def other_shapes(copied: Mapping[str, str], here: Shapes, there: Shapes) -> list[str]:
    """Lines about parameters that cannot be copied because of their shape."""
    names = [name for name, source in copied.items() if here[name] != there[source]]
    if not names:
        return []
    shapes = first_eight([f"{name} has {there[copied[name]]} there and {here[name]} here" for name in names])
    problems = [f"{shapes}; for initial values name them in both init_from.new and init_from.ignore"]
    if all(name.startswith("periods/") and here[name][1:] == there[copied[name]][1:] for name in names):
        first = names[0]
        repeats = f"{there[copied[first]][0]} there and {here[first][0]} here"
        problems.append(f"the first axis is the repetition of model.pattern: {repeats}; all of them are copied, or none")
    return problems


def read_copied(directory: str, step: int, copied: Mapping[str, str], expected: Mapping) -> dict[str, jax.Array]:
    """The copied parameters by their names here, with the shardings and dtypes of `expected`, and verified."""
    abstract = {source: expected[name] for name, source in copied.items()}
    saved = flatten_dict(checkpoint.read_params(directory, unflatten_dict(abstract, sep="/"), step), sep="/")
    params, taken = {}, set()
    for name, source in copied.items():
        params[name] = jnp.copy(saved[source]) if source in taken else saved[source]  # a step donates each array once
        taken.add(source)
    return params


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def started(c: Config, copied: dict[str, jax.Array]) -> TrainState:
    """The state before the first step with the `copied` parameters, by name, and with the initial values of the others."""
    params = flatten_dict(init_state(c).params, sep="/") | edge.converted(c.at(0).model, copied)
    return init_state(c, unflatten_dict(params, sep="/"))


def tokenizer_note(directory: str, data: Mapping, tokenizer_hash: str) -> list[str]:
    """A line if the checkpoint's embeddings are of another tokenizer than the one with this hash."""
    path = Path(directory) / loading.IMPORTED_FILES / "tokenizer.json"
    saved = data.get("stage", {}).get("tokenizer") or (load_tokenizer(str(path)).hash if path.is_file() else None)
    if saved in (None, tokenizer_hash):
        return []
    return [f"tokenizer: {saved[:12]} -> {tokenizer_hash[:12]} (hashes): the copied embeddings may be of other tokens"]
