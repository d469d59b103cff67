"""Checkpoints: what training writes and everything else reads.

A checkpoint is a directory named by its step. It holds `state` (arrays), `config` (the nested dict that made it),
`data` (where the data stands) and `checksums` (one number an array). It is complete or it does not exist: it is written
under another name and renamed when all of it is on disk. The mesh and the precision are chosen by whoever reads it.
"""

import copy
import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from jax.experimental import multihost_utils
from orbax.checkpoint import checkpoint_managers

from hybrid_attn import trees
from hybrid_attn.checksums import checksums, mesh_of

MIB = 2**20
_STEPS = ocp.path.step.standard_name_format()


class UnreadableError(ValueError):
    """A checkpoint whose files are missing, truncated or changed."""


class AnotherModelError(ValueError):
    """A checkpoint that is intact, and whose arrays are not those that are wanted."""


class Checkpoints:
    """The checkpoints of one run, written in the background; every process of the run makes the same calls."""

    def __init__(self, directory: str | os.PathLike, keep: int, every: int):
        """Opens or creates `directory` and removes what a killed run left half-written; the newest `keep` are kept.

        OSError if some process does not see what another has written there.
        """
        self.directory = _absolute(directory)
        _check_shared(self.directory)
        self._writing: int | None = None
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
        """Starts writing, unless `step` is there; when this returns, `state` may be donated and the dicts may change.

        OSError if it does not fit on the disk, or if the one before could not be written.
        """
        self.wait()
        if step in self._manager.all_steps():
            return
        _check_space(self.directory, state)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state, save_args=jax.tree_util.tree_map_with_path(_chunks, state)),
            config=ocp.args.JsonSave(copy.deepcopy(dict(config_dict))),
            data=ocp.args.JsonSave(copy.deepcopy(dict(data))),
            checksums=ocp.args.JsonSave(dict(zip(_flat(state), checksums(jax.tree.leaves(state)), strict=True))),
        )
        self._writing = step
        try:
            self._manager.save(step, args=items, force=True)
        except OSError as cause:
            raise self._not_written(cause) from cause
        if wait:
            self.wait()

    def wait(self) -> None:
        """Returns when the checkpoint that is being written is complete; OSError with the cause if it cannot be."""
        try:
            self._manager.wait_until_finished()
        except Exception as cause:
            raise self._not_written(cause) from cause

    def close(self) -> None:
        """Waits as `wait` does and ends the background threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, oldest first."""
        return steps(self.directory)

    def latest(self) -> int | None:
        return max(self.steps(), default=None)

    def check_config(self, config_dict: Mapping) -> None:
        """ValueError with a line for each field in which the newest checkpoint's model differs from `config_dict`'s."""
        for step in reversed(self.steps()):
            try:
                saved = read_config(self.directory, step)
            except UnreadableError:
                continue  # `restore` says so and takes the one before
            lines = trees.differences(saved["model"], config_dict["model"], "  model.")
            if lines:
                raise ValueError(
                    f"the checkpoint of step {step} in {self.directory} is of another model (saved -> wanted):\n"
                    + "\n".join(lines)
                    + "\nuse another --workdir, or the saved values"
                )
            return

    def restore(self, abstract_state: Any, step: int | None = None) -> tuple[int, Any, dict]:
        """(step, state, data) of the newest checkpoint that can be read, or of `step`.

        `abstract_state` is a tree of `jax.ShapeDtypeStruct`s: their shardings and dtypes are those of the result.
        An unreadable checkpoint is reported and set aside for the one before it. ValueError if none can be read,
        or if the arrays are those of another model.
        """
        self.wait()
        candidates = [step] if step is not None else self.steps()[::-1]
        causes = {}
        for candidate in candidates:
            path = _step_path(self.directory, candidate)
            try:
                data = _together(lambda path=path: _read_json(path, "data"))
                state = _read_arrays(path, abstract_state, partial=False)
            except UnreadableError as cause:
                logging.error("checkpoint %s/%d cannot be read: %s", self.directory, candidate, cause)
                causes[candidate] = cause
                continue
            self._set_aside(causes)
            return candidate, state, data
        tried = "\n".join(f"  {self.directory}/{s}: {cause}" for s, cause in causes.items()) or "  there is none"
        raise ValueError(f"no checkpoint in {self.directory} can be read:\n{tried}\nstart anew in another --workdir")

    def _set_aside(self, unreadable: Mapping[int, Exception]) -> None:
        """Renames unreadable checkpoints, so that their steps can be written again and nothing is deleted."""
        for step in unreadable:
            path = _step_path(self.directory, step)
            names = (path.parent / f"{step}.unreadable{n or ''}" for n in itertools.count())
            if jax.process_index() == 0:
                target = next(name for name in names if not name.exists())
                path.rename(target)
                logging.error("moved it to %s; delete that when it is of no more use", target)
        if unreadable:
            _agree(True)  # every process waits here until they are moved
            self._manager.reload()

    def _not_written(self, cause: Exception) -> OSError:
        self._manager.reload()
        return OSError(
            f"the checkpoint of step {self._writing} could not be written to {self.directory}: {_root(cause)}; "
            f"the last complete one is of step {self.latest()}; free some space and run the same command again"
        )


def steps(directory: str | os.PathLike) -> list[int]:
    """Steps of the complete checkpoints in `directory`, oldest first."""
    return sorted(found.step for found in _STEPS.find_all(_absolute(directory)))


def read_config(directory: str | os.PathLike, step: int | None = None) -> dict:
    """The nested dict of the config that made the newest checkpoint, or that of `step`; ValueError if unreadable."""
    return _read_json(_newest_path(directory, step), "config")


def read_data(directory: str | os.PathLike, step: int | None = None) -> dict:
    """Where the data stood at the newest checkpoint, or at that of `step`, as it was saved; ValueError if unreadable."""
    return _read_json(_newest_path(directory, step), "data")


def fingerprint(directory: str | os.PathLike, step: int | None = None) -> str:
    """The SHA-256 of the checksums of the parameters of the newest checkpoint, or of `step`: tells its weights from others."""
    sums = _read_json(_newest_path(directory, step), "checksums")
    told = sorted((name, number) for name, number in sums.items() if name.startswith("params/"))
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def read_params(directory: str | os.PathLike, abstract_params: Any, step: int | None = None) -> Any:
    """The parameters alone, with the shardings and dtypes of `abstract_params`, of the newest checkpoint or of `step`.

    Leaves without a sharding go to the first device. ValueError if they are unreadable or of another model.
    """
    tree = _read_arrays(_newest_path(directory, step), {"params": abstract_params}, partial=True)
    return tree["params"]


def read_slices(directory: str | os.PathLike, name: str, shape: tuple, step: int | None = None) -> Iterator[np.ndarray]:
    """The periods of a stacked parameter in turn, or an unstacked one whole, on the host and in the dtype on disk.

    Holds one of them, and what TensorStore needs to decode it; of checkpoints whose chunks have several periods, as many.
    UnreadableError, before the last, if their checksum is not that of the parameter.
    """
    path, name = _newest_path(directory, step), f"params/{name}"
    base = f"{path}/state" if "://" in str(path) else f"file://{path}/state"
    spec = {"driver": "zarr", "kvstore": {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}}
    wanted = _read_json(path, "checksums").get(name)
    stored = _together(lambda: tensorstore.open(spec, open=True, read=True).result())
    _check_same_arrays(path, {name: stored}, {name: jax.ShapeDtypeStruct(shape, "float32")}, partial=True)
    rows, total = stored.chunk_layout.read_chunk.shape[0] if _stacked(name) else shape[0], 0
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        read = _together(lambda start=start, stop=stop: stored[start:stop].read().result())
        total += int(np.sum(read.view(f"uint{8 * read.itemsize}"), dtype=np.uint32))
        if stop == shape[0] and total % 2**32 != wanted:
            raise UnreadableError(f"checksums differ: the bytes of {name} changed on disk")
        yield from read if _stacked(name) else [read]
        del read  # before the next is read


def _stacked(name: str) -> bool:
    return name.startswith("params/periods/")


def _chunks(key: tuple, _) -> ocp.SaveArgs:
    """How a leaf lies on disk: a stacked parameter by period, so that one can be read without the others."""
    return ocp.SaveArgs(shard_axes=(0,) if _stacked(_name(key)) else ())


def _absolute(directory: str | os.PathLike) -> str:
    """An absolute path; a bucket's address stays as it is."""
    return str(directory) if "://" in str(directory) else os.path.abspath(directory)


def _step_path(directory: str, step: int):
    try:
        return _STEPS.find_step(directory, step).path
    except ValueError:
        there = ", ".join(map(str, steps(directory))) or "none"
        raise ValueError(f"{directory} has no complete checkpoint of step {step}; it has {there}") from None


def _newest_path(directory: str | os.PathLike, step: int | None):
    directory = _absolute(directory)
    if step is None:
        step = max(steps(directory), default=None)
    if step is None:
        raise ValueError(f"{directory} has no complete checkpoint; it must be the folder that holds the numbered ones")
    return _step_path(directory, step)


def _read_json(path, item: str) -> dict:
    handler = ocp.JsonCheckpointHandler()
    try:
        return handler.restore(path / item, args=ocp.args.JsonRestore())
    except (OSError, ValueError) as cause:
        raise UnreadableError(f"{item}: {_root(cause)}") from cause
    finally:
        handler.close()


def _read_arrays(path, abstract: Any, partial: bool) -> Any:
    """Arrays like `abstract`, checked against their checksums in the precision that they were saved in, then cast."""
    abstract = jax.tree.map(_placed, abstract)
    sums = _together(lambda: _read_json(path, "checksums"))
    leaves, treedef = jax.tree.flatten(_together(lambda: _read_as_saved(path, abstract, partial)))
    names = _flat(abstract).keys()
    changed = [name for name, value in zip(names, checksums(leaves), strict=True) if sums.get(name) != value]
    if changed:
        raise UnreadableError(f"checksums differ: the bytes of {_some(changed)} changed on disk")
    for i, like in enumerate(jax.tree.leaves(abstract)):  # one at a time: both precisions of all of them may not fit
        with jax.set_mesh(mesh_of(leaves[i])):
            leaves[i] = leaves[i].astype(like.dtype)
    return treedef.unflatten(leaves)


def _read_as_saved(path, abstract: Any, partial: bool) -> Any:
    """Arrays with the shapes and shardings of `abstract` and the dtypes on disk; AnotherModelError if they differ."""
    handler = ocp.PyTreeCheckpointHandler()
    try:
        saved = _flat(handler.metadata(path / "state").tree)
        _check_same_arrays(path, saved, _flat(abstract), partial)
        wanted = jax.tree_util.tree_map_with_path(lambda key, x: _with_dtype(x, saved[_name(key)].dtype), abstract)
        restore_args = ocp.checkpoint_utils.construct_restore_args(wanted)
        args = ocp.args.PyTreeRestore(item=wanted, restore_args=restore_args, partial_restore=partial)
        return handler.restore(path / "state", args=args)
    finally:
        handler.close()


def _together(read: Callable[[], Any]) -> Any:
    """The result of `read`; UnreadableError in every process of the run if it fails in one of them."""
    result, failure = None, None
    try:
        result = read()
    except (AnotherModelError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # not the fault of the files
    except Exception as cause:  # Orbax raises bare Exceptions for what it cannot read
        failure = cause
    if not _agree(failure is None):
        raise UnreadableError(_root(failure) if failure else "another process could not read it") from failure
    return result


def _check_same_arrays(path, saved: Mapping, wanted: Mapping, partial: bool) -> None:
    """AnotherModelError that names the arrays which the checkpoint lacks, has besides, or has in another shape."""
    shapes = {name: tuple(x.shape) for name, x in wanted.items()}
    lines = [f"  {name}: not saved -> {shape}" for name, shape in shapes.items() if name not in saved]
    if not partial:
        lines += [f"  {name}: {tuple(x.shape)} -> not wanted" for name, x in saved.items() if name not in shapes]
    for name in shapes.keys() & saved.keys():
        if tuple(saved[name].shape) != shapes[name]:
            lines.append(f"  {name}: {tuple(saved[name].shape)} -> {shapes[name]}")
    if lines:
        raise AnotherModelError(
            f"{path} holds the arrays of another model or optimiser (saved -> wanted):\n{_some(sorted(lines), chr(10))}"
            "\nuse another --workdir, or the config that wrote it"
        )


def _placed(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    sharding = x.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)


def _with_dtype(x: jax.ShapeDtypeStruct, dtype) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding)


def _name(key: tuple) -> str:
    """A leaf's path, the same for a dict, a named tuple and a dataclass: `params/periods/L0/attention/q`."""
    return "/".join(ocp.tree.str_keypath(key))


def _flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {_name(key): leaf for key, leaf in leaves}


def _check_space(directory: str, state: Any) -> None:
    """OSError, before anything is written, if less is free than the arrays and 1 MiB for Orbax's own files."""
    if "://" in directory:
        return
    needed = sum(x.nbytes for x in jax.tree.leaves(state)) + MIB
    free = shutil.disk_usage(directory).free
    if not _agree(needed <= free):
        raise OSError(
            f"checkpoint of {needed / MIB:,.0f} MiB does not fit: {free / MIB:,.0f} MiB free at {directory}; "
            "free some space or lower train.keep"
        )


def _check_shared(directory: str) -> None:
    """OSError if the processes of a run have other disks there: each would hold a part of every checkpoint."""
    if "://" in directory or jax.process_count() == 1:
        return
    number = multihost_utils.broadcast_one_to_all(np.random.default_rng().integers(2**31, dtype=np.int32))
    mark = os.path.join(directory, f".seen-{number}")
    if jax.process_index() == 0:
        os.makedirs(directory, exist_ok=True)
        open(mark, "w").close()
    _agree(True)  # every process waits here until it is written
    seen = multihost_utils.process_allgather(np.array(os.path.exists(mark)))
    if jax.process_index() == 0:
        os.remove(mark)
    if not np.all(seen):
        blind = ", ".join(map(str, np.flatnonzero(~seen)))
        raise OSError(f"{directory} is not on a disk that all processes share: {blind} cannot see it; use another --workdir")


def _agree(ok: bool) -> bool:
    """Whether `ok` holds in every process of the run: they must all go the same way."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def _root(cause: Exception) -> str:
    """What went wrong at the bottom of a chain of causes, on one line, without TensorStore's dump of its settings."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).partition(" [tensorstore_spec=")[0].partition("\n")[0]
    return f"{type(cause).__name__}: {text}"


def _some(items: list[str], separator: str = ", ") -> str:
    """The first eight of them and how many there are besides."""
    rest = [f"and {len(items) - 8} more"] if len(items) > 8 else []
    return separator.join([*items[:8], *rest])
