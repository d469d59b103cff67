"""The files of the checkpoint at a path: JSON items and arrays, verified against their checksums as they are read.

`checksums` is a JSON item with the sum, the shape and the dtype of every array, a digest of every other JSON item and a digest
of itself. Checkpoints of older versions have only the sums of the arrays: `{name: sum}`.
"""

import contextlib
import errno
import hashlib
import json
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

from hybrid_attn.files import object_of

ITEMS = ("config", "data")
EXTRAS = "extras"  # the field of a state whose entries may be in a checkpoint or not
FORMAT = 2
# Not a fault of the files: the checkpoint may be readable in a minute, or by another user.
TRANSIENT = (errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE)


class UnreadableError(ValueError):
    """A checkpoint whose files are missing, truncated or changed."""


class AnotherModelError(ValueError):
    """An intact checkpoint with other arrays than the expected ones."""


class Sums(NamedTuple):
    """The `checksums` of a checkpoint; `described` and `items` are None if an older version wrote it."""

    arrays: dict[str, int]
    described: dict[str, tuple[tuple[int, ...], str]] | None  # shape and dtype of each array
    items: dict[str, str] | None


def sums_of(state: Any, items: Mapping[str, Mapping]) -> dict:
    """The `checksums` of a checkpoint of `state` and of the JSON `items`."""
    leaves = flat(state)
    sums = checksums(list(leaves.values()))
    arrays = {
        name: {"sum": total, "shape": list(x.shape), "dtype": str(x.dtype)}
        for (name, x), total in zip(leaves.items(), sums, strict=True)
    }
    saved = {"format": FORMAT, "arrays": arrays, "items": {name: digest(item) for name, item in items.items()}}
    return saved | {"digest": digest(saved)}


def checksums(leaves: list[jax.Array]) -> list[int]:
    """Of every array, the sum of its elements as unsigned integers: independent of the sharding, changed by any flipped bit.

    Orbax verifies the index of its files and not the arrays: a flipped bit would go unnoticed.
    """
    sums = []
    for x in leaves:
        with jax.set_mesh(mesh_of(x)):
            sums.append(int(_checksum(x)))  # one at a time: many collectives at once deadlock on many CPU devices
    return sums


def mesh_of(x: jax.Array) -> jax.sharding.Mesh:
    """The mesh of an array, which may differ from the mesh in force."""
    if isinstance(x.sharding, jax.sharding.NamedSharding):
        return x.sharding.mesh
    return jax.sharding.Mesh(np.array(list(x.devices())), "device")


@jax.jit
def _checksum(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.uint8) if x.dtype == bool else x
    integers = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jnp.sum(integers, dtype=jnp.uint32)


def digest(value: Any) -> str:
    """The SHA-256 of the JSON form of a value."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(value)), sort_keys=True).encode()).hexdigest()


def read_sums(path) -> Sums:
    """The checksums; UnreadableError if their own digest differs."""
    saved = read_json(path, "checksums")
    if saved and all(type(total) is int for total in saved.values()):
        return Sums(saved, None, None)
    content = {key: value for key, value in saved.items() if key != "digest"}
    if saved.get("digest") != digest(content) or saved.get("format") != FORMAT:
        raise UnreadableError("checksums: the bytes changed on disk")
    described = {name: (tuple(x["shape"]), x["dtype"]) for name, x in saved["arrays"].items()}
    return Sums({name: x["sum"] for name, x in saved["arrays"].items()}, described, saved["items"])


def read_item(path, item: str) -> dict:
    """A JSON item, verified; UnreadableError if it is missing or was changed."""
    value, sums = read_json(path, item), read_sums(path)
    # Items of older versions have no digest; an empty one was changed, because none was written empty.
    if not value if sums.items is None else sums.items.get(item) != digest(value):
        raise UnreadableError(f"{item}: the bytes changed on disk")
    return value


def read_json(path, item: str) -> dict:
    """A JSON item as it is on disk; UnreadableError if it is no dict, OSError if it may be readable later."""
    try:
        return object_of((path / item / "metadata").read_text(), "it")
    except (OSError, ValueError) as cause:
        if isinstance(cause, OSError) and cause.errno in TRANSIENT:
            raise
        raise UnreadableError(f"{item}: {root(cause)}") from cause


def read_slices(path, name: str, shape: tuple) -> Iterator[np.ndarray]:
    """The periods of a stacked parameter, or all of an unstacked one; see `checkpoint.read_slices`."""
    sums = read_sums(path)
    if name not in sums.arrays:
        raise UnreadableError(f"checksums: no array {name}")
    stored = together(lambda: open_array(path, name))
    check_as_described(sums, {name: stored}, partial=True)
    check_same_arrays(path, {name: stored}, {name: jax.ShapeDtypeStruct(shape, "float32")}, partial=True)
    rows, total = stored.chunk_layout.read_chunk.shape[0] if stacked(name) else shape[0], 0
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        read = together(lambda start=start, stop=stop: stored[start:stop].read().result())
        total += sum_of(read)
        if stop == shape[0] and total % 2**32 != sums.arrays[name]:
            raise changed([name])
        yield from read if stacked(name) else [read]
        del read  # before the next is read


def read_shapes(path) -> dict[str, tuple[int, ...]]:
    """The shape of every array, by name; UnreadableError if the checksums describe others."""
    saved = together(lambda: _read_metadata(path, read_sums(path)))
    return {name: tuple(x.shape) for name, x in saved.items()}


def _read_metadata(path, sums: Sums) -> dict[str, Any]:
    """Shape and dtype of every array, by name; UnreadableError if the checksums describe others."""
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        saved = flat(handler.metadata(path / "state").tree)
    check_as_described(sums, saved, partial=False)
    return saved


def check_smallest(path) -> None:
    """UnreadableError if the items or the smallest array differ from their checksums."""
    for item in ITEMS:
        read_item(path, item)
    sums = read_sums(path)
    name = min(sums.described, key=lambda name: (np.prod(sums.described[name][0]), name))
    if sum_of(open_array(path, name)[...].read().result()) % 2**32 != sums.arrays[name]:
        raise changed([name])


def open_array(path, name: str) -> tensorstore.TensorStore:
    """An array, not read yet."""
    scheme, _, location = str(path).rpartition("://")
    base = f"{scheme}://{urllib.parse.quote(location)}/state/" if scheme else {"driver": "file", "path": f"{path}/state/"}
    kvstore = {"driver": "ocdbt", "base": base, "path": name.replace("/", ".") + "/"}
    return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True, read=True).result()


def sum_of(x: np.ndarray) -> int:
    """The checksum of an array on the host."""
    x = np.atleast_1d(np.ascontiguousarray(x))
    return int(np.sum(x.view(f"uint{8 * x.itemsize}"), dtype=np.uint32))


def stacked(name: str) -> bool:
    """Whether the first axis of an array is the period: of a parameter, or of an extra that is like the parameters."""
    return "periods" in name.split("/")[1:3]


def fields_of(state: Any) -> dict[str, Any]:
    """The fields of a state, a named tuple or a dict, without extras that have no arrays: Orbax saves none of these."""
    fields = _as_dict(state)
    saved = {name: extra for name, extra in fields.pop(EXTRAS, {}).items() if jax.tree.leaves(extra)}
    return fields | ({EXTRAS: saved} if saved else {})


def _as_dict(state: Any) -> dict[str, Any]:
    return dict(state) if isinstance(state, Mapping) else state._asdict()


def extras(path) -> set[str]:
    """The names of the extras of a checkpoint."""
    return {name.split("/")[1] for name in read_sums(path).arrays if name.startswith(f"{EXTRAS}/")}


def read_state(path, abstract: Any) -> Any:
    """The state like `abstract`, a named tuple or a dict, with the extras that both it and the checkpoint have."""
    fields, saved = _as_dict(abstract), together(lambda: extras(path))
    common = {name: extra for name, extra in fields.get(EXTRAS, {}).items() if name in saved}
    ignored = tuple(f"{EXTRAS}/{name}" for name in saved - common.keys())
    read = read_arrays(path, fields_of(fields | {EXTRAS: common}), partial=False, ignored=ignored)
    read |= {EXTRAS: read.get(EXTRAS, {})} if EXTRAS in fields else {}
    return read if isinstance(abstract, Mapping) else abstract._replace(**read)


def read_arrays(path, abstract: Any, partial: bool, ignored: tuple[str, ...] = ()) -> Any:
    """Arrays like `abstract`, checked against their checksums in the precision that they were saved in, then cast.

    With `partial` the checkpoint may have other arrays too; without it, only those in one of the groups `ignored`.
    """
    first = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(lambda x: x.update(sharding=x.sharding or first), abstract)
    sums = together(lambda: read_sums(path))
    leaves, treedef = jax.tree.flatten(together(lambda: _read_as_saved(path, abstract, sums, partial, ignored)))
    names = flat(abstract).keys()
    wrong = [name for name, value in zip(names, checksums(leaves), strict=True) if sums.arrays.get(name) != value]
    if wrong:
        raise changed(wrong)
    for i, like in enumerate(jax.tree.leaves(abstract)):  # one at a time: all arrays in both precisions may not fit
        with jax.set_mesh(mesh_of(leaves[i])):
            leaves[i] = leaves[i].astype(like.dtype)
    return treedef.unflatten(leaves)


def _read_as_saved(path, abstract: Any, sums: Sums, partial: bool, ignored: tuple[str, ...]) -> Any:
    """Arrays with the shapes and shardings of `abstract` and the dtypes on disk; AnotherModelError if they differ."""
    saved = _read_metadata(path, sums)
    compared = {name: x for name, x in saved.items() if not any(inside(name, group) for group in ignored)}
    check_same_arrays(path, compared, flat(abstract), partial)
    as_saved = jax.tree_util.tree_map_with_path(lambda key, x: x.update(dtype=saved[name_of(key)].dtype), abstract)
    restore_args = ocp.checkpoint_utils.construct_restore_args(as_saved)
    args = ocp.args.PyTreeRestore(item=as_saved, restore_args=restore_args, partial_restore=partial or bool(ignored))
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as handler:
        return handler.restore(path / "state", args=args)


def check_as_described(sums: Sums, saved: Mapping, partial: bool) -> None:
    """UnreadableError if the names, shapes and dtypes of the arrays on disk differ from those in the checksums."""
    names = saved.keys() if partial else saved.keys() | sums.arrays.keys()
    wrong = [name for name in names if name not in saved or name not in sums.arrays]
    if sums.described is not None and not wrong:
        wrong = [name for name, x in saved.items() if (tuple(x.shape), x.dtype.name) != sums.described[name]]
    if wrong:
        raise UnreadableError(f"the description of {first_eight(sorted(wrong))} changed on disk")


def changed(names: list[str]) -> UnreadableError:
    return UnreadableError(f"checksums differ: the bytes of {first_eight(names)} changed on disk")


def together(read: Callable[[], Any]) -> Any:
    """The result of `read`; UnreadableError in every process of the run if it fails in one of them."""
    result, failure = None, None
    try:
        result = read()
    except (AnotherModelError, MemoryError, jax.errors.JaxRuntimeError):
        raise  # not a fault of the files
    except Exception as cause:  # Orbax raises bare Exceptions for unreadable files
        if isinstance(cause, OSError) and cause.errno in TRANSIENT:
            raise
        failure = cause
    if not agree(failure is None):
        raise UnreadableError(root(failure) if failure else "another process could not read it") from failure
    return result


def check_same_arrays(path, saved: Mapping, expected: Mapping, partial: bool) -> None:
    """AnotherModelError that names the arrays which are missing, additional, or of another shape in the checkpoint."""
    shapes = {name: tuple(x.shape) for name, x in expected.items()}
    lines = [f"  {name}: not saved -> {shape}" for name, shape in shapes.items() if name not in saved]
    if not partial:
        lines += [f"  {name}: {tuple(x.shape)} -> not expected" for name, x in saved.items() if name not in shapes]
    for name in shapes.keys() & saved.keys():
        if tuple(saved[name].shape) != shapes[name]:
            lines.append(f"  {name}: {tuple(saved[name].shape)} -> {shapes[name]}")
    if lines:
        cure = "use another --workdir, or the config that wrote it"
        if not partial and not any(inside(name, "opt_state") for name in saved):
            cure = f"it has no optimiser state: start a run in another --workdir, with --config.init_from.path={path.parent}"
        problem = f"{path} holds the arrays of another model or optimiser (saved -> expected):"
        raise AnotherModelError("\n".join([problem, first_eight(sorted(lines), "\n"), cure]))


def name_of(key: tuple) -> str:
    """The path of a leaf, such as `params/periods/L0/attention/q`; the same for dicts, named tuples and dataclasses."""
    return "/".join(ocp.tree.str_keypath(key))


def inside(name: str, group: str) -> bool:
    """Whether an array is `group` itself, or in the group of that name."""
    return name == group or name.startswith(f"{group}/")


def flat(tree: Any) -> dict[str, Any]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {name_of(key): leaf for key, leaf in leaves}


def agree(ok: bool) -> bool:
    """Whether `ok` holds in every process of the run."""
    if jax.process_count() == 1:
        return ok
    return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def root(cause: Exception) -> str:
    """The first error of a chain of causes, on one line, without TensorStore's dump of its settings."""
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = str(cause).partition(" [tensorstore_spec=")[0].partition("\n")[0]
    return f"{type(cause).__name__}: {text}"


def first_eight(items: list[str], separator: str = ", ") -> str:
    """The first eight items, and how many more there are."""
    more = [f"and {len(items) - 8} more"] if len(items) > 8 else []
    return separator.join([*items[:8], *more])
