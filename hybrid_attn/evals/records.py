"""Records of an evaluation: groups of them, means over them, and what a record of losses is about."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np


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
