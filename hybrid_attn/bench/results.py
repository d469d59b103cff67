"""The JSON of a run of the benchmark: written, compared with an older one, and made into docs/results/speed.md."""

import json
import re
from collections.abc import Iterable
from pathlib import Path

from hybrid_attn import files
from hybrid_attn.bench import machine, table
from hybrid_attn.bench.measurement import table as markdown
from hybrid_attn.bench.part import Figure, Part, show
from hybrid_attn.trees import check

MACHINE = ("processor", "cores", "memory_gib")  # what a result says of its machine, and of each part
CODE = ("machine", "versions", "revision")  # what results of one file have in common
PART = ("model", "watch", "records", "figures")
SIDES = ("before", "after")  # folders beside the page, with the JSON files of the code before a change and after it


def write(path: Path, result: dict) -> None:
    """Writes a result with numbers of seven digits, one list or innermost object a line."""
    text = json.dumps(_with_seven_digits(result), indent=1)
    innermost = re.compile(r"([\[{])\s+([^\[\]{}]*?)\s+([\]}])")
    files.write_atomically(path, innermost.sub(lambda x: x[1] + re.sub(r"\s+", " ", x[2]) + x[3], text) + "\n")


def _with_seven_digits(x):
    if isinstance(x, dict):
        return {key: _with_seven_digits(value) for key, value in x.items()}
    if isinstance(x, list | tuple):
        return [_with_seven_digits(value) for value in x]
    return float(f"{x:.7g}") if isinstance(x, float) else x


def read(path: Path) -> dict:
    """ValueError where the file is not a result."""
    result = files.object_of(path.read_text(), str(path))
    needed = {name: result.get(name) for name in ("machine", "versions", "parts")}
    lacks = [name for name, value in needed.items() if not isinstance(value, dict)]
    lacks += [] if lacks else [f"machine.{name}" for name in MACHINE if name not in result["machine"]]
    for name, part in {} if lacks else result["parts"].items():
        check(name in table.PARTS, f"{path} has a part {name!r}; known: {', '.join(table.PARTS)}")
        lacks += [f"parts.{name}.{field}" for field in PART if not isinstance(part, dict) or field not in part]
    check(not lacks, f"{path} is no result of tools/bench.py: it lacks {', '.join(lacks)}")
    return result


def figures_of(part: Part, measured: dict) -> dict[str, dict]:
    """Name to value and unit, as the JSON has them."""
    return {name: {"value": x.value, "unit": x.unit} for name, x in part.figures(measured["records"]).items()}


def check_can_add(old: dict, new: dict, models: dict[str, dict | None], path: Path) -> None:
    """ValueError where `old`, which `path` has, is of another machine or code, or its parts are of others than these models."""
    different = [key for key in CODE if old.get(key) != new[key]]
    different += [f"parts.{name}.model" for name, x in models.items() if x != old["parts"].get(name, {"model": x})["model"]]
    check(
        not different,
        f"--add to {path}: its {', '.join(different)} differs, so the figures would not compare; name another --json",
    )


def joined(old: dict, new: dict) -> dict:
    """`new` with the records of `old` before its own."""
    parts = dict(old["parts"])
    for name, measured in new["parts"].items():
        before = parts.get(name, measured | {"records": []})
        watch = {"load_start": before["watch"]["load_start"], "load_end": measured["watch"]["load_end"]}
        watch["others"] = max(before["watch"]["others"], measured["watch"]["others"])
        parts[name] = measured | {"watch": watch, "records": before["records"] + measured["records"]}
        parts[name]["figures"] = figures_of(table.find(name), parts[name])
    return new | {"command": f"{old['command']} && {new['command']}", "parts": parts}


def compared(old: dict, new: dict) -> str:
    """A table of the figures that both results have, and a line if they are of different machines."""
    rows = []
    for part, measured in new["parts"].items():
        before = old["parts"].get(part, {"figures": {}})["figures"]
        for name, figure in measured["figures"].items():
            if name in before:
                was, now = before[name]["value"], figure["value"]
                change = f"{now / was:.3f}" if was else "—"
                rows.append([part, name, show(was, figure["unit"]), show(now, figure["unit"]), change])
    text = markdown(("part", "figure", "old", "new", "new / old"), rows) if rows else "no figure is in both results"
    different = [key for key in ("machine", "versions") if old[key] != new[key]]
    if not different:
        return text
    said = "; ".join(f"{key} old {_listed(old[key])}, new {_listed(new[key])}" for key in different)
    return f"{text}\n\nNot measured alike: {said}"


def _listed(values: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def describe(result: dict) -> str:
    """The machine and the versions, in a line."""
    m = result["machine"]
    versions = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    return f"{m['processor']}, {m['cores']} cores, {m['memory_gib']} GiB; {m['platform']}; {versions}"


def section(name: str, measured: dict) -> str:
    """The table of a part, and how it was measured."""
    part = table.find(name)
    m, how = measured["model"], []
    if m:
        how.append(f"{m['config']}, {m['parameters']:,} parameters, layers {m['layers']}, {m['dtype']}")
    if any("calls" in r for r in measured["records"]):
        calls = " or ".join(str(number) for number in dict.fromkeys(r["repeats"] for r in measured["records"]))
        how.append(f"medians of {calls} calls of each contender in turn, and the best call")
    if peaks := [r["peak"] for r in measured["records"] if "peak" in r]:
        how.append(f"matmul peak {max(peaks) / 1e9:,.1f} GFLOP/s")
    return f"{'; '.join(how)}. {machine.idleness(measured['watch'])}\n\n{part.table(measured['records'])}"


def verdict(figure: Figure | None) -> str:
    return "" if figure is None else {None: "", True: "yes", False: "no"}[figure.reached]


def page(folder: Path) -> str:
    """The page of the results in `folder`/before and `folder`/after: for each machine its figures, then the tables."""
    results = {side: [read(path) for path in sorted((folder / side).glob("*.json"))] for side in SIDES}
    check(any(results.values()), f"{folder} has no results: write some with --json={folder}/after/NAME.json")
    machines = dict.fromkeys(_machine(result) for side in SIDES for result in results[side])
    texts = [INTRODUCTION]
    for name in machines:
        on_it = {side: [result for result in results[side] if _machine(result) == name] for side in SIDES}
        texts.append(f"## {name}\n\n{_overview(on_it)}")
        sections = [(part, side, result) for part in table.PARTS for side in SIDES for result in on_it[side]]
        texts += [_table(part, side, result) for part, side, result in sections if part in result["parts"]]
    return "\n\n".join(texts) + "\n"


INTRODUCTION = """# Speed

`python tools/bench.py --page=docs/results/speed.md` makes this page of the JSON files in `docs/results/speed/`. Times are
medians of calls in turn, and ratios those of medians: "transformers / ours" 2.5 says that it takes 2.5 times as long as we do.
Targets stand beside the figures that have one."""


def _machine(result: dict) -> str:
    m = result["machine"]
    return f"{m['processor']}, {m['cores']} cores, {m['memory_gib']:.0f} GiB"


def _overview(results: dict[str, list[dict]]) -> str:
    """The figures of one machine, before and after, beside the targets."""
    by_side = {side: dict(_figures(of_side)) for side, of_side in results.items()}
    rows = []
    keys = dict.fromkeys([*by_side["after"], *by_side["before"]])
    for key in sorted(keys, key=lambda key: list(table.PARTS).index(key[0])):
        before, after = (by_side[side].get(key) for side in SIDES)
        figure, (part, name) = after or before, key
        target = "" if figure.target is None else ("≥ " if figure.at_least else "≤ ") + show(figure.target, figure.unit)
        shown = ["—" if x is None else x.shown for x in (before, after)]
        rows.append([part, name, *shown, target, verdict(after)])
    return markdown(("part", "figure", *SIDES, "target", "reached"), rows)


def _figures(results: list[dict]) -> Iterable[tuple[tuple[str, str], Figure]]:
    for result in results:
        for part, measured in result["parts"].items():
            for name, figure in table.find(part).figures(measured["records"]).items():
                yield (part, name), figure


def _table(part: str, side: str, result: dict) -> str:
    revision = re.sub(r"^([0-9a-f]{12})[0-9a-f]+", r"\1", result["revision"])
    commands = "`, then `".join(result["command"].split(" && "))
    head = f"`{commands}`, {result['date']}, revision {revision}"
    libraries = ", ".join(f"{name} {value}" for name, value in result["versions"].items())
    return f"### {table.find(part).title}, {side}\n\n{head}; {libraries}\n\n{section(part, result['parts'][part])}"
