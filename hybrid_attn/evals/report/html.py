"""The page: one file that asks for no other."""

from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template

from hybrid_attn.evals.report import canvas, descriptions, escape, tables, verdict
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.report.wrong import SHOWN, Failure

MOST_CHARACTERS = 1200  # of an answer


def page(title: str, runs: Sequence[Run], sections: Sequence[Section], wrong: Mapping[str, tuple[str, list[Failure]]]) -> str:
    """The whole report."""
    numbers = {run.name: number % len(canvas.RUNS) for number, run in enumerate(runs)}
    commands = {section.evaluation: descriptions.command(runs, section.evaluation) for section in sections}
    *parts, last = (_section(section, commands[section.evaluation] * bool(section.evaluation)) for section in sections)
    links = [(section.name, section.title) for section in sections]
    if wrong:
        parts.append(_failures(wrong, numbers))
        links.insert(-1, ("failures", "Wrong answers"))
    names = "".join(f"<li>{_dot(number)}{escape.html(name)}</li>" for name, number in numbers.items())
    return Template(_file("page.html")).substitute(
        title=escape.html(title),
        style=_file("style.css"),
        script=_file("page.js"),
        runs=names,
        verdict=_verdict(runs),
        links="".join(f'<a href="#{name}">{escape.html(text)}</a>' for name, text in links),
        body="\n".join([*parts, last]),
    )


def _file(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text()


def _verdict(runs: Sequence[Run]) -> str:
    told = "".join(f"<p>{escape.html(text)}</p>" for text in verdict.sentences(runs))
    return told + "".join(f'<p class="warning">{escape.html(text)}</p>' for text in verdict.warnings(runs))


def _section(section: Section, command: str) -> str:
    words = "".join(f"<p>{escape.html(text)}</p>" for text in section.words)
    drawn = "".join(_picture(picture, command) for picture in section.pictures)
    folded = "".join(f"<details><summary>{escape.html(x.title)}</summary>{tables.html(x)}</details>" for x in section.folded)
    return (
        f'<section id="{section.name}"><h2>{escape.html(section.title)}</h2><div class="words">{words}</div>'
        f'<div class="pictures">{drawn}</div>{"".join(map(tables.html, section.tables))}{folded}</section>'
    )


def _picture(picture: canvas.Picture, command: str) -> str:
    """With its finding above, and below how to read it, its files, and the command that measures it anew."""
    kind = "picture wide" if picture.wide else "picture"
    files = [("PNG", f"pictures/{escape.file_name(picture.name)}.png")]
    files += [("CSV", f"tables/{escape.file_name(picture.table)}.csv")] if picture.table else []
    links = "".join(f' <a class="file" href="{path}">{name}</a>' for name, path in files)
    again = f"<details><summary>command</summary><code>{escape.html(command)}</code></details>" if command else ""
    return (
        f'<figure class="{kind}"><figcaption>{escape.html(picture.caption)}</figcaption>{canvas.svg(picture)}'
        f'<div class="note"><span>{escape.html(picture.note)}{links}</span>{again}</div></figure>'
    )


def _failures(wrong: Mapping[str, tuple[str, list[Failure]]], numbers: Mapping[str, int]) -> str:
    """Tasks that open, with the questions that some run missed."""
    parts = [
        '<section id="failures"><h2>Wrong answers</h2><div class="words"><p>Questions of which a run missed a part, at most '
        f"{SHOWN} of a task, of every length in turn: the end of the prompt, what was wanted, and what each run gave. All "
        "others are in each run's answers.jsonl.</p></div>"
    ]
    for task, (missed, found) in wrong.items():
        cards = "".join(_failure(failure, numbers) for failure in found)
        heading = f"<b>{escape.html(task)}</b> <span>{escape.html(missed)}</span>"
        parts.append(f'<details class="task"><summary>{heading}</summary><div class="cards">{cards}</div></details>')
    return "".join([*parts, "</section>"])


def _failure(failure: Failure, numbers: Mapping[str, int]) -> str:
    where = " · ".join(x for x in (tables.tokens(failure.length), f"sample {failure.index}", failure.group) if x)
    wanted = ", ".join(f"<code>{_text(answer)}</code>" for answer in failure.wanted)
    given = "".join(
        f"<dt>{_dot(numbers[name])}{escape.html(name)} <span>{score:.2f}</span></dt><dd>{_given(text)}</dd>"
        for name, text, score in failure.given
    )
    return (
        f"<article><h3>{escape.html(where)}</h3><pre>…{_text(failure.prompt_end)}</pre>"
        f"<dl><dt>wanted</dt><dd>{wanted}</dd>{given}</dl></article>"
    )


def _given(text: str) -> str:
    """An answer; one without anything to see is said in words."""
    if not text:
        return "<i>nothing</i>"
    if not text.strip():
        return f"<i>only whitespace ({len(text):,} character{'s' * (len(text) > 1)})</i>"
    return f"<code>{_text(text)}</code>"


def _text(text: str) -> str:
    return escape.html(text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…")


def _dot(number: int) -> str:
    return f'<i class="dot" style="background:var(--run-{number})"></i>'
