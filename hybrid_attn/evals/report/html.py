"""The page: one file that asks for no other."""

from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template

from hybrid_attn.evals.report import canvas, tables
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.sections import SHOWN, Failure, Section

MOST_CHARACTERS = 1200  # of an answer
VISIBLE = {i: f"\\x{i:02x}" for i in (*range(32), 127) if chr(i) not in "\n\t"}  # a page holds no control characters


def page(title: str, runs: Sequence[Run], sections: Sequence[Section], wrong: Mapping[str, tuple[str, list[Failure]]]) -> str:
    """The whole report."""
    numbers = {run.name: number % len(canvas.RUNS) for number, run in enumerate(runs)}
    *parts, last = map(_section, sections)
    links = [(section.name, section.title) for section in sections]
    if wrong:
        parts.append(_failures(wrong, numbers))
        links.insert(-1, ("failures", "Wrong answers"))
    names = "".join(f"<li>{_dot(number)}{escape(name)}</li>" for name, number in numbers.items())
    return Template(_file("page.html")).substitute(
        title=escape(title),
        style=_file("style.css"),
        script=_file("page.js"),
        runs=names,
        links="".join(f'<a href="#{name}">{escape(text)}</a>' for name, text in links),
        body="\n".join([*parts, last]),
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text()


def _section(section: Section) -> str:
    words = "".join(f"<p>{escape(text)}</p>" for text in section.words)
    drawn = "".join(_picture(picture) for picture in section.pictures)
    folded = "".join(f"<details><summary>{escape(x.title)}</summary>{tables.html(x)}</details>" for x in section.folded)
    return (
        f'<section id="{section.name}"><h2>{escape(section.title)}</h2><div class="words">{words}</div>'
        f'<div class="pictures">{drawn}</div>{"".join(map(tables.html, section.tables))}{folded}</section>'
    )


def _picture(picture: canvas.Picture) -> str:
    kind = "picture wide" if picture.wide else "picture"
    return f'<figure class="{kind}"><figcaption>{escape(picture.caption)}</figcaption>{canvas.svg(picture)}</figure>'


def _failures(wrong: Mapping[str, tuple[str, list[Failure]]], numbers: Mapping[str, int]) -> str:
    """Tasks that open, with the questions that some run missed."""
    parts = [
        '<section id="failures"><h2>Wrong answers</h2><div class="words"><p>Questions of which a run missed a part, at most '
        f"{SHOWN} of a task, of every length in turn: the end of the prompt, what was wanted, and what each run gave. All "
        "others are in each run's answers.jsonl.</p></div>"
    ]
    for task, (missed, found) in wrong.items():
        cards = "".join(_failure(failure, numbers) for failure in found)
        heading = f"<b>{escape(task)}</b> <span>{escape(missed)}</span>"
        parts.append(f'<details class="task"><summary>{heading}</summary><div class="cards">{cards}</div></details>')
    return "".join([*parts, "</section>"])


def _failure(failure: Failure, numbers: Mapping[str, int]) -> str:
    where = " · ".join(x for x in (tables.tokens(failure.length), f"sample {failure.index}", failure.group) if x)
    wanted = ", ".join(f"<code>{_text(answer)}</code>" for answer in failure.wanted)
    given = "".join(
        f"<dt>{_dot(numbers[name])}{escape(name)} <span>{score:.2f}</span></dt>"
        f"<dd>{f'<code>{_text(text)}</code>' if text else '<i>nothing</i>'}</dd>"
        for name, text, score in failure.given
    )
    return (
        f"<article><h3>{escape(where)}</h3><pre>…{_text(failure.prompt_end)}</pre>"
        f"<dl><dt>wanted</dt><dd>{wanted}</dd>{given}</dl></article>"
    )


def _text(text: str) -> str:
    cut = text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"
    return escape(cut.translate(VISIBLE))


def _dot(number: int) -> str:
    return f'<i class="dot" style="background:var(--run-{number})"></i>'
