"""The language model: `init` makes its parameters, `apply` runs it, `losses` scores a batch."""

from hybrid_attn.model.transformer import Run, apply, init, logits, losses, losses_and_aux, run_on, specs, unembedding

__all__ = ["Run", "apply", "init", "logits", "losses", "losses_and_aux", "run_on", "specs", "unembedding"]
