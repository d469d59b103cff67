"""Seconds from the command of a run to its first step, of the imports of the programs, and of each program's --help.

The run is started in a new workdir, with an empty user cache, and stopped after its first step. Later starts of the same
command go on from there: they are timed.
"""

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from hybrid_attn import config
from hybrid_attn.bench import measurement
from hybrid_attn.bench.contender import Ready
from hybrid_attn.bench.measurement import Processes, Task
from hybrid_attn.bench.part import ROOT, Figure, Part, Run, chosen

FIRST_STEP, IMPORTS, HELP = 10.0, 3.0, 2.0  # seconds: the targets
MODULES = ("hybrid_attn.train.loop", "hybrid_attn.infer.engine", "hybrid_attn.evals.suite")
POLL = 0.01  # seconds between two looks at the metrics
STOPS = 120  # seconds that a run may take to save and to end


def environment(folder: str) -> dict[str, str]:
    """Without a compile cache that the user set, and with a user cache directory of its own."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION_CACHE")}
    return inherited | {"XDG_CACHE_HOME": f"{folder}/cache", "PYTHONPATH": str(ROOT)}


@contextlib.contextmanager
def started(command: list[str], folder: str) -> Iterator[subprocess.Popen]:
    """A program in a folder; at the end it is asked to stop, and waited for."""
    with open(f"{folder}/output", "w+") as output:
        process = subprocess.Popen(command, cwd=folder, env=environment(folder), stdout=output, stderr=subprocess.STDOUT)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOPS)
            finally:
                process.kill()  # where it did not end


def make_run(values: dict, folder: str) -> Ready:
    """Starts of one run, whose results are the seconds to the first new step."""
    (Path(folder) / "config.py").write_text(f"import json\ndef get_config():\n    return json.loads({json.dumps(values)!r})\n")
    metrics = Path(folder) / "run/metrics.jsonl"
    command = [sys.executable, str(ROOT / "launch/train.py"), "--config=config.py", "--workdir=run"]

    def lines() -> int:
        return metrics.read_text().count("\n") if metrics.exists() else 0

    def run() -> float:
        before, start = lines(), time.perf_counter()
        with started(command, folder) as process:
            while lines() <= before:
                if process.poll() is not None:
                    raise ValueError(f"the run ended before its first step: {(Path(folder) / 'output').read_text()[-500:]}")
                time.sleep(POLL)
            return time.perf_counter() - start

    return Ready(run, 0)


def make_program(command: list[str]) -> Ready:
    """A program that runs to its end; ValueError where it fails. The exit code of --help is 1, as absl has it."""

    def run() -> None:
        done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
        ok = done.returncode == (1 if "--help" in command else 0) and "Traceback" not in done.stderr
        if not ok:
            raise ValueError(f"{' '.join(command)} ended with {done.returncode}: {done.stderr[-500:]}")

    return Ready(run, 0)


def imports() -> dict[str, list[str]]:
    """By name, the commands that import the modules of the programs."""
    return {f"import {name}": [sys.executable, "-c", f"import {name}"] for name in MODULES}


def helps() -> dict[str, list[str]]:
    """By name, the commands that show the help of every program."""
    files = [ROOT / "launch/train.py", *sorted((ROOT / "tools").glob("*.py"))]
    return {f"{path.relative_to(ROOT)} --help": [sys.executable, str(path), "--help"] for path in files}


def measure_run(processes: Processes, run: Run) -> list[dict]:
    """A record of the first start, and one of the later ones."""
    values = config.to_dict(run.config)
    values["train"]["log_every"] = 1  # a line of the metrics for each step
    with tempfile.TemporaryDirectory() as folder:
        x = processes.race("start", {"run": Task("start", make_run, (values, folder))}, run.repeats)["run"]
    first, *later = x.results
    records = [{"contender": "first step, first start", "seconds": first, "best": first, "calls": [first]}]
    later = {"seconds": statistics.median(later), "best": min(later), "calls": later}
    return [*records, {"contender": "first step, second start", "target": FIRST_STEP} | later]


def measure(processes: Processes, run: Run) -> list[dict]:
    """A record of the first start and of the later ones, of each import and of each --help."""
    what = chosen("what", run.options["what"], ("run", "imports", "help"))
    records, commands = measure_run(processes, run) if "run" in what else [], {}
    for name, target, of_name in (("imports", IMPORTS, imports()), ("help", HELP, helps())):
        if name in what:
            commands |= {title: (command, target) for title, command in of_name.items()}
    tasks = {title: Task("start", make_program, (command,)) for title, (command, _) in commands.items()}
    measured = processes.race("start", tasks, run.repeats)
    return records + [{"contender": title, "target": commands[title][1]} | x.record for title, x in measured.items()]


def table(records: list[dict]) -> str:
    rows = [[r["contender"], f"{r['seconds']:.2f}", f"{r['best']:.2f}"] for r in records]
    return measurement.table(("what", "s", "best"), rows)


def figures(records: list[dict]) -> dict[str, Figure]:
    return {r["contender"]: Figure(r["seconds"], "s", r.get("target"), at_least=False) for r in records}


PART = Part("Start", "configs/hybrid_8k.py", (), measure, table, figures, {"what": "run+imports+help"})
