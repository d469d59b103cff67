"""The program of `tools/study.py`: trains the missing runs of a study, records them, and writes its page."""

import os
import shlex
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hybrid_attn import files, programs
from hybrid_attn.bench import machine
from hybrid_attn.studies import children, page, plot, results, runs, study
from hybrid_attn.studies.compare import compared
from hybrid_attn.trees import check


class Options(NamedTuple):
    """Those of the command line, None for the default; `trainer` is the path of launch/train.py."""

    seeds: int | None
    only: Sequence[str]
    processes: int | None
    workdir: str | None
    out: str | None
    trainer: Path


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
            check(runs.is_complete(run), f"ended before step {run.config.total_steps} was evaluated")
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
        seconds = line["cpu_seconds"]
        spent = "CPU s unknown (a process was killed before it wrote them)" if seconds is None else f"{seconds:.0f} CPU s"
        print(f"{self.done}/{self.number}  {run.name}  {spent}  {shown}", flush=True)

    def without_recorded(self, missing: Sequence[runs.Run]) -> list[runs.Run]:
        """The runs that still need training or evaluation; those whose workdir is complete are recorded now."""
        left = []
        for run in missing:
            try:
                check(runs.is_complete(run), "not complete")
                self.record(run)
            except (OSError, ValueError):
                left.append(run)
        return left


def job_of(folder: Path, options: Options) -> Job:
    """The job that the command line names."""
    for flag in ("out", "workdir"):
        value = getattr(options, flag)
        files.check_named(flag, "." if value is None else value, "a directory")
    out = folder if options.out is None else Path(options.out)
    default = Path("runs/studies") / folder.name if out == folder else out / "workdirs"
    return Job(study.load(folder), folder, out, default if options.workdir is None else Path(options.workdir))


def train(job: Job, missing: Sequence[runs.Run], options: Options) -> Progress:
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
            number = options.processes or (children.side_by_side(job.study.one_core) if missing else 1)
            children.train(missing, options.trainer, number, is_stopped, progress.ended)
        finally:
            signal.signal(signal.SIGTERM, before)
    return progress


def run(folder: str, options: Options) -> int:
    """Trains what is missing, then shows all results; the exit code."""
    job = job_of(Path(os.path.normpath(folder)), options)
    cells, seeds = job.study.chosen(options.only), options.seeds or job.study.seeds
    with files.lock(job.root):
        most = max([seeds, *(line["seed"] + 1 for x in (job.out, job.folder) for line in results.read(x))])
        known = {(x.cell, x.seed): x for x in runs.runs_of(job.study, job.folder, job.root, list(job.study.cells), most)}
        current, others = job.read(known, job.out)
        if others:
            names = ", ".join(f"{line['cell']} seed {line['seed']}" for line in others)
            print(f"{job.out / results.FILE}: left out, because their config or metrics have changed: {names}")
        chosen = [x for x in known.values() if x.cell in cells and x.seed < seeds]
        missing = [x for x in chosen if x.seed not in current.of(x.cell)]
        check_machine(job, current.lines if missing else ())
        print(f"runs: {len(chosen)}, not recorded yet: {len(missing)}; workdirs: {job.root}", flush=True)
        progress = train(job, missing, options)
        show(job, job.read(known, job.out)[0], job.read(known, job.folder)[0])
    return exit_code(progress)


def check_machine(job: Job, lines: Sequence[dict]) -> None:
    """ValueError where the costs of a study on one core were recorded on another machine or with other versions."""
    ours = f"{machine.processor()}, {page.shown_versions(machine.versions())}"
    for line in lines if job.study.one_core else ():
        theirs = f"{line['machine']['processor']}, {page.shown_versions(line['versions'])}"
        where, cure = job.out / results.FILE, "use --out=DIR, which trains all cells here"
        check(ours == theirs, f"{where} has CPU seconds of {theirs}, and this is {ours}; {cure}")


def show(job: Job, current: results.Results, recorded: results.Results) -> None:
    """Writes plot and page and prints them; with --out it also compares with the recorded results of the study."""
    if not current.lines:
        return
    is_own = job.out == job.folder
    path, picture = job.out / (job.study.page if is_own else "README.md"), job.out / page.PLOT
    files.write_atomically(picture, plot.svg(current, job.folder.name))
    command = f"python tools/study.py {job.folder}" + ("" if is_own else f" --out={job.out}")
    files.write_atomically(path, page.page(path, current, os.path.relpath(picture, path.parent), command, is_own))
    print("\n".join(["", page.table(current), "", *page.verdicts(current), "", f"page  {os.path.normpath(path)}"]))
    if not is_own:
        print(compared(current, recorded))


def exit_code(progress: Progress) -> int:
    """Prints why the study is not complete, if it is not."""
    if progress.interrupted:
        print(f"error: interrupted; the same command goes on: {shlex.join(['python', *sys.argv])}", file=sys.stderr)
        return 130
    if progress.failed:
        number = f"{len(progress.failed)} run" + "s" * (len(progress.failed) > 1)
        print(f"error: {number} failed: {'; '.join(progress.failed)}", file=sys.stderr)
    return 1 if progress.failed else 0
