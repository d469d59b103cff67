"""Preferences in a report: log-probabilities of held-out pairs of completions, and indicators of over-optimisation."""

from collections.abc import Sequence

from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Section
from hybrid_attn.evals.report.tables import LENGTH, SOURCE, Column, of_records

PAIRS = [
    *(SOURCE, LENGTH, Column("pairs", ","), Column("chosen more likely", ",.3f", "accuracy")),
    *(Column("chosen (nats)", ",.3f", "chosen"), Column("rejected (nats)", ",.3f", "rejected")),
    *(Column("difference (nats)", ",.3f", "margin"), Column("entropy (bits)", ",.3f", "entropy_bits")),
    *(Column("renormalised (bits)", ",.3f", "renormalised_entropy_bits"), Column("mass", ",.3f")),
]
TEXT = (
    "Log-probabilities of completions are sums over their tokens, means over the pairs. Entropy and mass are those of the ten "
    "most likely next tokens in the chosen completions. Where from one checkpoint to the next the entropy turns from rising to "
    "falling, or the mass falls, training on preferences has gone too far: arXiv 2410.11677."
)


def sections(runs: Sequence[Run]) -> list[Section]:
    table = of_records("preferences", "Pairs by source", records_of(runs, "preferences"), PAIRS)
    return [Section("preferences", "Preferences", [TEXT], (), [table], "preferences")]


REPORT = EvaluationReport(sections)
