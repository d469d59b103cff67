"""A line for each run with its headline numbers: the first table of a report, and what a terminal shows."""

from collections.abc import Sequence

from hybrid_attn.evals.evaluation import Evaluation
from hybrid_attn.evals.report import escape, layers, tables, verdict
from hybrid_attn.evals.report.runs import Run, measured
from hybrid_attn.evals.report.section import RunColumn, Section
from hybrid_attn.evals.report.tables import RUN, Column, Table, count, tokens

ABOUT = (
    RunColumn(RUN, lambda run: run.name),
    RunColumn(Column("layers", layers.layout), lambda run: run.provenance["model"].get("layers")),
    RunColumn(Column("parameters", count), lambda run: run.provenance["model"].get("parameters")),
    RunColumn(Column("trained at", tokens), lambda run: run.trained),
    RunColumn(Column("step", count), lambda run: run.provenance.get("step")),
)


def columns_of(runs: Sequence[Run]) -> list[RunColumn]:
    """The columns in which some run has a value: what a run is, then numbers of its evaluations."""
    columns = [*ABOUT]
    for evaluation in measured(runs):
        of_evaluation = evaluation.report().columns
        columns += [_headline(evaluation)] if of_evaluation is None else of_evaluation
    return [x for x in columns if any(x.value(run) is not None for run in runs)]


def _headline(evaluation: Evaluation) -> RunColumn:
    name, headline = evaluation.name, evaluation.headline
    return RunColumn(Column(name, headline.form.format), lambda run: headline.value(x) if (x := run.of(name)) else None)


def table(runs: Sequence[Run]) -> Table:
    columns = columns_of(runs)
    return Table("overview", "The runs", [x.column for x in columns], [[x.value(run) for x in columns] for run in runs])


def section(runs: Sequence[Run]) -> Section:
    meanings = " ".join(f"{x.column.name}: {x.meaning}." for x in columns_of(runs) if x.meaning)
    return Section("overview", "At a glance", [*filter(None, [meanings]), *layers.meanings(runs)], [], [table(runs)])


def terminal(runs: Sequence[Run]) -> str:
    """The overview and the verdict, for the end of a program's output."""
    sentences = [*verdict.sentences(runs), *(f"warning: {text}" for text in verdict.warnings(runs))]
    return "\n".join([tables.plain(table(runs)), *map(escape.label, sentences)])
