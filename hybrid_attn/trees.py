"""Nested plain values, as files have them, to frozen dataclasses that check themselves, and back."""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping


def check(ok: bool, message: str) -> None:
    """ValueError with `message` where something is not `ok`."""
    if not ok:
        raise ValueError(message)


class Table(dict):
    """A dict that is not changed after it is made, so that the configs that hold it can be hashed."""

    def __hash__(self):
        return hash(frozenset(self.items()))


def build(wanted: type, values, path: str):
    """`values` as the dataclass `wanted`; ValueError names the key under `path` that does not fit."""
    return _build(wanted, plain(values), path)


def plain(value):
    """Nested dicts and lists without the classes of the config library."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    return value


def differences(old: Mapping, new: Mapping, path: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two nested dicts differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {a} -> {b}")
    return lines


def _build(wanted, value, path: str):
    """`value` as the type `wanted`, or a ValueError that names `path`."""
    origin, args = typing.get_origin(wanted), typing.get_args(wanted)
    if origin is types.UnionType:
        return None if value is None else _build(args[0], value, path)
    if dataclasses.is_dataclass(wanted):
        return _build_dataclass(wanted, value, path)
    if origin is Table:
        return Table({key: _build(args[1], x, f"{path}.{key}") for key, x in value.items()})
    if origin is tuple:
        check(isinstance(value, (list, tuple)), f"{path}={value!r} must be a list")
        return tuple(_build(args[0], x, f"{path}[{i}]") for i, x in enumerate(value))
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    ok = isinstance(value, wanted) and (wanted is bool or not isinstance(value, bool))
    check(ok, f"{path}={value!r} must be of type {wanted.__name__}")
    return value


def _build_dataclass(wanted, value, path: str):
    check(isinstance(value, Mapping), f"{path}={value!r} must be a group of keys")
    hints = typing.get_type_hints(wanted)
    for key in value:
        if key not in hints:
            near = difflib.get_close_matches(key, hints, 1, cutoff=0.5)
            raise ValueError(
                f"unknown key {path}.{key}; "
                + (f"did you mean {path}.{near[0]}?" if near else f"known keys: {', '.join(hints)}")
            )
    missing = [key for key in hints if key not in value]
    check(not missing, f"{path} lacks {', '.join(missing)}; start from configs/base.py, which has every key")
    return wanted(**{key: _build(hint, value[key], f"{path}.{key}") for key, hint in hints.items()})
