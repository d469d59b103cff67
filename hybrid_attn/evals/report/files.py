"""What a report leaves in a directory."""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybrid_attn.evals.report import escape
from hybrid_attn.evals.report.runs import Run, measured
from hybrid_attn.evals.report.tables import comma_separated
from hybrid_attn.files import write_atomically
from hybrid_attn.trees import check


def write(out: Path, runs: Sequence[Run]) -> str:
    """Writes what follows from the runs alone, whatever the directory held before; returns overview and verdict for a terminal.

    The files are report.html, report.md, results.json, pictures/*.png, tables/*.csv, and those of each evaluation.
    """
    check(bool(runs), f"there are 0 runs to report in {out}; evaluate a model first")
    names = [run.name for run in runs]
    check(len(set(names)) == len(names), f"runs of a report have a name each, and these are {', '.join(names)}")
    from hybrid_attn.evals.report import pictures, render, sections  # matplotlib takes a second to import

    parts = sections.sections(runs)
    shown = [table for part in parts for table in part.tables]
    title = "Long-context report" if len(runs) > 1 else f"Long-context report: {names[0]}"
    files = {f"{escape.file_name(table.name)}.csv": comma_separated([table.names(), *table.rows]) for table in shown}
    for evaluation in measured(runs):
        for run in runs:
            files |= evaluation.report().files(run)
    _replace(out / "tables", files)
    _replace(out / "pictures", {f"{escape.file_name(x.name)}.png": pictures.png(x) for part in parts for x in part.pictures})
    content = render.content(title, runs, parts)
    results = {
        "runs": {run.name: {"provenance": run.provenance, "records": run.records} for run in runs},
        "tables": {table.name: table.objects() for table in shown},
        "failures": {task.name: task.examples for task in content["failures"]},
    }
    write_atomically(out / "results.json", json.dumps(results, indent=1, allow_nan=False) + "\n")
    write_atomically(out / "report.md", render.markdown(content))
    write_atomically(out / "report.html", render.page(content))
    return sections.terminal(content)


def _replace(directory: Path, files: Mapping[str, str | bytes]) -> None:
    """A directory of these files alone, written before those of an earlier report go; ValueError where a path is not safe."""
    for path in files:
        check(all(map(escape.SAFE.fullmatch, path.split("/"))), f"{path!r} cannot be the name of a file of a report")
    new = directory.with_name(f"{directory.name}.part")
    _remove(new)
    new.mkdir(parents=True)
    for name, content in files.items():
        write_atomically(new / name, content)
    _remove(directory)
    new.rename(directory)


def _remove(path: Path) -> None:
    """Removes a directory, or a file or link of its name; what a link points to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)
