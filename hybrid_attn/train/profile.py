"""A trace of some training steps for xprof, whose operations have the letters of the layer types in their names."""

import contextlib
import re
from pathlib import Path

import jax

from hybrid_attn.train.resume import Range
from hybrid_attn.trees import check


def parse(text: str) -> Range:
    """The steps of "10:12"; ValueError for anything else."""
    match = re.fullmatch(r"(\d+):(\d+)", text)
    check(match is not None, f"--profile={text}: write the first and the last step to trace, such as 10:12")
    return int(match[1]), int(match[2])


def check_range(steps: Range | None, start: int, total: int) -> None:
    """ValueError where a run that goes on from step `start` does not train all of these steps."""
    if steps is not None:
        first, last = steps
        fits = start < first <= last <= total
        check(fits, f"--profile={first}:{last} must be steps from {start + 1} to {total}, with the first one first")


class Profile:
    """Traces `steps`, if there are any, into `folder`; process 0 traces its own devices."""

    def __init__(self, steps: Range | None, folder: Path):
        self.steps, self.folder, self.is_open = None if jax.process_index() else steps, folder, False

    def begins(self, step: int) -> bool:
        """Whether the trace must begin before `step`."""
        return self.steps is not None and step == self.steps[0]

    def ends(self, step: int) -> bool:
        """Whether the trace must end before `step`."""
        return self.is_open and step > self.steps[1]

    def start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # calls of Python would be most of the file
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self.is_open = True

    def stop(self) -> str:
        """Writes the trace, which is the only one; returns what to print."""
        (first, last), self.steps, self.is_open = self.steps, None, False
        jax.profiler.stop_trace()
        return f"profile      steps {first} to {last}: xprof --logdir={self.folder}"

    def step(self, number: int) -> contextlib.AbstractContextManager:
        """Marks what the body dispatches as that step."""
        return jax.profiler.StepTraceAnnotation("train", step_num=number) if self.is_open else contextlib.nullcontext()
