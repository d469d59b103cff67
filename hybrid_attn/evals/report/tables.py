"""Tables of plain values, and their forms: HTML that sorts, CSV and Markdown."""

import csv
import hashlib
import io
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import Any, NamedTuple

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


def plain(name: str) -> str:
    """What a file can be called; a name that cannot stay as it is has a hash of it, for another one may become the same."""
    kept = re.sub(r"[^\w.-]", "_", name)
    return kept if kept == name else f"{kept}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"


def html(table: Table) -> str:
    """With what JavaScript sorts by in `data-value`."""
    numeric = [any(isinstance(row[i], (int, float)) for row in table.rows) for i in range(len(table.columns))]
    heads = "".join(
        f'<th scope="col"{" class=number" * is_number}><button type="button">{escape(column.name)}</button></th>'
        for column, is_number in zip(table.columns, numeric, strict=True)
    )
    rows = "\n".join(
        f"<tr>{''.join(_cell(*x) for x in zip(table.columns, row, numeric, strict=True))}</tr>" for row in table.rows
    )
    return (
        f'<figure class="table" data-name="{table.name}"><figcaption>{escape(table.title)}</figcaption>'
        '<div class="scroll" tabindex="0">'
        f"<table><thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody></table></div></figure>"
    )


def markdown(table: Table) -> str:
    """As GitHub writes tables; a marked value is underlined there."""
    lines = [[column.name for column in table.columns], ["---"] * len(table.columns)]
    for row in table.rows:
        cells = zip(table.columns, row, strict=True)
        lines.append([f"<ins>{_shown(c, x)}</ins>" if _is_marked(c, x) else _shown(c, x) for c, x in cells])
    body = "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines)
    return f"**{table.title}**\n\n{body}\n"


def comma_separated(table: Table) -> str:
    """The values themselves; a missing one is empty."""
    return lines_of([[column.name for column in table.columns], *table.rows])


def lines_of(rows: Sequence[Sequence[Value]]) -> str:
    """Rows as CSV."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue()


def _cell(column: Column, value: Value, is_number: bool) -> str:
    names = [name for name, holds in (("number", is_number), ("marked", _is_marked(column, value))) if holds]
    kind = f' class="{" ".join(names)}"' if names else ""
    raw = "" if value is None else escape(str(value))
    return f'<td{kind} data-value="{raw}">{escape(_shown(column, value))}</td>'


def _shown(column: Column, value: Value) -> str:
    return "–" if value is None else column.show(value)


def _is_marked(column: Column, value: Value) -> bool:
    return value is not None and column.marked(value)
