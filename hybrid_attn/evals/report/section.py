"""A section of a report, and all that a report shows of one evaluation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.statistics import Share
from hybrid_attn.evals.report.tables import Column, Table


class Picture(NamedTuple):
    """The caption says what the figure shows, the note how to read it; the names are of its file and of its numbers' table."""

    name: str
    caption: str
    figure: Any  # of matplotlib
    note: str = ""
    table: str = ""


class Section(NamedTuple):
    """`evaluation` is the name of the one that it shows, if any."""

    name: str
    title: str
    paragraphs: Sequence[str]
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    evaluation: str = ""


class Reading(NamedTuple):
    """Shares of right answers by length; `chance` is that of a guess."""

    questions: str
    by_length: dict[int, Share]
    chance: float = 0


class EvaluationReport(NamedTuple):
    """What a report shows of one evaluation.

    `columns` are its numbers in the overview; their records are `model` of run.json, and None stands for the headline. The
    verdict of a page is about the first reading of all evaluations; it has their sentences if there is no reading or no other
    run. `files` returns further files by their paths in tables/. `mean` names the mean over its tasks in comparisons, if any.
    """

    sections: Callable[[Sequence[Run]], list[Section]]
    columns: Sequence[Column] | None = None
    verdict: Callable[[Run], Iterable[Reading | str]] = lambda run: ()
    files: Callable[[Run], Mapping[str, str]] = lambda run: {}
    mean: str = ""
