"""The page of a study: handwritten prose, and between two markers the table, the plot and the verdicts of its results."""

import re
from collections.abc import Mapping, Sequence, Sized
from pathlib import Path

from hybrid_attn.bench.measurement import table as markdown
from hybrid_attn.studies.results import FILE, Results
from hybrid_attn.studies.statistics import mean_of, ordered, verdict
from hybrid_attn.trees import check

PLOT = "plot.svg"
BEGIN, END = "<!-- results: written by tools/study.py -->", "<!-- end of results -->"
SECTIONS = ("Design", "Verdict", "What would change our mind")  # of a new page, for the author to write


def table(results: Results) -> str:
    """A row for each cell: means of its seeds, the seeds that learned the task, and what a run costs."""
    learns = results.study.learned is not None
    header = ["cell", *_columns(results), *["learned"] * learns, "CPU seconds", "FLOPs"]
    return markdown(header, [_row(results, cell) for cell in ordered(results)])


def _columns(results: Results) -> Sequence[str]:
    """The metrics that the table shows."""
    return results.study.table or [*results.study.metrics]


def _row(results: Results, cell: str) -> list[str]:
    lines, means = [*results.of(cell).values()], [_shown(results, cell, metric) for metric in _columns(results)]
    if not lines:
        return [cell]
    learned = [f"{len(results.learned(cell))} of {len(lines)}"] * (results.study.learned is not None)
    return [cell, *means, *learned, _cost(lines, "cpu_seconds", ",.0f"), _cost(lines, "flops", ".3g")]


def _shown(results: Results, cell: str, name: str) -> str:
    """The mean of a metric."""
    metric, values = results.study.metrics[name], [*results.values(cell, name).values()]
    return mean_of(values, metric.bounds).show(metric.form) + _share(values, results.of(cell))


def _cost(lines: Sequence[dict], key: str, form: str) -> str:
    values = [line[key] for line in lines if line[key] is not None]
    return f"{mean_of(values).mean:{form}}{_share(values, lines)}" if values else "—"


def _share(values: Sized, lines: Sized) -> str:
    """How many seeds have a number, where that is not all."""
    return f", {len(values)} of {len(lines)}" if len(values) < len(lines) else ""


def verdicts(results: Results) -> list[str]:
    claims = results.study.claims
    return [verdict(results, claim) for claim in (claims(results) if callable(claims) else claims)]


def made_with(results: Results) -> str:
    """The seeds, the machines, the versions and the revisions of the results, in a few sentences."""

    def all_of(show) -> str:
        return "; ".join(sorted({show(line) for line in results.lines}))

    versions = all_of(lambda line: shown_versions(line["versions"]))
    revisions = all_of(lambda line: re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", line["revision"]))
    machines = all_of(lambda line: f"{line['machine']['processor']}, {line['machine']['memory_gib']:.0f} GiB")
    conditions = ", on one core and without a compile cache" * results.study.one_core
    return (
        f"{_number(results)} CPU seconds are those of one run, its start and its evaluation included{conditions}. FLOPs are "
        f"those of its training. Machine: {machines}. Versions: {versions}. Revision: {revisions}. Every run is a line of "
        f"`{FILE}`."
    )


def shown_versions(versions: Mapping[str, str]) -> str:
    """Those of which numbers depend."""
    return ", ".join(f"{name} {versions[name]}" for name in ("python", "jax", "jaxlib"))


def _number(results: Results) -> str:
    numbers = {len(results.of(cell)) for cell in results.study.cells} - {0}
    if numbers == {1}:
        return "One seed."
    low = f"{min(numbers)} to " if len(numbers) > 1 else ""
    return f"Means of {low}{max(numbers)} seeds, with intervals of 95% by Student's t where the seeds differ."


def block(results: Results, plot: str, command: str) -> str:
    """What stands between the markers; `plot` is the path of the picture, seen from the page."""
    parts = [table(results), f"![{results.study.title}]({plot})"]
    if lines := verdicts(results):
        parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join([BEGIN, *parts, f"`{command}`: {made_with(results)}", END])


def page(path: Path, results: Results, plot: str, command: str, is_own: bool) -> str:
    """The text of the page at `path` with new results.

    A new page that is the study's own gets headings for the author to write under.
    ValueError where the page has no markers.
    """
    new = block(results, plot, command)
    if not path.exists():
        return "\n\n".join([f"# {results.study.title}", results.study.question, *(_headings(new) if is_own else [new])]) + "\n"
    text = path.read_text()
    is_marked = text.count(BEGIN) == text.count(END) == 1
    check(is_marked, f"{path} needs the lines {BEGIN!r} and {END!r} once each, around its results")
    return text[: text.index(BEGIN)] + new + text[text.index(END) + len(END) :]


def _headings(new: str) -> Sequence[str]:
    design, *others = (f"## {name}" for name in SECTIONS)
    return [design, "## Results", new, *others]
