"""Two models on the same questions and sequences: which is better where, by how much, in a sentence, a picture and a table."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import attrgetter, itemgetter
from typing import NamedTuple

import numpy as np

from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.report import pictures, statistics, win_rate
from hybrid_attn.evals.report.pictures import Line
from hybrid_attn.evals.report.runs import Run, measured, records_of, sample_of, sequences_of
from hybrid_attn.evals.report.section import Picture, Section
from hybrid_attn.evals.report.tables import LENGTH, RUN, TASK, Column, Table, signed, tokens
from hybrid_attn.evals.table import EVALS

PAIRS = 10  # fewest pairs for a verdict: a sign test on five equal differences gives p = 0.06
VERDICTS = ("better", "worse", "unclear")


class Difference(NamedTuple):
    """Mean scores of two models on the same `pairs` of answers, and the interval of 95% of b - a, if anything bounds it.

    `fewest` is how many pairs its task has; of a mean over tasks, the one with the fewest. Of a `loss` less is better.
    `in_mean` says that its task counts in such a mean. The scores of `wins` are shares of the same prompts, b and a = 1 - b.
    """

    task: str
    length: int
    pairs: int
    a: float
    b: float
    difference: float
    low: float | None
    high: float | None
    fewest: int
    loss: bool
    in_mean: bool = False
    wins: bool = False

    @property
    def verdict(self) -> str:
        """Unclear without an interval, where it has 0 in it, and where a task has too few pairs."""
        if self.low is None or self.fewest < PAIRS or self.low <= 0 <= self.high:
            return "unclear"
        return "better" if (self.low > 0) != self.loss else "worse"


def compare(a: Run, b: Run, families: Mapping[str, set[str]]) -> list[Difference]:
    """b against a, by length, on the questions that both answered: the mean over the tasks of each family, then each task."""
    scores = {sample_of(answer): answer["score"] for answer in a.answers}
    common = [answer for answer in b.answers if sample_of(answer) in scores]
    cells = grouped(common, lambda answer: (answer["length"], answer["task"]))
    pairs = {key: np.array([(scores[sample_of(x)], x["score"]) for x in answers]) for key, answers in cells.items()}
    differences = []
    for length, keys in grouped(sorted(pairs), itemgetter(0)).items():
        averaged = {name: [key for key in keys if key[1] in family] for name, family in families.items()}
        averaged = {name: of_mean for name, of_mean in averaged.items() if len(of_mean) > 1}
        for name, of_mean in averaged.items():
            differences.append(_difference(f"{name} of {len(of_mean)} tasks", length, [pairs[key] for key in of_mean]))
        for key in keys:
            in_mean = any(key in of_mean for of_mean in averaged.values())
            differences.append(_difference(key[1], length, [pairs[key]])._replace(in_mean=in_mean))
    return differences


def compare_sequences(a: Run, b: Run) -> list[Difference]:
    """b against a on the sequences that both have read: the share of right answers in each, or its mean loss in nats."""
    known = {sequences_of(a, record): record["by_row"] for record in a.records if "by_row" in record}
    differences = []
    for record in b.records:
        if "by_row" in record and (of_a := known.get(sequences_of(b, record))):
            loss = not EVALS[record["eval"]].headline.higher_is_better
            name = f"loss of {record['source']}" if loss else f"{record['eval']}: {record['source']}"
            differences.append(_difference(name, record["length"], [np.stack([of_a, record["by_row"]], 1)], loss))
    return differences


def compare_wins(a: Run, b: Run) -> list[Difference]:
    """b against a on the answers of both that a judge compared: their shares of the prompts, with the interval of b's."""
    differences = []
    for record, log_probs in win_rate.pairs(a, b):
        of_b, *ends, n = win_rate.win_rate(log_probs)
        scores = 1 - of_b, of_b, *(2 * x - 1 for x in (of_b, *ends))
        differences.append(
            Difference(f"win rate on {record['source']}", record["length"], n, *scores, fewest=n, loss=False, wins=True)
        )
    return differences


def _difference(task: str, length: int, cells: Sequence[np.ndarray], loss: bool = False) -> Difference:
    """The mean over tasks of b - a, of each of which there are pairs [n, 2]."""
    bounds = statistics.UNBOUNDED if loss else statistics.OF_SCORES
    intervals = np.array([statistics.mean_within(pairs[:, 1] - pairs[:, 0], bounds) for pairs in cells])
    mean, *ends = statistics.mean_of(intervals)
    low, high = (None if math.isnan(x) else x for x in ends)
    a, b = np.mean([pairs.mean(0) for pairs in cells], axis=0).tolist()
    sizes = [len(pairs) for pairs in cells]
    return Difference(task, length, sum(sizes), a, b, mean, low, high, min(sizes), loss)


def differences(runs: Sequence[Run]) -> dict[str, list[Difference]]:
    """Every further run against the first, by its name."""
    averaged = [evaluation for evaluation in measured(runs) if evaluation.report().mean]
    families = {x.report().mean: {record["task"] for _, record in records_of(runs, x.name)} for x in averaged}
    return {x.name: compare(runs[0], x, families) + compare_sequences(runs[0], x) + compare_wins(runs[0], x) for x in runs[1:]}


def sentence(first: str, name: str, of_run: Sequence[Difference]) -> str:
    """Which of two runs is better where, by how much: of each task at its longest length, means of tasks before single ones."""
    if not of_run:
        return f"{name} and {first} have no question and no sequence in common: they cannot be compared."
    longest = {x.task: x for x in sorted(of_run, key=attrgetter("length")) if not x.in_mean}.values()
    headlines = sorted(longest, key=lambda x: (x.loss, x.fewest == x.pairs, -abs(x.difference)))
    amounts = grouped(headlines, attrgetter("verdict"))
    parts = [f"{verdict} on {' and '.join(map(_amount, amounts[verdict][:2]))}" for verdict in VERDICTS if verdict in amounts]
    return f"{name} against {first}: {'; '.join(parts)}. Of {len(of_run)} comparisons: {_counts(of_run)}."


def _counts(of_run: Sequence[Difference]) -> str:
    counts = Counter(x.verdict for x in of_run)
    return ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])


def _amount(x: Difference) -> str:
    if x.wins:
        low, high = (f"{50 * (1 + end):.0f}" for end in (x.low, x.high))
        few = ", too few" * (x.fewest < PAIRS)
        return f"{x.task} at {tokens(x.length)} (wins {100 * x.b:.0f}% ({low} to {high}) of n = {x.pairs:,} prompts{few})"
    scale, unit, digits = (1, "nats", 3) if x.loss else (100, "points", 0)
    half = "" if x.low is None else f" ± {scale * max(x.difference - x.low, x.high - x.difference):.{digits}f}"
    pairs = f"n = {x.pairs:,}{' sequences' * x.loss}{', too few' * (x.fewest < PAIRS)}"
    return f"{x.task} at {tokens(x.length)} ({signed(scale * x.difference, digits)}{half} {unit}, {pairs})"


def sections(runs: Sequence[Run]) -> list[Section]:
    """Differences of scores with their intervals, a panel for each length, and a table of them and of losses."""
    compared, first = differences(runs), runs[0].name
    panels: dict[int, list[Line]] = {}
    for number, (name, of_run) in enumerate(compared.items(), 1):
        for length, of_length in grouped((x for x in of_run if not x.loss), attrgetter("length")).items():
            panels.setdefault(length, []).append(Line("no difference", None, {x.task: [0.0] * 3 for x in of_length}))
            panels[length].append(Line(name, number, {x.task: (x.difference, x.low, x.high) for x in of_length}))
    images = []
    if panels:
        by_name = {f"length {tokens(length)}": panels[length] for length in sorted(panels)}
        figure = pictures.lines(by_name, "", f"score less that of {first}", "linear")
        findings = "; ".join(f"{name} {_counts([x for x in of_run if not x.loss])}" for name, of_run in compared.items())
        note = "With intervals of 95%: one that has 0 in it is unclear."
        images = [Picture("comparison", f"Scores against {first}: {findings}.", figure, note, "comparison")]
    text = (
        "Only questions that both runs were asked count, word for word, and sequences that both have read. The interval is "
        "Student's for the differences of pairs; where all pairs differ by the same, it follows from Wilson's, as Newcombe's "
        f"does; that of a win rate is Wilson's. Fewer than {PAIRS} pairs of a task leave it unclear. The mean of tasks gives "
        "each task the same weight, that of sequences each sequence. Of losses, less is better."
    )
    columns = [RUN, TASK, LENGTH, Column("pairs", ","), Column(first, ",.3f"), Column("run's", ",.3f")]
    columns += [*(Column(name, signed) for name in ("difference", "95% from", "to")), Column("verdict")]
    rows = [[name, *x[: x._fields.index("fewest")], x.verdict] for name, of_run in compared.items() for x in of_run]
    title = f"Against {first} on the same questions and sequences: scores between 0 and 1, losses in nats"
    return [Section("comparison", "Comparison", [text], images, [Table("comparison", title, columns, rows)])] if rows else []
