"""What earlier runs left in a workdir: kept under other names where a run that goes on would not write it again."""

import json
import shutil
from pathlib import Path

import jax

from hybrid_attn import files

LINES = ("metrics.jsonl", "evals.jsonl")


def set_aside(workdir: Path, start: int, replayed: int) -> list[str]:
    """Makes room for a run that goes on from step `start`; a line for everything that now has another name.

    After a kill at most `replayed` steps are repeated, and their records are written again. Without a checkpoint, with records
    of more steps, or with lines that cannot be read, the files are kept as they were; so are evaluations of later steps.
    Process 0 does it for all.
    """
    if jax.process_index() != 0:
        return []
    notes = []
    for path in (workdir / name for name in LINES):
        if path.exists() and _is_at_stake(path, start, replayed):
            kept = files.set_aside(path) if start == 0 else _copy(path)
            begins = f"goes on from step {start}" if start else "starts at step 0"
            notes.append(f"kept         the old {path.name} as {kept}; the run {begins}")
    later = [folder for folder in workdir.glob("evals/*") if folder.name.isdecimal() and int(folder.name) > start]
    for folder in sorted(later, key=lambda folder: int(folder.name)):
        notes.append(f"kept         the old evaluation of step {folder.name} as {files.set_aside(folder)}")
    if start == 0 and notes and (workdir / "tensorboard").exists():
        notes.append(f"kept         the old tensorboard as {files.set_aside(workdir / 'tensorboard')}")
    return notes


def step_of(line: str | bytes) -> int | None:
    """The step of a line of JSON, None if it has none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = record.get("step") if isinstance(record, dict) else None
    return step if type(step) is int else None


def _is_at_stake(path: Path, start: int, replayed: int) -> bool:
    """Whether a file of lines has some that the run would drop and not write again; a kill may cut the last one short."""
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [step_of(line) for line in lines if line.endswith(b"\n")]
    last = max((step for step in steps if step is not None), default=0)
    return bool(steps) and (start == 0 or None in steps or last - start > replayed)


def _copy(path: Path) -> Path:
    return Path(shutil.copy2(path, files.free_name(path, "old")))
