"""What a run that goes on tells of its past, and refuses: changed fields, a jump of its learning rate, skipped steps.

Steps are numbered from 1 here, as the step lines number them; a range of steps has both its ends.
"""

import types
from collections.abc import Iterable, Mapping, Sequence

from hybrid_attn import trees
from hybrid_attn.config import Config, to_dict
from hybrid_attn.train.optim import schedule
from hybrid_attn.trees import check

LR_JUMP = 0.1  # of the rate that the saved schedule has at the same step: a larger change is a jump
Range = tuple[int, int]


def changed_fields(saved: Mapping, c: Config) -> list[str]:
    """Lines `key: old -> new` for every field in which `c` differs from the config of a checkpoint."""
    lines = [line.partition(": ") for line in trees.differences(_by_index(saved), _by_index(to_dict(c)))]
    return [f"{key.replace('.[', '[')}: {values}" for key, _, values in lines]


def _by_index(value):
    """Nested dicts in which a list of groups is a dict by index, so that its fields are compared one by one."""
    if isinstance(value, Mapping):
        return {key: _by_index(x) for key, x in value.items()}
    if isinstance(value, list) and value and all(isinstance(x, Mapping) for x in value):
        return {f"[{i}]": _by_index(x) for i, x in enumerate(value)}
    return value


def rate_jump(saved: Mapping, c: Config, start: int) -> tuple[float, float] | None:
    """Old and new learning rate of the step after `start`, if they differ by more than `LR_JUMP` of the old one.

    The old one is what the schedule of the `saved` config has there; of a finished run, its last.
    """
    old_steps = sum(stage["steps"] for stage in saved["stages"])
    # Not checked as a config's: other versions have other keys and allow other values.
    before = types.SimpleNamespace(**to_dict(c)["optim"] | saved["optim"])
    old = float(schedule(before, old_steps)(min(start, old_steps - 1)))
    new = float(schedule(c.optim, c.total_steps)(start))
    return None if abs(new - old) <= LR_JUMP * abs(old) else (old, new)


def check_rate(saved: Mapping, c: Config, start: int, allowed: bool) -> list[str]:
    """A line for a jump of the learning rate after step `start` that is `allowed`; ValueError for one that is not."""
    jump = rate_jump(saved, c, start)
    if jump is None:
        return []
    old, new = jump
    what = f"from {old:.4g} to {new:.4g} at step {start + 1}"
    if allowed:
        return [f"rate         jumps {what}, as --allow_lr_jump allows"]
    changed = [line for line in changed_fields(saved, c) if line.startswith(("optim.", "stages"))]
    lines = [f"the learning rate would jump {what} (saved -> wanted):", *(f"  {line}" for line in changed)]
    if old > 0:
        lines.append(f"to go on at the rate of step {start}: {' '.join(held_rate(c, start, old))}")
    raise ValueError("\n".join([*lines, "to let it jump: --allow_lr_jump"]))


def held_rate(c: Config, start: int, rate: float) -> list[str]:
    """Flags with which the rate after step `start` is `rate`, until the final decay begins."""
    share = min(c.optim.decay_fraction, (c.total_steps - start) / c.total_steps)
    values = {"lr": f"{rate:.6g}", "schedule": "wsd", "warmup_steps": "0", "decay_fraction": f"{share:.6g}"}
    return [f"--config.optim.{name}={value}" for name, value in values.items()]


def parse_steps(text: str) -> list[Range]:
    """The ranges of "40" or "40:42,100:120"; ValueError for what is none."""
    ranges = []
    for part in text.split(","):
        first, _, last = part.partition(":")
        try:
            ranges.append((int(first), int(last or first)))
        except ValueError:
            raise ValueError(f"--skip_steps={text}: {part!r} is no range of steps; write 40, or 40:42, or 40:42,50") from None
    return ranges


def merge_skipped(wanted: Iterable[Range], recorded: Iterable[Sequence[int]], start: int, total: int) -> list[Range]:
    """The ranges that a run skips: those `recorded` in the checkpoint of step `start`, and those `wanted`, in order.

    ValueError for a range that is none of steps 1 to `total`, and for steps that are done and were trained on.
    """
    wanted, recorded = list(wanted), _joined(recorded)
    for first, last in wanted:
        flag = f"--skip_steps={first}:{last}"
        check(1 <= first <= last <= total, f"{flag} must be a range of the steps 1 to {total}, with the first one first")
        done = min(last, start)
        was_skipped = any(a <= first and done <= b for a, b in recorded)
        check(
            first > done or was_skipped,
            f"{flag}: the checkpoint of step {start} was trained on steps {first} to {done}; skip steps after {start}, or "
            "start anew in another --workdir",
        )
    return _joined([*recorded, *wanted])


def _joined(ranges: Iterable[Sequence[int]]) -> list[Range]:
    """The same steps as ranges in order, with a gap between one and the next."""
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
