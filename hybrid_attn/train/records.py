"""Records of earlier runs in a workdir: renamed where the run that continues would overwrite and not repeat them."""

import shutil
from pathlib import Path

import jax

from hybrid_attn import files

LINES = ("metrics.jsonl", "evals.jsonl")


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
            copy = files.set_aside(path) if start == 0 else _copy(path)
            begins = f"goes on from step {start}" if start else "starts at step 0"
            notes.append(f"kept         the old {path.name} as {copy}; the run {begins}")
    later = [folder for folder in workdir.glob("evals/*") if folder.name.isdecimal() and int(folder.name) > start]
    for folder in sorted(later, key=lambda folder: int(folder.name)):
        notes.append(f"kept         the old evaluation of step {folder.name} as {files.set_aside(folder)}")
    if start == 0 and notes and (workdir / "tensorboard").exists():
        notes.append(f"kept         the old tensorboard as {files.set_aside(workdir / 'tensorboard')}")
    return notes


def step_of(line: str | bytes) -> int | None:
    """The step of a line of JSON, None if it has none."""
    try:
        step = files.object_of(line, "it").get("step")
    except ValueError:
        return None
    return step if type(step) is int else None


def _would_lose_lines(path: Path, start: int, replayed: int) -> bool:
    """Whether the run would drop lines of a file and not write them again; a kill may have truncated the last line."""
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [step_of(line) for line in lines if line.endswith(b"\n")]
    last = max((step for step in steps if step is not None), default=0)
    return bool(steps) and (start == 0 or None in steps or last - start > replayed)


def _copy(path: Path) -> Path:
    return Path(shutil.copy2(path, files.free_name(path, "old")))
