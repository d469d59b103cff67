"""The same model, parameters and tokens here, in `transformers` and in MaxText: training steps and decoded tokens.

A contender runs in processes of its own: --repeats of them, in turn with those of the others. All numbers of a row are of these
processes. `first` is the time from the start of a process to its first step or token, the median over the processes; `seconds`
is that of a later step or token, the median over all of them; `memory` is the peak of the largest process, with its libraries
and parameters. Either all contenders recompute the activations of each layer in the backward pass, or none does.
"""

import dataclasses
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from hybrid_attn import config
from hybrid_attn.bench import answers, maxtext_config, measurement, step, training
from hybrid_attn.bench.alone import Calls, Request, run_alone
from hybrid_attn.bench.measurement import Processes
from hybrid_attn.bench.part import Figure, Part, Run, chosen
from hybrid_attn.config import Config
from hybrid_attn.model import flops
from hybrid_attn.trees import check

CONTENDERS = ("ours", "transformers", "MaxText")
REMAT = ("none", "layer")
OPTIONS = answers.CHUNK | {
    "workload": "step+decode",
    "contenders": "+".join(CONTENDERS),
    "timed": 3,  # steps or answers of a process that are timed, after its first one
    "enough": 240,  # seconds: a process makes no further call once its timed ones have taken so long
    "new": 32,  # tokens of an answer
    "remat": "none",  # of every contender in training, in place of train.remat; none+layer measures both
    "maxtext_python": "",  # Python of an environment with MaxText
}
HEADER = (
    *("workload", "contender", "kernel", "tokens", "remat", "timed calls", "tokens/s", "time / ours", "peak GiB"),
    *("memory / ours", "first s", "first / ours", "first loss or same tokens"),
)
ROWS = (
    "All numbers of a row are of the same processes: tokens/s is the median of the timed calls, which follow the first call of "
    "each process, peak GiB is that of the largest process, and first s is the time from the start of a process to its first "
    "step or token. Ratios are to our row of the same run, length and remat."
)
NOTES = {
    "transformers": (
        "`transformers` runs on PyTorch with its scaled dot-product attention, which gets a mask in windowed layers and "
        "computes all S x S scores."
    ),
    "MaxText": (
        "MaxText's attention on a CPU, `dot_product`, computes all S x S scores of every layer. In decoding it applies the "
        "window to the keys of the prompt and to those of the answer apart, so that its answers may differ from the second new "
        "token on."
    ),
}


class Case(NamedTuple):
    """Rows of one table that are measured in turn: a workload at the sequence length and with the remat of `config`."""

    workload: str
    config: Config

    @property
    def title(self) -> str:
        return f"{self.workload} {self.config.stages[0].seq_len:,}"


class Export(NamedTuple):
    """The model in files that the others load, and the names of its tensors with weight decay."""

    directory: str
    decayed: list[str]


def why_missing(name: str, run: Run) -> str:
    """Why a contender cannot run here, empty if it can; ValueError where the Python that is named for it does not exist."""
    if name == "ours":
        return ""
    if name == "transformers":
        return measurement.no_transformers(run.platform, run.dtype)
    python = run.options["maxtext_python"]
    if not python:
        return "no Python of an environment that has it is named; use --options=maxtext_python=PATH"
    check(Path(python).is_file(), f"--options has maxtext_python={python}, which is no file; name a Python with MaxText")
    if reason := measurement.not_in_float32_on_cpu(run.platform, run.dtype):
        return reason
    has_it = "import importlib.util, sys; sys.exit(importlib.util.find_spec('maxtext') is None)"
    is_installed = subprocess.run([python, "-c", has_it], capture_output=True).returncode == 0
    return "" if is_installed else f"not installed for {python}"


# --- What each contender does.


def ours(*function) -> Request:
    return Request(sys.executable, [["hybrid_attn.allocator", "keep_freed_memory", []], function])


def in_maxtext(run: Run, *function) -> Request:
    return Request(str(Path(run.options["maxtext_python"]).absolute()), [function])


def steps_of(run: Run, c: Config, export: Export) -> dict[str, Request]:
    """Training steps on one batch, by contender."""
    batch = {name: x.tolist() for name, x in training.batch_of(c).items()}
    of_torch = step.transformers_steps(c, *export, c.train.remat != "none")
    of_maxtext = maxtext_config.of_steps(c, export.directory), export.directory, batch
    return {
        "ours": ours("hybrid_attn.bench.training", "make_ours", [config.to_dict(c)]),
        "transformers": Request(sys.executable, [("hybrid_attn.bench.pytorch", "make_steps", of_torch)]),
        "MaxText": in_maxtext(run, "hybrid_attn.bench.maxtext", "make_steps", of_maxtext),
    }


def answers_of(run: Run, c: Config, export: Export) -> dict[str, Request]:
    """Answers to a prompt, by contender; both together have the length of the sequences of `c`."""
    new, directory = run.options["new"], export.directory
    prompt = answers.prompt_of(c, c.stages[0].seq_len - new)
    of_ours = config.to_dict(c), len(prompt), new, run.options["chunk"]
    of_maxtext = maxtext_config.of_answers(c, directory, len(prompt)), directory, prompt, new
    return {
        "ours": ours("hybrid_attn.bench.answers", "make_ours", of_ours),
        "transformers": Request(sys.executable, [("hybrid_attn.bench.pytorch", "make_answers", (directory, prompt, new))]),
        "MaxText": in_maxtext(run, "hybrid_attn.bench.maxtext", "make_answers", of_maxtext),
    }


WORKLOADS = {"step": steps_of, "decode": answers_of}


# --- Checks before the measurements, and between them.


def check_options(run: Run) -> None:
    """ValueError for options that cannot be measured with, before anything is started."""
    timed, contenders = run.options["timed"], chosen("contenders", run.options["contenders"], CONTENDERS)
    check(timed >= 2, f"--options has timed={timed}, and a median needs two steps or answers after the first; use 2 or more")
    check("ours" in contenders, f"--options has contenders={'+'.join(contenders)}, and ratios are to ours; add ours")
    chosen("remat", run.options["remat"], REMAT)
    if "decode" in chosen("workload", run.options["workload"], tuple(WORKLOADS)):
        answers.check_new(run.options["new"], run.lengths)


def check_parameters(c: Config, requests: dict[str, Request], limit: int) -> None:
    """ValueError where a contender, which is started for this alone, has another number of parameters than ours."""
    number = flops.parameters(c.model)
    for name, request in requests.items():
        theirs = run_alone(request, Calls(0), limit).get("parameters", number)  # one that fails says why when it is measured
        check(theirs == number, f"{name} has {theirs:,} parameters, and ours {number:,}: they are not one model")


def check_result(case: Case, name: str, measured: dict, of_ours: dict) -> None:
    """ValueError where the first loss or the first new token of a contender is not ours."""
    if "missing" in measured or "missing" in of_ours:
        return
    S, first, own = case.config.stages[0].seq_len, measured["results"][0], of_ours["results"][0]
    if case.workload == "step":
        records = [{"contender": x, "tokens": S, "losses": [loss]} for x, loss in (("ours", own), (name, first))]
        return training.check_losses(records)
    token, own_token = (answers.Answer(*x).tokens[0] for x in (first, own))
    check(token == own_token, f"the first new tokens after {S:,} differ: ours {own_token}, {name} {token}")


# --- Measurements.


def cases(run: Run) -> list[Case]:
    """Each workload at each length, and training with each remat."""
    listed = []
    for workload in chosen("workload", run.options["workload"], tuple(WORKLOADS)):
        for S in run.lengths:
            c = training.at_length(run.config, S, run.options["timed"])
            for remat in chosen("remat", run.options["remat"], REMAT) if workload == "step" else REMAT[:1]:
                listed.append(Case(workload, dataclasses.replace(c, train=dataclasses.replace(c.train, remat=remat))))
    return listed


def initial_record(case: Case, name: str, reason: str, run: Run, records: list[dict]) -> dict:
    """The record of a contender before it is measured; `records` of shorter sequences tell whether it would take too long."""
    c = case.config
    record = {"workload": case.workload, "remat": c.train.remat} | training.about(name, c, masked=name != "ours")
    if case.workload == "step":
        alike = [r for r in records if (r["workload"], r["remat"]) == ("step", c.train.remat)]
        reason = reason or training.too_long(record, alike, run.seconds)
    return record | ({"missing": reason} if reason else {"note": NOTES[name]} if name in NOTES else {})


def run_in_turn(case: Case, requests: dict[str, Request], run: Run, limit: int) -> dict[str, list[dict]]:
    """What the processes of each contender measured; one that is missing once is not started again."""
    calls, measured = Calls(1 + run.options["timed"], run.options["enough"]), {name: [] for name in requests}
    for turn in range(run.repeats):
        for name in [name for name, of_name in measured.items() if not of_name or "missing" not in of_name[-1]]:
            x = run_alone(requests[name], calls, limit)
            measured[name].append(x)
            shown = x["missing"] if "missing" in x else f"{x['ended'] - x['started']:.3g} s from its start"
            print(f"{case.title}  {turn + 1}/{run.repeats}  {name}: {shown}", file=sys.stderr, flush=True)
            check_result(case, name, x, measured["ours"][0])
    return measured


def of_process(workload: str, measured: dict) -> dict:
    """Of one process: seconds from its start to the first step or token, those of the timed ones, and its peak memory."""
    begin, seconds = measured["started"], measured["seconds"][1:]
    if workload == "step":
        return {"first": measured["ended"] - begin, "seconds": seconds, "memory": measured["memory"]}
    first, *timed = (answers.Answer(*result) for result in measured["results"])
    until_first = measured["began"] - begin + first.prefill
    return {"first": until_first, "seconds": [answer.token for answer in timed], "memory": measured["memory"]}


def summary(workload: str, measured: list[dict]) -> dict:
    """What a record says of the processes of a contender; or why it is missing."""
    if "missing" in measured[-1]:
        return {"missing": measured[-1]["missing"]}
    first, processes = measured[0], [of_process(workload, x) for x in measured]
    record = {name: first[name] for name in ("parameters", "kernel", "versions")} | {"processes": processes}
    if first["memory"] is not None:
        record["memory"] = max(x["memory"] for x in processes)
    if workload == "step":
        record["losses"] = first["results"]
    else:
        record["answer"] = answers.Answer(*first["results"][0]).tokens
    seconds = [s for x in processes for s in x["seconds"]]
    return record | {"first": statistics.median(x["first"] for x in processes), "seconds": statistics.median(seconds)}


def measure(processes: Processes, run: Run) -> list[dict]:
    """Records of the contenders for each case; ValueError where they are not one model, before anything is timed."""
    check_options(run)
    reasons = {name: why_missing(name, run) for name in chosen("contenders", run.options["contenders"], CONTENDERS)}
    available = [name for name, reason in reasons.items() if not reason]
    if "MaxText" in available:
        maxtext_config.check_model(run.config.model)
    with tempfile.TemporaryDirectory() as directory:
        values = config.to_dict(run.config), directory, max(run.lengths)
        export = Export(directory, processes.call("jax", measurement.export, *values) if len(available) > 1 else [])
        return measured_cases(run, reasons, export, processes.limit)


def measured_cases(run: Run, reasons: dict[str, str], export: Export, limit: int) -> list[dict]:
    """Records of all cases; `reasons` say of each contender why it is missing, empty where it can run."""
    records, checked = [], set()
    for case in cases(run):
        of_case = {}
        for name, reason in reasons.items():
            too_large = maxtext_config.too_large(case.config, limit) if name == "MaxText" else ""
            of_case[name] = initial_record(case, name, reason or too_large, run, records)
        requests = WORKLOADS[case.workload](run, case.config, export)
        requests = {name: requests[name] for name, record in of_case.items() if "missing" not in record}
        check_parameters(run.config, {name: x for name, x in requests.items() if name not in {"ours", *checked}}, limit)
        checked |= requests.keys()
        for name, measured in run_in_turn(case, requests, run, limit).items():
            of_case[name] |= summary(case.workload, measured)
        records += of_case.values()
    return records


# --- The table and the figures.


def beside_ours(records: list[dict]) -> list[tuple[dict, dict]]:
    """Each record with ours of the same run: the last one before it of the same case, or an empty one."""
    last, pairs = {}, []
    for r in records:
        case = r["workload"], r["tokens"], r["remat"]
        if r["contender"] == "ours":
            last[case] = r
        pairs.append((r, last.get(case, {})))
    return pairs


def table(records: list[dict]) -> str:
    measured = [r for r in records if "missing" not in r]
    text = measurement.table(HEADER, [cells(*pair) for pair in beside_ours(records)]) + measurement.missing(records, row_name)
    versions = {r["contender"]: ", ".join(f"{name} {x}" for name, x in r["versions"].items()) for r in measured}
    lines = [ROWS, "; ".join(f"{name}: {x}" for name, x in versions.items()) + "."] if measured else []
    return "\n\n".join([text, *lines, *dict.fromkeys(r["note"] for r in measured if "note" in r)])


def cells(r: dict, own: dict) -> list[str]:
    remat = r["remat"] if r["workload"] == "step" else "—"
    row = [r["workload"], r["contender"], r.get("kernel", "—"), f"{r['tokens']:,}", remat]
    if "missing" in r:
        return row
    tokens = r["batch"] * r["tokens"] if r["workload"] == "step" else 1
    row += [timed_calls(r), f"{tokens / r['seconds']:,.4g}", ratio(r, own, "seconds")]
    row += [measurement.gib(r.get("memory")), ratio(r, own, "memory"), f"{r['first']:.3g}", ratio(r, own, "first")]
    return [*row, result_shown(r, own)]


def timed_calls(r: dict) -> str:
    """Such as 3, or 3 + 3 of two processes."""
    return " + ".join(str(len(process["seconds"])) for process in r["processes"])


def result_shown(r: dict, own: dict) -> str:
    if r["workload"] == "step":
        return f"{r['losses'][0]:.4f}"
    if "answer" not in r or "answer" not in own:
        return "—"
    return f"{answers.same_tokens(r['answer'], own['answer'])}/{len(own['answer'])}"


def title(r: dict) -> str:
    return r["contender"] + (", recomputing" if r["remat"] != "none" else "")


def row_name(r: dict) -> str:
    return f"{r['workload']}, {title(r)}, {r['tokens']:,} tokens"


def ratio(r: dict, own: dict, key: str) -> str:
    return f"{r[key] / own[key]:.2f}" if key in r and key in own else "—"


def figures(records: list[dict]) -> dict[str, Figure]:
    """Time, peak memory and time to the first step or token of the others over ours."""
    ratios, names = {}, {"seconds": "time", "memory": "memory", "first": "start"}
    for r, own in beside_ours(records):
        for key in names if r is not own else ():
            if key in r and key in own:
                name = f"{names[key]} of a {r['workload']}, {title(r)} / ours, {r['tokens']:,} tokens"
                ratios[name] = Figure(r[key] / own[key], "times")
    return ratios


PART = Part("Beside transformers and MaxText", "configs/bench.py:olmo3", ("2K", "8K", "32K"), measure, table, figures, OPTIONS)
