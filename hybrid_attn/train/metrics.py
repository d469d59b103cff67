"""Output of metrics: TensorBoard, JSON lines, a progress bar or plain lines; and the peak FLOP/s of the MFU.

The files of an earlier run in the workdir are continued, or renamed where this run would lose what they hold.
"""

import contextlib
import json
import math
import os
import shutil
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from hybrid_attn import files
from hybrid_attn.files import Appended
from hybrid_attn.train import console

LINES = ("metrics.jsonl", "evals.jsonl")

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


# The TensorBoard tag, with its unit, of each value of a step's line.
TAGS = {
    "loss": "train/loss_nats",
    "loss_mean": "train/loss_mean_nats",
    "bits_per_byte": "train/bits_per_byte",
    "lr": "train/learning_rate",
    "grad_norm": "norms/gradient",
    "param_norm": "norms/parameters",
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
    """The metrics of a run: `metrics.jsonl`, `evals.jsonl` and `tensorboard/` in `workdir`; process 0 alone writes."""

    def __init__(self, workdir: str | os.PathLike, start: int, total_steps: int, peak_flops: float):
        """The run goes on from step `start`; `peak_flops` is the peak of all devices together. Call `open` before the rest."""
        self.workdir, self.total_steps, self.peak_flops, self.step = Path(workdir), total_steps, peak_flops, start
        self.writes = jax.process_index() == 0
        self.position: Callable[[int], dict] = lambda step: {}  # of the run after a step: the loop says it

    def open(self) -> "Metrics":
        """Opens the files, and drops what was written of steps after the one reached."""
        start, terminal = self.step, self.writes and sys.stderr.isatty()
        if self.writes:
            self.workdir.mkdir(parents=True, exist_ok=True)
            self.steps_file, self.evals_file = (_continue(self.workdir / name, lambda step: step <= start) for name in LINES)
            self.events_file = _open_events(self.workdir / "tensorboard", start)
        self.bar = tqdm.tqdm(total=self.total_steps, initial=start, unit="step", dynamic_ncols=True, disable=not terminal)
        return self

    def log(self, step: int, values: Mapping[str, float], tokens: float, flops: float) -> None:
        """Writes a step's `values`, tokens_per_s and mfu; `tokens` and `flops` are those of `step_time` seconds, or NaN."""
        if not self.writes:
            return
        seconds = values["step_time"]
        values = {**values, "tokens_per_s": tokens / seconds, "mfu": flops / seconds / self.peak_flops}
        self._write(self.steps_file, {"step": step, **values})
        for name, value in values.items():
            if name in TAGS and math.isfinite(value):
                self._show(summary.scalar(TAGS[name], value), step)
        if self.bar.disable:
            print(f"step {step}/{self.total_steps}  {console.step_line(values)}", flush=True)
        else:
            self.bar.set_postfix_str(console.step_line(values), refresh=False)

    def skip(self, step: int, reason: str) -> None:
        """Records that a step was skipped, and prints the reason."""
        position = self.position(step)
        if self.writes:
            self._write(self.steps_file, {"step": step, **position, "skipped": True, "reason": reason})
            self._show(summary.scalar("train/skipped", 1), step)
        self.say("  ".join([f"step {step}/{self.total_steps}", *console.stage_of(position), f"skipped: {reason}"]))

    def advance(self, step: int) -> None:
        """Moves the progress bar to `step`, which is now the step reached."""
        self.bar.update(step - self.step)
        self.step = step

    def forget(self) -> None:
        """Drops the records of evaluations at the step reached, before they are written again."""
        if self.writes:
            self.evals_file.close()
            self.evals_file = _continue(self.workdir / "evals.jsonl", lambda step: step != self.step)

    def report(self, name: str, records: Iterable[Mapping[str, float | str | None]]) -> None:
        """Writes the records of the evaluation `name` at the step reached."""
        if self.writes:
            for record in records:
                self._write(self.evals_file, {"eval": name, "step": self.step, **self.position(self.step), **record})

    def score(self, name: str, value: float) -> None:
        """Writes a score at the step reached to TensorBoard."""
        if self.writes:
            self._show(summary.scalar(name, value), self.step)

    def picture(self, name: str, pixels_HWC: np.ndarray) -> None:
        """Writes an image, RGB between 0 and 1, to TensorBoard."""
        if self.writes:
            self._show(summary.image(name, pixels_HWC, dataformats="HWC"), self.step)

    def _show(self, what, step: int) -> None:
        """Writes a summary of tensorboardX to TensorBoard's file."""
        self.events_file.write(_as_record(Event(step=step, summary=what)))

    def _write(self, file: Appended, record: Mapping) -> None:
        """Writes a line of strict JSON, in which NaN and infinity become null."""
        finite = {k: None if isinstance(x, float) and not math.isfinite(x) else x for k, x in record.items()}
        if file.write((json.dumps(finite, allow_nan=False) + "\n").encode()):
            self.say(f"{file.path} was removed or replaced while the run was going on; all of it is written again")

    def write_again(self) -> None:
        """Tries once more to write lines that did not fit on the disk."""
        if self.writes:
            with contextlib.suppress(OSError):
                self.steps_file.write(b"")

    def say(self, *lines: str) -> None:
        """Prints lines to stdout, above the progress bar."""
        for line in lines if self.writes else ():
            if self.bar.disable:
                print(line, flush=True)
            else:
                self.bar.write(line, file=sys.stdout)

    def close(self) -> None:
        self.bar.close()
        for file in (self.steps_file, self.evals_file, self.events_file) if self.writes else ():
            file.close()


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


def _open_events(folder: Path, start: int) -> Appended:
    """A new event file in `folder` of a run that goes on from step `start`: TensorBoard hides later steps of older files.

    A writer in the background, such as tensorboardX has, would lose what a kill finds in its queue.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{int(time.time()):010}.{socket.gethostname()}.{os.getpid()}.from{start}"
    file = Appended(folder / name)
    file.write(_as_record(Event(file_version="brain.Event:2")))
    file.write(_as_record(Event(step=start + 1, session_log=SessionLog(status=SessionLog.START))))
    return file


def _as_record(event: Event) -> bytes:
    """A record of an event file: its length in 8 bytes, 4 of checksum, the event, 4 of checksum."""
    event.wall_time = time.time()
    content = event.SerializeToString()
    length = struct.pack("<Q", len(content))
    sums = [struct.pack("<I", masked_crc32c(part)) for part in (length, content)]
    return length + sums[0] + content + sums[1]


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
