"""Checks of a resumed run against its checkpoint: changed fields, a jump of the learning rate, skipped steps.

Steps are numbered from 1 here, as in the printed lines; a range of steps includes both ends.
"""

import types
from collections.abc import Iterable, Mapping, Sequence

from hybrid_attn import trees
from hybrid_attn.config import Config, to_dict
from hybrid_attn.train.optim import schedule
from hybrid_attn.trees import check

LR_JUMP = 0.1  # a larger change, relative to the saved schedule at the same step, is a jump
Range = tuple[int, int]


def rate_jump(saved: Mapping, c: Config, start: int) -> tuple[float, float] | None:
    """Old and new learning rate of the step after `start`, if they differ by more than `LR_JUMP` of the old one.

    The old one is that of the `saved` schedule at the same step, or its last one if that run was finished.
    """
    old_steps = sum(stage["steps"] for stage in saved["stages"])
    # Not built as a config: a checkpoint of another version has other keys and values.
    before = types.SimpleNamespace(**to_dict(c)["optim"] | saved["optim"])
    old = float(schedule(before, old_steps)(min(start, old_steps - 1)))
    new = float(schedule(c.optim, c.total_steps)(start))
    return None if abs(new - old) <= LR_JUMP * abs(old) else (old, new)


def check_rate(saved: Mapping, c: Config, start: int, allowed: bool) -> list[str]:
    """A line for a jump of the learning rate after step `start` if it is `allowed`; otherwise ValueError."""
    jump = rate_jump(saved, c, start)
    if jump is None:
        return []
    old, new = jump
    change = f"from {old:.4g} to {new:.4g} at step {start + 1}"
    if allowed:
        return [f"rate         jumps {change}, as --allow_lr_jump allows"]
    changed = [line for line in trees.differences(saved, to_dict(c)) if line.startswith(("optim.", "stages"))]
    lines = [f"the learning rate would jump {change} (saved -> new):", *(f"  {line}" for line in changed)]
    if old > 0:
        lines.append(f"to go on at the rate of step {start}: {' '.join(held_rate(c, start, old))}")
    raise ValueError("\n".join([*lines, "to let it jump: --allow_lr_jump"]))


def held_rate(c: Config, start: int, rate: float) -> list[str]:
    """Flags with which the rate after step `start` is `rate`, until the final decay begins."""
    share = min(c.optim.decay_fraction, (c.total_steps - start) / c.total_steps)
    values = {"lr": f"{rate:.6g}", "schedule": "wsd", "warmup_steps": "0", "decay_fraction": f"{share:.6g}"}
    return [f"--config.optim.{name}={value}" for name, value in values.items()]


def parse_steps(text: str) -> list[Range]:
    """The ranges of "40" or "40:42,100:120"; ValueError for anything else."""
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        try:
            ranges.append((int(first), int(last or first)))
        except ValueError:
            raise ValueError(f"--skip_steps={text}: {part!r} is no range of steps; write 40, or 40:42, or 40:42,50") from None
    return ranges


def merge_skipped(requested: Iterable[Range], recorded: Iterable[Sequence[int]], start: int, total: int) -> list[Range]:
    """The ranges that a run skips: those `recorded` in the checkpoint of step `start` and those `requested`, in order.

    ValueError for a range outside of steps 1 to `total`, and for steps that the checkpoint was trained on.
    """
    requested, recorded = list(requested), _joined(recorded)
    for first, last in requested:
        flag = f"--skip_steps={first}:{last}"
        check(1 <= first <= last <= total, f"{flag} must be a range of the steps 1 to {total}, with the first one first")
        done = min(last, start)
        was_skipped = any(a <= first and done <= b for a, b in recorded)
        check(
            first > done or was_skipped,
            f"{flag}: the checkpoint of step {start} was trained on steps {first} to {done}; skip steps after {start}, or "
            "start anew in another --workdir",
        )
    return _joined([*recorded, *requested])


def _joined(ranges: Iterable[Sequence[int]]) -> list[Range]:
    """The same steps as sorted ranges that neither overlap nor touch."""
    joined: list[Range] = []
    for first, last in sorted(map(tuple, ranges)):
        if joined and first <= joined[-1][1] + 1:
            first, last = joined[-1][0], max(last, joined.pop()[1])
        joined.append((first, last))
    return joined


def is_skipped(step: int, skipped: Iterable[Range]) -> bool:
    return any(first <= step <= last for first, last in skipped)


def text_of(skipped: Iterable[Range]) -> str:
    """The form that `parse_steps` reads."""
    return ",".join(f"{first}" if first == last else f"{first}:{last}" for first, last in skipped)
