"""A part of a report."""

from collections.abc import Sequence
from typing import NamedTuple

from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.tables import Table


class Section(NamedTuple):
    """`folded` tables are closed until a reader opens them; `evaluation` is the one that it shows, if it shows one."""

    name: str
    title: str
    paragraphs: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    folded: Sequence[Table]
    evaluation: str = ""
