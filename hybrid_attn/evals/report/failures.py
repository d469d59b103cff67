"""Questions that were answered wrongly, and which of them a report shows."""

from collections.abc import Sequence
from typing import NamedTuple

from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.report.runs import Run, sample_of

MOST_EXAMPLES = 8  # of a task
QUESTION = ("length", "index", "group", "prompt_end", "wanted")  # fields of an answer that belong to its question


class Failure(NamedTuple):
    """A question that at least one run did not answer in full: its fields, and (run, text, score) of each run's answer."""

    question: dict
    answers: Sequence[tuple[str, str, float]]


class Task(NamedTuple):
    """`missed` says how many answers of each run were not right in full; `examples` has some of the questions."""

    name: str
    missed: str
    examples: Sequence[Failure]


def by_task(runs: Sequence[Run]) -> list[Task]:
    """The tasks with wrong answers, in alphabetical order."""
    answers = grouped(((run.name, answer) for run in runs for answer in run.answers), lambda x: sample_of(x[1]))
    failures: dict[str, list[Failure]] = {}
    for same_question in answers.values():
        if any(answer["score"] < 1 for _, answer in same_question):
            first = same_question[0][1]
            of_runs = [(name, answer["given"], answer["score"]) for name, answer in same_question]
            failures.setdefault(first["task"], []).append(Failure({key: first[key] for key in QUESTION}, of_runs))
    return [Task(name, _missed(runs, name), _examples(of_task)) for name, of_task in sorted(failures.items())]


def _missed(runs: Sequence[Run], task: str) -> str:
    scores = {run.name: [answer["score"] for answer in run.answers if answer["task"] == task] for run in runs}
    return ", ".join(f"{name} {sum(x < 1 for x in of_run):,} of {len(of_run):,}" for name, of_run in scores.items() if of_run)


def _examples(failures: Sequence[Failure]) -> list[Failure]:
    """A question of each length, then a second of each, and so on; in order of length."""
    ordered = sorted(failures, key=lambda failure: failure.question["index"])
    by_length = grouped(ordered, lambda failure: failure.question["length"])
    ranked = sorted((rank, length) for length, of_length in by_length.items() for rank in range(len(of_length)))
    return [by_length[length][rank] for rank, length in sorted(ranked[:MOST_EXAMPLES], key=lambda x: x[::-1])]
