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

from hybrid_attn.bench import machine
from hybrid_attn.studies.runs import COST, Run

POLL = 0.05  # seconds
CHILD = Path(__file__).with_name("child.py")
# Of runs on one core: they have no accelerator, and compile all of their programs, whatever ran before.
ONE_CORE = {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"}
ASK = "import jax; print(jax.default_backend())"


class Child(NamedTuple):
    """A process that trains a run on some cores."""

    run: Run
    process: subprocess.Popen
    cores: frozenset[int]


class Ended(NamedTuple):
    """A process that has ended."""

    run: Run
    cores: frozenset[int]
    exit_code: int


def shares(processes: int, one_core: bool = False) -> list[frozenset[int]]:
    """For each process its share of the cores that this one may use; where the system pins no processes, no core.

    With `one_core` a share is one core.
    """
    if not hasattr(os, "sched_getaffinity"):
        return [frozenset()] * processes
    cores = sorted(os.sched_getaffinity(0))
    step = len(cores) if one_core else processes
    return [frozenset(cores[i::step] or [cores[i % len(cores)]]) for i in range(processes)]


def side_by_side(one_core: bool) -> int:
    """How many runs go side by side by default: one for each core, or on an accelerator one, with all of its devices."""
    return 1 if not one_core and has_accelerator() else machine.threads()


def has_accelerator() -> bool:
    """Whether jax takes an accelerator here. A short process asks it: in this one jax would hold the memory of the device."""
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        return False
    answer = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True)
    return answer.stdout.strip() not in ("cpu", "")  # where jax finds no device at all, each run says so


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
    command, env = [sys.executable, str(program), *run.arguments()], os.environ | ONE_CORE if run.one_core else None
    with run.log.open("a") as log, pinned(cores):
        log.write(f"{shlex.join(command)}\n")
        log.flush()
        started = json.dumps({"started": time.time(), "machine": machine.describe()})
        # -P: the folder of child.py has modules with names of the standard library.
        child = [sys.executable, "-P", str(CHILD), str(os.getpid()), str(run.workdir / COST), started, *command]
        output = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
        return Child(run, subprocess.Popen(child, env=env, **output, start_new_session=True), cores)


def wait(children: Sequence[Child]) -> tuple[list[Ended], list[Child]]:
    """The processes that have ended, and the others."""
    running = [child for child in children if child.process.poll() is None]
    ended = [Ended(x.run, x.cores, x.process.returncode) for x in children if x.process.returncode is not None]
    return ended, running


def train(
    runs: Sequence[Run], program: Path, processes: int, is_stopped: Callable[[], bool], done: Callable[[Ended], None]
) -> None:
    """Trains runs, so many at a time, and calls `done` after each process, until all are trained or `is_stopped()`.

    The processes then save a checkpoint and end, as they do after an exception and after the end of this process.
    """
    waiting, children, stopping = list(runs), [], False
    free = shares(min(processes, len(runs)), any(run.one_core for run in runs))
    try:
        while children or (waiting and not stopping):
            if is_stopped() and not stopping:
                terminate(children)
                stopping = True
            while waiting and free and not stopping:
                children.append(start(waiting.pop(0), program, free.pop(0)))
            time.sleep(POLL)
            ended, children = wait(children)
            for one in ended:
                free.append(one.cores)
                done(one)
    finally:
        terminate(children)


def terminate(children: Sequence[Child]) -> None:
    for child in children:
        child.process.send_signal(signal.SIGTERM)
