"""The results of an evaluation as tables for a terminal, and the last lines of a finished run."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from hybrid_attn.evals.evaluation import Baselines
from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.table import EVALS
from hybrid_attn.train.console import aligned

HEADINGS = ("", "of", "score", "±", "bits/byte", "number")


def evaluation_tables(records: Sequence[Mapping], baselines: Baselines, trained: int) -> list[str]:
    """A table for each length of the records: the lines of every evaluation, totals before their parts."""
    lines = []
    for length, of_length in sorted(grouped(records, itemgetter("length")).items()):
        by_name = grouped(of_length, itemgetter("eval"))
        table = [line for name, x in EVALS.items() if name in by_name for line in x.table_lines(by_name[name], baselines)]
        note = " (the length of training)" if length == trained else ""
        lines += ["", f"at {length:,} tokens{note}", *aligned([HEADINGS, *table])]
    return lines


def ending(workdir: str, step: int, report: Path | None, own_files: bool) -> list[str]:
    """Lines with the files of a finished run and with further commands; `own_files`: it was trained on files or URLs.

    The commands are the console scripts of an installed package where one of these trains, else those of the repository.
    """
    installed = Path(sys.argv[0]).name.startswith("hybrid-")
    generate, evaluate = (f"hybrid-{x}" if installed else f"python tools/{x}.py" for x in ("generate", "evaluate"))
    path = shlex.quote(str(workdir))
    trust = " --trust_checkpoint_data" if own_files else ""
    name = shlex.quote(f"evals/{Path(workdir).name}")
    return [
        "",
        *([f"report       {report}"] if report is not None else []),
        f"metrics      {workdir}/metrics.jsonl, evals.jsonl; tensorboard --logdir={path}",
        f"checkpoint   {workdir}/checkpoints/{step}",
        f"next         {generate} --checkpoint={path} --prompt='def main('",
        f"             {evaluate} --checkpoint={path} --suite=quick --out={name}{trust}",
        *([] if installed else [f"             python tools/plot_runs.py --workdir={path} --out=loss.png"]),
    ]
