"""Tables of plain values, as CSV and Markdown; a template makes HTML of their cells."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hybrid_attn.evals.report import escape

Value = str | int | float | None


class Column(NamedTuple):
    """A column; `show`, a format or a function, makes text of its values, bold from some value on.

    `value` is a function of the run and the record, or a field of the record; if it is empty, the field of the column's name.
    `meaning` is for columns of the overview.
    """

    name: str
    show: str | Callable[[Any], str] = ""
    value: str | Callable[[Any, dict], Value] = ""
    bold_from: float | None = None
    meaning: str = ""

    def of(self, run: Any, record: dict) -> Value:
        return self.value(run, record) if callable(self.value) else record.get(self.value or self.name)

    def cell(self, value: Value) -> tuple[Value, str, bool]:
        """A value, its text for a reader, and whether it is bold."""
        if value is None:
            return value, "–", False
        text = self.show(value) if callable(self.show) else format(value, self.show)
        return value, text, self.bold_from is not None and value >= self.bold_from


class Table(NamedTuple):
    """`name` is that of its files; a missing value is None. A reader opens a folded table, which Markdown leaves out."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]
    is_folded: bool = False

    def names(self) -> list[str]:
        return [column.name for column in self.columns]

    def objects(self) -> list[dict[str, Value]]:
        """Rows by the names of their columns."""
        return [dict(zip(self.names(), row, strict=True)) for row in self.rows]

    def numeric(self) -> list[bool]:
        """Which columns have numbers."""
        return [any(isinstance(row[i], (int, float)) for row in self.rows) for i in range(len(self.columns))]

    def cells(self) -> list[list[tuple[Value, str, bool]]]:
        """What every form of the table shows."""
        return [[column.cell(value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]


def of_records(name: str, title: str, records: Iterable[tuple[Any, dict]], columns: Sequence[Column]) -> Table:
    """A line for each record, after the name of its run."""
    rows = [[run.name, *(column.of(run, record) for column in columns)] for run, record in records]
    return Table(name, title, [RUN, *columns], rows)


def interval(of: Callable[[dict], tuple[float | None, float | None]], digits: int = 3) -> list[Column]:
    """The columns of an interval of 95%."""
    return [Column(name, f",.{digits}f", lambda run, r, i=i: of(r)[i]) for i, name in enumerate(("95% from", "to"))]


def tokens(length: int) -> str:
    """8192 as 8K, 1000 as 1,000."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return f"{length:,}"


def signed(value: float, digits: int = 3) -> str:
    """With so many digits after the point, and a sign where they are not all zeros."""
    text = f"{value:+.{digits}f}".replace("-", "−")
    return text if any(digit in text for digit in "123456789") else text[1:]


RUN, SOURCE, TASK, LENGTH = Column("run"), Column("source"), Column("task"), Column("length", tokens)


def markdown(table: Table, escaped: Callable[[str], str] = escape.markdown) -> str:
    """GitHub's Markdown, aligned so that it reads in a terminal, too."""
    rows = [[f"**{escaped(text)}**" if is_bold else escaped(text) for _, text, is_bold in row] for row in table.cells()]
    lines = [[escaped(name) for name in table.names()], *rows]
    widths, numeric = [max(3, *map(len, column)) for column in zip(*lines, strict=True)], table.numeric()
    lines.insert(1, ["-" * (width - 1) + "-:"[is_number] for width, is_number in zip(widths, numeric, strict=True)])
    sides = [f">{width}" if is_number else f"<{width}" for width, is_number in zip(widths, numeric, strict=True)]
    return "\n".join(f"| {' | '.join(map(format, line, sides))} |" for line in lines)


def comma_separated(rows: Iterable[Iterable[Value]]) -> str:
    """Rows of values as CSV, in which a missing one is empty; no cell is a formula to a spreadsheet."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([map(escape.csv, row) for row in rows])
    return out.getvalue()
