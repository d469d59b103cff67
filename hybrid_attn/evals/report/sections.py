"""The sections of a report, in order: text, pictures and tables."""

from collections.abc import Sequence

from hybrid_attn.evals.report import comparison, overview, provenance
from hybrid_attn.evals.report.runs import Run, measured
from hybrid_attn.evals.report.section import Section


def sections(runs: Sequence[Run]) -> list[Section]:
    """Those of the evaluations that the runs have records of, between the overview and the comparison."""
    of_evaluations = [section for evaluation in measured(runs) for section in evaluation.report().sections(runs)]
    after = [*comparison.sections(runs), *provenance.absent(runs), provenance.provenance(runs)]
    return [overview.section(runs), *of_evaluations, *after]
