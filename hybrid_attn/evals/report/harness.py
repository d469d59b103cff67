"""Tasks of lm-evaluation-harness in a report: a table of their values."""

from collections.abc import Sequence

from hybrid_attn.evals.report import statistics
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Section
from hybrid_attn.evals.report.tables import LENGTH, TASK, Column, Table, interval, of_records

FIELDS = ("filter", "shots", "version", "documents", "requests", "truncated", "windowed")  # beside a value


def table(runs: Sequence[Run]) -> Table:
    """Values with what the records have beside them, and the interval of 95% that their documents leave."""
    records = records_of(runs, "harness")
    columns = [
        *(TASK, LENGTH, Column("metric"), Column("value", ",.4f"), Column("± stderr", ",.4f", "stderr")),
        *(*interval(value_interval, 4), *(Column(x) for x in FIELDS if any(x in record for _, record in records))),
    ]
    return of_records("harness", "lm-evaluation-harness", records, columns)


def value_interval(record: dict) -> tuple[float | None, float | None]:
    """A normal interval from the standard error; Wilson's where that is 0, for a share of so many documents."""
    value, error, documents = record["value"], record.get("stderr"), record.get("documents")
    if value is None or error is None:
        return None, None
    if error:
        return value - statistics.Z * error, value + statistics.Z * error
    is_share = value in (0, 1) and isinstance(documents, int) and documents > 0
    return statistics.wilson(value * documents, documents) if is_share else (None, None)


def sections(runs: Sequence[Run]) -> list[Section]:
    text = (
        "A truncated request lost the beginning of its prompt: its score says little about context. A windowed text was scored "
        "in several pieces."
    )
    return [Section("harness", "Harness", [text], [], [table(runs)], "harness")]


REPORT = EvaluationReport(sections, columns=())
