"""Tables of plain values, as CSV, Markdown and plain text; a template makes HTML of their cells."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hybrid_attn.evals.report import escape

Value = str | int | float | None


class Column(NamedTuple):
    """A column; `show`, a format or a function, makes text of its values, and `meaning` is for columns of the overview.

    `value` is a function of the run and the record, or a field of the record; if it is empty, the field of the column's name.
    """

    name: str
    show: str | Callable[[Any], str] = ""
    value: str | Callable[[Any, dict], Value] = ""
    is_bold: Callable[[Any], bool] = lambda value: False
    meaning: str = ""

    def of(self, run: Any, record: dict) -> Value:
        return self.value(run, record) if callable(self.value) else record.get(self.value or self.name)

    def cell(self, value: Value) -> tuple[Value, str, bool]:
        """A value, its text for a reader, and whether it is bold."""
        if value is None:
            return value, "–", False
        return value, self.show(value) if callable(self.show) else format(value, self.show), self.is_bold(value)


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


def markdown(table: Table) -> str:
    """GitHub's Markdown, aligned so that it reads in a terminal."""
    head, *body = _aligned(table, escape.markdown, bold="**{}**", least=3)
    rule = ["-" * (len(text) - 1) + (":" if is_number else "-") for text, is_number in zip(head, table.numeric(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def plain(table: Table) -> str:
    """For a terminal: columns aligned, two spaces between them."""
    return "\n".join("  ".join(line).rstrip() for line in _aligned(table, escape.label))


def _aligned(table: Table, escaped: Callable[[str], str], bold: str = "{}", least: int = 0) -> list[list[str]]:
    """Headings and rows, each cell as wide as the widest of its column, `least` at least; numbers are at the right."""
    rows = [[(bold if is_bold else "{}").format(escaped(text)) for _, text, is_bold in row] for row in table.cells()]
    lines = [[escaped(name) for name in table.names()], *rows]
    widths = [max(least, *map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.rjust if is_number else str.ljust for is_number in table.numeric()]
    return [[side(text, width) for side, text, width in zip(sides, line, widths, strict=True)] for line in lines]


def comma_separated(rows: Iterable[Iterable[Value]]) -> str:
    """Rows of values as CSV, in which a missing one is empty; no cell is a formula to a spreadsheet."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([map(escape.csv, row) for row in rows])
    return out.getvalue()
