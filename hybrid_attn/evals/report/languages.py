"""Languages in a report: loss, bits per byte and accuracy of each held-out source, and their means."""

from collections.abc import Mapping, Sequence

from hybrid_attn.evals.records import grouped, mean_of
from hybrid_attn.evals.report.losses import BITS, LOSS, NUMBER, incomparable
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Section
from hybrid_attn.evals.report.tables import LENGTH, RUN, SOURCE, Column, Table

ACCURACY = Column("next token right", ",.3f", "accuracy")
COLUMNS = [RUN, SOURCE, LENGTH, NUMBER, LOSS, BITS, ACCURACY]
MEAN = "mean of all"
TEXT = (
    "Of each source: the loss of a token, the same per byte of text, and the share of tokens that the model finds most "
    "likely. Between languages, the loss depends on how the tokenizer cuts them, and bits per byte on their script. The mean "
    "gives each source the same weight."
)


def sections(runs: Sequence[Run]) -> list[Section]:
    rows = []
    for (run, length), of_length in grouped(records_of(runs, "languages"), lambda x: (x[0].name, x[1]["length"])).items():
        records = [record for _, record in of_length]
        rows += [_row(run, length, r["source"], r["tokens"], [r]) for r in records]
        rows += [_row(run, length, MEAN, None, records)] if len(records) > 1 else []
    table = Table("languages", "Loss and accuracy by source", COLUMNS, rows)
    return [Section("languages", "Languages", [TEXT, *incomparable(runs, "languages")], (), [table], "languages")]


def _row(run: str, length: int, source: str, tokens: int | None, records: Sequence[Mapping]) -> list:
    return [run, source, length, tokens, *(mean_of(records, name) for name in ("loss", "bits_per_byte", "accuracy"))]


REPORT = EvaluationReport(sections)
