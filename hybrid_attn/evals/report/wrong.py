"""The questions that were answered wrongly, and which of them a report shows."""

from collections.abc import Sequence
from typing import NamedTuple

from hybrid_attn.evals.report.runs import Run, sample_of

SHOWN = 8  # of a task


class Failure(NamedTuple):
    """A question of which one run at least missed a part, and what each run that was asked gave: (run, given, score)."""

    length: int
    index: int
    group: str
    prompt_end: str
    wanted: Sequence[str]
    given: Sequence[tuple[str, str, float]]


def failures(runs: Sequence[Run]) -> dict[str, tuple[str, list[Failure]]]:
    """By task: how many answers of each run missed something, and some of the questions, of every length in turn."""
    asked: dict[tuple, list[tuple[str, dict]]] = {}
    for run in runs:
        for answer in run.answers:
            asked.setdefault(sample_of(answer), []).append((run.name, answer))
    wrong: dict[str, list[Failure]] = {}
    for several in asked.values():
        if any(answer["score"] < 1 for _, answer in several):
            first = several[0][1]
            given = [(name, answer["given"], answer["score"]) for name, answer in several]
            fields = (first[key] for key in ("length", "index", "group", "prompt_end", "wanted"))
            wrong.setdefault(first["task"], []).append(Failure(*fields, given))
    return {task: (_missed(runs, task), _spread(found)) for task, found in sorted(wrong.items())}


def _missed(runs: Sequence[Run], task: str) -> str:
    """How many answers of each run were not wholly right."""
    scores = {run.name: [answer["score"] for answer in run.answers if answer["task"] == task] for run in runs}
    counts = {name: (sum(score < 1 for score in several), len(several)) for name, several in scores.items()}
    return ", ".join(f"{name} {wrong:,} of {asked:,}" for name, (wrong, asked) in counts.items() if asked)


def _spread(found: Sequence[Failure]) -> list[Failure]:
    """A question of each length, then a second of each, and so on; in order of length."""
    turns, seen = [], {}
    for failure in sorted(found, key=lambda failure: failure.index):
        seen[failure.length] = seen.get(failure.length, 0) + 1
        turns.append((seen[failure.length], failure.length, failure))
    shown = sorted(turns, key=lambda turn: turn[:2])[:SHOWN]
    return [failure for *_, failure in sorted(shown, key=lambda turn: (turn[1], turn[0]))]
