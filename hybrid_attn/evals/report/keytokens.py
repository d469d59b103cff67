"""Key tokens in a report: a table of their losses."""

from collections.abc import Sequence

from hybrid_attn.evals.report.losses import LOSS, incomparable
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Section
from hybrid_attn.evals.report.tables import LENGTH, SOURCE, Column, Table, count, fixed, of_records, tokens

FIELDS = [
    *(SOURCE, LENGTH, (Column("near context", tokens), "short"), (Column("key tokens", count), "key_tokens")),
    *((Column("of tokens", count), "tokens"), LOSS, (Column("perplexity", fixed(2)), "perplexity")),
]


def table(runs: Sequence[Run]) -> Table:
    return of_records("key_tokens", "Tokens whose loss depends on the far context", records_of(runs, "key_tokens"), FIELDS)


def sections(runs: Sequence[Run]) -> list[Section]:
    text = (
        "Key tokens are those that the far context makes more likely than the near context alone does; the loss is over these "
        "tokens only. Each model has its own key tokens, so that the losses of two models are not over the same tokens."
    )
    paragraphs = [text, *incomparable(runs, "key_tokens")]
    return [Section("key_tokens", "Key tokens", paragraphs, [], [table(runs)], [], "key_tokens")]


REPORT = EvaluationReport(sections, columns=())
