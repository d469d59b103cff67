"""Learning rate by step, in one piece over all stages or in one for each."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from hybrid_attn.config import LrSchedule, Optim, Piece
from hybrid_attn.trees import check

TOLERANCE = 1e-3  # rates that differ by less, relative to the larger one, meet

# The decay of wsd from its first to its last rate, over so many steps. `join_schedules` evaluates it at steps before it too.
DECAYS: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    "linear": lambda start, end, steps: optax.linear_schedule(start, end, max(steps - 1, 1)),
    "sqrt": lambda start, end, steps: lambda step: start + (end - start) * _share(step, steps) ** 0.5,
    "exponential": lambda start, end, steps: lambda step: start * (end / start) ** _share(step, steps),
}


def schedule(optim: Optim, pieces: Sequence[Piece]) -> optax.Schedule:
    """The rate of each step of a run; a piece without a schedule has that of `optim`.

    ValueError where a stage does not begin at the last rate of the stage before, unless it warms up or asks for the jump.
    """
    schedules, before = [], 0.0
    for index, (steps, own) in enumerate(pieces):
        form = own or optim.lr_schedule
        start = _start(index, form, before)
        schedules.append(of_stage(form, start, before, steps))
        before = _last(form, start, steps)
    return optax.join_schedules(schedules, [*itertools.accumulate(steps for steps, _ in pieces)][:-1])


def _start(index: int, form: LrSchedule, before: float) -> float:
    """The rate after the warm-up of a stage; `before` is the last rate of the stage before it."""
    field = f"stages[{index}].lr_schedule.start"
    check(index > 0 or form.start is not None, f"{field} is None, and no stage is before it; give a rate")
    start = before if form.start is None else form.start
    check(start > 0, f"{field} is None, and the stage before ends at 0; give a rate, and warmup_steps to rise to it")
    meets = abs(start - before) <= TOLERANCE * max(start, before)
    check(
        index == 0 or meets or form.warmup_steps > 0 or form.jump,
        f"{field}={start:.4g} is not the last rate of the stage before, {before:.4g}; use start=None to go on from there, "
        "warmup_steps to rise to it, or jump=True",
    )
    return start


def of_stage(form: LrSchedule, start: float, before: float, steps: int) -> optax.Schedule:
    """The rates of so many steps: a linear warm-up from `before` to `start`, then the shape of `form`."""
    warmup = min(form.warmup_steps, steps - 1)
    first, left = before + (start - before) / max(warmup, 1), steps - warmup
    rise = optax.linear_schedule(first, start, max(warmup - 1, 1))
    if form.shape == "wsd":
        decay = min(max(round(form.decay_fraction * steps), 1), left)
        fall = DECAYS[form.decay_shape](start, form.end, decay)
        return optax.join_schedules([rise, optax.constant_schedule(start), fall], [warmup, steps - decay])
    shapes = {
        "constant": lambda: optax.constant_schedule(start),
        "linear": lambda: optax.linear_schedule(start, form.end, max(left - 1, 1)),
        "cosine": lambda: optax.cosine_decay_schedule(start, max(left - 1, 1), alpha=form.end / start),
        "inverse_sqrt": lambda: lambda step: _inverse_sqrt(start, warmup, jnp.maximum(step, 0)),
    }
    return optax.join_schedules([rise, shapes[form.shape]()], [warmup])


def _share(step, steps: int) -> jax.Array:
    """The share of a decay of so many steps that is done."""
    return jnp.clip(step, 0, steps - 1) / max(steps - 1, 1)


def _inverse_sqrt(start: float, warmup: int, step):
    return start * (max(warmup, 1) / (max(warmup, 1) + step)) ** 0.5


def _last(form: LrSchedule, start: float, steps: int) -> float:
    """The rate of the last of so many steps."""
    if form.shape == "inverse_sqrt":
        warmup = min(form.warmup_steps, steps - 1)
        return _inverse_sqrt(start, warmup, steps - 1 - warmup)
    return start if form.end is None else form.end
