"""RULER's scores: which of the answers wanted stand in what a model has generated, whatever else stands there."""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

from hybrid_attn.evals.records import grouped, lengths_of, mean_of
from hybrid_attn.evals.ruler.tasks import NAMES, QA

THRESHOLD = 85.6  # percent: Llama-2-7B-chat at 4,096 tokens
RELATIVE = 0.85  # of the score at the shortest length, NoLiMa's rule


def postprocess(prediction: str) -> str:
    """Control characters become line breaks; nothing blank at the ends."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def score(task: str, prediction: str, answers: Sequence[str]) -> float:
    """Of one sample: percent of the answers that the prediction contains in any case; for QA 100 if it contains one.

    RULER's string_match_all and string_match_part, with `postprocess` applied.
    """
    number = right(prediction, answers)
    return 100.0 * (number > 0) if task in QA else 100 * number / len(answers)


def right(prediction: str, answers: Sequence[str]) -> int:
    """How many of the answers the prediction contains, in any case."""
    said = postprocess(prediction).lower()
    return sum(answer.lower() in said for answer in answers)


def averages(scores: Mapping[int, float]) -> dict[str, float]:
    """Over lengths: the mean, and means with weights 1, 2, … and …, 2, 1, shortest first."""
    ordered = [scores[length] for length in sorted(scores)]
    rising = range(1, len(ordered) + 1)
    weighted = [sum(i * x for i, x in zip(weights, ordered, strict=True)) / sum(rising) for weights in (rising, rising[::-1])]
    return {"average": sum(ordered) / len(ordered), "rising": weighted[0], "falling": weighted[1]}


def complete_tasks(records: Iterable[Mapping]) -> list[str]:
    """The tasks that means are over: those with a score at each length of the records, so that lengths compare."""
    lengths = {task: set(lengths_of(of_task)) for task, of_task in grouped(records, itemgetter("task")).items()}
    all_lengths = set().union(*lengths.values())
    return [task for task in NAMES if lengths.get(task) == all_lengths]


def means(records: Iterable[Mapping]) -> dict[int, float]:
    """The mean score of `complete_tasks` at each length."""
    records = list(records)
    tasks = complete_tasks(records)
    by_length = grouped((r for r in records if r["task"] in tasks), itemgetter("length"))
    return {length: mean_of(of_length, "score") for length, of_length in sorted(by_length.items())}


def effective_length(scores: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """The largest length such that it and all shorter ones score at least `threshold`, or None."""
    reached = list(itertools.takewhile(lambda length: scores[length] >= threshold, sorted(scores)))
    return reached[-1] if reached else None


def relative_length(scores: Mapping[int, float]) -> int | None:
    """`effective_length` by 0.85 of the score at the shortest length: for models that are far below RULER's threshold.

    None where the shortest length scores nothing.
    """
    base = scores[min(scores)]
    return effective_length(scores, RELATIVE * base) if base > 0 else None
