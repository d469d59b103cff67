"""The language model: `init` makes its parameters, `apply` runs it, `losses` scores a batch."""

from hybrid_attn.model.loss import losses
from hybrid_attn.model.transformer import Run, apply, init, logits, run_on, unembedding

__all__ = ["Run", "apply", "init", "logits", "losses", "run_on", "unembedding"]
