"""The numbers of a step's line: values of the step, averages since the last line, and the progress of the run."""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax

from hybrid_attn.config import Config
from hybrid_attn.model import flops
from hybrid_attn.train.resume import Range

AVERAGED = ("loss", "bits_per_byte")


class Timed(NamedTuple):
    """A finished step: its metrics, the seconds since the end of the step before, and how many of them it waited for data."""

    values: Mapping[str, float]
    seconds: float
    waited: float
    compiled: bool  # the seconds include compilation
    stage: int


class Progress:
    """The steps since the last line, and the tokens and FLOPs of the whole run."""

    def __init__(self, c: Config, skipped: Sequence[Range]):
        self.config, self.stages, self.skipped, self.steps = c, c.each_stage, skipped, []
        self.tokens = [stage.batch * stage.seq_len for stage in self.stages]
        per_token = [flops.train_flops_per_token(stage.model, stage.seq_len) for stage in self.stages]
        self.flops = [tokens * cost for tokens, cost in zip(self.tokens, per_token, strict=True)]
        self.flops_per_second = math.nan

    def add(self, step: Timed) -> None:
        self.steps.append(step)

    def line(self, number: int) -> tuple[dict[str, float], float, float]:
        """The values of the line of step `number`, and the mean tokens and FLOPs of a step of `step_time` seconds.

        The step's own metrics are unchanged; `loss_mean` and `bits_per_byte_mean` are means over the `steps` since the last
        line. `step_time` and `data_wait`, in seconds, are means over the steps without compilation, or over all steps if there
        is none; tokens and FLOPs are then NaN. `tokens_seen` counts from the start of the run; `seconds_left` assumes the speed
        of this line and leaves out evaluations.
        """
        steps, self.steps = self.steps, []
        steady = [step for step in steps if not step.compiled]
        timed = steady or steps
        values = dict(steps[-1].values) | {"steps": len(steps)}
        values |= {f"{name}_mean": _mean([step.values[name] for step in steps]) for name in AVERAGED}
        values |= {"step_time": _mean([x.seconds for x in timed]), "data_wait": _mean([x.waited for x in timed])}
        tokens, flops_of_step = (_mean([per_step[x.stage] for x in steady]) for per_step in (self.tokens, self.flops))
        if steady:
            self.flops_per_second = flops_of_step / values["step_time"]
        index = steps[-1].stage
        values |= {"stage": index + 1, "stages": len(self.stages), "seq_len": self.stages[index].seq_len}
        values["tokens_seen"] = self.tokens_seen(number)
        values["seconds_left"] = self.flops_left(number) / self.flops_per_second
        if (memory := peak_memory()) is not None:
            values["peak_memory_bytes"] = memory
        return values, tokens, flops_of_step

    def tokens_seen(self, step: int) -> int:
        """Tokens that were trained on in the first `step` steps, padding included."""
        skipped = [(min(first - 1, step), min(last, step)) for first, last in self.skipped]
        return self._tokens_until(step) - sum(self._tokens_until(end) - self._tokens_until(start) for start, end in skipped)

    def _tokens_until(self, step: int) -> int:
        return sum(steps * tokens for steps, tokens in zip(self.config.stage_steps(step), self.tokens, strict=True))

    def flops_left(self, step: int) -> float:
        """FLOPs of the steps after `step`."""
        stages = zip(self.stages, self.config.stage_steps(step), self.flops, strict=True)
        return sum((stage.steps - done) * flops_of_step for stage, done, flops_of_step in stages)


def peak_memory() -> int | None:
    """The largest peak memory, in bytes, of this process's devices; None where devices do not report it."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    return max((x["peak_bytes_in_use"] for x in stats if "peak_bytes_in_use" in x), default=None)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
