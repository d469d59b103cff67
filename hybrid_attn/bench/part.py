"""What a part of the benchmark is: what it measures, how its table and its figures are made of the records."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from hybrid_attn.bench.measurement import Processes
from hybrid_attn.config import Config
from hybrid_attn.trees import check

ROOT = Path(__file__).parents[2]  # of the repository: the configs and programs that are measured lie there


class Run(NamedTuple):
    """What a part is asked to measure. `repeats` calls of each contender are timed, after one that warms it up.

    A call that would take more than `seconds`, judged by one of a shorter sequence, is left out. `options` are the part's own.
    """

    config: Config | None
    lengths: list[int]
    repeats: int
    seconds: float
    options: Mapping[str, str | int | float]
    platform: str
    dtype: str | None


class Figure(NamedTuple):
    """A number that a part is judged by. The larger the better; where `at_least` is False, the smaller the better."""

    value: float
    unit: str
    target: float | None = None
    at_least: bool = True

    @property
    def shown(self) -> str:
        return show(self.value, self.unit)

    @property
    def reached(self) -> bool | None:
        """Whether the target is reached; None without one."""
        return None if self.target is None else (self.value >= self.target) == self.at_least or self.value == self.target


def show(value: float, unit: str) -> str:
    """0.5 as 50%, or with three digits and another unit."""
    return f"{value:.0%}" if unit == "%" else f"{value:#.3g}{'' if unit == 'times' else ' ' + unit}"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the benchmark; `hybrid_attn/bench/table.py` lists them.

    `measure` returns a record for each contender, which JSON can hold. From these, `table` makes Markdown and `figures` the
    numbers by name. `config` is the default of --config, None if no model is measured; `lengths` are the default of --lengths.
    """

    title: str
    config: str | None
    lengths: tuple[str, ...]
    measure: Callable[[Processes, Run], list[dict]]
    table: Callable[[list[dict]], str]
    figures: Callable[[list[dict]], dict[str, Figure]]
    options: Mapping[str, str | int | float] = dataclasses.field(default_factory=dict)


def chosen(option: str, text: str, known: tuple[str, ...]) -> list[str]:
    """The names of "a+b", in the order in which they are known; ValueError for others."""
    names = text.split("+")
    check(set(names) <= set(known), f"--options has {option}={text!r}; use {', '.join(known)}, joined by +")
    return [name for name in known if name in names]


def ratios(records: list[dict], key: str, targets: Mapping[int, float] = MappingProxyType({})) -> dict[str, Figure]:
    """The `key` of each other contender over that of "ours" with the same tokens; `targets` are by tokens."""
    ours = {r["tokens"]: r[key] for r in records if r["contender"] == "ours" and key in r}
    others = [r for r in records if r["contender"] != "ours" and key in r and r["tokens"] in ours]
    made = {}
    for r in others:
        S = r["tokens"]
        made[f"{r['contender']} / ours, {S:,} tokens"] = Figure(r[key] / ours[S], "times", targets.get(S))
    return made


def share_of_peak(record: dict, needed_flops: float, seconds: float, target: float | None = None) -> Figure:
    """The FLOP/s of a record over the matmul peak that was measured beside it."""
    return Figure(needed_flops / seconds / record["peak"], "%", target)
