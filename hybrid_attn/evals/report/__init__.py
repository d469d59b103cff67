"""The report: from the files that the suite wrote of each run to a page, pictures and tables."""

from hybrid_attn.evals.report.files import write
from hybrid_attn.evals.report.runs import Run, read

__all__ = ["Run", "read", "write"]
