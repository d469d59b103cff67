"""Records of an evaluation in groups."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import itemgetter
from typing import Any

from hybrid_attn.evals.report import contents


def grouped(items: Iterable, key: Callable) -> dict[Any, list]:
    """By their key, in the order in which keys come first."""
    groups: dict[Any, list] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def needle_totals(records: Sequence[Mapping]) -> dict[int, tuple[float, int]]:
    """Right questions and all questions, over the depths of each length."""
    questions = grouped(records, itemgetter("length"))
    totals = {length: zip(*map(contents.needle_questions, cells), strict=True) for length, cells in sorted(questions.items())}
    return {length: tuple(map(sum, columns)) for length, columns in totals.items()}
