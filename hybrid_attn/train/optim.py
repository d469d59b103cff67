"""Optimisers, and the learning-rate schedule that they share."""

from collections.abc import Callable

import jax
import optax

from hybrid_attn.config import Config, Optim, StageConfig
from hybrid_attn.model import specs
from hybrid_attn.trees import choice


def schedule(optim: Optim, total_steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then to the last step a cosine, or a constant and a linear decay (WSD)."""
    warmup = min(optim.warmup_steps, total_steps - 1)
    last = optim.final_lr_ratio * optim.lr
    rise = optax.linear_schedule(optim.lr / max(warmup, 1), optim.lr, max(warmup - 1, 1))
    if optim.schedule == "cosine":
        fall = optax.cosine_decay_schedule(optim.lr, max(total_steps - warmup - 1, 1), alpha=optim.final_lr_ratio)
        return optax.join_schedules([rise, fall], [warmup])
    decay = min(max(round(optim.decay_fraction * total_steps), 1), total_steps - warmup)
    fall = optax.linear_schedule(optim.lr, last, max(decay - 1, 1))
    return optax.join_schedules([rise, optax.constant_schedule(optim.lr), fall], [warmup, total_steps - decay])


def adamw(optim: Optim, specs: dict, total_steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=jax.tree.map(lambda spec: spec.decay, specs)),
        optax.scale_by_learning_rate(schedule(optim, total_steps)),
    )


# From the optimiser's part of a config, the `ParamSpec` of every parameter and the steps of all stages.
OPTIMISERS: dict[str, Callable[[Optim, dict, int], optax.GradientTransformation]] = {"adamw": adamw}


def optimiser(c: Config | StageConfig) -> optax.GradientTransformation:
    """The optimiser that `c.optim.optimiser` names; ValueError for one that is not in `OPTIMISERS`."""
    return choice("optim.optimiser", c.optim.optimiser, OPTIMISERS)(c.optim, specs(c.model), c.total_steps)
