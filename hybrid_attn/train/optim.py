"""The optimiser and its learning-rate schedule."""

import jax
import optax

from hybrid_attn.config import Optim

UNDECAYED = (
    "weight",
    "embed",
    "unembed",
    "sink",
    "temperature",
)  # norms, embeddings and per-head scalars, by leaf name


def schedule(optim: Optim, total_steps: int) -> optax.Schedule:
    """Learning rate by step: a linear warm-up, then a cosine, or a constant with a linear decay at the end (WSD).

    The last step has the last rate.
    """
    warmup = min(optim.warmup_steps, total_steps - 1)
    last = optim.final_lr_ratio * optim.lr
    rise = optax.linear_schedule(optim.lr / max(warmup, 1), optim.lr, max(warmup - 1, 1))
    if optim.schedule == "cosine":
        fall = optax.cosine_decay_schedule(optim.lr, max(total_steps - warmup - 1, 1), alpha=optim.final_lr_ratio)
        return optax.join_schedules([rise, fall], [warmup])
    decay = min(max(round(optim.decay_fraction * total_steps), 1), total_steps - warmup)
    fall = optax.linear_schedule(optim.lr, last, max(decay - 1, 1))
    return optax.join_schedules([rise, optax.constant_schedule(optim.lr), fall], [warmup, total_steps - decay])


def decayed(params: dict) -> dict:
    """True for the leaves that weight decay shrinks: the matrices, told by name since stacking adds an axis to every leaf."""
    return jax.tree.map_with_path(lambda path, _: path[-1].key not in UNDECAYED, params)


def optimiser(optim: Optim, total_steps: int) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) after clipping by the global norm."""
    return optax.chain(
        optax.clip_by_global_norm(optim.clip_norm),
        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decayed),
        optax.scale_by_learning_rate(schedule(optim, total_steps)),
    )
