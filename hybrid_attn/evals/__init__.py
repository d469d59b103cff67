"""Evaluations: `EVALS[name](subject, spec)` yields records, plain dicts of numbers and names."""

from hybrid_attn.evals import attention, keytokens, position, recall
from hybrid_attn.evals.subject import Spec, Subject

EVALS = {
    "position": position.run,
    "recall": recall.run,
    "attention_mass": attention.run,
    "key_tokens": keytokens.run,
}

__all__ = ["EVALS", "Spec", "Subject"]
