"""The language model: `init` makes its parameters, `apply` runs it, `losses` scores a batch."""

from hybrid_attn.model.execution import Execution, execution_on
from hybrid_attn.model.transformer import abstract_params, apply, init, logits, losses, losses_and_aux, specs

__all__ = ["Execution", "abstract_params", "apply", "execution_on", "init", "logits", "losses", "losses_and_aux", "specs"]
