"""The same model and tokens here, in `transformers` and in MaxText: training steps and decoded tokens.

Each contender runs in a process of its own, which is started --repeats times, in turn with the others. Memory is the peak of
the process, with its libraries and parameters. The time of the first step or token is that from the start of the process. Steps
and answers after the first are timed; with steps=0 the first one is. A contender whose process does not fit into --memory_gib
recomputes the activations of each layer.
"""

import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import psutil

from hybrid_attn import config
from hybrid_attn.bench import answers, machine, maxtext, measurement, step, training
from hybrid_attn.bench.measurement import Processes
from hybrid_attn.bench.part import Figure, Part, Run, chosen
from hybrid_attn.bench.start import POLL, started
from hybrid_attn.config import Config
from hybrid_attn.trees import check

CONTENDERS = ("ours", "transformers", "MaxText")
OPTIONS = answers.CHUNK | {
    "work": "step+decode",
    "contenders": "+".join(CONTENDERS),
    "steps": 2,  # steps or answers that a process does after the first
    "new": 32,  # tokens of an answer
    "recompute": "",  # contenders that recompute activations without trying whether they fit
    "maxtext_python": "",  # Python of an environment with MaxText
}
HEADER = (
    *("work", "contender", "tokens", "parameters", "tokens/s", "time / ours", "peak GiB", "memory / ours"),
    *("first s", "first / ours"),
)
ALIKE = 1e-3  # the largest difference of numbers of parameters, as a share of ours
DOES_NOT_FIT = "needs more than"


class Request(NamedTuple):
    """What a process does: `functions` of hybrid_attn/bench/contender.py, run by `python`."""

    python: str
    functions: list
    recomputes: bool = False  # activations in the backward pass


def no_transformers(run: Run) -> str:
    return measurement.no_transformers(run.platform, run.dtype)


def no_maxtext(run: Run, c: Config, limit: int) -> str:
    """Why MaxText cannot be compared with here, empty if it can; ValueError where its Python does not exist."""
    python = run.options["maxtext_python"]
    if not python:
        return "no Python of an environment that has it is named; use --options=maxtext_python=PATH"
    check(Path(python).is_file(), f"--options has maxtext_python={python}, which is no file; name a Python with MaxText")
    if (run.platform, run.dtype) != ("cpu", "float32"):
        return f"compared in float32 on a CPU, not in {run.dtype} on {run.platform}"
    has = "import importlib.util, sys; sys.exit(importlib.util.find_spec('maxtext') is None)"
    if subprocess.run([python, "-c", has], capture_output=True).returncode:
        return f"not installed for {python}"
    return maxtext.no_such_model(c.model) or maxtext.too_large(c, limit)


# --- What the contenders do: requests by contender, of which the next is used where one does not fit.


def ours(*function) -> Request:
    return Request(sys.executable, [["hybrid_attn.allocator", "keep_freed_memory", []], function])


def in_maxtext(run: Run, function: tuple) -> Request:
    return Request(str(Path(run.options["maxtext_python"]).absolute()), [function])


def recomputing(run: Run) -> list[str]:
    """The contenders that recompute without trying whether their activations fit."""
    return chosen("recompute", run.options["recompute"], CONTENDERS[1:]) if run.options["recompute"] else []


def steps(run: Run, c: Config, directory: str, decayed: list[str]) -> dict[str, list[Request]]:
    """Training steps of `c`; `decayed` are tensors with weight decay of the model that is exported in a directory."""
    tokens_BT, at_once = training.batch_of(c)["tokens"].tolist(), recomputing(run)
    requests = {"ours": [ours("hybrid_attn.bench.training", "make_ours", [config.to_dict(c)])]}
    for name in CONTENDERS[1:]:
        requests[name] = []
        for recompute in (True,) if name in at_once or c.train.remat != "none" else (False, True):
            of_torch = "hybrid_attn.bench.pytorch", "make_steps", step.transformers_steps(c, directory, decayed, recompute)
            of_maxtext = "hybrid_attn.bench.maxtext", "make_steps", [maxtext.of_steps(c, directory, recompute), tokens_BT]
            made = in_maxtext(run, of_maxtext) if name == "MaxText" else Request(sys.executable, [of_torch])
            requests[name].append(made._replace(recomputes=recompute))
    return requests


def decoding(run: Run, c: Config, directory: str, decayed: list[str]) -> dict[str, list[Request]]:
    """Answers to a prompt; both together have the length of the sequences of `c`."""
    S, new = c.stages[0].seq_len, run.options["new"]
    prompt = answers.prompt_of(c, S - new)
    of_ours = [config.to_dict(c), len(prompt), new, run.options["chunk"]]
    of_torch = "hybrid_attn.bench.pytorch", "make_answers", [directory, prompt, new]
    of_maxtext = "hybrid_attn.bench.maxtext", "make_answers", [maxtext.of_answers(c, directory, len(prompt)), prompt, new]
    return {
        "ours": [ours("hybrid_attn.bench.answers", "make_ours", of_ours)],
        "transformers": [Request(sys.executable, [of_torch])],
        "MaxText": [in_maxtext(run, of_maxtext)],
    }


WORKS = {"step": steps, "decode": decoding}


# --- Processes.


def sample(request: Request, calls: int, limit: int) -> dict:
    """What a contender measured in a process of its own, and when the process started; or what is missing."""
    with tempfile.TemporaryDirectory() as folder:
        path, output = Path(folder) / "request.json", Path(folder) / "output"
        path.write_text(json.dumps({"functions": request.functions, "calls": calls}))
        begin = time.time()
        with started([request.python, "-m", "hybrid_attn.bench.contender", str(path)], folder) as process:
            fits = stays_below(limit, process)
        if fits and process.returncode == 0:
            return json.loads(path.read_text()) | {"started": begin, "recomputes": request.recomputes}
        lines = output.read_text(errors="replace").strip().splitlines() or [""]
    if not fits or any(text in line for text in measurement.OUT_OF_MEMORY for line in lines):
        return {"missing": f"{DOES_NOT_FIT} {limit / machine.GIB:.3g} GiB"}
    return {"missing": f"ended with {process.returncode}: {lines[-1]}"}


def stays_below(limit: int, process: subprocess.Popen) -> bool:
    """Waits for the end of a process, and returns False as soon as it has more than `limit` bytes."""
    with contextlib.suppress(psutil.NoSuchProcess):  # it ended
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            if watched.memory_info().rss > limit:
                return False
            time.sleep(POLL)
    process.wait()
    return True


def race(title: str, requests: dict[str, list[Request]], run: Run, limit: int) -> dict[str, list[dict]]:
    """Samples by contender, which start in turn; nothing of one that is missing once."""
    samples, requests = {name: [] for name in requests}, {name: list(of_name) for name, of_name in requests.items()}
    for turn in range(run.repeats):
        for name in [name for name, xs in samples.items() if not xs or "missing" not in xs[-1]]:
            x = sample(requests[name][0], 1 + run.options["steps"], limit)
            while x.get("missing", "").startswith(DOES_NOT_FIT) and len(requests[name]) > 1:
                requests[name].pop(0)
                x = sample(requests[name][0], 1 + run.options["steps"], limit)
            samples[name].append(x)
            shown = x["missing"] if "missing" in x else f"{x['ended'] - x['started']:.3g} s from its start"
            print(f"{title}  {turn + 1}/{run.repeats}  {name}: {shown}", file=sys.stderr, flush=True)
    return samples


# --- Records, their table and their figures.


def summary(work: str, samples: list[dict]) -> dict:
    """What a record says of samples; `first` is the time from the start of the process to the first step or token."""
    if "missing" in samples[-1]:
        return {"missing": samples[-1]["missing"]}
    record = {name: samples[0][name] for name in ("parameters", "versions", "recomputes")} | {"processes": len(samples)}
    if samples[0]["memory"] is not None:
        record["memory"] = max(x["memory"] for x in samples)
    timed = slice(len(samples[0]["seconds"]) > 1, None)  # without the first call, unless it is the only one
    if work == "step":
        record["losses"] = samples[0]["results"]
        first = [x["ended"] - x["started"] for x in samples]
        seconds = [s for x in samples for s in x["seconds"][timed]]
    else:
        replies = [[answers.Answer(*result) for result in x["results"]] for x in samples]
        first = [x["began"] - x["started"] + of_x[0].prefill for x, of_x in zip(samples, replies, strict=True)]
        seconds = [answer.token for of_x in replies for answer in of_x[timed]]
    return record | {"first": statistics.median(first), "seconds": statistics.median(seconds), "samples": seconds}


def planned(work: str, c: Config, run: Run, limit: int, done: list[dict]) -> dict[str, dict]:
    """The records before they are measured, by contender; those that are left out say why. `done` are those of this work."""
    records = {}
    for name in chosen("contenders", run.options["contenders"], CONTENDERS):
        records[name] = {"work": work} | training.about(name, c, masked=name != "ours")
        reason = "" if name == "ours" else no_transformers(run) if name == "transformers" else no_maxtext(run, c, limit)
        reason = reason or (training.too_long(records[name], done, run.seconds) if work == "step" else "")
        records[name] |= {"missing": reason} if reason else {}
    return records


def of_length(work: str, c: Config, processes: Processes, run: Run, records: dict[str, dict]) -> None:
    """Adds what was measured to the records of one kind of work at the length of `c`."""
    S = c.stages[0].seq_len
    with tempfile.TemporaryDirectory() as directory:
        decayed = processes.call("jax", measurement.export, config.to_dict(c), directory, S)
        requests = WORKS[work](run, c, directory, decayed)
        requests = {name: requests[name] for name, record in records.items() if "missing" not in record}
        for name, samples in race(f"{work} {S:,}", requests, run, processes.limit).items():
            records[name] |= summary(work, samples)


def check_parameters(records: list[dict]) -> None:
    """ValueError where a contender has another number of parameters than ours, by more than the norms of MaxText."""
    numbers = {r["contender"]: r["parameters"] for r in records if "parameters" in r}
    for name, number in numbers.items():
        own = numbers.get("ours", number)
        check(abs(number - own) <= ALIKE * own, f"{name} has {number:,} parameters, and ours {own:,}: they are not one model")


def measure(processes: Processes, run: Run) -> list[dict]:
    """Records of the contenders for each kind of work and length; ValueError where they are not one model."""
    works, done = chosen("work", run.options["work"], tuple(WORKS)), []
    check(run.options["steps"] >= 0, f"--options has steps={run.options['steps']}; use 0 or more")
    recomputing(run)
    answers.check_new(run.options["new"], run.lengths)
    for work, S in itertools.product(works, run.lengths):
        c = training.at_length(run.config, S, run.options["steps"])
        records = planned(work, c, run, processes.limit, [r for r in done if r["work"] == work])
        of_length(work, c, processes, run, records)
        done += records.values()
    check_parameters(done)
    training.check_losses([r for r in done if r["contender"] != "MaxText"])
    return done


def beside_ours(records: list[dict]) -> list[tuple[dict, dict]]:
    """Each record with ours of the same run: the last one before it of the same work and length, or an empty one."""
    own, pairs = {}, []
    for r in records:
        if r["contender"] == "ours":
            own[r["work"], r["tokens"]] = r
        pairs.append((r, own.get((r["work"], r["tokens"]), {})))
    return pairs


def table(records: list[dict]) -> str:
    def cells(r: dict, own: dict) -> list[str]:
        row = [r["work"], title(r), f"{r['tokens']:,}"]
        if "missing" in r:
            return row
        tokens = r["batch"] * r["tokens"] if r["work"] == "step" else 1
        row += [f"{r['parameters']:,}", f"{tokens / r['seconds']:,.4g}", ratio(r, own, "seconds")]
        row += [measurement.gib(r.get("memory")), ratio(r, own, "memory"), f"{r['first']:.3g}", ratio(r, own, "first")]
        return row

    measured = [r for r in records if "missing" not in r]
    lines = [measurement.table(HEADER, [cells(*pair) for pair in beside_ours(records)]) + measurement.missing(records, named)]
    lines += [of_processes(measured)] if measured else []
    lines += [maxtext.DIFFERENT] if any(r["contender"] == "MaxText" for r in measured) else []
    return "\n\n".join(lines)


def title(r: dict) -> str:
    return r["contender"] + (", recomputing" if r.get("recomputes") else "")


def named(r: dict) -> str:
    return f"{r['work']}, {r['contender']}, {r['tokens']:,} tokens"


def ratio(r: dict, own: dict, key: str) -> str:
    return f"{r[key] / own[key]:.2f}" if key in r and key in own else "—"


def of_processes(measured: list[dict]) -> str:
    """How many processes were started and how many of their calls timed, and with which versions."""
    rows = dict.fromkeys((len(r["samples"]), r["processes"]) for r in measured)
    rows = " or ".join(
        f"{counted(calls, 'timed call', 's')} in {counted(processes, 'process', 'es')}" for calls, processes in rows
    )
    versions = {r["contender"]: ", ".join(f"{name} {x}" for name, x in r["versions"].items()) for r in measured}
    return f"Each speed is the median of {rows}. " + "; ".join(f"{name}: {x}" for name, x in versions.items()) + "."


def counted(number: int, noun: str, plural: str) -> str:
    return f"{number} {noun}{plural if number > 1 else ''}"


def figures(records: list[dict]) -> dict[str, Figure]:
    """Time, peak memory and time to the first step or token of the others over ours."""
    made, names = {}, {"seconds": "time", "memory": "memory", "first": "start"}
    for r, own in beside_ours(records):
        for key in names if r is not own else ():
            if key in r and key in own:
                name = f"{names[key]} of a {r['work']}, {title(r)} / ours, {r['tokens']:,} tokens"
                made[name] = Figure(r[key] / own[key], "times")
    return made


PART = Part("Beside transformers and MaxText", "configs/bench.py", ("2K", "8K", "32K"), measure, table, figures, OPTIONS)
