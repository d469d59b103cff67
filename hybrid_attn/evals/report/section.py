"""A section of a report, and all that a report shows of one evaluation."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.statistics import Share
from hybrid_attn.evals.report.tables import Column, Table, Value


class Section(NamedTuple):
    """`folded` tables are closed until a reader opens them. `evaluation` is the name of the one that it shows, if any."""

    name: str
    title: str
    paragraphs: Sequence[str]
    pictures: Sequence[Picture] = ()
    tables: Sequence[Table] = ()
    folded: Sequence[Table] = ()
    evaluation: str = ""


class RunColumn(NamedTuple):
    """A column of the overview: a number of each run. A page explains it if it has a `meaning`."""

    column: Column
    value: Callable[[Run], Value]
    meaning: str = ""


class Reading(NamedTuple):
    """Shares of right answers by length: the verdict says up to which length a run reads.

    `chance` is what a guess would score. The verdict on synthetic questions comes after its other sentences.
    """

    questions: str
    by_length: dict[int, Share]
    chance: float = 0
    synthetic: bool = False


class EvaluationReport(NamedTuple):
    """What a report shows of one evaluation.

    `columns` are its numbers in the overview; None stands for its headline. `verdict` yields readings and sentences of
    a run. The verdict of a page is about the first reading; it has the sentences if there is no reading or no other run.
    `files` returns further files of a run by their paths in tables/. `mean` is the name of the mean over its tasks in
    comparisons of runs; empty if there is none.
    """

    sections: Callable[[Sequence[Run]], list[Section]]
    columns: Sequence[RunColumn] | None = None
    verdict: Callable[[Run], Iterable[Reading | str]] = lambda run: ()
    files: Callable[[Run], Mapping[str, str]] = lambda run: {}
    mean: str = ""
