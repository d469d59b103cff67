"""Checkpoints: training writes them, every other program reads them.

A checkpoint is a directory named by its step. It holds `state` (arrays), `config` (the nested dict that made it), `data` (the
data state) and `checksums` of all of these. It is complete or it does not exist: it is written under a temporary name and
renamed when all of it is on disk. That of an adapter has the trained parameters alone; the others are those of its base,
another checkpoint. The reader chooses the mesh and the precision. Functions with an optional `step` read the newest checkpoint
of a directory, or that of `step`; ValueError if it is unreadable.
"""

import contextlib
import copy
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax import traverse_util
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from hybrid_attn import files, stored
from hybrid_attn.config import upgraded
from hybrid_attn.stored import UnreadableError
from hybrid_attn.trees import check

Directory = str | os.PathLike
MIB = 2**20
PARAMS = "params"  # the group of the parameters in the state
INIT_FROM, IS_BASE = "init_from", "is_base"  # in the data state: a record of the first parameters, and whether they are a base
CHAT_TEMPLATE = "chat_template"  # in the data state and that record: the text of the template that wrote conversations
GLOB = r"*?[" + "\\"  # Orbax reads a directory name with one of these as a pattern
_STEPS = ocp.path.step.standard_name_format()


class Checkpoints:
    """The checkpoints of one run, written in the background; every process of the run makes the same calls."""

    def __init__(self, directory: Directory, keep: int, every: int):
        """Opens or creates `directory` and removes incomplete checkpoints of a killed run; the newest `keep` are kept.

        ValueError for a name that Orbax cannot write to, and for a file; OSError if the processes do not share the disk.
        """
        self.directory = absolute(directory)
        check_name(self.directory)
        fits = os.path.isdir(self.directory) or not os.path.lexists(self.directory)
        check(fits, f"{self.directory} is not a directory, and checkpoints go there; move it away")
        _check_shared(self.directory)
        self._writing: int | None = None
        self._read_back = self._abandoned = False
        options = ocp.CheckpointManagerOptions(
            save_decision_policy=checkpoint_managers.FixedIntervalPolicy(every),
            preservation_policy=checkpoint_managers.LatestN(keep),
            cleanup_tmp_directories=True,
        )
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def due(self, step: int) -> bool:
        """Whether `step` is a multiple of `every` that has no checkpoint yet."""
        return self._manager.should_save(step)

    def save(self, step: int, state: Any, data: Mapping, config_dict: Mapping, wait: bool = False) -> None:
        """Starts writing, unless `step` has a checkpoint; afterwards `state` may be donated and the dicts may change.

        It waits for the first one and reads it back. OSError if this one does not fit on the disk or the last was not written.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        state = stored.fields_of(state)
        items = {"config": copy.deepcopy(dict(config_dict)), "data": copy.deepcopy(dict(data))}
        items["checksums"] = stored.sums_of(state, items)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, save_args=jax.tree_util.tree_map_with_path(_chunks, state)),
            **{name: ocp.args.JsonSave(item) for name, item in items.items()},
        )
        self._writing = step
        try:
            _check_space(self.directory, state)
            self._manager.save(step, args=items, force=True)
        except OSError as cause:
            raise self._not_written(cause) from cause
        if wait or not self._read_back:
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint being written is complete, and the first one readable; OSError if it is not."""
        try:
            self._manager.wait_until_finished()
            if self._writing is not None and jax.process_index() == 0:
                if self._writing not in self.steps():
                    raise FileNotFoundError("it is not there")
                if not self._read_back:
                    stored.check_smallest(_path(self.directory, self._writing))
            self._read_back = self._read_back or self._writing is not None
        except Exception as cause:
            raise self._not_written(cause) from cause
        self._writing = None

    def abandon(self) -> None:
        """Makes `close` return without waiting for a checkpoint that is being written."""
        self._abandoned = True

    def close(self) -> None:
        """Waits as `wait` does and ends the background threads."""
        if not self._abandoned:
            with contextlib.closing(self._manager):
                self.wait()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return steps(self.directory)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def newest_config(self) -> tuple[int, dict] | None:
        """(step, config) of the newest checkpoint whose config can be read; None if there is none."""
        for step in reversed(self.steps()):
            with contextlib.suppress(UnreadableError):  # `restore` reports it and reads the previous one
                return step, read_config(self.directory, step)
        return None

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any, dict]:
        """(step, state, data) of the newest checkpoint that can be read, or of `step`.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct`s with the shardings and dtypes of the result, or a function that
        makes it for a step. Of its `extras`, the result has those that the checkpoint has. An unreadable checkpoint is reported
        and renamed, and the one before it is read. ValueError if none can be read, or if the arrays are those of another model.
        """
        self.wait()
        candidates = [step] if step is not None else self.steps()[::-1]
        causes = {}
        for candidate in candidates:
            path = _path(self.directory, candidate)
            try:
                _, data = stored.together(lambda path=path: [stored.read_item(path, item) for item in stored.ITEMS])
                like = abstract_state(candidate) if callable(abstract_state) else abstract_state
                state = _read_state(path, like)
            except UnreadableError as cause:
                logging.error("checkpoint %s/%d cannot be read: %s", self.directory, candidate, cause)
                causes[candidate] = cause
                continue
            for moved in self.set_aside(causes, "unreadable") if causes else ():
                logging.error("moved it to %s; delete it when it is no longer needed", moved)
            return candidate, state, data
        tried = "\n".join(f"  {self.directory}/{s}: {cause}" for s, cause in causes.items()) or "  there is none"
        raise ValueError(f"no checkpoint in {self.directory} can be read:\n{tried}\nstart anew in another --workdir")

    def set_aside(self, unwanted: Iterable[int], ending: str) -> list[str]:
        """Renames the checkpoints of these steps, which can then be written again; the new names, in process 0 alone."""
        targets = []
        for step in unwanted if jax.process_index() == 0 else ():
            path = _path(self.directory, step)
            target = files.free_name(path, ending)
            path.rename(target)
            targets.append(str(target))
        stored.agree(True)  # every process waits here until they are moved
        self._manager.reload()
        return targets

    def _not_written(self, cause: Exception) -> OSError:
        step, self._writing = self._writing, None
        complete = [other for other in self.steps() if other != step]
        last = f"the last complete one is of step {complete[-1]}" if complete else "there is no other"
        cure = "free some space, or restore the directory, and run the same command again"
        problem = f"the checkpoint of step {step} could not be written to {self.directory}: {stored.root(cause)}"
        return OSError(f"{problem}; {last}; {cure}")


def steps(directory: Directory) -> list[int]:
    """Steps of the complete checkpoints in `directory`, oldest first."""
    directory = absolute(directory)
    if "://" not in directory and not os.path.isdir(directory):
        return []
    return sorted(checkpoint.step for checkpoint in _STEPS.find_all(directory))


def read_config(directory: Directory, step: int | None = None) -> dict:
    """The nested dict, with today's keys, of the config that made the checkpoint."""
    return upgraded(stored.read_item(_path(directory, step), "config"))


def read_data(directory: Directory, step: int | None = None) -> dict:
    """The data state."""
    return stored.read_item(_path(directory, step), "data")


def chat_template(data: Mapping) -> str | None:
    """The text of the template that wrote the conversations of a run, or of the run that it started from, by its data state."""
    sources = (x for x in (data, data.get(INIT_FROM)) if isinstance(x, Mapping))
    text = next((x[CHAT_TEMPLATE] for x in sources if CHAT_TEMPLATE in x), None)
    check(isinstance(text, str | None), f"{CHAT_TEMPLATE}={str(text)[:50]} of a data state must be text")
    return text


def extras(directory: Directory, step: int | None = None) -> set[str]:
    """The names of the extras."""
    return stored.extras(_path(directory, step))


def fingerprint(directory: Directory, step: int | None = None, group: str = PARAMS) -> str:
    """The SHA-256 of the checksums of the parameters, or of another group, and of those of its base: it identifies weights."""
    sums = stored.read_sums(_path(directory, step))
    arrays = sorted((name, number) for name, number in sums.arrays.items() if name.startswith(f"{group}/"))
    if (base := _base_record(_path(directory, step))) is not None:
        arrays.append(("base", base["fingerprint"]))
    return hashlib.sha256(json.dumps(arrays).encode()).hexdigest()


def read_params(directory: Directory, abstract_params: Any, step: int | None = None) -> Any:
    """The parameters alone, like `abstract_params`; leaves without a sharding go to the first device."""
    path = _path(directory, step)
    own, others = _divided(path, abstract_params)
    params = stored.read_arrays(path, {PARAMS: own}, partial=True)[PARAMS] if own else {}
    return _joined(params, _of_base(path, others)) if others else params


def read_shapes(directory: Directory, step: int | None = None, group: str = PARAMS) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by name; `group` holds them, or arrays like them: an extra such as extras/ema."""
    shapes, base = stored.read_shapes(_path(directory, step)), _base(_path(directory, step))
    of_base = read_shapes(base.directory, base.step) if base and group == PARAMS else {}
    return of_base | {name.removeprefix(f"{group}/"): shape for name, shape in shapes.items() if name.startswith(f"{group}/")}


def read_slices(
    directory: Directory, name: str, shape: tuple, step: int | None = None, group: str = PARAMS
) -> Iterator[np.ndarray]:
    """Yields the periods of a stacked parameter, or all of an unstacked one, on the host and in the dtype on disk.

    One chunk is in memory at a time: a period, or several in older checkpoints. Where the checksum differs, UnreadableError is
    raised in place of the last period.
    """
    path = _path(directory, step)
    base = None if group != PARAMS or f"{group}/{name}" in stored.read_sums(path).arrays else _base(path)
    if base is not None:
        return read_slices(base.directory, name, shape, base.step)
    return stored.read_slices(path, f"{group}/{name}", shape)


class Base(NamedTuple):
    """The checkpoint that has the parameters which the checkpoint of an adapter lacks."""

    directory: str
    step: int


def _base_record(path) -> Mapping | None:
    record = stored.read_item(path, "data").get(INIT_FROM, {})
    return record if record.get(IS_BASE) else None


def _base(path) -> Base | None:
    """The base of the checkpoint at a path, if it has one; ValueError if it is gone, or if another one stands there."""
    record = _base_record(path)
    if record is None:
        return None
    base, expected = Base(record["path"], record["step"]), record["fingerprint"]
    problem = f"{path} is an adapter of the checkpoint of step {base.step} in {base.directory}"
    check(base.step in steps(base.directory), f"{problem}, which is not there; put it back, or a link to it")
    actual = fingerprint(*base)
    changed = f"which had the fingerprint {expected[:12]} and has {actual[:12]} now: it is another model; put the base back"
    check(actual == expected, f"{problem}, {changed}")
    return base


def _agreed_base(path) -> Base:
    """`_base` of a checkpoint that has one; it fails in every process of the run if it fails in one of them."""
    base, failure = None, None
    try:
        base = _base(path)
    except ValueError as cause:
        failure = cause
    if not stored.agree(failure is None):
        raise failure or UnreadableError("another process could not read it")
    return base


def _of_base(path, abstract_params: dict) -> dict:
    """Parameters of the base of the checkpoint at a path; ValueError if it cannot be read."""
    try:
        base = _agreed_base(path)
        return read_params(base.directory, abstract_params, base.step)
    except UnreadableError as cause:
        record = _base_record(path)
        name = f"{record['path']}/{record['step']}"
        raise ValueError(f"{path} needs its base {name}, which cannot be read: {cause}") from cause


def _divided(path, abstract_params: dict) -> tuple[dict, dict]:
    """The parameters that the checkpoint at a path has, and those that its base has; without a base, all are its own."""
    saved = stored.together(lambda: stored.read_sums(path)).arrays
    flat = traverse_util.flatten_dict(abstract_params, sep="/")
    own = {name: x for name, x in flat.items() if f"{PARAMS}/{name}" in saved}
    others = {name: x for name, x in flat.items() if name not in own}
    if not others or stored.together(lambda: _base_record(path)) is None:
        return abstract_params, {}
    return traverse_util.unflatten_dict(own, sep="/"), traverse_util.unflatten_dict(others, sep="/")


def _joined(own: dict, others: dict) -> dict:
    flat = traverse_util.flatten_dict(others) | traverse_util.flatten_dict(own)
    return traverse_util.unflatten_dict(flat)


def _read_state(path, abstract_state: Any) -> Any:
    """The state, with the parameters of the base where the checkpoint at a path has one."""
    if stored.together(lambda: _base_record(path)) is None:
        return stored.read_state(path, abstract_state)
    own, others = _divided(path, abstract_state.params)
    state = stored.read_state(path, abstract_state._replace(params=own))
    return state._replace(params=_joined(state.params, _of_base(path, others)))


def _chunks(key: tuple, _) -> ocp.SaveArgs:
    """The chunks of a leaf on disk: a stacked parameter has one per period, so that a period can be read alone."""
    return ocp.SaveArgs(shard_axes=(0,) if stored.stacked(stored.name_of(key)) else ())


def check_name(directory: str) -> None:
    """ValueError for a directory whose name Orbax would read as a pattern or cannot encode."""
    if "://" in directory:
        return
    wrong = [character for character in GLOB if character in directory]
    cure = "rename it, or use another --workdir"
    check(not wrong, f"no checkpoint can be written to {directory}: its name has {' and '.join(wrong)}; {cure}")
    try:
        directory.encode()
    except UnicodeEncodeError:
        raise ValueError(f"no checkpoint can be written to {directory!r}: its name is not UTF-8; {cure}") from None


def absolute(directory: Directory) -> str:
    """An absolute path; a URL is unchanged."""
    return str(directory) if "://" in str(directory) else os.path.abspath(directory)


def _path(directory: Directory, step: int | None):
    """The checkpoint of `step`, or the newest."""
    directory = absolute(directory)
    step = max(steps(directory), default=None) if step is None else step
    check(step is not None, f"{directory} has no complete checkpoint; it must be the folder that holds the numbered ones")
    try:
        return _STEPS.find_step(directory, step).path
    except ValueError:
        existing = ", ".join(map(str, steps(directory))) or "none"
        raise ValueError(f"{directory} has no complete checkpoint of step {step}; it has {existing}") from None


def _check_space(directory: str, state: Any) -> None:
    """OSError if the disk lacks space for the arrays and 1 MiB of Orbax's own files. Creates a directory that was removed."""
    if "://" in directory:
        return
    needed = sum(x.nbytes for x in jax.tree.leaves(state)) + MIB
    os.makedirs(directory, exist_ok=True)
    free = shutil.disk_usage(directory).free
    if not stored.agree(needed <= free):
        size, space = math.ceil(10 * needed / MIB) / 10, math.floor(10 * free / MIB) / 10
        raise OSError(f"{size:,.1f} MiB do not fit: {space:,.1f} MiB are free")


def _check_shared(directory: str) -> None:
    """OSError if the processes of a run do not share the disk: each would hold a part of every checkpoint."""
    if "://" in directory or jax.process_count() == 1:
        return
    number = multihost_utils.broadcast_one_to_all(np.random.default_rng().integers(2**31, dtype=np.int32))
    probe = os.path.join(directory, f".seen-{number}")
    if jax.process_index() == 0:
        os.makedirs(directory, exist_ok=True)
        open(probe, "w").close()
    stored.agree(True)  # every process waits here until it is written
    seen = multihost_utils.process_allgather(np.array(os.path.exists(probe)))
    if jax.process_index() == 0:
        os.remove(probe)
    if not np.all(seen):
        blind = ", ".join(map(str, np.flatnonzero(~seen)))
        raise OSError(f"{directory} is not on a disk that all processes share: {blind} cannot see it; use another --workdir")
