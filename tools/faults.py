"""Injects faults into training runs and resumes them: python tools/faults.py --small

Every run must end bit for bit like an undisturbed one: the same parameters, the same loss at each step, each step once in
metrics.jsonl and in TensorBoard, and no traceback. Faults are kills, signals, damaged checkpoints and a full disk; of two
processes, one is killed or stopped. Prints a table; exit code 1 if a case fails. All cases take 15 minutes on two cores.
"""

import contextlib
import dataclasses
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from absl import app, flags

from hybrid_attn import programs
from hybrid_attn.parallel import launchers

ROOT = Path(__file__).parents[1]
CASES = flags.DEFINE_string("cases", "", "Only the cases whose name matches this regular expression.")
SMALL = flags.DEFINE_bool("small", False, "One or two cases of each kind instead of all.")
OUT = flags.DEFINE_string("out", None, "New folder that keeps the runs; by default they are removed.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the moments of the faults.")
STEPS, EDGE, EVERY, EVALS = 96, 48, 8, 56
TIMEOUT = 240  # seconds in which a run must reach the moment, or end
DISK = 3  # MiB: room for two checkpoints, their successor and the records
CONFIG = f"""
from configs import base

def get_config():
    c = base.get_config()
    c.model.update(pattern="LG", num_layers=2, d_model=16, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=32)
    c.model.kinds.L.window = 16
    c.data.sources.text.paths = ("{{corpus}}/*.txt",)
    c.stages = [
        dict(c.stages[0], steps={EDGE}, seq_len=64, batch=4),
        dict(c.stages[0], steps={STEPS - EDGE}, seq_len=128, batch=2),
    ]
    c.train.update(log_every=1, checkpoint_every={EVERY}, keep=3, remat="none")
    c.evals.update(names=("position",), every={EVALS}, tokens=4096, lengths=(1.0,))
    c.optim.warmup_steps = 4
    return c
"""


@dataclasses.dataclass
class Lab:
    """The folder of all runs, and the outcomes of the undisturbed runs by the number of processes."""

    folder: Path
    undisturbed: dict[int, tuple] = dataclasses.field(default_factory=dict)

    def env(self) -> dict[str, str]:
        return os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "JAX_COMPILATION_CACHE_DIR": f"{self.folder}/compiled",
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }


class Training:
    """One run of the training command in `workdir`, in one process or several; everything that it prints goes to files."""

    def __init__(self, lab: Lab, workdir: Path, processes: int = 1):
        self.workdir, log = workdir, workdir.with_name(f"{workdir.name}.log")
        log.mkdir(parents=True, exist_ok=True)
        number = len(list(log.glob("*-0.err")))
        self.outputs = [log / f"{number}-{i}.out" for i in range(processes)]
        program = [sys.executable, ROOT / "launch/train.py", f"--config={lab.folder}/config.py", f"--workdir={workdir}"]
        port = launchers.free_port()
        self.processes = []
        for i, output in enumerate(self.outputs):
            joins = [f"--coordinator=localhost:{port}", f"--num_processes={processes}", f"--process_id={i}"]
            command = program + joins * (processes > 1)
            with output.open("wb") as out, output.with_suffix(".err").open("wb") as err:
                self.processes.append(subprocess.Popen(command, cwd=ROOT, env=lab.env(), stdout=out, stderr=err))

    def wait_for(self, moment: Callable[["Training"], bool]) -> bool:
        """Whether `moment` became true before the run ended."""
        until = time.monotonic() + TIMEOUT
        while time.monotonic() < until and self.processes[0].poll() is None:
            if moment(self):
                return True
            time.sleep(0.002)
        return False

    def steps(self) -> int:
        """The number of lines in metrics.jsonl."""
        path = self.workdir / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def end(self, timeout: float = TIMEOUT) -> list[int | None]:
        """Exit codes; None of a process that had to be killed because it did not end."""
        until = time.monotonic() + timeout
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(until - time.monotonic(), 0.1))
        codes = [process.poll() for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait()
        return codes


# Moments of a run: whether it has come.
def reached(step: int) -> Callable[[Training], bool]:
    return lambda run: run.steps() >= step


def saving(step: int) -> Callable[[Training], bool]:
    """Its directory has the name under which Orbax writes."""
    return lambda run: any(run.workdir.glob(f"checkpoints/{step}.orbax-checkpoint-tmp*"))


def saved(step: int) -> Callable[[Training], bool]:
    return lambda run: (run.workdir / f"checkpoints/{step}").exists()


def evaluating(step: int) -> Callable[[Training], bool]:
    return lambda run: (run.workdir / f"evals/{step}").exists()


def importing(run: Training) -> bool:
    """The compiled part of jax is being loaded."""
    return "jaxlib" in Path(f"/proc/{run.processes[0].pid}/maps").read_text()


@dataclasses.dataclass
class Case:
    """`disturb(lab, workdir)` injects a fault into a new run; returns what it did, and exit codes that must be `allowed`."""

    name: str
    disturb: Callable[[Lab, Path], tuple[str, list]]
    allowed: tuple = ()
    processes: int = 1
    unreadable: int = 0  # checkpoints that the next run must rename


def signalled(number: int, moment: Callable, delay: float, process: int = 0, processes: int = 1) -> Callable:
    """A run that gets a signal `delay` seconds after a moment, and ends."""

    def disturb(lab: Lab, workdir: Path) -> tuple[str, list]:
        run = Training(lab, workdir, processes)
        in_time = run.wait_for(moment)
        time.sleep(delay)
        run.processes[process].send_signal(number)
        codes = run.end()
        return f"{'' if in_time else 'not reached; '}exit {', '.join(map(str, codes))}", codes

    return disturb


def signalled_twice(lab: Lab, workdir: Path) -> tuple[str, list]:
    """Ctrl-C while a checkpoint is written, and again at once: the program ends within seconds."""
    run = Training(lab, workdir)
    run.wait_for(saving(56))
    run.processes[0].send_signal(signal.SIGINT)
    time.sleep(0.02)
    before = time.monotonic()
    run.processes[0].send_signal(signal.SIGINT)
    codes = run.end(30)
    return f"exit {codes[0]} after {time.monotonic() - before:.1f} s", codes


def stopped_process(lab: Lab, workdir: Path) -> tuple[str, list]:
    """One of two processes is stopped, like a machine that hangs; the other must end by itself."""
    run = Training(lab, workdir, 2)
    run.wait_for(reached(30))
    before = time.monotonic()
    run.processes[1].send_signal(signal.SIGSTOP)
    code = run.processes[0].wait(TIMEOUT)
    run.processes[1].send_signal(signal.SIGKILL)
    run.end()
    return f"process 0: exit {code} after {time.monotonic() - before:.0f} s", [code]


def damaged(damage: Callable[[Path], None], newest: int) -> Callable:
    """A run that is stopped late; then its newest checkpoints, `newest` of them, are damaged."""

    def disturb(lab: Lab, workdir: Path) -> tuple[str, list]:
        stopped = lab.folder / "stopped"
        if not stopped.exists():
            signalled(signal.SIGTERM, reached(75), 0)(lab, stopped)
        shutil.copytree(stopped, workdir)
        steps = sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())
        for step in steps[-newest:]:
            damage(workdir / "checkpoints" / str(step))
        return f"damaged {', '.join(map(str, steps[-newest:]))} of {', '.join(map(str, steps))}", []

    return disturb


def largest_file(checkpoint: Path) -> Path:
    return max((checkpoint / "state").rglob("d/*"), key=lambda path: path.stat().st_size)


def truncate(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(checkpoint: Path) -> None:
    path = largest_file(checkpoint)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty_the_config(checkpoint: Path) -> None:
    (checkpoint / "config/metadata").write_text("{}")


def change_a_digit(checkpoint: Path) -> None:
    path = checkpoint / "data/metadata"
    path.write_text(re.sub(r"(\d)(?=\])", lambda digit: str((int(digit[1]) + 1) % 10), path.read_text(), count=1))


def damage_the_manifest(checkpoint: Path) -> None:
    path = checkpoint / "state/manifest.ocdbt"
    path.write_bytes(path.read_bytes()[::-1])


DAMAGES = (truncate, flip_a_bit, empty_the_config, change_a_digit, damage_the_manifest)


def full_disk(lab: Lab, workdir: Path) -> tuple[str, list]:
    """A small disk that fills during the run and has room again for the next one."""
    workdir.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}m", "tmpfs", workdir]
    if subprocess.run(mount, capture_output=True).returncode:
        return "left out: mounting a small disk needs root", []
    run = Training(lab, workdir)
    run.wait_for(reached(60))
    ballast = workdir / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass
    codes = run.end()
    ballast.unlink()
    return f"exit {codes[0]}: {last_line(run)}", codes


def last_line(run: Training) -> str:
    lines = run.outputs[0].with_suffix(".err").read_text().splitlines() or [""]
    return lines[-1].replace(f"{run.workdir}/", "")[:100]


def tracebacks(logs: Path) -> Iterator[str]:
    """The last line of the first traceback of each run that printed one."""
    for path in sorted(logs.glob("*.err")):
        _, header, after = path.read_text().partition("Traceback (most recent call last):\n")
        if header:
            yield next((line for line in after.splitlines() if not line.startswith(" ")), "cut off")[:200]


def cases(rng: random.Random) -> Iterator[Case]:
    """All cases, in the order of the table."""
    anywhere = [reached(rng.randrange(1, STEPS)) for _ in range(9)]
    kills = [
        saving(16), evaluating(EVALS), reached(EDGE), evaluating(STEPS), saving(EDGE), reached(0), saved(EVERY), reached(1),
        saving(EVERY), saving(STEPS), saving(EVALS + EVERY), *anywhere,
    ]  # fmt: skip
    for i, moment in enumerate(kills):
        yield Case(f"kill-{i + 1}", signalled(signal.SIGKILL, moment, rng.uniform(0, 0.03)), (-signal.SIGKILL, 0))
    moments = [saving(24), evaluating(EVALS), reached(EDGE), importing, reached(1), evaluating(STEPS), *anywhere[:4]]
    for number, name, codes in ((signal.SIGTERM, "term", (0, -signal.SIGTERM)), (signal.SIGINT, "ctrl-c", (0, 130))):
        for i, moment in enumerate(moments):
            yield Case(f"{name}-{i + 1}", signalled(number, moment, rng.uniform(0, 0.05)), codes)
        if number == signal.SIGINT:
            yield Case("ctrl-c-imports", signalled(number, importing, 0.2), (130,))
            yield Case("ctrl-c-twice", signalled_twice, (0, 130))
    for damage, newest in itertools.product(DAMAGES, (1, 2)):
        yield Case(f"{damage.__name__}-{newest}", damaged(damage, newest), unreadable=newest)
    yield Case("full-disk", full_disk, (1,))
    for process in (0, 1):
        disturb = signalled(signal.SIGKILL, reached(30), rng.uniform(0, 0.05), process, 2)
        yield Case(f"two-processes-kill-{process}", disturb, (-signal.SIGKILL, 1), 2)
    yield Case("two-processes-stop-1", stopped_process, (1,), 2)


SMALL_CASES = (
    "kill-1", "kill-2", "kill-3", "term-1", "ctrl-c-2", "ctrl-c-imports", "ctrl-c-twice", "truncate-2", "change_a_digit-1",
    "damage_the_manifest-1", "full-disk",
)  # fmt: skip


def outcome(workdir: Path) -> tuple:
    """The fingerprint of the last parameters, (step, loss) of every line of metrics.jsonl, and the steps in TensorBoard."""
    from hybrid_attn import checkpoint

    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    losses = [(line["step"], line["loss"]) for line in lines]
    return checkpoint.fingerprint(workdir / "checkpoints", STEPS), losses, tensorboard_steps(workdir / "tensorboard")


def tensorboard_steps(folder: Path) -> list[int]:
    """The steps of the most frequent scalar; a session hides events of older sessions from its first step on.

    A record of a file is 8 bytes of length, 4 of checksum, the event, and 4 of checksum; the last may be truncated.
    """
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    steps: dict[str, list[int]] = {}
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        content = path.read_bytes()
        while len(content) >= 16 + (length := int.from_bytes(content[:8], "little")):
            event, content = Event.FromString(content[12 : length + 12]), content[length + 16 :]
            if event.session_log.status == SessionLog.START:
                steps = {tag: [step for step in seen if step < event.step] for tag, seen in steps.items()}
            for value in event.summary.value:
                steps.setdefault(value.tag, []).append(event.step)
    return max(steps.values(), key=len)


def finish(lab: Lab, workdir: Path, processes: int) -> list[str]:
    """Runs the command to its end, and returns its failures."""
    run = Training(lab, workdir, processes)
    codes = run.end()
    return [f"the same command ended with {', '.join(map(str, codes))}: {last_line(run)}"] if any(codes) else []


def failures_of(lab: Lab, case: Case, workdir: Path, codes: list) -> list[str]:
    """The failures of a case; none if the run ended like an undisturbed one."""
    wrong = [f"exit code {code}" for code in codes if code not in case.allowed]
    wrong += finish(lab, workdir, case.processes)
    noticed = len(list(workdir.glob("checkpoints/*.unreadable*")))
    wrong += [f"{noticed} of {case.unreadable} damaged checkpoints renamed"] if noticed < case.unreadable else []
    wrong += [f"a traceback: {error}" for error in tracebacks(workdir.parent / f"{workdir.name}.log")]
    if not wrong:
        (expected, expected_losses, _), (params, losses, steps) = lab.undisturbed[case.processes], outcome(workdir)
        every = list(range(1, STEPS + 1))
        wrong += ["other parameters"] if params != expected else []
        wrong += ["a step twice, or missing"] if [step for step, _ in losses] != every else []
        wrong += ["a step twice, or missing, in TensorBoard"] if steps != every else []
        wrong += ["other losses"] if dict(losses) != dict(expected_losses) else []
    return wrong


def prepare(folder: Path) -> Lab:
    """Writes the corpus and the config."""
    (folder / "corpus").mkdir()
    for i in range(40):
        (folder / f"corpus/{i}.txt").write_text("".join(f"line {j} of document {i}\n" for j in range(10 + i)))
    (folder / "config.py").write_text(CONFIG.format(corpus=folder / "corpus"))
    return Lab(folder)


def run_case(lab: Lab, case: Case) -> list[str]:
    """Its failures. The first case with so many processes comes after an undisturbed run, with which all are compared."""
    if case.processes not in lab.undisturbed:
        straight = lab.folder / f"straight-{case.processes}"
        if wrong := finish(lab, straight, case.processes):
            raise OSError(f"the undisturbed run failed: {wrong[0]}")
        lab.undisturbed[case.processes] = outcome(straight)
    workdir, before = lab.folder / case.name, time.monotonic()
    try:
        how, codes = case.disturb(lab, workdir)
        wrong = [] if how.startswith("left out") else failures_of(lab, case, workdir, codes)
    finally:
        if workdir.is_mount():
            subprocess.run(["umount", workdir], check=True)
    verdict = "FAILED: " + "; ".join(wrong) if wrong else "left out" if how.startswith("left out") else "same bits"
    print(f"{case.name:<24} {time.monotonic() - before:5.0f} s  {verdict:<10}  {how}", flush=True)
    return wrong


def break_runs() -> int:
    chosen = [case for case in cases(random.Random(SEED.value)) if not SMALL.value or case.name in SMALL_CASES]
    chosen = [case for case in chosen if re.search(CASES.value, case.name)]
    if not chosen:
        raise ValueError(f"--cases={CASES.value} matches none of the cases")
    if OUT.value:
        Path(OUT.value).mkdir(parents=True)
    with contextlib.nullcontext(OUT.value) if OUT.value else tempfile.TemporaryDirectory(prefix="faults-") as folder:
        lab = prepare(Path(folder).absolute())
        failed = [case.name for case in chosen if run_case(lab, case)]
    print(f"{len(chosen) - len(failed)} of {len(chosen)} cases passed" + "".join(f"; {name}" for name in failed))
    return 1 if failed else 0


def main(argv):
    programs.run(break_runs, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
