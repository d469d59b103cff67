"""LoRA in the files of PEFT: adapter_config.json, and adapter_model.safetensors with the family's names of matrices.

A of a module is [r, fan-in] there and B [fan-out, r]. Beside a matrix of the parameters stand "a" and "b" (model/transforms).
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_attn.config import NO_ADAPTER, Adapter, Model
from hybrid_attn.convert import families, hf
from hybrid_attn.files import read_object, write_atomically
from hybrid_attn.trees import check

CONFIG, TENSORS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
LETTERS = {"a": "A", "b": "B"}
PLAIN = {  # values of options that change what the matrices mean
    "peft_type": ("LORA",), "bias": ("none",), "fan_in_fan_out": (False,), "use_dora": (False,), "use_rslora": (False,),
    "lora_bias": (False,), "init_lora_weights": (True, False, "gaussian"), "use_qalora": (False,),
    "alora_invocation_tokens": (None,), "layer_replication": (None,), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
    "modules_to_save": (None, []),
}  # fmt: skip


class Matrix(NamedTuple):
    """A matrix that can have an adapter: its shape in one layer, and how many of its first axes are contracted."""

    shape: tuple[int, ...]
    fan_in: int

    def of_adapter(self, part: str, rank: int) -> tuple[int, ...]:
        """The shape of a part of its adapter."""
        return (*self.shape[: self.fan_in], rank) if part == "a" else (rank, *self.shape[self.fan_in :])


def write(
    directory: Path,
    model: Model,
    model_type: str,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str, str], Iterator[np.ndarray]],
) -> None:
    """Writes the adapter of `model`; `shapes` are those of its matrices, and `read` yields the periods of a part beside one.

    ValueError for a family whose files join such a matrix with others.
    """
    rank, arrays = model.adapter.rank, {}
    names = modules(model, model_type, shapes)
    for path, of_path in names.items():
        for part, letter in LETTERS.items():
            for module, x in zip(of_path, read(path, part), strict=True):
                matrix = x.reshape(-1, rank) if part == "a" else x.reshape(rank, -1)
                arrays[tensor_name(module, letter)] = np.ascontiguousarray(matrix.T)
    safetensors = hf.library()
    try:
        safetensors.numpy.save_file(arrays, directory / TENSORS, metadata={"format": "pt"})
    except (OSError, safetensors.SafetensorError) as cause:
        raise OSError(f"{directory / TENSORS} could not be written: {cause}") from cause
    values = {key: plain[0] for key, plain in PLAIN.items()} | {"task_type": "CAUSAL_LM", "inference_mode": True}
    values |= {"r": rank, "lora_alpha": model.adapter.alpha, "lora_dropout": 0.0, "base_model_name_or_path": None}
    values["target_modules"] = sorted(module for of_path in names.values() for module in of_path)
    write_atomically(directory / CONFIG, json.dumps(values, indent=2, sort_keys=True) + "\n")


def read(
    directory: str | os.PathLike, model: Model, model_type: str, matrices: Mapping[str, Matrix]
) -> tuple[Adapter, dict[str, dict[str, np.ndarray]]]:
    """The adapter in `directory` of a model with these matrices, and its arrays, by the matrix beside which they stand.

    ValueError for options that are not plain LoRA, and for tensors that are missing, of another shape, or of no such matrix.
    """
    values = read_object(Path(directory) / CONFIG)
    tensors = _load(Path(directory) / TENSORS)
    for key, plain in PLAIN.items():
        problem = f"{directory}/{CONFIG} has {key}={values.get(key)!r}; only {key}={plain[0]!r} is supported"
        check(values.get(key, plain[0]) in plain, problem)
    rank, alpha = values.get("r"), values.get("lora_alpha")
    numbers = type(rank) is int and rank > 0 and type(alpha) in (int, float)
    check(numbers, f"{directory}/{CONFIG} has r={rank!r} and lora_alpha={alpha!r}, which must be numbers, and r positive")
    stacked = {path: _stacked(model, path, matrix.shape) for path, matrix in matrices.items()}
    arrays, used = {}, set()
    for path, of_path in modules(model, model_type, stacked, skip_joined=True).items():
        names = {part: [tensor_name(module, letter) for module in of_path] for part, letter in LETTERS.items()}
        if used_here := [name for name in names["a"] + names["b"] if name in tensors]:
            missing = sorted({*names["a"], *names["b"]} - tensors.keys())
            check(not missing, f"{directory} has an adapter of some layers of {path} alone: it lacks {', '.join(missing[:3])}")
            used |= {*used_here}
            shapes = {part: matrices[path].of_adapter(part, rank) for part in LETTERS}
            arrays[path] = {part: _read(directory, path, tensors, names[part], shapes[part], part) for part in LETTERS}
    others = sorted(tensors.keys() - used)
    check(not others, f"{directory} has tensors of no matrix of this model that takes an adapter: {', '.join(others[:3])}")
    check(bool(arrays), f"{directory} has no tensors")
    adapter = dataclasses.replace(NO_ADAPTER, type="lora", targets=tuple(sorted(arrays)), rank=rank, alpha=float(alpha))
    return adapter, arrays


def _load(path: Path) -> dict[str, np.ndarray]:
    safetensors = hf.library()
    try:
        return safetensors.numpy.load_file(path)
    except (OSError, safetensors.SafetensorError) as cause:
        raise ValueError(f"{path} cannot be read: {cause}") from cause


def tensor_name(module: str, letter: str) -> str:
    return f"{PREFIX}{module}.lora_{letter}.weight"


def modules(
    model: Model, model_type: str, shapes: Mapping[str, tuple[int, ...]], *, skip_joined: bool = False
) -> dict[str, list[str]]:
    """The module of every period of matrices of these names and shapes.

    A matrix that the files of the family join with others is a ValueError, unless `skip_joined` leaves it out.
    """
    names: dict[str, list[str]] = {}
    for tensor in families.tensors(model, model_type, shapes):
        (piece, *more) = tensor.pieces
        alone = not more and piece.at == () and piece.transposed
        problem = f"the files of {model_type} join {piece.path} with other matrices, and PEFT has one adapter for all of them"
        check(alone or skip_joined, f"{problem}; export the merged model")
        if alone:
            names.setdefault(piece.path, []).append(tensor.name.removesuffix(".weight"))
    return names


def _stacked(model: Model, path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    numbers = {group: number for group, _, number in model.groups}
    return (numbers["periods"], *shape) if path.startswith("periods/") else shape


def _read(directory, path: str, tensors: Mapping, names: list[str], shape: tuple[int, ...], part: str) -> np.ndarray:
    """A part of the adapter of a matrix, with the axis of periods where it has one."""
    rank = shape[-1] if part == "a" else shape[0]
    size = math.prod(shape) // rank
    expected = (rank, size) if part == "a" else (size, rank)
    for name in names:
        actual = tensors[name].shape
        check(actual == expected, f"{directory}: {name} has the shape {actual}, and {expected} fits r={rank} and this model")
    periods = [np.asarray(tensors[name], np.float32).T.reshape(shape) for name in names]
    return np.stack(periods) if path.startswith("periods/") else periods[0]
