"""What the line of a step says: values of the step, averages since the last line, and how far the run is."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from hybrid_attn.config import Config
from hybrid_attn.model import flops
from hybrid_attn.train.resume import Range

AVERAGED = ("loss", "bits_per_byte")


class Timed(NamedTuple):
    """A step that is done, with the seconds since the end of the one before, and those of them spent waiting for a batch."""

    values: Mapping[str, float]
    seconds: float
    waited: float
    compiled: bool  # its program was made first, which takes longer than the step
    stage: int


class Progress:
    """Steps since the last line, and what is behind and before them."""

    def __init__(self, c: Config, skipped: Sequence[Range]):
        self.c, self.skipped, self.steps = c, skipped, []
        self.tokens = [stage.batch * stage.seq_len for stage in c.stages]
        per_token = [flops.train_flops_per_token(c.model, stage.seq_len) for stage in c.stages]
        self.flops = [tokens * cost for tokens, cost in zip(self.tokens, per_token, strict=True)]
        self.flops_per_second = math.nan

    def add(self, step: Timed) -> None:
        self.steps.append(step)

    def line(self, number: int) -> tuple[dict[str, float], float, float]:
        """The values of step `number`, whose line it is, and the tokens and FLOPs of a step of `step_time` seconds.

        `loss` and the like are of the step; `loss_mean` and `bits_per_byte_mean` are means over the `steps` since the last
        line; `step_time` and `data_wait` in seconds are means over those that compiled nothing, where there are any, and
        tokens and FLOPs are NaN where there are none. `tokens_seen` is from the start of the run; `seconds_left` is at the
        speed of the line, without evaluations.
        """
        steps, self.steps = self.steps, []
        steady = [step for step in steps if not step.compiled]
        timed = steady or steps
        values = dict(steps[-1].values) | {"steps": len(steps)}
        values |= {f"{name}_mean": _mean([step.values[name] for step in steps]) for name in AVERAGED}
        values |= {"step_time": _mean([x.seconds for x in timed]), "data_wait": _mean([x.waited for x in timed])}
        tokens, spent = (_mean([per[x.stage] for x in steady]) for per in (self.tokens, self.flops))
        if steady:
            self.flops_per_second = spent / values["step_time"]
        index = steps[-1].stage
        values |= {"stage": index + 1, "stages": len(self.c.stages), "seq_len": self.c.stages[index].seq_len}
        values["tokens_seen"] = self.tokens_seen(number)
        values["seconds_left"] = self.flops_left(number) / self.flops_per_second
        if (memory := peak_memory()) is not None:
            values["peak_memory_bytes"] = memory
        return values, tokens, spent

    def tokens_seen(self, step: int) -> int:
        """Tokens of the batches, padding included, that were trained on in the first `step` steps."""
        seen = before = 0
        for stage, tokens in zip(self.c.stages, self.tokens, strict=True):
            last = min(step, before + stage.steps)
            left_out = sum(max(min(b, last) - max(a, before + 1) + 1, 0) for a, b in self.skipped)
            seen += max(last - before - left_out, 0) * tokens
            before += stage.steps
        return seen

    def flops_left(self, step: int) -> float:
        """FLOPs of the steps after `step`."""
        left, before = 0.0, 0
        for stage, spent in zip(self.c.stages, self.flops, strict=True):
            left += max(before + stage.steps - max(step, before), 0) * spent
            before += stage.steps
        return left


def peak_memory() -> int | None:
    """Most bytes that one of this process's devices has held, where it says so."""
    known = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((x["peak_bytes_in_use"] for x in known if "peak_bytes_in_use" in x), default=None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
