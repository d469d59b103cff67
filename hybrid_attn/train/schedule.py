"""Learning rate by step, in one piece over all stages or in one for each."""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

from hybrid_attn.config import LrSchedule, Optim, Piece
from hybrid_attn.trees import check

MEET = 1e-3  # rates that differ by less, relative to the larger, are no jump

# From the first and the last rate of a decay, and its steps.
DECAYS: dict[str, Callable[[float, float, int], optax.Schedule]] = {
    "linear": lambda start, end, steps: optax.linear_schedule(start, end, max(steps - 1, 1)),
    "sqrt": lambda start, end, steps: lambda i: start + (end - start) * jnp.sqrt(i / max(steps - 1, 1)),
    "exponential": lambda start, end, steps: lambda i: start * (end / start) ** (i / max(steps - 1, 1)),
}


def schedule(optim: Optim, pieces: Sequence[Piece]) -> optax.Schedule:
    """The rate of each step of a run; a piece without a schedule has that of `optim`.

    ValueError where a stage does not begin at the last rate of the stage before, unless it warms up or asks for the jump.
    """
    schedules, before = [], 0.0
    for index, (steps, own) in enumerate(pieces):
        rate = own or optim.lr_schedule
        schedules.append(shaped(rate, _start(index, rate, before), before, steps))
        with jax.ensure_compile_time_eval():
            before = float(schedules[-1](steps - 1))
    return optax.join_schedules(schedules, [*itertools.accumulate(steps for steps, _ in pieces)][:-1])


def _start(index: int, rate: LrSchedule, before: float) -> float:
    """The rate that a stage has after its warm-up; `before` is the last one of the stage before it."""
    check(
        index > 0 or rate.start is not None, "stages[0].lr_schedule.start is None, and no stage is before it; give a rate"
    )
    start = before if rate.start is None else rate.start
    meets = abs(start - before) <= MEET * max(start, before)
    check(
        index == 0 or meets or rate.warmup_steps > 0 or rate.jump,
        f"stages[{index}].lr_schedule.start={start:.4g} is not the last rate of the stage before, {before:.4g}; use start=None "
        "to go on from there, warmup_steps to rise to it, or jump=True",
    )
    return start


def shaped(rate: LrSchedule, start: float, before: float, steps: int) -> optax.Schedule:
    """The rates of so many steps: a linear warm-up from `before` to `start`, then the shape of `rate`; the last is `end`."""
    warmup = min(rate.warmup_steps, steps - 1)
    first = before + (start - before) / max(warmup, 1)
    rise, left = optax.linear_schedule(first, start, max(warmup - 1, 1)), steps - warmup
    if rate.shape == "wsd":
        decay = min(max(round(rate.decay_fraction * steps), 1), left)
        fall = DECAYS[rate.decay_shape](start, rate.end, decay)
        return optax.join_schedules([rise, optax.constant_schedule(start), fall], [warmup, steps - decay])
    shapes = {
        "constant": lambda: optax.constant_schedule(start),
        "linear": lambda: optax.linear_schedule(start, rate.end, max(left - 1, 1)),
        "cosine": lambda: optax.cosine_decay_schedule(start, max(left - 1, 1), alpha=rate.end / start),
        "inverse_sqrt": lambda: lambda i: start * jnp.sqrt(max(warmup, 1) / (max(warmup, 1) + i)),
    }
    return optax.join_schedules([rise, shapes[rate.shape]()], [warmup])
