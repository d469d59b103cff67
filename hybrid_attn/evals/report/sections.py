"""The sections of a report, in order: text, pictures and tables."""

from collections.abc import Sequence

from hybrid_attn.evals.report import contents, heatmaps, layers, overview, statistics
from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.table import EVALS


def sections(runs: Sequence[Run]) -> list[Section]:
    """Those of the evaluations that the runs have records of, between the overview and the comparison."""
    measured = {record["eval"] for run in runs for record in run.records}
    evaluations = sorted((x for x in EVALS.values() if x.name in measured), key=lambda x: x.section_order)
    of_evaluations = [section for evaluation in evaluations for section in evaluation.section(runs)]
    return [_overview(runs), *of_evaluations, *_comparison(runs), *_absent(runs), _provenance(runs)]


def _overview(runs: Sequence[Run]) -> Section:
    table = overview.table(runs)
    words = [" ".join(meanings)] if (meanings := overview.meanings(table)) else []
    return Section("overview", "At a glance", [*words, *layers.meanings(runs)], [], [table], [])


def _comparison(runs: Sequence[Run]) -> list[Section]:
    differences = contents.differences(runs)
    first, drawn = runs[0].name, []
    for number, (name, of_run) in enumerate(differences, 1):
        if of_run := [x for x in of_run if not x.loss]:
            counts = [f"{sum(contents.verdict(x) == y for x in of_run)} {y}" for y in ("better", "worse", "unclear")]
            caption = f"{name} against {first}: of {len(of_run)} comparisons {', '.join(counts)}."
            note = f"{name} less {first}; in bold and in the colour of the better run where it is clear."
            figure = heatmaps.differences(of_run, number)
            drawn.append(Picture(f"comparison_{number}", caption, figure, note, "comparison"))
    if not any(of_run for _, of_run in differences):
        return []
    words = [
        "Only questions that both runs were asked count, word for word, and rows that both have read. The interval is a paired "
        f"bootstrap over them, with {statistics.RESAMPLES:,} resamples; where all pairs differ by the same, it follows from "
        f"Wilson's, as Newcombe's does. Fewer than {statistics.PAIRS} pairs of a task leave it unclear. The mean of tasks "
        "gives each task the same weight, that of rows each row. Of losses, less is better."
    ]
    return [Section("comparison", "Comparison", words, drawn, [contents.comparison(first, differences)], [])]


def _absent(runs: Sequence[Run]) -> list[Section]:
    table = contents.absent(runs)
    return [Section("absent", "Absent", [], [], [table], [])] if table.rows else []


def _provenance(runs: Sequence[Run]) -> Section:
    return Section("provenance", "Provenance", [], [], [contents.provenance(runs)], [])
