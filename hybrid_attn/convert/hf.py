"""Hugging Face checkpoint directories: config.json, safetensors in one file or in shards with an index, and tokenizer files.

Tensors are read one by one from memory-mapped files and written shard by shard. Besides the arrays that are read, the host
holds one tensor and the part of one parameter on one device, with all its periods. While writing, it holds one shard and what
the caller holds of one parameter.
"""

import contextlib
import json
import math
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding

from hybrid_attn import config
from hybrid_attn.config import Model
from hybrid_attn.convert import families, mxfp4
from hybrid_attn.convert.tensors import TOP, Piece, Tensor
from hybrid_attn.files import check_named, read_object, write_atomically
from hybrid_attn.trees import check

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
TOKENIZER_AND_CONFIG_FILES = (  # config.json has the ids of the special tokens
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja",
)  # fmt: skip
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
BUFFERS = (".rotary_emb.inv_freq",)  # in old checkpoints; they are computed from config.json
EXPERTS = ".experts."  # in the names of their tensors
LINES = 20  # largest number of tensors that an error names
DTYPES = ("F64", "F32", "F16", "BF16")  # integers and 8-bit floats are quantized weights with scales in other tensors


def library():
    """The library that reads and writes tensors; ImportError with the command that installs it."""
    try:
        import safetensors.numpy
    except ImportError as cause:
        raise ImportError("Hugging Face files need the library safetensors: pip install 'hybrid_attn[hf]'") from cause
    return safetensors


def read_config(directory: str | os.PathLike) -> dict:
    """The config.json of `directory`; ValueError if it is missing or not JSON."""
    return read_object(Path(directory) / "config.json")


def read_params(directory: str | os.PathLike, model: Model, model_type: str, abstract: Any) -> dict:
    """Parameters of `model` with the shapes, dtypes and shardings of `abstract` (without a sharding: on the first device).

    ValueError, before any array is read, with every tensor that is missing, has another shape or type, or is not expected.
    """
    leaves = flat(abstract)
    expected = families.tensors(model, model_type, {path: x.shape for path, x in leaves.items()})
    with contextlib.ExitStack() as stack:
        files, conflicts = _open(Path(directory), stack)
        ignored = families.family_of(model_type).ignored
        files = {name: file for name, file in files.items() if not (ignored and name.startswith(ignored))}
        files = mxfp4.with_unpacked(files)
        _check(directory, files, conflicts, expected, model.tie_embeddings)
        by_path = {path: [] for path in leaves}
        for tensor in expected:
            for piece in tensor.pieces:
                by_path[piece.path].append((tensor.name, piece))
        params = {path: _sharded(x, by_path[path], files) for path, x in leaves.items()}
        return traverse_util.unflatten_dict(params, sep="/")


def write(
    directory: str | os.PathLike,
    model: Model,
    config_json: Mapping,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Iterator[np.ndarray]],
    dtype,
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes config.json and the tensors in `dtype`; `read` yields the periods of the parameter at a path, one at a time.

    A shard has at most `shard_bytes`, or a single tensor. OSError, with the path, if a file cannot be written; if the disk has
    too little space, before anything is written.
    """
    directory, dtype, safetensors = Path(directory), np.dtype(dtype), library()
    shards = _shards(families.tensors(model, config_json["model_type"], shapes), dtype.itemsize, shard_bytes)
    total = dtype.itemsize * sum(_size(tensor) for shard in shards for tensor in shard)
    if (free := shutil.disk_usage(directory).free) < total:
        raise OSError(f"{total:,} bytes of tensors do not fit: {free:,} are free at {directory}; free some space")
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    names = [SINGLE] if len(shards) == 1 else names
    periods = _Periods(read)
    for name, shard in zip(names, shards, strict=True):
        arrays = {tensor.name: _assembled(tensor, periods, dtype) for tensor in shard}
        try:
            safetensors.numpy.save_file(arrays, directory / name, metadata={"format": "pt"})
        except (OSError, safetensors.SafetensorError) as cause:
            raise OSError(f"{directory / name} could not be written: {cause}") from cause
    if len(shards) > 1:
        files = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))})
    _write_json(directory / "config.json", {**config_json, "dtype": dtype.name})


def describe(model: Model, directory: str | os.PathLike, max_len: int, model_type: str | None = None) -> dict:
    """The config.json of `model`. Special tokens and the longest length come from the config.json in `directory`, if any.

    The family is `model_type`, or that of the config.json in `directory`, or the first that can express the model.
    """
    path = Path(directory) / "config.json"
    old = read_object(path) if path.exists() else {}
    model_type = model_type or old.get("model_type") or families.expressing(model)
    special = {key: old.get(key) for key in SPECIAL_TOKENS}  # null: the default of a family is an id of another vocabulary
    return families.config_json(model, model_type, max(max_len, config.longest_text(old, path) or 0)) | special


def copy_files(source: str | os.PathLike, target: str | os.PathLike, without: tuple[str, ...] = ()) -> list[str]:
    """Copies the tokenizer and config files of `source` into `target`, which it makes if needed, and returns their names."""
    names = [name for name in TOKENIZER_AND_CONFIG_FILES if name not in without and (Path(source) / name).is_file()]
    for name in names:
        os.makedirs(target, exist_ok=True)
        shutil.copyfile(Path(source) / name, Path(target) / name)
    return names


@contextlib.contextmanager
def new_directory(out: str | os.PathLike) -> Iterator[Path]:
    """A directory whose content moves to `out` at the end; on failure it is removed. ValueError if `out` is not empty.

    A new `out` appears atomically, and a failure leaves none of its new parents. An empty one (perhaps a mount point or a link)
    is filled by renames inside it. If these fail, OSError names the directory with the content.
    """
    check_named("out", out, "a new directory")
    out = Path(os.path.realpath(out))
    exists = out.exists()
    empty = not exists or (out.is_dir() and not any(out.iterdir()))
    check(empty, f"{out} exists and is not an empty directory; name another --out, or remove it")
    new_parents = [parent for parent in out.parents if not parent.exists()]  # the innermost first
    temporary = (out if exists else out.parent) / f".{out.name}.{secrets.token_hex(4)}"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        yield temporary
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        with contextlib.suppress(OSError):  # another process may have written to it
            for parent in new_parents:
                parent.rmdir()
        raise
    try:
        _move(temporary, out)
    except OSError as cause:
        raise OSError(f"{out} could not be created ({cause.strerror}); its content is in {temporary}") from cause


def _move(temporary: Path, out: Path) -> None:
    """Renames `temporary` to `out`. If it is inside `out`, renames its content, config.json and numbered checkpoints last."""
    if temporary.parent != out:
        temporary.rename(out)
        return
    for path in sorted(temporary.iterdir(), key=lambda path: (path.name == "config.json" or path.name.isdigit(), path.name)):
        path.rename(out / path.name)
    temporary.rmdir()


def _open(directory: Path, stack: contextlib.ExitStack) -> tuple[dict[str, Any], dict[str, str]]:
    """The open file of every tensor, and the conflicts between index and files by tensor."""
    index = directory / INDEX
    if not index.exists():
        file = _open_file(directory, SINGLE, f"and no {INDEX}", stack)
        return dict.fromkeys(file.keys(), file), {}
    weight_map = read_object(index).get("weight_map")
    check(isinstance(weight_map, dict), f"{index} has no weight_map of tensors to files")
    for key, name in weight_map.items():
        ok = isinstance(name, str) and re.fullmatch(r"[^/\\\0]+\.safetensors", name)
        check(ok, f"{index} has {key} in {name!r}, which must be the name of a .safetensors file beside it")
    opened = {name: _open_file(directory, name, f"which {INDEX} names", stack) for name in sorted(set(weight_map.values()))}
    keys = {name: set(file.keys()) for name, file in opened.items()}
    conflicts = {key: f"in {name}, not in the index" for name in opened for key in keys[name] - weight_map.keys()}
    files = {key: opened[name] for key, name in weight_map.items() if key in keys[name]}
    absent = {key: f"missing in {name}, where the index has it" for key, name in weight_map.items() if key not in files}
    return files, conflicts | absent


def _open_file(directory: Path, name: str, reason: str, stack: contextlib.ExitStack):
    safetensors = library()
    check((directory / name).is_file(), f"{directory} has no {name}, {reason}")  # a pipe would block
    try:
        return stack.enter_context(safetensors.safe_open(directory / name, framework="numpy"))
    except (OSError, safetensors.SafetensorError) as cause:
        raise ValueError(f"{directory / name} is not a complete safetensors file: {cause}; download it again") from cause


def _check(directory, files: Mapping[str, Any], conflicts: Mapping[str, str], expected: list[Tensor], tied: bool) -> None:
    """ValueError with a line for every tensor that is missing, has another shape or type, or is not expected."""
    shapes = {tensor.name: str(list(tensor.shape)) for tensor in expected}
    stored = dict(conflicts) | {name: _described(file.get_slice(name)) for name, file in files.items()}
    lines = [f"  {x}: {stored.get(x, 'missing')} -> {shape}" for x, shape in shapes.items() if stored.get(x) != shape]
    extra = {name for name in stored if name not in shapes and not name.endswith(BUFFERS)}
    head, embed = TOP["unembed"], TOP["embed"]
    if tied and head in extra and stored[head] == stored.get(embed) == shapes[embed]:
        if _same(files[head], head, files[embed], embed):
            extra.discard(head)  # tied embeddings may be stored twice
    lines += [f"  {name}: {stored[name]} -> not expected" for name in sorted(extra)]
    of_mixtures = {tensor.name for tensor in expected if any(piece.is_of_experts for piece in tensor.pieces)}
    check(
        not lines or any(EXPERTS not in line and line.split(":")[0].strip() not in of_mixtures for line in lines),
        f"{len(lines):,} tensors of experts in {directory} are not those of its config.json, the first (file -> config.json) "
        f"{lines[0].strip() if lines else ''}; correct config.json, or download the model again",
    )
    listed = lines if len(lines) <= LINES else [*lines[:LINES], f"  and {len(lines) - LINES:,} more"]
    title = f"the tensors of {directory} are not those of its config.json (file -> config.json):"
    check(not lines, "\n".join([title, *listed]))


def _described(stored) -> str:
    """The shape of a tensor in a file, and its type if that is not supported."""
    shape, dtype = str(list(stored.get_shape())), stored.get_dtype()
    return shape if dtype in DTYPES else f"{shape} of type {dtype}, where only {', '.join(DTYPES)} are supported"


def _same(file_a, name_a: str, file_b, name_b: str) -> bool:
    """Whether two tensors of the same shape are equal. They are compared in parts, to save memory."""
    a, b = file_a.get_slice(name_a), file_b.get_slice(name_b)
    rows = a.get_shape()[0]
    step = max(1, 2**24 // max(1, a.get_shape()[-1]))
    return all(np.array_equal(a[i : min(i + step, rows)], b[i : min(i + step, rows)]) for i in range(0, rows, step))


class _Periods:
    """The periods of parameters, of which `read` yields those of one path. Each is read once, in their order."""

    def __init__(self, read: Callable[[str], Iterator[np.ndarray]]):
        self.read, self.opened, self.current = read, {}, {}

    def get(self, piece: Piece) -> np.ndarray:
        """The array of a piece with our axes. A period stays in memory until another of its parameter is read."""
        if piece.path not in self.current or self.current[piece.path][0] != piece.period:
            self.current.pop(piece.path, None)
            if piece.path not in self.opened:
                self.opened[piece.path] = self.read(piece.path)
            self.current[piece.path] = piece.period, next(self.opened[piece.path])
        x = self.current[piece.path][1]
        return x if piece.expert is None else x[piece.expert]

    def release(self, tensor: Tensor) -> None:
        """Forgets the periods that `tensor` does not need."""
        needed = {(piece.path, piece.period) for piece in tensor.pieces}
        self.current = {path: x for path, x in self.current.items() if (path, x[0]) in needed}


def _assembled(tensor: Tensor, periods: _Periods, dtype: np.dtype) -> np.ndarray:
    """The array of a tensor, as it is written."""
    periods.release(tensor)
    out = np.empty(tensor.shape, dtype)
    for piece in tensor.pieces:
        out[piece.at] = piece.theirs(periods.get(piece))
    return out


def _piece_of(file, name: str, piece: Piece) -> np.ndarray:
    """The array of a piece with the axes of the file, of which only its expert is read."""
    if piece.expert is None or not piece.at:
        return file.get_tensor(name)[piece.at]
    return file.get_slice(name)[piece.at[0]][piece.at[1:]]


def _sharded(like, pieces: list[tuple[str, Piece]], files: Mapping[str, Any]) -> jax.Array:
    """One parameter on its devices, of the current mesh if its own is abstract. The host reads each part piece by piece."""
    first = pieces[0][1]
    leading = [first.period is not None, first.expert is not None].count(True)  # axes that pieces are indexed by

    def part(index: tuple[slice, ...]) -> np.ndarray:
        out = np.empty([len(range(*x.indices(size))) for x, size in zip(index, like.shape, strict=True)], like.dtype)
        starts = [x.indices(size)[0] for x, size in zip(index[:leading], like.shape, strict=False)]
        for name, piece in pieces:
            at = [i for i in (piece.period, piece.expert) if i is not None]
            slot = tuple(i - start for i, start in zip(at, starts, strict=True))
            if all(0 <= i < size for i, size in zip(slot, out.shape, strict=False)):
                out[slot] = piece.ours(_piece_of(files[name], name, piece), like.shape[leading:])[index[leading:]]
        return out

    sharding = like.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    if isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, jax.sharding.AbstractMesh):
        sharding = NamedSharding(jax.sharding.get_mesh(), sharding.spec)
    return jax.make_array_from_callback(like.shape, sharding, part)


def _shards(tensors: list[Tensor], itemsize: int, limit: int) -> list[list[Tensor]]:
    """Divides tensors, in their order, into as few shards as possible of at most `limit` bytes."""
    shards, used = [], limit
    for tensor in tensors:
        size = itemsize * _size(tensor)
        if used + size > limit:
            shards.append([])
            used = 0
        shards[-1].append(tensor)
        used += size
    return shards


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def by_period(params: dict) -> Callable[[str], Iterator[np.ndarray]]:
    """The `read` of `write` for parameters in memory."""
    leaves = flat(params)

    def read(path: str) -> Iterator[np.ndarray]:
        return map(np.asarray, leaves[path] if path.startswith("periods/") else [leaves[path]])

    return read


def flat(params: Mapping) -> dict[str, Any]:
    """Parameters by path, in the order of the paths: `periods/L0/attention/q`."""
    return dict(sorted(traverse_util.flatten_dict(params, sep="/").items()))


def _write_json(path: Path, values: Mapping) -> None:
    write_atomically(path, json.dumps(values, indent=2, sort_keys=True) + "\n")
