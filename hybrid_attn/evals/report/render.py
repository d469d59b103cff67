"""The page, one file that asks for no other, and its Markdown: sections, wrong answers, and commands that measure anew."""

import itertools
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import NamedTuple

import markupsafe
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hybrid_attn.characters import visible
from hybrid_attn.evals.records import grouped
from hybrid_attn.evals.report import escape, pictures, tables, verdict
from hybrid_attn.evals.report.runs import Run, sample_of
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
        **{"title": title, "runs": runs, "sections": sections, "failures": wrong_answers(runs), "most": MOST_EXAMPLES},
        **{"verdict": verdict.sentences(runs), "warnings": verdict.warnings(runs), "width": pictures.WIDTH},
        "colours": {run.name: pictures.RUNS[i % len(pictures.RUNS)] for i, run in enumerate(runs)},
        "commands": {x.evaluation: command(runs, x.evaluation) for x in sections},
    }


def page(content: Mapping) -> str:
    return _environment(lambda text: markupsafe.escape(visible(text))).get_template("page.html").render(content)


def markdown(content: Mapping) -> str:
    """The verdict and the sections with links to their pictures, without HTML; wrong answers are counted."""
    return _environment(escape.markdown).get_template("report.md").render(content).rstrip() + "\n"


def _environment(escaped: Callable[[str], str]) -> Environment:
    """Escapes every value of a template, whatever the template says; only `Markup` goes through as it is."""
    environment = Environment(
        **{"loader": PackageLoader(__package__), "undefined": StrictUndefined, "autoescape": True},
        **{"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True},
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escaped(str(value))),
    )
    environment.filters |= {
        "shortened": lambda text: escape.shortened(text, MOST_CHARACTERS),
        "unbroken": lambda text: UNBROKEN.sub(lambda x: x[0].replace(" ", "\N{NO-BREAK SPACE}"), text),
    }
    environment.filters["file_name"] = lambda name: Markup(escape.file_name(name))
    environment.globals |= {"svg": pictures.svg, "tokens": tables.tokens, "markdown": lambda x: Markup(tables.markdown(x))}
    return environment


class Task(NamedTuple):
    """`missed` says how many answers of each run are not right in full; examples have (run, text, score) in `answers`."""

    name: str
    missed: str
    examples: Sequence[dict]


def wrong_answers(runs: Sequence[Run]) -> list[Task]:
    """The tasks with wrong answers, in alphabetical order, and some of them."""
    answers = [(run.name, answer) for run in runs for answer in run.answers]
    by_question = grouped(answers, lambda x: sample_of(x[1])).values()
    wrong = [question for question in by_question if any(answer["score"] < 1 for _, answer in question)]
    tasks = []
    for name, questions in sorted(grouped(wrong, lambda question: question[0][1]["task"]).items()):
        of_runs = grouped((x for x in answers if x[1]["task"] == name), itemgetter(0)).items()
        missed = [f"{run} {sum(answer['score'] < 1 for _, answer in x):,} of {len(x):,}" for run, x in of_runs]
        tasks.append(Task(name, ", ".join(missed), _examples(questions)))
    return tasks


def _examples(questions: Sequence[Sequence[tuple[str, dict]]]) -> list[dict]:
    """A question of each length, then a second of each, and so on; in order of length."""
    examples = [
        {key: question[0][1][key] for key in QUESTION} | {"answers": [(run, x["given"], x["score"]) for run, x in question]}
        for question in questions
    ]
    by_length = grouped(sorted(examples, key=itemgetter("length", "index")), itemgetter("length")).values()
    chosen = [x for of_rank in itertools.zip_longest(*by_length) for x in of_rank if x][:MOST_EXAMPLES]
    return sorted(chosen, key=itemgetter("length", "index"))


def command(runs: Sequence[Run], evaluation: str) -> str:
    """What measures an evaluation of these runs anew, with the settings and data of the first.

    Empty where a run names no checkpoint, or where no flag names the text that was asked about.
    """
    settings, data = (runs[0].provenance.get(name, {}) for name in ("settings", "data"))
    checkpoints, steps = ([run.provenance.get(name) for run in runs] for name in ("checkpoint", "step"))
    read = EVALS[evaluation].flags if evaluation in EVALS else ()
    if not read or not all(checkpoints) or ("text" in read and data.get("text", ()) is None):
        return ""
    lengths = (settings.get("asked") if EVALS[evaluation].uses_engine else None) or settings.get("lengths")
    mesh = str(runs[0].provenance.get("mesh"))
    values = {
        "checkpoint": checkpoints,
        "step": [] if None in steps else steps if len({*steps}) > 1 else steps[:1],
        **{"suite": evaluation, "lengths": _listed(lengths)},
        **{name: data[name] if name in data else _listed(settings.get(name)) for name in read if name != "compat"},
        "mesh": mesh.replace(" x ", ",").replace(" ", "=") if MESH.fullmatch(mesh) else None,
    }
    flags = [(name, x) for name, value in values.items() for x in (value if isinstance(value, list) else [value])]
    arguments = [f"--{name}={x}" for name, x in flags if x not in (None, "", _listed(NAMES))]
    trusts = "heldout" in read and not data.get("heldout") and data.get("trust_checkpoint_data")
    arguments += ["--trust_checkpoint_data"] * bool(trusts) + ["--compat"] * ("compat" in read and runs[0].compat)
    return escape.label(f"python tools/evaluate.py {shlex.join([*arguments, '--out=DIR'])}")


def _listed(value: object) -> object:
    """The items of a list in one flag."""
    if not isinstance(value, (list, tuple)):
        return value
    return ",".join(f"{x:g}" if isinstance(x, float) else str(x) for x in value)
