"""The page, one file that asks for no other, and its Markdown: sections, wrong answers, and commands that measure anew."""

import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import markupsafe
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hybrid_attn.characters import visible
from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.report import canvas, escape, tables, verdict
from hybrid_attn.evals.report.runs import DATA, Run, sample_of
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.ruler.tasks import NAMES
from hybrid_attn.evals.table import EVALS

MOST_CHARACTERS = 1200  # of an answer
MOST_EXAMPLES = 8  # of a task
QUESTION = ("length", "index", "group", "prompt_end", "wanted")  # fields of an answer that belong to its question
UNBROKEN = re.compile(r" ± |\bn = (?=\d)")  # "96% ± 24" and "n = 16" stay on one line
MESH = re.compile(r"[a-z]+ \d+( x [a-z]+ \d+)*")  # in run.json: "context 4 x tensor 2" is the flag "context=4,tensor=2"


def content(title: str, runs: Sequence[Run], sections: Sequence[Section]) -> Mapping:
    """What the templates show."""
    return {
        **{"title": title, "runs": runs, "sections": sections},
        **{"failures": wrong_answers(runs), "most_examples": MOST_EXAMPLES},
        **{"verdict": verdict.sentences(runs), "warnings": verdict.warnings(runs)},
        "numbers": {run.name: number % len(canvas.RUNS) for number, run in enumerate(runs)},
        "commands": {x.evaluation: x.evaluation and command(runs, x.evaluation) for x in sections},
    }


def page(content: Mapping) -> str:
    return _environment(lambda text: markupsafe.escape(visible(text))).get_template("page.html").render(content)


def markdown(content: Mapping) -> str:
    """The verdict and the sections with links to their pictures, without HTML; wrong answers are counted."""
    return _environment(escape.markdown).get_template("report.md").render(content).rstrip() + "\n"


def _environment(escaped: Callable[[str], str]) -> Environment:
    """Escapes every value of a template, whatever the template says; only `Markup` goes through as it is."""
    environment = Environment(
        loader=PackageLoader(__package__),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escaped(str(value))),
    )
    environment.filters["shortened"] = lambda text: escape.shortened(text, MOST_CHARACTERS)
    environment.filters["unbroken"] = lambda text: UNBROKEN.sub(lambda x: x[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
    environment.globals |= {"zip": zip, "tokens": tables.tokens, "file_name": lambda name: Markup(escape.file_name(name))}
    environment.globals |= {"svg": canvas.svg, "markdown": lambda table: Markup(tables.markdown(table))}
    return environment


class Task(NamedTuple):
    """`missed` says how many answers of each run are not right in full; examples have (run, text, score) in `answers`."""

    name: str
    missed: str
    examples: Sequence[dict]


def wrong_answers(runs: Sequence[Run]) -> list[Task]:
    """The tasks with wrong answers, in alphabetical order, and some of them."""
    answers = grouped(((run.name, answer) for run in runs for answer in run.answers), lambda x: sample_of(x[1]))
    failures: dict[str, list[dict]] = {}
    for same_question in answers.values():
        if any(answer["score"] < 1 for _, answer in same_question):
            first = same_question[0][1]
            of_runs = [(name, answer["given"], answer["score"]) for name, answer in same_question]
            failures.setdefault(first["task"], []).append({key: first[key] for key in QUESTION} | {"answers": of_runs})
    tasks = []
    for name, of_task in sorted(failures.items()):
        scores = {run.name: [answer["score"] for answer in run.answers if answer["task"] == name] for run in runs}
        missed = [f"{run} {sum(x < 1 for x in of_run):,} of {len(of_run):,}" for run, of_run in scores.items() if of_run]
        tasks.append(Task(name, ", ".join(missed), _examples(of_task)))
    return tasks


def _examples(failures: Sequence[dict]) -> list[dict]:
    """A question of each length, then a second of each, and so on; in order of length."""
    by_length = grouped(sorted(failures, key=lambda x: x["index"]), lambda x: x["length"])
    ranked = sorted((rank, length) for length, of_length in by_length.items() for rank in range(len(of_length)))
    return [by_length[length][rank] for rank, length in sorted(ranked[:MOST_EXAMPLES], key=lambda x: x[::-1])]


def command(runs: Sequence[Run], evaluation: str) -> str:
    """What measures an evaluation of these runs anew, with the settings and data of the first.

    Empty where a run names no checkpoint, or where no flag names the text that was asked about.
    """
    settings, data = (runs[0].provenance.get(name, {}) for name in ("settings", "data"))
    if evaluation not in EVALS or not all(run.provenance.get("checkpoint") for run in runs):
        return ""
    read = EVALS[evaluation].flags
    if "text" in read and data.get("text", ()) is None:
        return ""
    lengths = settings.get("asked") if EVALS[evaluation].uses_engine else None
    steps = [run.provenance.get("step") for run in runs]
    flags = [("checkpoint", run.provenance["checkpoint"]) for run in runs]
    flags += [("step", step) for step in (steps if len(set(steps)) > 1 else steps[:1]) if None not in steps]
    flags += [("suite", evaluation), ("lengths", _listed(lengths or settings.get("lengths")))]
    for name in (name for name in read if name != "compat"):
        value = data.get(name) if name in DATA else _listed(settings.get(name))
        flags += [(name, x) for x in (value if isinstance(value, (list, tuple)) else [value]) if x != _listed(NAMES)]
    mesh = runs[0].provenance.get("mesh") or ""
    flags.append(("mesh", mesh.replace(" x ", ",").replace(" ", "=") if MESH.fullmatch(mesh) else None))
    trusts = "heldout" in read and not data.get("heldout") and data.get("trust_checkpoint_data")
    arguments = [f"--{name}={value}" for name, value in flags if value not in (None, "")]
    arguments += ["--trust_checkpoint_data"] * bool(trusts)
    arguments += ["--compat"] * ("compat" in read and runs[0].compat) + ["--out=DIR"]
    return escape.label(f"python tools/evaluate.py {shlex.join(arguments)}")


def _listed(value: object) -> object:
    """The items of a list in one flag."""
    if not isinstance(value, (list, tuple)):
        return value
    return ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in value)
