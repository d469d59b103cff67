"""Recall in a report: the share of right answers in synthetic tasks by length, beside that of a guess."""

from collections.abc import Iterable, Mapping, Sequence
from operator import itemgetter

import numpy as np

from hybrid_attn.evals.recall import guess
from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.report import pictures, statistics
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Reading, Section
from hybrid_attn.evals.report.tables import LENGTH, SOURCE, TASK, Column, interval, of_records

TASKS = {
    "recall": "pairs of letters in noise, then keys whose value is asked for",
    "mqar": "pairs, then each key once more among random words (zoology's multi-query associative recall)",
    "copy": "letters, then the same letters",
    "tracking": "chains of assignments in noise, then a value whose variables are asked for",
    "needle": "numbers in held-out text, then questions about them, whose digits are predicted one by one",
}
COLUMNS = [
    *(SOURCE, TASK, LENGTH, Column("sequences", ",", lambda run, r: len(r["by_row"])), Column("answers", ",")),
    *(Column("accuracy", ",.3f"), *interval(lambda r: statistics.wilson(*independent_answers(r)))),
]


def independent_answers(record: Mapping) -> tuple[float, float]:
    """How many answers are right, and how many there are, as far as they do not depend on others of their sequence.

    Their number is that whose share would spread as that of sequences does (Korn and Graubard, Survey Methodology 24, 1998),
    between the number of sequences and that of answers; where all sequences are alike, that of sequences.
    """
    share, sequences = record["accuracy"], len(record["by_row"])
    spread = float(np.var(record["by_row"], ddof=1)) / sequences if sequences > 1 else 0.0
    number = min(max(share * (1 - share) / spread, sequences), record["answers"]) if spread else sequences
    return share * number, number


def shares(records: Iterable[Mapping]) -> dict[int, statistics.Share]:
    ordered = sorted(records, key=itemgetter("length"))
    return {record["length"]: statistics.share(*independent_answers(record)) for record in ordered}


def readings(run: Run) -> list[Reading]:
    """Of each source with its task; a source that is named after its task does not repeat it."""
    by_task = grouped(run.of("recall"), itemgetter("source", "task")).items()
    names = {(source, task): task if task.split(" ")[0] == source else f"{source} ({task})" for (source, task), _ in by_task}
    return [Reading(names[key], shares(of_key), guess(key[1]) or 0) for key, of_key in by_task]


def sections(runs: Sequence[Run]) -> list[Section]:
    note = " for as many answers as are independent. Chance: the score of a guess among what the sequence names."
    images = [pictures.by_length("recall", runs, readings, note, "recall")]
    records = records_of(runs, "recall")
    tasks = {r["task"].partition(" ")[0] for _, r in records}
    meanings = "".join(f" {name}: {text}." for name, text in TASKS.items() if name in tasks)
    table = of_records("recall", "Synthetic recall: answers that are the likeliest token", records, COLUMNS)
    text = f"Synthetic sequences, in which each question is about something that the sequence has named before.{meanings}"
    return [Section("recall", "Recall", [text], images, [table], "recall")]


MEANING = "the share of right answers in the first task, at the longest length"
LONGEST = Column("recall", ",.3f", lambda run, _: max(run.of("recall"), key=itemgetter("length"), default={}).get("accuracy"))
REPORT = EvaluationReport(sections, [LONGEST._replace(meaning=MEANING)], readings)
