"""What a model can read. Evaluations give records, plain dicts of numbers and names; `suite` measures those that are named.

`position`, `recall`, `attention` and `keytokens` yield theirs from a `EvalModel` and a `Spec` with `run`. `needle`, `ruler` and
`harness` ask questions, and make theirs of the answers of an engine.
"""

from hybrid_attn.evals.types import EvalModel, Spec

__all__ = ["Spec", "EvalModel"]
