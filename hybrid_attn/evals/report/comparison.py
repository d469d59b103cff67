"""Runs against the first: a table, pictures, and a sentence of the verdict."""

from collections import Counter
from collections.abc import Sequence

from hybrid_attn.evals.report import heatmaps, statistics
from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.runs import Run, measured, records_of
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.report.statistics import Difference
from hybrid_attn.evals.report.tables import RUN, Column, Table, count, fixed, signed, tokens

VERDICTS = ("better", "worse", "unclear")


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Difference]]]:
    """Every further run against the first."""
    families = {
        name: {record["task"] for _, record in records_of(runs, evaluation.name)}
        for evaluation in measured(runs)
        if (name := evaluation.report().mean)
    }
    first, *others = runs
    return [(x.name, statistics.compare(first, x, families) + statistics.compare_sequences(first, x)) for x in others]


def table(first: str, compared: Sequence[tuple[str, list[Difference]]]) -> Table:
    columns = [
        *(
            RUN,
            Column("task"),
            Column("length", tokens),
            Column("pairs", count),
            Column(first, fixed(3)),
            Column("run's", fixed(3)),
        ),
        *(Column(name, signed(3)) for name in ("difference", "95% from", "to")),
        Column("verdict"),
    ]
    shown = Difference._fields.index("fewest")  # fields before it
    rows = [[name, *difference[:shown], difference.verdict] for name, of_run in compared for difference in of_run]
    title = f"Against {first} on the same questions and sequences: scores between 0 and 1, losses in nats"
    return Table("comparison", title, columns, rows)


def sections(runs: Sequence[Run]) -> list[Section]:
    compared = differences(runs)
    first, images = runs[0].name, []
    for number, (name, of_run) in enumerate(compared, 1):
        if scores := [x for x in of_run if not x.loss]:
            counts = Counter(x.verdict for x in scores)
            caption = f"of {len(scores)} comparisons {', '.join(f'{counts[x]} {x}' for x in VERDICTS)}."
            note = f"{name} less {first}; in bold and in the colour of the better run where it is clear."
            figure = heatmaps.differences(scores, number)
            images.append(Picture(f"comparison_{number}", f"{name} against {first}: {caption}", figure, note, "comparison"))
    if not any(of_run for _, of_run in compared):
        return []
    text = (
        "Only questions that both runs were asked count, word for word, and sequences that both have read. The interval is a "
        f"paired bootstrap over them, with {statistics.RESAMPLES:,} resamples; where all pairs differ by the same, it follows "
        f"from Wilson's, as Newcombe's does. Fewer than {statistics.PAIRS} pairs of a task leave it unclear. The mean of tasks "
        "gives each task the same weight, that of sequences each sequence. Of losses, less is better."
    )
    return [Section("comparison", "Comparison", [text], images, [table(first, compared)])]


def sentence(first: str, name: str, of_run: Sequence[Difference]) -> str:
    """Which of two runs is better where, by how much: of each task at its longest length, means of tasks before single ones."""
    if not of_run:
        return f"{name} and {first} have no question and no sequence in common: they cannot be compared."
    groups = {verdict: [] for verdict in VERDICTS}
    for difference in headlines(of_run):
        groups[difference.verdict].append(_amount(difference))
    parts = [f"{verdict} on {' and '.join(groups[verdict][:2])}" for verdict in ("better", "worse") if groups[verdict]]
    if groups["unclear"] and (not parts or len(groups["unclear"]) < 3):
        parts.append(f"unclear on {' and '.join(groups['unclear'][:2])}")
    counts = Counter(x.verdict for x in of_run)
    totals = ", ".join(f"{counts[verdict]} {verdict}" for verdict in groups if counts[verdict])
    return f"{name} against {first}: {'; '.join(parts)}. Of {len(of_run)} comparisons: {totals}."


def headlines(of_run: Sequence[Difference]) -> list[Difference]:
    """Of each task, or of the mean of its family, the comparison at the longest length: the largest clear ones first."""
    means = {x.family for x in of_run if x.is_mean}
    longest: dict[str, Difference] = {}
    for x in of_run:
        name = x.family if x.family in means else x.task
        shown = x.is_mean or x.family not in means
        if shown and (name not in longest or longest[name].length < x.length):
            longest[name] = x
    return sorted(longest.values(), key=lambda x: (x.loss, not x.is_mean, -abs(x.difference)))


def _amount(x: Difference) -> str:
    scale, unit, digits = (1, "nats", 3) if x.loss else (100, "points", 0)
    half = "" if x.low is None else f" ± {scale * max(x.difference - x.low, x.high - x.difference):.{digits}f}"
    pairs = f"n = {x.pairs:,}{' sequences' * x.loss}{', too few' * (x.fewest < statistics.PAIRS)}"
    return f"{x.task} at {tokens(x.length)} ({signed(digits)(scale * x.difference)}{half} {unit}, {pairs})"
