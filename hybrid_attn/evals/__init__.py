"""Evaluations: modules whose `run` yields records, plain dicts of numbers and names; `suite` runs those that are named."""

from hybrid_attn.evals.subject import Spec, Subject

__all__ = ["Spec", "Subject"]
