"""The page, one file that asks for no other, and its Markdown, from the templates beside this module."""

import re
from collections.abc import Callable, Mapping, Sequence

import markupsafe
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from hybrid_attn.characters import visible
from hybrid_attn.evals.report import canvas, command, escape, failures, tables, verdict
from hybrid_attn.evals.report.failures import Task
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Section

MOST_CHARACTERS = 1200  # of an answer
UNBROKEN = re.compile(r" ± |\bn = (?=\d)")  # "96% ± 24" and "n = 16" stay on one line


def page(title: str, runs: Sequence[Run], sections: Sequence[Section], failed: Sequence[Task]) -> str:
    template = _environment(lambda text: markupsafe.escape(visible(text))).get_template("page.html")
    return template.render(
        _context(title, runs, sections, failed),
        runs=runs,
        numbers={run.name: number % len(canvas.RUNS) for number, run in enumerate(runs)},
        commands={x.evaluation: x.evaluation and command.measuring(runs, x.evaluation) for x in sections},
        most_examples=failures.MOST_EXAMPLES,
    )


def markdown(title: str, runs: Sequence[Run], sections: Sequence[Section], failed: Sequence[Task]) -> str:
    """The verdict and the sections with links to their pictures, without HTML; wrong answers are counted."""
    text = _environment(escape.markdown).get_template("report.md").render(_context(title, runs, sections, failed))
    return text.rstrip() + "\n"


def _context(title: str, runs: Sequence[Run], sections: Sequence[Section], failed: Sequence[Task]) -> Mapping:
    sentences = {"verdict": verdict.sentences(runs), "warnings": verdict.warnings(runs)}
    return {"title": title, "sections": sections, "failures": failed} | sentences


def _environment(escaped: Callable[[str], str]) -> Environment:
    """Escapes every value of a template, whatever the template says; only `Markup` goes through as it is."""
    environment = Environment(
        loader=PackageLoader(__package__),
        undefined=StrictUndefined,
        autoescape=True,
        finalize=lambda value: value if isinstance(value, Markup) else Markup(escaped(str(value))),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"shortened": _shortened, "unbroken": _unbroken}
    environment.globals |= {"zip": zip, "tokens": tables.tokens, "file_name": lambda name: Markup(escape.file_name(name))}
    environment.globals |= {"svg": canvas.svg, "markdown": lambda table: Markup(tables.markdown(table))}
    return environment


def _shortened(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"


def _unbroken(text: str) -> str:
    return UNBROKEN.sub(lambda match: match[0].replace(" ", "\N{NO-BREAK SPACE}"), text)
