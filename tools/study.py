"""Trains the cells of a study with several seeds, evaluates them, and writes the table, the plot and the verdicts.

    python tools/study.py studies/layouts --seeds=3
    python tools/study.py studies/layouts --seeds=3 --out=runs/again       # trains all anew, and compares with what is recorded

Each run is one of launch/train.py, with its config, checkpoints and evaluations. Runs go side by side, each on its share of
the cores. The same command goes on after an interruption: finished runs are not repeated, others go on from their checkpoint.
How to write a study: docs/studies.md. Exit codes: 0 done; 1 a run failed; 2 a wrong flag, study or config; 130 Ctrl-C.
"""

import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import app, flags

from hybrid_attn import files, programs
from hybrid_attn.bench.machine import threads
from hybrid_attn.studies import children, page, plot, results, runs, study
from hybrid_attn.studies.compare import compared
from hybrid_attn.trees import check

SEEDS = flags.DEFINE_integer("seeds", None, "Number of seeds; by default the study's.", 1)
ONLY = flags.DEFINE_list("only", [], "Cells that are trained; the page has all.")
PROCESSES = flags.DEFINE_integer("processes", None, "Runs side by side; by default one for each core.", 1)
WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the workdirs of the runs, by default runs/studies/NAME, or OUT/workdirs."
)
OUT = flags.DEFINE_string("out", None, "Folder of results, plot and page, by default that of the study.")
TRAIN = Path(__file__).parents[1] / "launch" / "train.py"


class Job(NamedTuple):
    """A study, its folder, and the folders of its results and of the workdirs of its runs."""

    study: study.Study
    folder: Path
    out: Path
    root: Path

    def read(self, runs_by_key: Mapping[tuple[str, int], runs.Run], folder: Path) -> tuple[results.Results, list[dict]]:
        """The results in a folder that count, and the lines that do not."""
        return results.current(self.study, results.read(folder), {key: run.hash for key, run in runs_by_key.items()})


class Progress:
    """Records the runs that end, and prints a line for each."""

    def __init__(self, job: Job, number: int):
        self.job, self.number, self.done, self.interrupted = job, number, 0, False
        self.failed: list[str] = []

    def ended(self, ended: children.Ended) -> None:
        """Records a run whose process has ended."""
        run = ended.run
        try:
            check(ended.exit_code == 0, f"exit code {ended.exit_code}")
            check(runs.is_complete(run), f"ended before step {run.config.total_steps}")
            self.record(run)
        except (OSError, ValueError) as error:
            if self.interrupted:
                return print(f"{run.name}: stopped, to go on in {run.workdir}", flush=True)
            self.failed.append(f"{run.name}: {programs.one_line(programs.message(error))}; its output is in {run.log}")
            print(self.failed[-1], flush=True)

    def record(self, run: runs.Run) -> None:
        """Writes the line of a complete run; ValueError where its workdir lacks a metric."""
        chosen, _, out, _ = self.job
        line = runs.line_of(run, chosen.metrics)
        results.write(out, results.with_line(results.read(out), line), list(chosen.cells))
        self.done += 1
        shown = ", ".join(f"{name} {metric.show(line['metrics'][name])}" for name, metric in chosen.metrics.items())
        print(f"{self.done}/{self.number}  {run.name}  {line['cpu_seconds']:.0f} CPU s  {shown}", flush=True)

    def without_recorded(self, missing: Sequence[runs.Run]) -> list[runs.Run]:
        """The runs that must be trained or evaluated: what a workdir has of a complete one is recorded now."""
        left = []
        for run in missing:
            try:
                check(runs.is_complete(run), "not complete")
                self.record(run)
            except (OSError, ValueError):
                left.append(run)
        return left


def job_of(argument: str) -> Job:
    """The job that the command line names."""
    folder = Path(os.path.normpath(argument))
    files.check_named("out", "." if OUT.value is None else OUT.value, "a directory")
    files.check_named("workdir", "." if WORKDIR.value is None else WORKDIR.value, "a directory")
    out = folder if OUT.value is None else Path(OUT.value)
    default = Path("runs/studies") / folder.name if out == folder else out / "workdirs"
    return Job(study.load(folder), folder, out, default if WORKDIR.value is None else Path(WORKDIR.value))


def train(job: Job, missing: Sequence[runs.Run]) -> Progress:
    """Trains what is missing; Ctrl-C and SIGTERM have the runs save a checkpoint and end."""
    progress = Progress(job, len(missing))
    missing = progress.without_recorded(missing)

    def is_stopped() -> bool:
        progress.interrupted = interrupt.requested
        return interrupt.requested

    with programs.Interrupt() as interrupt:
        interrupt.begin()
        before = signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGINT))
        try:
            number = PROCESSES.value or max(min(threads(), len(missing)), 1)
            children.train(missing, TRAIN, number, is_stopped, progress.ended)
        finally:
            signal.signal(signal.SIGTERM, before)
    return progress


def run(*arguments: str) -> int:
    """Trains what is missing, then shows all results; the exit code."""
    check(len(arguments) == 1, "name the folder of a study, such as studies/layouts")
    job = job_of(arguments[0])
    cells, seeds = job.study.chosen(ONLY.value), SEEDS.value or job.study.seeds
    with files.lock(job.root):
        most = max([seeds, *(line["seed"] + 1 for folder in (job.out, job.folder) for line in results.read(folder))])
        known = {(x.cell, x.seed): x for x in runs.runs_of(job.study, job.folder, job.root, list(job.study.cells), most)}
        current, others = job.read(known, job.out)
        if others:
            names = ", ".join(f"{line['cell']} seed {line['seed']}" for line in others)
            print(f"{job.out / results.FILE}: left out, for their config or their metrics are others than now: {names}")
        chosen = [x for x in known.values() if x.cell in cells and x.seed < seeds]
        missing = [x for x in chosen if x.seed not in current.of(x.cell)]
        print(f"{len(chosen)} runs; {len(missing)} are not recorded yet; workdirs: {job.root}", flush=True)
        progress = train(job, missing)
        show(job, job.read(known, job.out)[0], job.read(known, job.folder)[0])
    return exit_code(progress)


def show(job: Job, current: results.Results, recorded: results.Results) -> None:
    """Writes the plot and the page, and prints what they say; beside it what the study's folder has, if that is another one."""
    if not current.lines:
        return
    path, picture = job.out / (job.study.page if job.out == job.folder else "README.md"), job.out / page.PLOT
    files.write_atomically(picture, plot.svg(current, job.folder.name))
    command = f"python tools/study.py {job.folder}"
    files.write_atomically(path, page.page(path, current, os.path.relpath(picture, path.parent), command))
    print("\n".join(["", page.table(current), "", *page.verdicts(current), "", f"page  {path}"]))
    if job.out != job.folder:
        print(compared(current, recorded))


def exit_code(progress: Progress) -> int:
    """Prints why the study is not complete, if it is not."""
    if progress.interrupted:
        print(f"error: interrupted; the same command goes on: {shlex.join(['python', *sys.argv])}", file=sys.stderr)
        return 130
    if progress.failed:
        print(f"error: {len(progress.failed)} runs failed: {'; '.join(progress.failed)}", file=sys.stderr)
    return 1 if progress.failed else 0


def main(argv):
    programs.run(run, argv, arguments=1)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
