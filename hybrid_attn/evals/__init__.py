"""Evaluations of what a model reads: one file and one record each (`table.EVALS`); `suite` runs them by their names.

`position`, `recall`, `attention`, `keytokens` and `routing` yield records, plain dicts of numbers and names, from an
`EvalModel` and a `Spec` with `records_of`, and `preferences` makes one with `record_of`. `needle`, `ruler` and `harness` make
theirs from what an engine answers or scores.
"""

from hybrid_attn.evals.types import EvalModel, Spec

__all__ = ["EvalModel", "Spec"]
