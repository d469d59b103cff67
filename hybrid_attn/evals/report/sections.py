"""The sections of a report, in order: an overview, those of evaluations, comparisons, and where the numbers come from."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter

from flax.traverse_util import flatten_dict

from hybrid_attn.evals.evaluation import Evaluation
from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.report import escape, layers, pictures, statistics, tables, verdict
from hybrid_attn.evals.report.pictures import Line
from hybrid_attn.evals.report.runs import Run, measured
from hybrid_attn.evals.report.section import Picture, Section
from hybrid_attn.evals.report.tables import LENGTH, RUN, TASK, Column, Table, signed, tokens

ABOUT = (
    Column("layers", layers.layout),
    Column("parameters", ","),
    Column("trained at", tokens, "seq_len"),
    Column("step", ",", lambda run, _: run.provenance.get("step")),
)
HASH = re.compile("[0-9a-f]{64}")  # of which a page shows the beginning; files hold all of it
LONGEST_VALUE = 300  # characters of a value of run.json that the page shows
DEEPEST = 8  # names of a value of run.json, after which an object is shown as it is


def sections(runs: Sequence[Run]) -> list[Section]:
    """Those of the evaluations that the runs have records of, between the overview and the comparison."""
    table = overview(runs)
    meanings = " ".join(f"{column.name}: {column.meaning}." for column in table.columns if column.meaning)
    paragraphs = [*filter(None, [meanings]), *layers.meanings(runs)]
    of_evaluations = [section for evaluation in measured(runs) for section in evaluation.report().sections(runs)]
    after = [*comparison(runs), *absent(runs), provenance(runs)]
    return [Section("overview", "At a glance", paragraphs, [], [table]), *of_evaluations, *after]


def overview(runs: Sequence[Run]) -> Table:
    """A line for each run: what it is, then numbers of its evaluations, in the columns in which some run has a value."""
    columns, models = [*ABOUT], [(run, run.provenance["model"]) for run in runs]
    for evaluation in measured(runs):
        of_evaluation = evaluation.report().columns
        columns += [_headline(evaluation)] if of_evaluation is None else of_evaluation
    shown = [column for column in columns if any(column.of(*x) is not None for x in models)]
    return tables.of_records("overview", "The runs", models, shown)


def _headline(evaluation: Evaluation) -> Column:
    name, headline = evaluation.name, evaluation.headline
    return Column(name, headline.form.format, lambda run, _: headline.value(x) if (x := run.of(name)) else None)


def terminal(content: Mapping) -> str:
    """The overview and the verdict of a page, for the end of a program's output."""
    sentences = [*content["verdict"], *(f"warning: {text}" for text in content["warnings"])]
    return "\n".join([tables.markdown(overview(content["runs"]), escape.label), *map(escape.label, sentences)])


def comparison(runs: Sequence[Run]) -> list[Section]:
    """Every further run against the first: differences of scores with their intervals, a panel for each length, and a table."""
    compared, first = verdict.differences(runs), runs[0].name
    rows = [[name, *x[: x._fields.index("fewest")], x.verdict] for name, of_run in compared for x in of_run]
    scores = [(name, i, x) for i, (name, of_run) in enumerate(compared, 1) for x in of_run if not x.loss]
    panels: dict[str, list[Line]] = {}
    for length in sorted({x.length for _, _, x in scores}):
        of_length = grouped((x for x in scores if x[2].length == length), itemgetter(0, 1))
        of_runs = [
            Line(*key, {x.task: (x.difference, x.low, x.high) for _, _, x in of_run}) for key, of_run in of_length.items()
        ]
        zero = Line("no difference", None, {x.task: [0.0] * 3 for _, _, x in scores if x.length == length})
        panels[f"length {tokens(length)}"] = [*of_runs, zero]
    images = []
    if scores:
        counts = {name: Counter(x.verdict for x in of_run if not x.loss) for name, of_run in compared}
        findings = [f"{name}: {', '.join(f'{n} {x}' for x, n in sorted(of_run.items()))}" for name, of_run in counts.items()]
        figure = pictures.lines(panels, "", f"score less that of {first}", "linear")
        note = "With intervals of 95%: one that has 0 in it is unclear."
        images = [Picture("comparison", f"Scores against {first}. {'; '.join(findings)}.", figure, note, "comparison")]
    text = (
        "Only questions that both runs were asked count, word for word, and sequences that both have read. The interval is "
        "Student's for the differences of pairs; where all pairs differ by the same, it follows from Wilson's, as Newcombe's "
        f"does. Fewer than {statistics.PAIRS} pairs of a task leave it unclear. The mean of tasks gives each task the same "
        "weight, that of sequences each sequence. Of losses, less is better."
    )
    columns = [RUN, TASK, LENGTH, Column("pairs", ","), Column(first, ",.3f"), Column("run's", ",.3f")]
    columns += [*(Column(name, signed) for name in ("difference", "95% from", "to")), Column("verdict")]
    title = f"Against {first} on the same questions and sequences: scores between 0 and 1, losses in nats"
    return [Section("comparison", "Comparison", [text], images, [Table("comparison", title, columns, rows)])] if rows else []


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
    columns = [Column("of the run"), *(Column(run.name) for run in runs)]
    rows = [[key, *(_plain(values.get(key)) for values in flat)] for key in keys]
    return Section("provenance", "Provenance", [], [], [Table("provenance", "Where the numbers come from", columns, rows)])


def _plain(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:12]
    if isinstance(value, (list, tuple)):
        value = ", ".join(map(str, value))
    return escape.shortened(f"{value:,}" if type(value) is int and value >= 10_000 else str(value), LONGEST_VALUE)
