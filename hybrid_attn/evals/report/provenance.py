"""Where the numbers of a report come from, and what was not measured."""

import re
from collections.abc import Iterable, Mapping, Sequence

from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.report.tables import RUN, Column, Table, tokens

HASH = re.compile("[0-9a-f]{64}")  # of which a page shows the beginning; files hold all of it
LONGEST_VALUE = 300  # characters of a value of run.json that the page shows


def absent(runs: Sequence[Run]) -> list[Section]:
    """What was not measured of each run, and why."""
    units = grouped(((run.name, *unit) for run in runs for unit in run.absent), lambda x: (*x[:3], x[4]))
    columns = [RUN, Column("evaluation"), Column("part"), Column("lengths"), Column("reason")]
    rows = [[*names, ", ".join(tokens(x[3]) for x in of_reason), reason] for (*names, reason), of_reason in units.items()]
    table = Table("absent", "Not measured, and in no average", columns, rows)
    return [Section("absent", "Absent", [], [], [table])] if rows else []


def provenance(runs: Sequence[Run]) -> Section:
    """What each run was, a column each."""
    flat = [{key: x for key, x in _leaves(run.provenance) if key != "settings.absent"} for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    columns = [Column("of the run"), *(Column(run.name) for run in runs)]
    rows = [[key, *(_plain(values.get(key)) for values in flat)] for key in keys]
    return Section("provenance", "Provenance", [], [], [Table("provenance", "Where the numbers come from", columns, rows)])


def _leaves(values: Mapping, prefix: str = "", depth: int = 8) -> Iterable[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and depth:
            yield from _leaves(value, f"{prefix}{key}.", depth - 1)
        else:
            yield f"{prefix}{key}", value


def _plain(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:12]
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        text = f"{value:,}"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
