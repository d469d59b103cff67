"""Tables of plain values, and their forms: HTML that sorts, CSV and Markdown."""

import csv
import io
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from hybrid_attn.evals.report import escape

Value = str | int | float | None


class Column(NamedTuple):
    """A heading, what a value looks like, and which values are marked."""

    name: str
    show: Callable[[Any], str] = str
    marked: Callable[[Any], bool] = lambda value: False


class Table(NamedTuple):
    """`name` is that of its files; a missing value is None."""

    name: str
    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Value]]


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


def html(table: Table) -> str:
    """With what JavaScript sorts by in `data-value`."""
    numbers = numeric(table)
    heads = "".join(
        f'<th scope="col"{" class=number" * is_number}><button type="button">{escape.html(column.name)}</button></th>'
        for column, is_number in zip(table.columns, numbers, strict=True)
    )
    rows = "\n".join(
        f"<tr>{''.join(_cell(*x) for x in zip(table.columns, row, numbers, strict=True))}</tr>" for row in table.rows
    )
    link = f' <a class="file" href="tables/{escape.file_name(table.name)}.csv">CSV</a>'
    return (
        f'<figure class="table" data-name="{escape.html(table.name)}"><figcaption>{escape.html(table.title)}{link}</figcaption>'
        '<div class="scroll" tabindex="0">'
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></figure>"
    )


def markdown(table: Table) -> str:
    """A table of GitHub's Markdown, aligned so that it reads in a terminal; a marked value is bold."""
    lines = [[escape.markdown(column.name) for column in table.columns]]
    for row in table.rows:
        cells = [escape.markdown(_shown(column, value)) for column, value in zip(table.columns, row, strict=True)]
        lines.append([f"**{x}**" if _is_marked(c, v) else x for c, v, x in zip(table.columns, row, cells, strict=True)])
    right, widths = numeric(table), [max(3, *map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * (width - 1) + (":" if is_number else "-") for width, is_number in zip(widths, right, strict=True)]
    body = "\n".join(f"| {' | '.join(_aligned(line, widths, right))} |" for line in (lines[0], rule, *lines[1:]))
    return f"**{escape.markdown(table.title)}**\n\n{body}\n"


def plain(table: Table) -> str:
    """For a terminal: columns aligned, two spaces between them."""
    lines = [[escape.label(column.name) for column in table.columns]]
    lines += [[escape.label(_shown(*cell)) for cell in zip(table.columns, row, strict=True)] for row in table.rows]
    right, widths = numeric(table), [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join("  ".join(_aligned(line, widths, right)).rstrip() for line in lines)


def _aligned(line: Sequence[str], widths: Sequence[int], right: Sequence[bool]) -> list[str]:
    cells = zip(line, widths, right, strict=True)
    return [text.rjust(width) if is_number else text.ljust(width) for text, width, is_number in cells]


def numeric(table: Table) -> list[bool]:
    """Which columns have numbers."""
    return [any(isinstance(row[i], (int, float)) for row in table.rows) for i in range(len(table.columns))]


def comma_separated(table: Table) -> str:
    """The values themselves; a missing one is empty."""
    return lines_of([[column.name for column in table.columns], *table.rows])


def lines_of(rows: Sequence[Sequence[Value]]) -> str:
    """Rows as CSV; no cell is a formula to a spreadsheet."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([map(escape.csv, row) for row in rows])
    return out.getvalue()


def _cell(column: Column, value: Value, is_number: bool) -> str:
    names = [name for name, holds in (("number", is_number), ("marked", _is_marked(column, value))) if holds]
    kind = f' class="{" ".join(names)}"' if names else ""
    raw = "" if value is None else escape.html(str(value))
    return f'<td{kind} data-value="{raw}">{escape.html(_shown(column, value))}</td>'


def _shown(column: Column, value: Value) -> str:
    return "–" if value is None else column.show(value)


def _is_marked(column: Column, value: Value) -> bool:
    return value is not None and column.marked(value)
