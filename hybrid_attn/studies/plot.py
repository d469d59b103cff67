"""The plot of a study, made of its results alone."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from hybrid_attn.studies.results import Results
from hybrid_attn.studies.statistics import mean_of
from hybrid_attn.studies.study import Study
from hybrid_attn.trees import check, not_among

if TYPE_CHECKING:  # it takes a second to import
    from matplotlib.figure import Figure

SCALES = ("share", "linear", "log")
Line = Mapping[int | str, tuple[str, str]]  # number or name on the horizontal axis -> cell and metric


class Curves(NamedTuple):
    """Means over seeds with intervals of 95%: a panel for each name, in it a line for each label.

    `across` and `up` are the names of the axes; `scale` is "share" (0 to 100%), "linear" or "log". A dashed line stands between
    the numbers up to those of `trained` and larger ones.
    """

    panels: Mapping[str, Mapping[str, Line]]
    across: str
    up: str
    scale: str = "share"
    trained: Sequence[int] = ()

    def check(self, study: Study) -> None:
        """ValueError for a panel without lines or with two equal ones, and for an unknown cell, metric or scale."""
        check(bool(self.panels) and all(self.panels.values()), f"the plot of {study.title!r} needs a line in every panel")
        for name, lines in self.panels.items():
            is_distinct = len({tuple(line.items()) for line in lines.values()}) == len(lines)
            check(is_distinct, f"the plot of {study.title!r} has the panel {name!r}, in which two lines show the same")
        problem = not_among(self.scale, SCALES)
        check(not problem, f"the plot of {study.title!r} has the scale {self.scale!r}, which {problem}")
        points = [point for panel in self.panels.values() for line in panel.values() for point in line.values()]
        study.check_names("cell", study.cells, [cell for cell, _ in points])
        study.check_names("metric", study.metrics, [metric for _, metric in points])

    def __call__(self, results: Results) -> "Figure":
        from hybrid_attn.evals.report import pictures

        def point(cell: str, metric: str) -> tuple[float, float, float]:
            mean = mean_of([*results.values(cell, metric).values()], results.study.metrics[metric].bounds)
            return (mean.mean, mean.low, mean.high)

        labels = [*dict.fromkeys(label for lines in self.panels.values() for label in lines)]  # each has a colour in all panels
        panels = {
            name: [
                pictures.Line(label, labels.index(label), {x: point(*of) for x, of in line.items()})
                for label, line in lines.items()
            ]
            for name, lines in self.panels.items()
        }
        return pictures.lines(panels, self.across, self.up, self.scale, self.trained)


def over_metrics(cells: Sequence[str], metrics: Mapping[int | str, str]) -> dict[str, Line]:
    """A line for each cell, over the numbers or names of metrics."""
    return {cell: {x: (cell, metric) for x, metric in metrics.items()} for cell in cells}


def over_cells(lines: Mapping[str, Mapping[int | str, str]], metric: str) -> dict[str, Line]:
    """A line for each label, over the numbers or names of its cells."""
    return {label: {x: (cell, metric) for x, cell in cells.items()} for label, cells in lines.items()}


def svg(results: Results, name: str) -> str:
    """The picture of the study; equal results give equal bytes."""
    from hybrid_attn.evals.report import pictures
    from hybrid_attn.evals.report.section import Picture

    picture = Picture(name, results.study.title, results.study.plot(results))
    start, end, rest = str(pictures.svg(picture)).partition(">")
    return f'{start}{end}<rect width="100%" height="100%" fill="white"/>{rest}\n'  # pages may be dark, and letters are
