"""Answers that a model judged, in a report: which of two models has the likelier ones, and how diverse they are."""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from scipy.special import expit

from hybrid_attn.evals.report import statistics
from hybrid_attn.evals.report.escape import shortened
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Section
from hybrid_attn.evals.report.tables import LENGTH, RUN, SOURCE, Column, Table, of_records

EXAMPLES, CHARACTERS = 5, 300  # prompts whose answers are shown, and how much of each
NATS = "log-probability (nats)"
JUDGED = [SOURCE, LENGTH, Column("prompts", ","), Column(NATS, ",.3f", "log_prob"), Column("tokens", ",.1f")]
ENDS = [[Column(name, ",.3f") for name in names] for names in (("95% from", "to"), ("P from", "P to"))]
WINS = [RUN, Column("against"), SOURCE, LENGTH, Column("prompts", ","), Column("wins", ","), Column("ties", ",")]
WINS += [Column("win rate", ",.3f"), *ENDS[0], Column("mean P(win)", ",.3f"), *ENDS[1]]
TEXT = (
    "Each model answered the same prompts, and a judge, another model, gave each answer the mean log-probability of its "
    "tokens after the prompt. The win rate is the share of prompts where a model's answer has the larger mean, a tie being "
    "half a win, with Wilson's interval; P(win) is sigmoid(difference of the means), with Student's interval. A "
    "log-probability is no quality: a judge finds repetitions likely, so look at the diversity and at the answers, too."
)
DIVERSITY = (
    "Distinct n-grams over all n-grams of the answers, in the judge's tokens (arXiv 1510.03055), and over the number that is "
    "expected of as many n-grams from a uniform distribution: EAD (arXiv 2202.13587), which does not fall with the length."
)


def pairs(a: Run, b: Run) -> Iterator[tuple[Mapping, np.ndarray]]:
    """Of b's records, those of the same prompts and judge as one of a, and [n, 2] log-probabilities of the answers of both."""

    def key(record: Mapping) -> tuple:
        return (*(record[name] for name in ("source", "length", "prompts_hash", "judge")), len(record["log_probs"]))

    known = {key(record): record["log_probs"] for record in a.of("win_rate")}
    for record in b.of("win_rate"):
        if key(record) in known:
            yield record, np.stack([known[key(record)], record["log_probs"]], 1)


def wins(log_probs: np.ndarray) -> np.ndarray:
    """1 where the second of each pair [n, 2] is larger, 1/2 where both are equal, and else 0."""
    return (np.sign(log_probs[:, 1] - log_probs[:, 0]) + 1) / 2


def win_rate(log_probs: np.ndarray) -> statistics.Share:
    """The share of pairs [n, 2] that the second wins, with Wilson's interval."""
    won = wins(log_probs)
    return statistics.share(float(won.sum()), len(won))


def sections(runs: Sequence[Run]) -> list[Section]:
    records = records_of(runs, "win_rate")
    tables = [of_records("judged", "Answers by the judge's log-probability", records, JUDGED), _diversity(records)]
    if rows := [_row(runs[0], run, *pair) for run in runs[1:] for pair in pairs(runs[0], run)]:
        tables.insert(0, Table("win_rate", f"Win rate against {runs[0].name}", WINS, rows))
    return [Section("win_rate", "Win rate", [TEXT, DIVERSITY], (), [*tables, _examples(records)], "win_rate")]


def _row(first: Run, run: Run, record: Mapping, log_probs: np.ndarray) -> list:
    won, difference = wins(log_probs), log_probs[:, 1] - log_probs[:, 0]
    probability = statistics.mean_within(expit(difference), (0.0, 1.0))
    counts = len(won), int((won == 1).sum()), int((won == 0.5).sum())
    names = run.name, first.name, record["source"], record["length"]
    return [*names, *counts, *win_rate(log_probs)[:3], *probability]


def _diversity(records: Sequence[tuple[Run, Mapping]]) -> Table:
    columns = [RUN, SOURCE, LENGTH, Column("n"), Column("distinct", ",.3f"), Column("EAD", ",.3f")]
    rows = [
        [run.name, r["source"], r["length"], n, plain, adjusted]
        for run, r in records
        for n, (plain, adjusted) in enumerate(zip(r["distinct"], r["ead"], strict=True), 1)
    ]
    return Table("diversity", "Distinct n-grams of the answers", columns, rows)


def _examples(records: Sequence[tuple[Run, Mapping]]) -> Table:
    columns = [Column("prompt"), RUN, Column("answer"), Column(NATS, ",.3f")]
    rows = [
        [shortened(r["prompt_ends"][i], CHARACTERS), run.name, shortened(r["answers"][i], CHARACTERS), r["log_probs"][i]]
        for i in range(EXAMPLES)
        for run, r in records
        if i < len(r["answers"])
    ]
    return Table("answers", "Answers to the first prompts", columns, rows, is_folded=True)


REPORT = EvaluationReport(sections)
