"""Hugging Face checkpoint directories: config.json, safetensors in one file or in shards with an index, and companions.

Tensors are read one by one from memory-mapped files and written shard by shard. Beyond the arrays that it is asked for,
the host holds one tensor and one device's part of one leaf, with all its periods, when it reads; and one shard and what
its caller holds of one leaf when it writes.
"""

import contextlib
import itertools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from hybrid_attn import config
from hybrid_attn.config import Model
from hybrid_attn.convert import families
from hybrid_attn.convert.families import Tensor
from hybrid_attn.files import check_named, read_object, write_atomically

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
COMPANIONS = (  # what travels along: the tokenizer, how to generate, and the config.json that says which tokens are special
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
BUFFERS = (".rotary_emb.inv_freq",)  # old checkpoints carry them; they follow from config.json
LINES = 20  # most tensors that an error names
DTYPES = ("F64", "F32", "F16", "BF16")  # whole numbers and 8-bit floats mean quantized weights, whose scales stand elsewhere


def library():
    """The library that reads and writes the tensors; ImportError that says how to get it."""
    try:
        import safetensors.numpy
    except ImportError as cause:
        raise ImportError("Hugging Face files need the library safetensors: pip install 'hybrid_attn[hf]'") from cause
    return safetensors


def read_config(directory: str | os.PathLike) -> dict:
    """The config.json of `directory`; ValueError if it is not there or not JSON."""
    return read_object(Path(directory) / "config.json")


def read_params(directory: str | os.PathLike, model: Model, model_type: str, abstract: Any) -> dict:
    """Parameters of `model` with the shapes, dtypes and shardings of `abstract` (a leaf without one: the first device).

    ValueError, before any array is read, that names every tensor which is missing, of another shape or type, or not expected.
    """
    leaves = flat(abstract)
    wanted = families.tensors(model, model_type, {path: x.shape for path, x in leaves.items()})
    with contextlib.ExitStack() as stack:
        files, astray = _open(Path(directory), stack)
        _check(directory, files, astray, wanted, model.tie_embeddings)
        by_leaf = {path: list(group) for path, group in itertools.groupby(wanted, lambda tensor: tensor.path)}
        return unflat({path: _place(x, by_leaf[path], files) for path, x in leaves.items()})


def write(
    directory: str | os.PathLike,
    model: Model,
    config_json: Mapping,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Iterator[np.ndarray]],
    dtype,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json and the tensors in `dtype`; `read` gives the periods of the leaf of a path, one at a time.

    A shard has at most `shard_bytes`, or a single tensor. OSError, with the path, for what cannot be written; if all of it
    cannot, before anything is.
    """
    directory, dtype, safetensors = Path(directory), np.dtype(dtype), library()
    shards = _shards(families.tensors(model, config_json["model_type"], shapes), dtype.itemsize, shard_bytes)
    total = dtype.itemsize * sum(_size(tensor) for shard in shards for tensor in shard)
    _check_space(directory, total)
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    path, periods = None, iter(())
    for name, shard in zip(names, shards, strict=True):
        arrays = {}
        for tensor in shard:
            if tensor.path != path:
                path, periods = tensor.path, read(tensor.path)
            arrays[tensor.name] = tensor.theirs(next(periods)).astype(dtype, order="C")
        try:
            safetensors.numpy.save_file(arrays, directory / name, metadata={"format": "pt"})
        except (OSError, safetensors.SafetensorError) as cause:
            raise OSError(f"{directory / name} could not be written: {cause}") from cause
    if len(shards) > 1:
        files = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
    _write_json(directory / "config.json", {**config_json, "dtype": dtype.name})


def describe(model: Model, companions: str | os.PathLike, max_len: int, model_type: str | None = None) -> dict:
    """The config.json of `model`, with special tokens and the longest text of the one in `companions`, if there is one.

    The family is `model_type`, or the companion's where that expresses the model, or the first that does.
    """
    path = Path(companions) / "config.json"
    old = read_object(path) if path.exists() else {}
    model_type = model_type or old.get("model_type") or families.expressing(model)
    special = {key: old.get(key) for key in SPECIAL_TOKENS}  # null, since a family's default is an id of its own vocabulary
    return families.config_json(model, model_type, max(max_len, config.longest_text(old, path) or 0)) | special


def copy_companions(source: str | os.PathLike, target: str | os.PathLike, without: tuple[str, ...] = ()) -> list[str]:
    """Copies the tokenizer and its like into `target`, which is made where there is any, and gives their names."""
    found = [name for name in COMPANIONS if name not in without and (Path(source) / name).is_file()]
    for name in found:
        os.makedirs(target, exist_ok=True)
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return found


@contextlib.contextmanager
def new_directory(out: str | os.PathLike) -> Iterator[Path]:
    """A directory to write in, whose content is at `out` in the end; on failure it is removed. ValueError if `out` has content.

    A new `out` appears all at once, and failure leaves no parent of it that was not there before. An empty directory, which may
    be a mount point or a link to one, is filled by renames inside it. OSError, if they fail, says where the work is.
    """
    check_named("out", out, "a new directory")
    out = Path(os.path.realpath(out))
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists and is not an empty directory; name another --out, or remove it")
    exists = out.exists()
    made = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    temporary = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out if exists else out.parent))
        temporary.chmod(0o777 & ~_umask())
        yield temporary
    except BaseException:
        if temporary:
            shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # somebody else may have put something there since
            for parent in made:
                parent.rmdir()
        raise
    try:
        _move(temporary, out)
    except OSError as cause:
        raise OSError(f"{out} could not be made ({cause.strerror}); all that was to be in it is in {temporary}") from cause


def _move(temporary: Path, out: Path) -> None:
    """Renames `temporary` to `out`; or its content, where it is in `out`, with config.json or a numbered checkpoint last."""
    if temporary.parent != out:
        temporary.rename(out)
        return
    for path in sorted(temporary.iterdir(), key=lambda path: (path.name == "config.json" or path.name.isdigit(), path.name)):
        path.rename(out / path.name)
    temporary.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _open(directory: Path, stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, str]]:
    """The open file of every tensor; and of those on which the index and the files disagree, how."""
    index = directory / INDEX
    if not index.exists():
        file = _open_file(directory, SINGLE, f"and no {INDEX}", stack)
        return dict.fromkeys(file.keys(), file), {}
    named = _weight_map(index)
    opened = {name: _open_file(directory, name, f"which {INDEX} names", stack) for name in sorted(set(named.values()))}
    held = {name: set(file.keys()) for name, file in opened.items()}
    astray = {key: f"in {name}, not in the index" for name in opened for key in held[name] - named.keys()}
    astray |= {key: f"missing in {name}, where the index has it" for key, name in named.items() if key not in held[name]}
    return {key: opened[name] for key, name in named.items() if key in held[name]}, astray


def _weight_map(index: Path) -> dict[str, str]:
    """The file of every tensor; ValueError if one is not the name of a safetensors file beside the index."""
    named = read_object(index).get("weight_map")
    if not isinstance(named, dict):
        raise ValueError(f"{index} has no weight_map of tensors to files")
    for key, name in named.items():
        if not isinstance(name, str) or not re.fullmatch(r"[^/\\\0]+\.safetensors", name):
            raise ValueError(f"{index} has {key} in {name!r}, which must be the name of a .safetensors file beside it")
    return named


def _open_file(directory: Path, name: str, otherwise: str, stack: contextlib.ExitStack):
    safetensors = library()
    if not (directory / name).is_file():  # a pipe would keep its reader waiting
        raise ValueError(f"{directory} has no {name}, {otherwise}")
    try:
        return stack.enter_context(safetensors.safe_open(directory / name, framework="numpy"))
    except (OSError, safetensors.SafetensorError) as cause:
        raise ValueError(f"{directory / name} is not a whole safetensors file: {cause}; fetch it again") from cause


def _check(directory, files: Mapping[str, Any], astray: Mapping[str, str], wanted: list[Tensor], tied: bool) -> None:
    """ValueError with a line for every tensor that is missing, of another shape or type, or not expected."""
    shapes = {tensor.name: str(list(tensor.shape)) for tensor in wanted}
    found = dict(astray) | {name: _described(file.get_slice(name)) for name, file in files.items()}
    lines = [f"  {x}: {found.get(x, 'missing')} -> {shape}" for x, shape in shapes.items() if found.get(x) != shape]
    extra = {name for name in found if name not in shapes and not name.endswith(BUFFERS)}
    head, embed = families.TOP["unembed"], families.TOP["embed"]
    if tied and head in extra and found[head] == found.get(embed) == shapes[embed]:
        if _same(files[head], head, files[embed], embed):
            extra.discard(head)  # stored twice
    lines += [f"  {name}: {found[name]} -> not expected" for name in sorted(extra)]
    if lines:
        more = [f"  and {len(lines) - LINES:,} more"] if len(lines) > LINES else []
        raise ValueError(
            f"the tensors of {directory} are not those of its config.json (file -> config.json):\n"
            + "\n".join(lines[:LINES] + more)
        )


def _described(stored) -> str:
    """The shape of a tensor in a file, and its type where we read none of that type."""
    shape, dtype = str(list(stored.get_shape())), stored.get_dtype()
    return shape if dtype in DTYPES else f"{shape} of type {dtype}, where only {', '.join(DTYPES)} are read"


def _same(file_a, name_a: str, file_b, name_b: str) -> bool:
    """Whether two tensors of one shape are equal; compared in parts."""
    a, b = file_a.get_slice(name_a), file_b.get_slice(name_b)
    rows = a.get_shape()[0]
    step = max(1, 2**24 // max(1, a.get_shape()[-1]))
    return all(np.array_equal(a[i : min(i + step, rows)], b[i : min(i + step, rows)]) for i in range(0, rows, step))


def _place(like, tensors: list[Tensor], files: Mapping[str, Any]) -> jax.Array:
    """One leaf on its devices; each device's part is put together on the host and read tensor by tensor."""
    stacked = tensors[0].period is not None
    inner = like.shape[1:] if stacked else like.shape

    def part(index: tuple[slice, ...]) -> np.ndarray:
        if not stacked:
            return _read(tensors[0], inner, index, files).astype(like.dtype, copy=False)
        chosen = tensors[index[0]]
        shape = [len(range(*where.indices(size))) for where, size in zip(index, like.shape, strict=True)]
        out = np.empty(shape, like.dtype)
        for row, tensor in zip(out, chosen, strict=True):
            row[...] = _read(tensor, inner, index[1:], files)
        return out

    return jax.make_array_from_callback(like.shape, _sharding(like), part)


def _sharding(like) -> jax.sharding.Sharding:
    """The sharding of an abstract leaf; one that names no devices means those of the mesh in force."""
    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        return NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return sharding


def _read(tensor: Tensor, shape: tuple[int, ...], index: tuple[slice, ...], files: Mapping[str, Any]) -> np.ndarray:
    return tensor.ours(files[tensor.name].get_tensor(tensor.name), shape)[index]


def _shards(tensors: list[Tensor], itemsize: int, most: int) -> list[list[Tensor]]:
    """Tensors in their order, in as few shards as keep to `most` bytes."""
    shards, used = [], most
    for tensor in tensors:
        size = itemsize * _size(tensor)
        if used + size > most:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _size(tensor: Tensor) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64))


def by_period(params: dict) -> Callable[[str], Iterator[np.ndarray]]:
    """What `write` reads a tree of arrays in memory by."""
    leaves = flat(params)

    def read(path: str) -> Iterator[np.ndarray]:
        return map(np.asarray, leaves[path] if path.startswith("periods/") else [leaves[path]])

    return read


def flat(tree: Any) -> dict[str, Any]:
    """Leaves by the path that names them: `periods/L0/attention/q`."""
    return {"/".join(key.key for key in path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def unflat(leaves: Mapping[str, Any]) -> dict:
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for name in parents:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def _check_space(directory: Path, needed: int) -> None:
    """OSError, before anything is written, if less is free than the tensors take."""
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"{needed:,} bytes of tensors do not fit: {free:,} are free at {directory}; free some space")


def _write_json(path: Path, values: Mapping) -> None:
    write_atomically(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
