"""The directory that evaluations are written to: only one that is new, empty, or was made by this program."""

import json
from pathlib import Path

from hybrid_attn.files import LOCK, write_atomically
from hybrid_attn.trees import check

MARKER = "evaluations.txt"
TEXT = "tools/evaluate.py made this directory: it replaces report.*, results.json, pictures/ and tables/ here each time.\n"
RESERVED = ("samples", "pictures", "tables", "report.html", "report.md", "results.json", MARKER, LOCK)  # beside the runs


def check_ours(out: Path) -> None:
    """ValueError where `out` has files that no evaluation wrote; older directories are known by a run, or by samples alone."""
    check(not out.is_file(), f"--out={out} is a file; name a directory, which need not be there")
    there = sorted(path.name for path in out.iterdir() if path.name != LOCK) if out.is_dir() else []
    only_samples = there == ["samples"] and any(out.glob("samples/*.sha256"))
    ours = not there or MARKER in there or only_samples or any(map(_is_run, out.glob("*/run.json")))
    shown = ", ".join(there[:5]) + (", …" if len(there) > 5 else "")
    check(
        ours,
        f"--out={out} has files that no evaluation wrote ({shown}), and a report would replace pictures/, tables/ and "
        "report.*; name a new or an empty directory",
    )


def mark(out: Path) -> None:
    """Says in `out` that evaluations are written here."""
    write_atomically(out / MARKER, TEXT)


def is_reserved(name: str) -> bool:
    """Whether a run of this name would lie where the report or the samples do."""
    return name in RESERVED or name.endswith((".part", ".old"))


def _is_run(path: Path) -> bool:
    try:
        return {"revision", "settings", "generator"} <= {*json.loads(path.read_bytes())}
    except (OSError, RecursionError, TypeError, ValueError):
        return False
