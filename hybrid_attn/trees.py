"""Nested dicts, as config files have them, to frozen dataclasses that validate themselves, and back.

A field declares its valid values: `steps: int = within(1, 1000)`, `norm: str = one_of("rms", "layernorm")`. It has no default.
"""

import ast
import dataclasses
import difflib
import functools
import math
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence


def check(ok: bool, message: str) -> None:
    """ValueError with `message` where something is not `ok`."""
    if not ok:
        raise ValueError(message)


_type_hints = functools.cache(typing.get_type_hints)
PART = r"[^.\[\]=\s]+|\[-?\d+\]"  # of a key: a name, or the index of a list
KEY = rf"({PART})(\.({PART})|\[-?\d+\])*"


class Table(dict):
    """A dict that nobody changes, so that a config with it can be hashed."""

    def __hash__(self):
        return hash(frozenset(self.items()))


class Partial(Table):
    """Some of the keys of a dataclass or a `Table`, in which groups are partial too: `Partial[Model]`."""


class FieldError(ValueError):
    """An invalid value of a field of `group`; `problem` begins with the field's name."""

    def __init__(self, group: str, problem: str):
        super().__init__(f"{group}.{problem}")
        self.problem = problem


def within(low: float, high: float, above: bool = False, below: bool = False, also: int | None = None, aliases=()):
    """A field for numbers from `low` to `high`, without these where `above` or `below`, or `also`; NaN is never among them.

    `aliases` are names that other programs have for the field.
    """
    lower = "positive" if above and low == 0 else f"{'above' if above else 'at least'} {low:,}"
    bound = f"must be {lower} and {'below' if below else 'at most'} {high:,}" + ("" if also is None else f", or {also}")

    def refuse(value) -> str:
        ok = low <= value <= high and not (above and value == low) and not (below and value == high)
        return "" if ok or value == also else bound

    return dataclasses.field(metadata={"refuse": refuse, "aliases": aliases})


def one_of(*choices: str):
    """A field for one of these strings."""
    return dataclasses.field(metadata={"refuse": lambda value: not_among(value, choices)})


def named(*aliases: str):
    """A field for any value; `aliases` are names that other programs have for the field."""
    return dataclasses.field(metadata={"aliases": aliases})


def not_among(value: str, choices: Sequence[str]) -> str:
    """The error for a value that is not among `choices`, with the nearest of them; empty if it is."""
    if value in choices:
        return ""
    return f"is not one of {', '.join(map(repr, choices))}{suggestion(value, choices, '; ')}"


def suggestion(name, choices: Iterable[str], before: str = "", otherwise: str = "") -> str:
    """`before` and "did you mean 'x'?" with the nearest of `choices`; `otherwise` where none is near."""
    near = difflib.get_close_matches(str(name), choices, 1)
    return f"{before}did you mean {near[0]!r}?" if near else otherwise


def choice(field: str, name: str, table: Mapping):
    """The entry that a config's `field` names; ValueError with the nearest name if the table has none of this name."""
    problem = not_among(name, tuple(table))
    check(not problem, f"{field}={name!r} {problem}")
    return table[name]


def check_fields(instance, group: str) -> None:
    """FieldError for the first field of a dataclass whose value, or an element of it, is invalid."""
    for field in dataclasses.fields(instance):
        name, value, refuse = field.name, getattr(instance, field.name), field.metadata.get("refuse", lambda _: "")
        elements = {name: value}
        if isinstance(value, tuple):
            elements = {f"{name}[{i}]": x for i, x in enumerate(value)}
        elif isinstance(value, Table):
            elements = {f"{name}.{key}": x for key, x in value.items()}
        for element, x in elements.items():
            problem = "" if x is None else refuse(x)
            none = ", or None" if isinstance(field.type, types.UnionType) else ""
            if problem:
                raise FieldError(group, f"{element}={x!r} {problem}{none}")


def check_once(field: str, names: Sequence[str]) -> None:
    """ValueError for a name that is in a field twice."""
    for name in names:
        check(names.count(name) == 1, f"{field}={names} names {name!r} twice")


def build(target: type, values, path: str):
    """`values` as the dataclass `target`; ValueError names the key under `path` that does not fit."""
    values = plain(values)
    return _build(target, values, path, (target, values, path))


def plain(value):
    """Nested dicts and lists of a ConfigDict."""
    if isinstance(value, Mapping) or hasattr(value, "items"):
        return {key: plain(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(x) for x in value]
    return value


def flat(values: Mapping, path: str = "") -> dict[str, object]:
    """The leaves of nested dicts, by their keys joined with dots."""
    leaves = {}
    for key, value in values.items():
        leaves |= flat(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return leaves


def merged(values: Mapping, changes: Mapping, path: str = "") -> dict:
    """Nested dicts with the leaves of `changes` in place of theirs; ValueError for a key that `values` lacks."""
    for key in changes:
        hint = suggestion(key, values, otherwise=f"there are {', '.join(values)}")
        check(key in values, f"{path}{key}: there is no {key!r}; {hint}")
    groups = {key: merged(values[key], x, f"{path}{key}.") for key, x in changes.items() if isinstance(x, Mapping)}
    return {**values, **changes, **groups}


def differences(old: Mapping, new: Mapping, path: str = "") -> list[str]:
    """Lines `key: old -> new` for every leaf in which two nested dicts differ; lists of dicts are compared entry by entry."""
    lines = []
    for key in sorted({*old, *new}):
        a, b, name = old.get(key), new.get(key), f"{path}{key}"
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{name}.")
        elif all(isinstance(x, list) and all(isinstance(entry, Mapping) for entry in x) for x in (a, b)):
            lines += differences(*({f"[{i}]": entry for i, entry in enumerate(x)} for x in (a, b)), name)
        elif a != b:
            lines.append(f"{name}: {a} -> {b}")
    return lines


def override(target: type, values: dict, path: str, key: str, text: str | None) -> tuple[str, typing.Any]:
    """Sets a key such as stages[0].steps in the nested dict `values` of type `target` to `text`, converted to the field's type.

    Returns the full name of the key, in which stages[-1] has its index from 0, and the value. Without text a bool is true.
    ValueError for an unknown key and for a text that is no value of the type.
    """
    check(re.fullmatch(KEY, key) is not None, f"{path}.{key} is no key; write a.b, or a[0].b for an entry of a list")
    root, kind, container, last = (target, values, path), target, [values], 0
    for part in re.findall(PART, key):
        container = container[last]
        last, kind = _step(_without_none(kind), container, path, part, root)
        if typing.get_origin(kind) is Partial:
            container.setdefault(last, {})
        path += f"[{last}]" if part.startswith("[") else f".{part}"
    check(text is not None or kind is bool, f"--{path} has no value; write --{path}=VALUE")
    container[last] = text is None or _from_text(kind, text, path)
    return path, container[last]


def _step(kind, values, path: str, part: str, root: tuple) -> tuple:
    """One part of a key as a key or index of `values`, and the type of its value."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if part.startswith("["):
        check(origin is tuple and isinstance(values, list), f"{path} is no list, and has no entry {part}")
        check(len(values) > 0, f"{path}{part} does not exist: {path} is empty")
        entries = f"{len(values)} {'entry' if len(values) == 1 else 'entries'}, counted from 0"
        check(-len(values) <= int(part[1:-1]) < len(values), f"{path}{part} does not exist: {path} has {entries}")
        return int(part[1:-1]) % len(values), args[0]
    check(origin is not tuple, f"{path} is a list; write {path}[0].{part}")
    groups = dataclasses.is_dataclass(kind) or origin in (Table, Partial)
    check(not groups or values is not None, f"{path} is None, and has no key {part!r}; give it all its keys in the config file")
    check(groups and isinstance(values, Mapping), f"{path}={values!r} is a value, and has no key {part!r}")
    hints = _hints(kind, [part] if origin is Partial else values)
    if part not in hints:
        raise _unknown(part, kind, list(hints), path, root)
    return part, hints[part]


def _hints(kind, names: Iterable[str]) -> dict:
    """The type of the value of every key of a group; the keys of a table are `names`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Partial:
        return {key: _partial(hint) for key, hint in _hints(args[0], names).items()}
    return dict.fromkeys(names, args[1]) if origin is Table else _type_hints(kind)


def _partial(kind):
    """The type of a part of a value: of a group some of its keys, of anything else all of it."""
    return Partial[kind] if dataclasses.is_dataclass(kind) or typing.get_origin(kind) is Table else kind


def _without_none(kind):
    """A type without None."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is types.UnionType else kind


BOOLS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}  # texts of a flag for a bool
DESCRIBED = {bool: "true or false", int: "of type int", float: "of type float"}


def _from_text(target, text: str, path: str):
    """A text of the command line converted to the type `target`."""
    origin, args = typing.get_origin(target), typing.get_args(target)
    if origin is types.UnionType:
        return None if text in ("None", "none") else _from_text(args[0], text, path)
    if target is str:
        return text
    try:
        if target is bool:
            return BOOLS[text.lower()]
        if target in (int, float):
            return target(text)
        if origin is tuple and not dataclasses.is_dataclass(args[0]) and not text.startswith(("(", "[")):
            return [_from_text(args[0], part.strip(), path) for part in text.split(",") if part]
        return plain(ast.literal_eval(text))
    except (ValueError, KeyError, SyntaxError, MemoryError, RecursionError):
        group = "a list" if origin is tuple else "a group of keys, as \"{'key': value}\""
        raise ValueError(f"{path}={text!r} must be {DESCRIBED.get(target, group)}") from None


def _build(target, value, path: str, root: tuple):
    """`value` as the type `target`; ValueError names `path`. `root` is the (type, values, path) of the whole config."""
    origin, args = typing.get_origin(target), typing.get_args(target)
    if origin is types.UnionType:
        return None if value is None else _build(args[0], value, path, root)
    if dataclasses.is_dataclass(target):
        return _build_dataclass(target, value, path, root)
    if origin in (Table, Partial):
        check(isinstance(value, Mapping), f"{path}={value!r} must be a group of keys")
        check(all(isinstance(key, str) for key in value), f"the keys of {path}={value!r} must be of type str")
        hints = _hints(target, value)
        for key in value:
            if key not in hints:
                raise _unknown(key, args[0], list(hints), path, root)
        return origin({key: _entry(hints[key], x, f"{path}.{key}", root) for key, x in value.items()})
    if origin is tuple:
        check(isinstance(value, (list, tuple)), f"{path}={value!r} must be a list")
        return tuple(_entry(args[0], x, f"{path}[{i}]", root) for i, x in enumerate(value))
    if target is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    ok = isinstance(value, target) and (target is bool or not isinstance(value, bool))
    check(ok, f"{path}={value!r} must be of type {target.__name__}")
    check(target is not float or math.isfinite(value), f"{path}={value} must be a finite number")
    return value


def _entry(target, value, path: str, root: tuple):
    """`_build` of an entry of a list or a table; an error that does not name the entry gets its path."""
    try:
        return _build(target, value, path, root)
    except ValueError as error:
        raise error if path in str(error) else ValueError(f"{path}: {error}") from None


def _build_dataclass(target, value, path: str, root: tuple):
    check(isinstance(value, Mapping), f"{path}={value!r} must be a group of keys")
    hints = _type_hints(target)
    for key in value:
        if key not in hints:
            raise _unknown(key, target, list(hints), path, root)
    missing = [key for key in hints if key not in value]
    check(not missing, f"{path} lacks {', '.join(missing)}; start from hybrid_attn/configs/base.py, which has every key")
    fields = {key: _build(hint, value[key], f"{path}.{key}", root) for key, hint in hints.items()}
    try:
        return target(**fields)
    except FieldError as error:
        raise ValueError(f"{path}.{error.problem}") from None


def _unknown(key, group, known: Sequence[str], path: str, root: tuple) -> ValueError:
    """The error for a key that is not among the `known` ones of a group, with the most similar key, there or elsewhere.

    A misspelt key of the group comes before a key of that name elsewhere: stages[0].steps for stages[0].step.
    """
    key, names = str(key), _names(group, known)
    misspelt, similar = (difflib.get_close_matches(key, names, 1, cutoff) for cutoff in (0.85, 0.5))
    # lr for learning_rate, vocab_size for vocab
    short = sorted((name for name in names if _abbreviates(name, key) or _abbreviates(key, name)), key=len, reverse=True)
    misspelt, similar = ([f"{path}.{names[name]}" for name in near] for near in (misspelt, [*similar, *short]))
    likely = next(iter([*misspelt, *_elsewhere(key, *root), *similar]), None)
    hint = f"did you mean {likely}?" if likely else f"known keys: {', '.join(known)}"
    return ValueError(f"unknown key {path}.{key}; {hint}")


def _names(group, known: Sequence[str]) -> dict[str, str]:
    """The field of every name, an alias's too."""
    aliases = {}
    if dataclasses.is_dataclass(group):
        aliases = {alias: f.name for f in dataclasses.fields(group) for alias in f.metadata.get("aliases", ())}
    return aliases | {name: name for name in known}


def _abbreviates(short: str, long: str) -> bool:
    """Whether the letters of `short` occur in `long` in this order, and both begin with the same letter."""
    letters = iter(long)
    return len(short) > 1 and short[:1] == long[:1] and all(letter in letters for letter in short)


def _elsewhere(key: str, target, values, path: str) -> Iterator[str]:
    """Yields the paths of fields with that name or alias in nested values."""
    target = _without_none(target)
    args = typing.get_args(target)
    if dataclasses.is_dataclass(target) and isinstance(values, Mapping):
        hints = _type_hints(target)
        names = _names(target, list(hints))
        if key in names:
            yield f"{path}.{names[key]}"
        for name in (name for name in hints if name in values):
            yield from _elsewhere(key, hints[name], values[name], f"{path}.{name}")
    elif typing.get_origin(target) is Table and isinstance(values, Mapping):
        for name, value in values.items():
            yield from _elsewhere(key, args[1], value, f"{path}.{name}")
    elif typing.get_origin(target) is tuple and isinstance(values, list):
        for i, value in enumerate(values):
            yield from _elsewhere(key, args[0], value, f"{path}[{i}]")
