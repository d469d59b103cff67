"""The sections of a report, in order: an overview, those of evaluations, a comparison, and where the numbers come from."""

from collections.abc import Mapping, Sequence

from flax.traverse_util import flatten_dict

from hybrid_attn.evals.evaluation import Evaluation
from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.report import comparison, escape, layers
from hybrid_attn.evals.report.runs import Run, measured
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.report.tables import RUN, Column, Table, markdown, of_records, tokens

ABOUT = (
    Column("layers", layers.layout),
    Column("parameters", ","),
    Column("trained at", tokens, "seq_len"),
    Column("step", ",", lambda run, _: run.provenance.get("step")),
)
LONGEST_VALUE = 80  # characters of a value of run.json that the page shows; files hold all of it
DEEPEST = 8  # names of a value of run.json, after which an object is shown as it is


def sections(runs: Sequence[Run]) -> list[Section]:
    """Those of the evaluations that the runs have records of, between the overview and the comparison."""
    table = overview(runs)
    meanings = " ".join(f"{column.name}: {column.meaning}." for column in table.columns if column.meaning)
    paragraphs = [*filter(None, [meanings]), *layers.meanings(runs)]
    of_evaluations = [section for evaluation in measured(runs) for section in evaluation.report().sections(runs)]
    after = [*comparison.sections(runs), *absent(runs), provenance(runs)]
    return [Section("overview", "At a glance", paragraphs, [], [table]), *of_evaluations, *after]


def overview(runs: Sequence[Run]) -> Table:
    """A line for each run: what it is, then numbers of its evaluations, in the columns in which some run has a value."""
    columns, models = [*ABOUT], [(run, run.provenance["model"]) for run in runs]
    for evaluation in measured(runs):
        of_evaluation = evaluation.report().columns
        columns += [_headline(evaluation)] if of_evaluation is None else of_evaluation
    shown = [column for column in columns if any(column.of(*x) is not None for x in models)]
    return of_records("overview", "The runs", models, shown)


def _headline(evaluation: Evaluation) -> Column:
    name, headline = evaluation.name, evaluation.headline
    return Column(name, headline.form.format, lambda run, _: headline.value(x) if (x := run.of(name)) else None)


def terminal(content: Mapping) -> str:
    """The overview and the verdict of a page, for the end of a program's output."""
    sentences = [*content["verdict"], *(f"warning: {text}" for text in content["warnings"])]
    return "\n".join([markdown(overview(content["runs"]), escape.label), *map(escape.label, sentences)])


def absent(runs: Sequence[Run]) -> list[Section]:
    """What was not measured of each run, and why."""
    units = [(run.name, *unit) for run in runs for unit in run.provenance.get("settings", {}).get("absent", ())]
    columns = [RUN, Column("evaluation"), Column("part"), Column("lengths"), Column("reason")]
    by_reason = grouped(units, lambda unit: (*unit[:3], unit[4]))
    rows = [[*names, ", ".join(tokens(x[3]) for x in of_reason), reason] for (*names, reason), of_reason in by_reason.items()]
    table = Table("absent", "Not measured, and in no average", columns, rows)
    return [Section("absent", "Absent", [], [], [table])] if rows else []


def provenance(runs: Sequence[Run]) -> Section:
    """What each run was, a column each."""
    flat = [flatten_dict(run.provenance, is_leaf=lambda path, _: len(path) > DEEPEST, sep=".") for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values if key != "settings.absent")
    shown = [{key: escape.shortened(str(value), LONGEST_VALUE) for key, value in x.items() if value is not None} for x in flat]
    columns = [Column("of the run"), *(Column(run.name) for run in runs)]
    rows = [[key, *(values.get(key) for values in shown)] for key in keys]
    return Section("provenance", "Provenance", [], [], [Table("provenance", "Where the numbers come from", columns, rows)])
