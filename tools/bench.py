"""Times the code beside other libraries, part by part, and makes docs/results/speed.md: python tools/bench.py --part=step

    python tools/bench.py --part=attention --lengths=2K,8K --options=head_dim=128,kinds=global --json=attention.json
    python tools/bench.py --part=step,prefill,decode --lengths=8K --json=new.json --compare=old.json
    python tools/bench.py --part=layouts --config=configs/bench.py --config.model.num_layers=4
    python tools/bench.py --page=docs/results/speed.md

Contenders are called alternately, each library in a process of its own, once to warm up and then --repeats times. Times are
medians, beside which the best call stands, and ratios are those of medians. Memory is what a call takes beyond its inputs.
The output says whether other programs used the machine meanwhile. A dash is explained under its table. --compare sets the
figures beside those of an earlier --json, and --add puts them into it. --page is made of the JSON files of its folder's
speed/before and speed/after.
"""

import itertools
import shlex
import sys
import time
from pathlib import Path

from absl import app, flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.bench import table
from hybrid_attn.trees import check

PART = flags.DEFINE_list("part", [], f"Parts to measure: {'; '.join(f'{name}: {what}' for name, what in table.PARTS.items())}.")
LENGTHS = flags.DEFINE_list("lengths", None, "Tokens of a sequence, 8192, 8K or 1M; by default each part has its own.")
OPTIONS = flags.DEFINE_string("options", "", "Options of the one part that is measured, such as heads=8,head_dim=32.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each contender.", lower_bound=1)
SECONDS = flags.DEFINE_float("seconds", 300.0, "Leave out calls that would take longer, judged by a shorter sequence.", 0)
MEMORY_GIB = flags.DEFINE_float("memory_gib", 12.0, "Leave out contenders that need more.", lower_bound=0.1)
JSON = flags.DEFINE_string("json", None, "File for the machine, the versions, the numbers of the tables and the figures.")
ADD = flags.DEFINE_bool(
    "add", False, "Add to the file of --json, if it is there, what the same code measures on the same machine."
)
COMPARE = flags.DEFINE_string("compare", None, "A file of --json, whose figures are printed beside the new ones.")
PAGE = flags.DEFINE_string("page", None, "Page to make of results that are there, such as docs/results/speed.md.")
CONFIG = config_file.define(
    "config", None, "Model, optimiser and how they run; by default each part has its own.", config.Config
)


def run_of(name: str, part, platform: str):
    """What --part, --lengths and the other flags ask of a part."""
    from hybrid_attn.bench import measurement
    from hybrid_attn.bench.part import ROOT, Run
    from hybrid_attn.model import execution_on

    types = {option: type(value) for option, value in part.options.items()}
    known = f"--options={OPTIONS.value}: part {name}"
    check(not OPTIONS.value or types, f"{known} has no options")
    options = {**part.options, **programs.pairs(known, OPTIONS.value, types)}
    check(bool(part.lengths) or LENGTHS.value is None, f"--lengths: part {name} has no lengths")
    check(bool(part.config) or CONFIG.value is None, f"--config: part {name} measures no model")
    lengths = measurement.lengths(part.lengths if LENGTHS.value is None else LENGTHS.value) if part.lengths else []
    c = dtype = None
    if part.config:
        c = config.build(CONFIG.value.values if CONFIG.value else config_file.load(str(ROOT / part.config)))
        dtype = str(execution_on(platform, c.model, c.train).dtype)
    return Run(c, lengths, REPEATS.value, SECONDS.value, options, platform, dtype)


def model_of(part, run) -> dict | None:
    """What a result says of the model that a part measures, if any; `digest` is of all that says what the model computes."""
    from hybrid_attn.model import flops
    from hybrid_attn.train import resume

    if not run.config:
        return None
    m, name = run.config.model, CONFIG.value.name if CONFIG.value else part.config
    about = {"config": name, "parameters": flops.parameters(m), "layers": m.layers, "dtype": run.dtype}
    return about | {"digest": resume.function_of(m)[:12]}


def measured(part, run, processes, revision: str) -> dict:
    """The records of a part, each with how it was measured: those of one file may be of several commands."""
    from hybrid_attn.bench import machine

    watch = machine.Watch()
    how = {"options": dict(run.options), "repeats": run.repeats, "revision": revision}
    records = [r | how for r in part.measure(processes, run)]
    return {"model": model_of(part, run), "watch": watch.stop(), "records": records}


def command() -> str:
    """The command line; its --json is the name of the file alone, and left out where --add does not need it."""
    arguments = [x for before, x in itertools.pairwise(sys.argv) if before != "--json" and x.partition("=")[0] != "--json"]
    file = [f"--json={Path(JSON.value).name}"] if ADD.value else []
    return shlex.join(["python", "tools/bench.py", *arguments, *file])


def bench() -> None:
    from hybrid_attn.bench import machine, measurement, results
    from hybrid_attn.evals.provenance import revision

    check(not OPTIONS.value or len(PART.value) == 1, f"--options={OPTIONS.value} belongs to one part; --part has {PART.value}")
    old = results.read(Path(COMPARE.value)) if COMPARE.value else None
    check(not ADD.value or bool(JSON.value), "--add adds to the file of --json; name one")
    before = results.read(Path(JSON.value)) if ADD.value and Path(JSON.value).exists() else None
    parts, result = {name: table.find(name) for name in PART.value}, {"command": command(), "date": time.strftime("%F")}
    with measurement.Processes(round(MEMORY_GIB.value * machine.GIB)) as processes:
        platform = processes.call("jax", measurement.platform_here)
        runs = {name: run_of(name, part, platform) for name, part in parts.items()}
        result |= {"revision": revision(Path(__file__)), "machine": machine.describe() | {"platform": platform}}
        result |= {"versions": machine.versions(), "parts": {}}
        if before:
            models = {name: model_of(part, runs[name]) for name, part in parts.items()}
            results.check_can_add(before, result, models, Path(JSON.value))
        for name, part in parts.items():
            of_part = measured(part, runs[name], processes, result["revision"])
            of_part["figures"] = results.figures_of(part, of_part)
            result["parts"][name] = of_part
            print(f"{results.describe(result)}\n\n{part.title}: {results.section(name, of_part)}\n")
            for figure, x in part.figures(of_part["records"]).items():
                print(f"{figure}: {x.shown}")
            if JSON.value:  # after every part: a later one may be interrupted
                results.write(Path(JSON.value), results.joined(before, result) if before else result)
    if old:
        print(f"\n{results.compared(old, result)}")


def start() -> None:
    """Makes the page or measures parts; slow imports are inside, so that --help is fast."""
    check(bool(PAGE.value) != bool(PART.value), f"name one of --page and --part; parts are {', '.join(table.PARTS)}")
    from hybrid_attn import files
    from hybrid_attn.bench import results

    if PART.value:
        if JSON.value:
            files.check_named("json", JSON.value, "a file")
            path = Path(JSON.value)
            check(path.parent.is_dir() and not path.is_dir(), f"--json={path} names no file of a directory that exists")
        return bench()
    others = [f"--{flag.name}" for flag in (LENGTHS, OPTIONS, JSON, COMPARE, CONFIG) if flag.value]
    check(not others, f"--page is made of results that are there; leave out {', '.join(others)}")
    path = Path(PAGE.value)
    files.write_atomically(path, results.page(path.with_suffix("")))


def main(argv):
    programs.run(start, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
