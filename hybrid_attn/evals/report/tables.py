"""Tables of plain values, as CSV, Markdown and plain text; a template makes HTML of their cells."""

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from hybrid_attn.evals.report import escape

Value = str | int | float | None


class Column(NamedTuple):
    """A heading, what a value looks like, and which values are bold."""

    name: str
    show: Callable[[Any], str] = str
    is_bold: Callable[[Any], bool] = lambda value: False


# A column, and the name of a record's field or a function of the run and the record.
Field = tuple[Column, str | Callable[[Any, dict], Value]]


class Cell(NamedTuple):
    """A value, its text for a reader, and whether it is bold."""

    value: Value
    text: str
    is_bold: bool


class Table(NamedTuple):
    """`name` is that of its files; a missing value is None."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]

    def numeric(self) -> list[bool]:
        """Which columns have numbers."""
        return [any(isinstance(row[i], (int, float)) for row in self.rows) for i in range(len(self.columns))]

    def cells(self) -> list[list[Cell]]:
        """What every form of the table shows."""
        return [[_cell(column, value) for column, value in zip(self.columns, row, strict=True)] for row in self.rows]


def _cell(column: Column, value: Value) -> Cell:
    return Cell(value, "–", False) if value is None else Cell(value, column.show(value), column.is_bold(value))


def of_records(name: str, title: str, records: Iterable[tuple[Any, dict]], fields: Sequence[Field]) -> Table:
    """A line for each record, after the name of its run."""
    rows = [[run.name, *(x(run, r) if callable(x) else r.get(x) for _, x in fields)] for run, r in records]
    return Table(name, title, [RUN, *(column for column, _ in fields)], rows)


def interval(of: Callable[[dict], tuple[float | None, float | None]], digits: int = 3) -> list[Field]:
    """The fields of an interval of 95%."""
    names = ("95% from", "to")
    return [(Column(name, fixed(digits)), lambda run, r, i=i: of(r)[i]) for i, name in enumerate(names)]


def tokens(length: int) -> str:
    """8192 as 8K, 1000 as 1,000."""
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if length >= unit and length % unit == 0:
            return f"{length // unit}{name}"
    return f"{length:,}"


def count(number: int) -> str:
    return f"{number:,}"


def fixed(digits: int) -> Callable[[float], str]:
    """With as many digits after the point."""
    return lambda value: f"{value:,.{digits}f}"


def significant(digits: int) -> Callable[[float], str]:
    """With as many digits that are no leading zeros: 0.0328, 4.1e-06."""
    return lambda value: f"{value:.{digits}g}"


def signed(digits: int) -> Callable[[float], str]:
    """With as many digits after the point, and a sign where they are not all zeros."""

    def shown(value: float) -> str:
        text = f"{value:+.{digits}f}".replace("-", "−")
        return text if any(digit in text for digit in "123456789") else text[1:]

    return shown


RUN = Column("run")
SOURCE, TASK, LENGTH = (Column("source"), "source"), (Column("task"), "task"), (Column("length", tokens), "length")


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown, aligned so that it reads in a terminal; a value of the column's `is_bold` is bold."""
    rows = [
        [f"**{escape.markdown(cell.text)}**" if cell.is_bold else escape.markdown(cell.text) for cell in row]
        for row in table.cells()
    ]
    head, *body = _aligned(table, [[escape.markdown(column.name) for column in table.columns], *rows], 3)
    rule = ["-" * (len(text) - 1) + (":" if is_number else "-") for text, is_number in zip(head, table.numeric(), strict=True)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *body))


def plain(table: Table) -> str:
    """For a terminal: columns aligned, two spaces between them."""
    lines = [[column.name for column in table.columns], *([cell.text for cell in row] for row in table.cells())]
    return "\n".join("  ".join(line).rstrip() for line in _aligned(table, [[*map(escape.label, line)] for line in lines]))


def _aligned(table: Table, lines: Sequence[Sequence[str]], least: int = 0) -> list[list[str]]:
    """Lines whose cells are as wide as the widest of their column, `least` at least; numbers are at the right."""
    widths = [max(least, *map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.rjust if is_number else str.ljust for is_number in table.numeric()]
    return [[side(text, width) for side, text, width in zip(sides, line, widths, strict=True)] for line in lines]


def comma_separated(table: Table) -> str:
    """The values themselves; a missing one is empty."""
    return lines_of([[column.name for column in table.columns], *table.rows])


def lines_of(rows: Sequence[Sequence[Value]]) -> str:
    """Rows as CSV; no cell is a formula to a spreadsheet."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([map(escape.csv, row) for row in rows])
    return out.getvalue()
