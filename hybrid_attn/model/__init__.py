"""The language model: `init` makes its parameters, `apply` runs it, `losses` scores a batch."""

from hybrid_attn.model.transformer import (
    Execution,
    apply,
    execution_on,
    init,
    logits,
    losses,
    losses_and_aux,
    specs,
    unembedding,
)

__all__ = ["Execution", "apply", "init", "logits", "losses", "losses_and_aux", "execution_on", "specs", "unembedding"]
