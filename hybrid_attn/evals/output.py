"""The directory that evaluations are written to: only one that is new, empty, or was made by this program."""

from pathlib import Path

from hybrid_attn.files import LOCK, write_atomically
from hybrid_attn.trees import check

MARKER = "evaluations.txt"
TEXT = "tools/evaluate.py made this directory: it replaces report.*, results.json, pictures/ and tables/ here each time.\n"
RESERVED = ("samples", "pictures", "tables", "report.html", "report.md", "results.json", MARKER, LOCK)  # beside the runs


def check_ours(out: Path) -> None:
    """ValueError where `out` is in the workdir of a training, has links, or has files but not the marker of an evaluation.

    Runs below it are no sign, for they may have been copied to beside files of the user that a report would replace.
    """
    check(not out.is_file(), f"--out={out} is a file; name a directory, which need not be there")
    around = out.resolve().parents[:2]  # a training writes to WORKDIR/evals/STEP
    trained = any(path.name.isdigit() for folder in around for path in (folder / "checkpoints").glob("*"))
    check(not trained, f"--out={out} is in the workdir of a training, which writes there itself; name a directory elsewhere")
    links = sorted(path.name for path in out.iterdir() if path.is_symlink()) if out.is_dir() else []
    check(not links, f"--out={out} has links ({', '.join(links[:5])}), which lead to files elsewhere; remove them")
    names = sorted(path.name for path in out.iterdir() if path.name != LOCK) if out.is_dir() else []
    shown = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    check(
        not names or MARKER in names,
        f"--out={out} has files that no evaluation wrote ({shown}), and a report would replace pictures/, tables/ and "
        "report.*; name a new or an empty directory",
    )


def write_marker(out: Path) -> None:
    """Says in `out` that evaluations are written here."""
    write_atomically(out / MARKER, TEXT)


def is_reserved(name: str) -> bool:
    """Whether a run of this name would lie where the report or the samples do."""
    return name in RESERVED or name.endswith((".part", ".old"))
