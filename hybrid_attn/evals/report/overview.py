"""A line for each run with one number of each evaluation: the first table of a report, and what a terminal shows."""

from collections.abc import Sequence

from hybrid_attn.evals.report import contents, escape, layers, tables, verdict
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.tables import Column, Table, count, fixed, tokens
from hybrid_attn.evals.ruler.scores import averages

MEANINGS = {
    "RULER Avg.": "RULER's mean over tasks and lengths",
    "needles": "the share of needles found, over all lengths, depths and numbers of needles",
    "recall": "the share of right answers in the first task, at the longest length",
    "loss": "nats per token on held-out text of one source, at the length of training",
    "bits per byte": "the same loss per byte of the text",
    "bigram": "the bits per byte of a bigram model on that text",
}


def table(runs: Sequence[Run]) -> Table:
    """Without the columns in which no run has a value."""
    columns = [
        *(Column("run"), Column("layers", layers.layout), Column("parameters", count), Column("trained at", tokens)),
        *(Column("step", count), Column("RULER Avg.", fixed(1)), Column("of tasks"), Column("effective")),
        *(Column("needles", fixed(3)), Column("recall", fixed(3)), Column("loss", fixed(3))),
        *(Column("bits per byte", fixed(3)), Column("bigram", fixed(3)), Column("of source")),
    ]
    rows = [_row(run) for run in runs]
    filled = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    return Table("overview", "The runs", [columns[i] for i in filled], [[row[i] for i in filled] for row in rows])


def _row(run: Run) -> list:
    model = run.provenance["model"]
    means = contents.ruler_means(run, contents.is_long) if run.of("ruler") else {}
    recalls = run.of("recall")
    losses = [r for r in run.of("position") if contents.is_total(r) and r["length"] == run.trained]
    loss = losses[0] if losses else {}
    bigrams = [r["bits_per_byte"] for r in run.of("bigram") if r["source"] == loss.get("source")]
    return [
        *(run.name, model.get("layers"), model.get("parameters"), run.trained, run.provenance.get("step")),
        averages(means)["average"] if means else None,
        contents.of_all(contents.ruler_tasks_of(run, contents.is_long)) if means else None,
        contents.effective(means) if means else None,
        contents.needles_found(run.of("needle")),
        max(recalls, key=lambda r: r["length"])["accuracy"] if recalls else None,
        *(loss.get("loss"), loss.get("bits_per_byte"), bigrams[0] if bigrams else None, loss.get("source")),
    ]


def meanings(overview: Table) -> list[str]:
    """What the columns of an overview are."""
    return [f"{column.name}: {MEANINGS[column.name]}." for column in overview.columns if column.name in MEANINGS]


def terminal(runs: Sequence[Run]) -> str:
    """The overview and the verdict, for the end of a program's output."""
    sentences = [*verdict.sentences(runs), *(f"warning: {text}" for text in verdict.warnings(runs))]
    return "\n".join([tables.plain(table(runs)), *map(escape.label, sentences)])
