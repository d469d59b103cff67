"""Output of metrics: JSON lines, sinks such as TensorBoard, a progress bar or plain lines; and the peak FLOP/s of the MFU.

The files of an earlier run in the workdir are continued, or renamed where this run would lose what they hold.
"""

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from hybrid_attn import files
from hybrid_attn.config import Config
from hybrid_attn.files import Appended
from hybrid_attn.train import console
from hybrid_attn.train.sinks import SINKS

METRICS, EVALS, STATISTICS = LINES = ("metrics.jsonl", "evals.jsonl", "statistics.jsonl")

# Dense bfloat16 matmul peak of one JAX device in FLOP/s, from data sheets; the first name that is part of the device kind
# applies.
PEAKS = (
    ("TPU v4 lite", 138e12),
    ("TPU v4", 275e12),
    ("TPU v5 lite", 197e12),
    ("TPU v5e", 197e12),
    ("TPU v5", 459e12),
    ("TPU v6 lite", 918e12),
    ("TPU v6e", 918e12),
    ("TPU7x", 2307e12 / 2),  # a chip is two devices
    ("A100", 312e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("GB200", 2500e12),
    ("B200", 2250e12),
)


# The tag in sinks, with its unit, of each value of a step's line.
TAGS = {
    "loss": "train/loss_nats",
    "loss_mean": "train/loss_mean_nats",
    "bits_per_byte": "train/bits_per_byte",
    "chosen_log_prob": "pairs/chosen_log_prob_nats",
    "rejected_log_prob": "pairs/rejected_log_prob_nats",
    "log_ratio": "pairs/difference_of_log_ratios_nats",
    "pair_accuracy": "pairs/accuracy_share",
    "lr": "train/learning_rate",
    "grad_norm": "norms/gradient",
    "param_norm": "norms/parameters",
    "expert_load": "experts/load_max_over_mean",
    "router_entropy_bits": "experts/router_entropy_bits",
    "router_z": "experts/router_z",
    "dropped_copies": "experts/dropped_copies",
    "gate_entropy_bits": "experts/gate_entropy_bits",
    "tokens_per_s": "speed/tokens_per_second",
    "mfu": "speed/mfu_share",
    "goodput": "speed/goodput_share",
    "step_time": "speed/step_seconds",
    "data_wait": "speed/data_wait_seconds",
    "tokens_seen": "progress/tokens",
    "stage": "progress/stage",
    "batch": "progress/batch_sequences",
    "peak_memory_bytes": "memory/peak_bytes",
}


class Metrics:
    """The metrics of a run: the `LINES` in `workdir`, and the sinks of its config; process 0 alone writes."""

    def __init__(self, workdir: str | os.PathLike, start: int, config: Config):
        """The run goes on from step `start`. Call `open` before the rest."""
        self.workdir, self.config, self.step = Path(workdir), config, start
        self.writes, self.total_steps = jax.process_index() == 0, config.total_steps
        self.position: Callable[[int], dict] = lambda step: {}  # of the run after a step: the loop says it
        self.last: Mapping[str, float] = {}  # the values of the last line

    def open(self) -> "Metrics":
        """Opens the files, and drops what was written of steps after the one reached."""
        start, terminal = self.step, self.writes and sys.stderr.isatty()
        if self.writes:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self.sinks = [SINKS[name].open(self.workdir, start, self.config) for name in self.config.train.sinks]
            unused = () if self.config.train.statistics_every or (self.workdir / STATISTICS).exists() else (STATISTICS,)
            names = [name for name in LINES if name not in unused]
            self.files = {name: _continue(self.workdir / name, lambda step: step <= start) for name in names}
        self.bar = tqdm.tqdm(total=self.total_steps, initial=start, unit="step", dynamic_ncols=True, disable=not terminal)
        return self

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the values of the line of a step."""
        self.last = values
        if not self.writes:
            return
        self._write(METRICS, {"step": step, **values})
        self._show(step, {TAGS[name]: value for name, value in values.items() if name in TAGS})
        if self.bar.disable:
            print(f"step {step}/{self.total_steps}  {console.step_line(values)}", flush=True)
        else:
            self.bar.set_postfix_str(console.step_line(values), refresh=False)

    def statistics(self, step: int, values: Mapping[str, float]) -> None:
        """Writes the statistics of a step; in sinks the layer type comes first, as the group: `L/grad_norm/attention/q`."""
        if self.writes:
            self._write(STATISTICS, {"step": step, **self.position(step), **values})
            parts = {name: name.split("/") for name in values}
            self._show(step, {"/".join([of, name, *leaf]): values[key] for key, (name, of, *leaf) in parts.items()})

    def skip(self, step: int, reason: str) -> None:
        """Records that a step was skipped, and prints the reason."""
        position = self.position(step)
        if self.writes:
            self._write(METRICS, {"step": step, **position, "skipped": True, "reason": reason})
            self._show(step, {"train/skipped": 1})
        self.say("  ".join([f"step {step}/{self.total_steps}", *console.stage_of(position), f"skipped: {reason}"]))

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`, which is now the step reached."""
        self.bar.update(step - self.step)
        self.step = step

    def forget(self) -> None:
        """Drops the records of evaluations at the step reached, before they are written again."""
        if self.writes:
            self.files[EVALS].close()
            self.files[EVALS] = _continue(self.workdir / EVALS, lambda step: step != self.step)

    def report(self, name: str, records: Iterable[Mapping[str, float | str | None]]) -> None:
        """Writes the records of the evaluation `name` at the step reached."""
        if self.writes:
            for record in records:
                self._write(EVALS, {"eval": name, "step": self.step, **self.position(self.step), **record})

    def score(self, name: str, value: float) -> None:
        """Shows a score at the step reached in the sinks."""
        if self.writes:
            self._show(self.step, {name: value})

    def picture(self, name: str, pixels_HWC: np.ndarray) -> None:
        """Shows an image, RGB between 0 and 1, in the sinks."""
        for sink in self.sinks if self.writes else ():
            sink.picture(self.step, name, pixels_HWC)

    def _show(self, step: int, values: Mapping[str, float]) -> None:
        """Shows those of the values that are finite in the sinks."""
        finite = {tag: value for tag, value in values.items() if math.isfinite(value)}
        for sink in self.sinks:
            sink.scalars(step, finite)

    def _write(self, name: str, record: Mapping) -> None:
        """Writes a line of strict JSON, in which NaN and infinity become null."""
        file = self.files[name]
        finite = {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in record.items()}
        if file.write((json.dumps(finite, allow_nan=False) + "\n").encode()):
            self.say(f"{file.path} was removed or replaced while the run was going on; all of it is written again")

    def write_again(self) -> None:
        """Tries once more to write lines that did not fit on the disk."""
        if self.writes:
            with contextlib.suppress(OSError):
                self.files[METRICS].write(b"")

    def say(self, *lines: str) -> None:
        """Prints lines to stdout, above the progress bar."""
        for line in lines if self.writes else ():
            if self.bar.disable:
                print(line, flush=True)
            else:
                self.bar.write(line, file=sys.stdout)

    def close(self) -> None:
        self.bar.close()
        for output in (*self.files.values(), *self.sinks) if self.writes else ():
            output.close()


def peak_flops(device: jax.Device, dtype: str) -> tuple[float, str]:
    """The matmul peak of one device in FLOP/s, and whether it was "looked up" or "measured".

    It is measured by a few matmuls in `dtype`; the devices of the CPU backend share the peak of the host.
    """
    peaks = [peak for name, peak in PEAKS if name in device.device_kind]
    if peaks and jnp.dtype(dtype).itemsize == 2:
        return peaks[0], "looked up"
    local = jax.local_devices(backend=device.platform)
    sharers = len(local) if device.platform == "cpu" else 1
    return _measure(local[0], dtype) / sharers, "measured"


def _measure(device: jax.Device, dtype: str) -> float:
    """FLOP/s of the best of ten square matmuls, or of as many as half a second holds."""
    size = 1024 if device.platform == "cpu" else 8192  # large enough to fill the device
    with jax.set_mesh(jax.make_mesh((1,), ("one",), devices=[device])):
        x = jnp.ones((size, size), dtype)
        multiply = jax.jit(jnp.matmul).lower(x, x).compile()
        times, until = [], time.perf_counter() + 0.5
        while len(times) < 2 or (len(times) < 10 and time.perf_counter() < until):
            before = time.perf_counter()
            jax.block_until_ready(multiply(x, x))
            times.append(time.perf_counter() - before)
    return 2 * size**3 / min(times)


def _continue(path: Path, keep: Callable[[int], bool]) -> Appended:
    """`path`, open for appending, without truncated lines and without lines whose step `keep` rejects."""
    if path.exists():
        lines = [(line, _step_of(line)) for line in path.read_bytes().splitlines()]
        files.write_atomically(path, b"".join(line + b"\n" for line, step in lines if step is not None and keep(step)))
    return Appended(path)


def set_aside(workdir: Path, start: int, replayed: int) -> list[str]:
    """Renames the records that a run from step `start` would lose; returns a line for each new name.

    After a kill at most `replayed` steps are repeated, and their records are written again. Files of records are renamed if
    there is no checkpoint, if they have more later steps than that, or if a line cannot be read; evaluations of later steps are
    always renamed. Process 0 does it for all.
    """
    if jax.process_index() != 0:
        return []
    notes = []
    for path in (workdir / name for name in LINES):
        if path.exists() and _would_lose_lines(path, start, replayed):
            copy = shutil.copy2(path, files.free_name(path, "old")) if start else files.set_aside(path)
            begins = f"goes on from step {start}" if start else "starts at step 0"
            notes.append(f"kept         the old {path.name} as {copy}; the run {begins}")
    later = [folder for folder in workdir.glob("evals/*") if folder.name.isdecimal() and int(folder.name) > start]
    for folder in sorted(later, key=lambda folder: int(folder.name)):
        notes.append(f"kept         the old evaluation of step {folder.name} as {files.set_aside(folder)}")
    if start == 0 and notes and (workdir / "tensorboard").exists():
        notes.append(f"kept         the old tensorboard as {files.set_aside(workdir / 'tensorboard')}")
    return notes


def _would_lose_lines(path: Path, start: int, replayed: int) -> bool:
    """Whether the run would drop lines of a file and not write them again; a kill may have truncated the last line."""
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [_step_of(line) for line in lines if line.endswith(b"\n")]
    last = max((step for step in steps if step is not None), default=0)
    return bool(steps) and (start == 0 or None in steps or last - start > replayed)


def _step_of(line: bytes) -> int | None:
    """The step of a line of JSON, None if it has none."""
    try:
        step = files.object_of(line, "it").get("step")
    except ValueError:
        return None
    return step if type(step) is int else None
