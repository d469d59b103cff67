"""Records of an evaluation: what the values of their fields must be, groups of records, means, and what a loss is about."""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

LONGEST_NAME = 500  # characters


class Kind(NamedTuple):
    """What a value must be, in words, and whether it is."""

    what: str
    holds: Callable[[object], bool]


def integer(least: int, most: int = 2**53) -> Kind:
    def holds(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < most

    return Kind(f"a whole number from {least}" + (f" to {most - 1:,}" if most < 2**53 else ""), holds)


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    def holds(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and abs(value) < 2**1000

    return Kind("a number" if math.isinf(low) else f"a number from {low:g} to {high:g}", holds)


def or_none(kind: Kind) -> Kind:
    return Kind(f"{kind.what}, or null", lambda value: value is None or kind.holds(value))


def list_of(kind: Kind, least: int = 0) -> Kind:
    def holds(value: object) -> bool:
        return isinstance(value, (list, tuple)) and len(value) >= least and all(map(kind.holds, value))

    return Kind(f"a list, each {kind.what}", holds)


NAME = Kind(f"a text of at most {LONGEST_NAME} characters", lambda value: isinstance(value, str) and len(value) <= LONGEST_NAME)
TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a text or a list of texts", lambda value: TEXT.holds(value) or list_of(TEXT).holds(value))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SCALAR = Kind("a text, a number, true, false or null", lambda value: value is None or isinstance(value, (str, int, float)))
COUNT, SIZE, ANY, SHARE = integer(0), integer(1), or_none(number()), number(0, 1)


def grouped(items: Iterable, key: Callable) -> dict[Any, list]:
    """By their key, in the order in which keys come first."""
    groups: dict[Any, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def lengths_of(records: Iterable[Mapping]) -> list[int]:
    """From the shortest to the longest."""
    return sorted({record["length"] for record in records})


def mean_of(records: Iterable[Mapping], field: str) -> float | None:
    """Over the records that have a number there."""
    values = [record[field] for record in records if record.get(field) is not None]
    return float(np.mean(values)) if values else None


def part(record: Mapping) -> str:
    """Which tokens a record of losses is about: all, repeated bigrams ("recall"), or the others ("rest")."""
    return record.get("part", "all")


def is_total(record: Mapping) -> bool:
    """Whether a record of losses is about every token of its sequences."""
    return "first" not in record and part(record) == "all"
