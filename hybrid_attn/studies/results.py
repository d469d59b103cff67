"""results.jsonl of a study: a line for each cell and seed."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hybrid_attn import files
from hybrid_attn.studies.study import Study
from hybrid_attn.trees import check

FILE = "results.jsonl"
FIELDS = ("cell", "seed", "config", "metrics", "cpu_seconds", "flops", "tokens", "revision", "versions", "machine")


def read(folder: Path) -> list[dict]:
    """The lines of FOLDER/results.jsonl, none without the file; ValueError for what is no such line."""
    path, lines = folder / FILE, []
    for number, text in enumerate(path.read_text().splitlines() if path.exists() else (), 1):
        line = files.object_of(text, f"{path}, line {number}")
        lacks = [field for field in FIELDS if field not in line]
        check(not lacks, f"{path}, line {number} is no result of a study: it lacks {', '.join(lacks)}")
        lines.append(line)
    return lines


def with_line(lines: Sequence[dict], new: dict) -> list[dict]:
    """The lines with a new one, instead of those of the same cell and seed."""
    return [line for line in lines if (line["cell"], line["seed"]) != (new["cell"], new["seed"])] + [new]


def write(folder: Path, lines: Sequence[dict], cells: Sequence[str]) -> None:
    """In the order of the cells, then of the seeds."""
    order = {name: number for number, name in enumerate(cells)}
    lines = sorted(lines, key=lambda line: (order.get(line["cell"], len(order)), line["cell"], line["seed"]))
    files.write_atomically(folder / FILE, "".join(json.dumps(line) + "\n" for line in lines))


class Results(NamedTuple):
    """The lines of the configs that the study has now."""

    study: Study
    lines: Sequence[dict]

    def of(self, cell: str) -> dict[int, dict]:
        """By seed."""
        return {line["seed"]: line for line in self.lines if line["cell"] == cell}

    def values(self, cell: str, metric: str) -> dict[int, float]:
        """By seed, of the runs in which the metric is a number."""
        return {seed: x for seed, line in self.of(cell).items() if (x := line["metrics"][metric]) is not None}

    def learned(self, cell: str) -> set[int]:
        """The seeds in which the cell learned the task; all of them where the study does not say what that is."""
        if self.study.learned is None:
            return set(self.of(cell))
        metric, bound = self.study.learned
        return {seed for seed, x in self.values(cell, metric).items() if self.reaches(metric, x, bound)}

    def reaches(self, metric: str, value: float, bound: float) -> bool:
        """Whether a value is as good as a bound."""
        return value >= bound if self.study.metrics[metric].higher_is_better else value <= bound


def current(study: Study, lines: Sequence[dict], hashes: Mapping[tuple[str, int], str]) -> tuple[Results, list[dict]]:
    """The lines with all metrics whose config is that of their cell and seed in the study as it is now; and the other lines."""

    def is_current(line: dict) -> bool:
        is_same = hashes.get((line["cell"], line["seed"])) == line["config"]
        return is_same and set(study.metrics) <= set(line["metrics"])

    return Results(study, [x for x in lines if is_current(x)]), [x for x in lines if not is_current(x)]
