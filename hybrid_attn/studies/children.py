"""Child processes that train side by side, each on its own share of the cores."""

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from hybrid_attn.studies.runs import COST, Run

POLL = 0.2  # seconds


class Child(NamedTuple):
    """A process that trains a run on some cores."""

    run: Run
    process: subprocess.Popen
    cores: frozenset[int]
    began: float


class Ended(NamedTuple):
    """A process that has ended."""

    run: Run
    cores: frozenset[int]
    exit_code: int
    seconds: float


def shares(processes: int) -> list[frozenset[int]]:
    """The cores that this process may use in so many parts; where the system pins no processes, parts without a core."""
    if not hasattr(os, "sched_getaffinity"):
        return [frozenset()] * processes
    cores = sorted(os.sched_getaffinity(0))
    return [frozenset(cores[i::processes] or [cores[i % len(cores)]]) for i in range(processes)]


@contextlib.contextmanager
def pinned(cores: frozenset[int]) -> Iterator[None]:
    """What the body starts runs on these cores alone, of which XLA makes its threads."""
    if not cores:
        yield
        return
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start(run: Run, program: Path, cores: frozenset[int]) -> Child:
    """Starts `program`, launch/train.py, in a session of its own: a Ctrl-C on the terminal does not reach it."""
    run.workdir.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(program), *run.arguments()]
    with run.log.open("a") as log, pinned(cores):
        log.write(f"{shlex.join(command)}\n")
        log.flush()
        output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return Child(run, subprocess.Popen(command, **output, start_new_session=True), cores, time.monotonic())


def wait(children: Sequence[Child]) -> tuple[list[Ended], list[Child]]:
    """The processes that have ended, whose cost is now in their workdirs, and the others."""
    ended, others = [], []
    for child in children:
        number, status, usage = os.wait4(child.process.pid, os.WNOHANG)
        if not number:
            others.append(child)
            continue
        code, seconds = os.waitstatus_to_exitcode(status), time.monotonic() - child.began
        child.process.returncode = code
        spent = {"cpu_seconds": usage.ru_utime + usage.ru_stime, "seconds": seconds, "exit_code": code}
        with (child.run.workdir / COST).open("a") as file:
            file.write(json.dumps(spent) + "\n")
        ended.append(Ended(child.run, child.cores, code, seconds))
    return ended, others


def train(
    runs: Sequence[Run], program: Path, processes: int, is_stopped: Callable[[], bool], done: Callable[[Ended], None]
) -> None:
    """Trains runs, so many at a time, and calls `done` after each process, until all are trained or `is_stopped()`.

    The processes then save a checkpoint and end. An exception kills them.
    """
    waiting, children, free, stopping = list(runs), [], shares(processes), False
    try:
        while children or (waiting and not stopping):
            if is_stopped() and not stopping:
                signal_all(children, signal.SIGTERM)  # once: a second one would end a process without a checkpoint
                stopping = True
            while waiting and free and not stopping:
                children.append(start(waiting.pop(0), program, free.pop(0)))
            time.sleep(POLL)
            ended, children = wait(children)
            for one in ended:
                free.append(one.cores)
                done(one)
    finally:
        signal_all(children, signal.SIGKILL)


def signal_all(children: Sequence[Child], number: signal.Signals) -> None:
    for child in children:
        child.process.send_signal(number)
