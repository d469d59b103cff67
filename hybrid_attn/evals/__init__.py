"""Evaluations: `EVALS[name](subject, spec)` yields records, plain dicts of numbers and names."""

from hybrid_attn.evals import position
from hybrid_attn.evals.subject import Spec, Subject

EVALS = {"position": position.run}

__all__ = ["EVALS", "Spec", "Subject"]
