"""What a report leaves in a directory."""

import importlib.util
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from hybrid_attn.evals.report import escape, failures, tables
from hybrid_attn.evals.report.failures import Task
from hybrid_attn.evals.report.runs import Run, measured
from hybrid_attn.evals.report.tables import Table
from hybrid_attn.files import write_atomically
from hybrid_attn.trees import check


def write(out: Path, runs: Sequence[Run]) -> str:
    """report.html, report.md, results.json, pictures/*.png, tables/*.csv, and the files of each evaluation.

    Returns the overview and the verdict for a terminal. The files follow from the runs alone, whatever the directory held
    before; the first run is what the others are compared with.
    """
    check(bool(runs), f"there are 0 runs to report in {out}; evaluate a model first")
    names = [run.name for run in runs]
    check(len(set(names)) == len(names), f"runs of a report have a name each, and these are {', '.join(names)}")
    check_drawing()
    from hybrid_attn.evals.report import canvas, overview, render, sections  # matplotlib takes a second to import

    parts, failed = sections.sections(runs), failures.by_task(runs)
    pictures = [picture for section in parts for picture in section.pictures]
    shown = [table for section in parts for table in (*section.tables, *section.folded)]
    title = "Long-context report" if len(runs) > 1 else f"Long-context report: {names[0]}"
    _replace(out / "pictures", {f"{escape.file_name(picture.name)}.png": canvas.png(picture) for picture in pictures})
    values = {f"{escape.file_name(table.name)}.csv": tables.comma_separated(table) for table in shown}
    for evaluation in measured(runs):
        for run in runs:
            values |= evaluation.report().files(run)
    _replace(out / "tables", values)
    write_atomically(out / "results.json", _json(runs, shown, failed))
    write_atomically(out / "report.md", render.markdown(title, runs, parts, failed))
    write_atomically(out / "report.html", render.page(title, runs, parts, failed))
    return overview.terminal(runs)


def check_drawing() -> None:
    """ValueError where a library that draws pictures or fills templates is missing."""
    for name in ("matplotlib", "jinja2"):
        check(
            importlib.util.find_spec(name) is not None,
            f"a report needs {name}, and {name} is not installed: pip install {name}",
        )


def _replace(directory: Path, files: Mapping[str, str | bytes]) -> None:
    """A directory of these files and no others: all of them are written before those of an earlier report go.

    ValueError where a path is not of safe names, such as one that leads out of the directory.
    """
    for path in files:
        check(all(map(escape.SAFE.fullmatch, path.split("/"))), f"{path!r} cannot be the name of a file of a report")
    new, old = (directory.with_name(f"{directory.name}.{name}") for name in ("part", "old"))
    for leftover in (new, old):
        _remove(leftover)
    new.mkdir(parents=True)
    for name, content in files.items():
        write_atomically(new / name, content)
    if directory.is_symlink() or directory.exists():
        directory.rename(old)
    new.rename(directory)
    _remove(old)


def _remove(path: Path) -> None:
    """Removes a directory, or a file or link of its name; what a link points to stays."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _json(runs: Sequence[Run], shown: Sequence[Table], failed: Sequence[Task]) -> str:
    """Records and provenance by run, every table's rows, and the questions that the page shows."""
    content = {
        "runs": {run.name: {"provenance": run.provenance, "records": run.records} for run in runs},
        "tables": {x.name: [dict(zip([c.name for c in x.columns], row, strict=True)) for row in x.rows] for x in shown},
        "failures": {task.name: [x.question | {"given": x.answers} for x in task.examples] for task in failed},
    }
    return json.dumps(content, indent=1, allow_nan=False) + "\n"
