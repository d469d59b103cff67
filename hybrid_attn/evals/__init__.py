"""Evaluations: `EVALS[name](subject, spec)` yields records, plain dicts of numbers and names."""

from hybrid_attn.evals import position, recall
from hybrid_attn.evals.subject import Spec, Subject

EVALS = {"position": position.run, "recall": recall.run}

__all__ = ["EVALS", "Spec", "Subject"]
