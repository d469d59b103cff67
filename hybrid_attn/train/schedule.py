"""Learning rate by step, in one piece over all stages or in one for each.

A schedule that counts tokens has the rates of one that counts steps, read at another step: where n tokens of the piece are seen
after a step, at number n / t, and t are the tokens of the last step. So both are equal where all steps have as many tokens.
"""

import itertools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hybrid_attn.config import LrSchedule, Optim, Piece
from hybrid_attn.trees import check

TOLERANCE = 1e-3  # rates that differ by less, relative to the larger one, meet

# The decay of wsd from its first to its last rate, over so many steps. `join_schedules` evaluates it at steps before it too.
DECAYS: dict[str, Callable[[float, float, float], optax.Schedule]] = {
    "linear": lambda start, end, steps: optax.linear_schedule(start, end, max(steps - 1, 1)),
    "sqrt": lambda start, end, steps: lambda step: start + (end - start) * _share(step, steps) ** 0.5,
    "exponential": lambda start, end, steps: lambda step: start * (end / start) ** _share(step, steps),
}


def schedule(optim: Optim, pieces: Sequence[Piece]) -> optax.Schedule:
    """The rate of each step of a run; a piece without a schedule has that of `optim`.

    ValueError where a stage does not begin at the last rate of the stage before, unless it warms up or asks for the jump.
    """
    schedules, before = [], 0.0
    for index, piece in enumerate(pieces):
        form = piece.lr_schedule or optim.lr_schedule
        start = _start(index, form, before)
        schedules.append(of_piece(form, start, before, piece))
        before = _last(form, start, *_lengths(form, piece))
    return optax.join_schedules(schedules, [*itertools.accumulate(piece.steps for piece in pieces)][:-1])


def _start(index: int, form: LrSchedule, before: float) -> float:
    """The rate after the warm-up of a stage; `before` is the last rate of the stage before it."""
    field = f"stages[{index}].lr_schedule.start"
    check(index > 0 or form.start is not None, f"{field} is None, and no stage is before it; give a rate")
    start = before if form.start is None else form.start
    check(start > 0, f"{field} is None, and the stage before ends at 0; give a rate, and warmup_steps to rise to it")
    meets = abs(start - before) <= TOLERANCE * max(start, before)
    check(
        index == 0 or meets or form.warmup_steps or form.warmup_tokens or form.jump,
        f"{field}={start:.4g} is not the last rate of the stage before, {before:.4g}; use start=None to go on from there, "
        "warmup_steps to rise to it, or jump=True",
    )
    return start


def of_piece(form: LrSchedule, start: float, before: float, piece: Piece) -> optax.Schedule:
    """The rates of a piece: a linear warm-up from `before` to `start`, then the shape of `form`."""
    steps, warmup = _lengths(form, piece)
    if form.warmup_tokens is None:
        first = before + (start - before) / max(warmup, 1)
        return _shaped(form, optax.linear_schedule(first, start, max(warmup - 1, 1)), start, warmup, steps)
    numbers, tokens = (np.cumsum([0, *x]) for x in ((n for n, _ in piece.spans), (n * x for n, x in piece.spans)))
    seen = tokens / piece.spans[-1][1]
    rise = optax.linear_schedule(before, start, max(warmup, 1e-6))  # optax takes 0 steps for a constant schedule
    rates = _shaped(form, lambda step: rise(step + 1), start, warmup, steps)
    return lambda step: rates(jnp.interp(step + 1, numbers, seen) - 1)


def _lengths(form: LrSchedule, piece: Piece) -> tuple[float, float]:
    """The steps of a piece and of its warm-up. Where it counts tokens, they are fractions, of the size of the last step."""
    if form.warmup_tokens is None:
        return piece.steps, min(form.warmup_steps, piece.steps - 1)
    last = piece.spans[-1][1]
    steps = sum(number * tokens for number, tokens in piece.spans) / last
    return steps, min(form.warmup_tokens / last, steps - 1)


def _shaped(form: LrSchedule, rise: optax.Schedule, start: float, warmup: float, steps: float) -> optax.Schedule:
    """`rise` for the steps of the warm-up, then the shape of `form` from `start`."""
    left = steps - warmup
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


def _share(step, steps: float) -> jax.Array:
    """The share of a decay of so many steps that is done."""
    return jnp.clip(step, 0, steps - 1) / max(steps - 1, 1)


def _inverse_sqrt(start: float, warmup: float, step):
    return start * (max(warmup, 1) / (max(warmup, 1) + step)) ** 0.5


def _last(form: LrSchedule, start: float, steps: float, warmup: float) -> float:
    """The rate of the last of so many steps."""
    if form.shape == "inverse_sqrt":
        return _inverse_sqrt(start, warmup, steps - 1 - warmup)
    return start if form.end is None else form.end
