"""The page of a study: handwritten prose, and between two markers the table, the plot and the verdicts of its results."""

import re
from collections.abc import Sequence
from pathlib import Path

from hybrid_attn.bench.measurement import table as markdown
from hybrid_attn.studies.results import FILE, Results
from hybrid_attn.studies.statistics import mean_of, verdict
from hybrid_attn.trees import check

PLOT = "plot.svg"
BEGIN, END = "<!-- results: written by tools/study.py -->", "<!-- end of results -->"
SECTIONS = ("Design", "Verdict", "What would change our mind")  # of a new page, for the author to write


def table(results: Results) -> str:
    """A row for each cell: means of its seeds, the seeds that learned the task, and what a run costs."""
    metrics, learns = results.study.metrics, results.study.learned is not None
    header = ["cell", *metrics, *["learned"] * learns, "CPU seconds", "FLOPs"]
    return markdown(header, [_row(results, cell) for cell in _ordered(results)])


def _row(results: Results, cell: str) -> list[str]:
    lines, means = [*results.of(cell).values()], [_shown(results, cell, metric) for metric in results.study.metrics]
    if not lines:
        return [cell]
    learned = [f"{len(results.learned(cell))} of {len(lines)}"] * (results.study.learned is not None)
    costs = [
        f"{mean_of([line[key] for line in lines]).mean:{form}}" for key, form in (("cpu_seconds", ",.0f"), ("flops", ".3g"))
    ]
    return [cell, *means, *learned, *costs]


def _shown(results: Results, cell: str, name: str) -> str:
    """The mean of a metric, with the number of seeds that have it where that is not all."""
    metric, values = results.study.metrics[name], [*results.values(cell, name).values()]
    of = len(results.of(cell))
    return mean_of(values, metric.bounds).show(metric.form) + (f", {len(values)} of {of}" if len(values) < of else "")


def _ordered(results: Results) -> list[str]:
    """The cells; if the study says by which metric, the best first, and those without a number last."""
    cells, by = list(results.study.cells), results.study.sorted_by
    if by is None:
        return cells
    sign = -1 if results.study.metrics[by].higher_is_better else 1
    means = {cell: mean_of([*results.values(cell, by).values()]) for cell in cells}
    return sorted(cells, key=lambda cell: sign * means[cell].mean if means[cell].number else float("inf"))


def verdicts(results: Results) -> list[str]:
    return [verdict(results, claim) for claim in results.study.claims]


def made_with(results: Results) -> str:
    """The seeds, the machines, the versions and the revisions of the results, in a few sentences."""

    def all_of(show) -> str:
        return "; ".join(sorted({show(line) for line in results.lines}))

    seeds = sorted({len(results.of(cell)) for cell in results.study.cells})
    number = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    versions = all_of(lambda line: ", ".join(f"{name} {line['versions'][name]}" for name in ("python", "jax", "jaxlib")))
    revisions = all_of(lambda line: re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", line["revision"]))
    machines = all_of(lambda line: f"{line['machine']['processor']}, {line['machine']['memory_gib']:.0f} GiB")
    return (
        f"Means of {number} seeds, with intervals of 95% by Student's t where the seeds differ. CPU seconds are those of one "
        "run, its start and its evaluation included. FLOPs are those of its training. "
        f"Machine: {machines}. Versions: {versions}. Revision: {revisions}. Every run is a line of `{FILE}`."
    )


def block(results: Results, plot: str, command: str) -> str:
    """What stands between the markers; `plot` is the path of the picture, seen from the page."""
    parts = [table(results), f"![{results.study.title}]({plot})"]
    if results.study.claims:
        parts.append("\n".join(f"- {line}" for line in verdicts(results)))
    return "\n\n".join([BEGIN, *parts, f"`{command}`: {made_with(results)}", END])


def page(path: Path, results: Results, plot: str, command: str) -> str:
    """The text of the page at `path` with new results; a new page gets headings for the author to write under.

    ValueError where the page has no markers.
    """
    new = block(results, plot, command)
    if not path.exists():
        return "\n\n".join([f"# {results.study.title}", results.study.question, *_headings(new)]) + "\n"
    text = path.read_text()
    is_marked = text.count(BEGIN) == text.count(END) == 1
    check(is_marked, f"{path} needs the lines {BEGIN!r} and {END!r} once each, around its results")
    return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]


def _headings(new: str) -> Sequence[str]:
    design, *others = (f"## {name}" for name in SECTIONS)
    return [design, "## Results", new, *others]
