"""The suite: evaluations cut into units, each of which is a file as soon as it is done.

The directory of a run has run.json (what was measured of which model), units/ (a file of records and answers each) and, when
all are done, records.jsonl and answers.jsonl, of which a report is made. Who was interrupted goes on with the units that are
not there.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from hybrid_attn import config, trees
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.synthetic import Task
from hybrid_attn.evals import attention, keytokens, needle, position, recall, ruler, samples
from hybrid_attn.evals.ruler import scores
from hybrid_attn.evals.ruler.qa import Questions
from hybrid_attn.evals.samples import Sample
from hybrid_attn.evals.subject import Spec, Subject
from hybrid_attn.infer.engine import Engine
from hybrid_attn.infer.text import answers

ATTENTION_PROMPTS = 2  # whose attention is averaged
PROMPT_END = 400  # characters of a prompt that are kept beside its answer
RECALL = {"recall": 4, "mqar": 4, "copy": 1, "tracking": 2}  # tasks, with the pairs of a row
GENERATOR = 1  # raised when the same settings give other samples


class Settings(NamedTuple):
    """What is measured: which evaluations, at which lengths in tokens, and on how much."""

    evals: tuple[str, ...]
    lengths: tuple[int, ...]
    samples: int  # of each task of RULER and each depth of the needles, at each length
    tokens: int  # of held-out text, or of rows of a drawn task, at each length
    depths: tuple[float, ...]
    seed: int
    tasks: tuple[str, ...] = ()  # of lm-evaluation-harness, whose own files are in `task_path`
    task_path: str | None = None


class Reader(NamedTuple):
    """A model with an engine of it, held-out documents by source, and text to hide needles in."""

    subject: Subject
    engine: Engine
    heldout: Mapping[str, Documents]
    haystack: str
    questions: Mapping[str, Questions]


class Unit(NamedTuple):
    """What is done or not: `part` is a source or a task."""

    eval: str
    part: str
    length: int

    @property
    def name(self) -> str:
        return f"{self.eval}-{self.part}-{self.length}"


class Measured(NamedTuple):
    records: list[dict]
    answers: list[dict]


def draw_needle(reader: Reader, settings: Settings, unit: Unit) -> Iterator[Sample]:
    words, text = reader.subject.tokenizer, reader.haystack
    for depth in settings.depths:
        for index in range(settings.samples):
            yield needle.generate(unit.length, depth, int(unit.part), index, settings.seed, words, text)


def draw_ruler(reader: Reader, settings: Settings, unit: Unit) -> Iterator[Sample]:
    words, texts = reader.subject.tokenizer, (reader.haystack, reader.questions)
    for index in range(settings.samples):
        yield ruler.generate(unit.part, unit.length, index, settings.seed, words, *texts)


def measure_position(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    spec = Spec(reader.heldout[unit.part], unit.length, settings.tokens)
    return Measured([{"source": unit.part, **record} for record in position.run(reader.subject, spec)], [])


def measure_recall(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    spec = Spec(Task(unit.part, RECALL[unit.part]), unit.length, settings.tokens)
    return Measured([{"source": unit.part, **record} for record in recall.run(reader.subject, spec)], [])


def measure_attention(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    spec = Spec(reader.heldout[unit.part], unit.length, ATTENTION_PROMPTS * unit.length)
    return Measured([{"source": unit.part, **record} for record in attention.run(reader.subject, spec)], [])


def measure_key_tokens(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    spec = Spec(reader.heldout[unit.part], unit.length, settings.tokens)
    return Measured([{"source": unit.part, **record} for record in keytokens.run(reader.subject, spec)], [])


def measure_harness(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    """A task of lm-evaluation-harness, whose library is an extra; of longer prompts than the unit the beginning is lost."""
    from hybrid_attn.evals import harness

    words = reader.subject.tokenizer
    found = harness.evaluate(
        reader.engine, words, [unit.part], max_length=unit.length, include_path=settings.task_path, limit=settings.samples,
        stop_tokens=[words.eos],
    )  # fmt: skip
    return Measured([{"length": unit.length, **record} for record in harness.records(found)], [])


def measure_needle(reader: Reader, settings: Settings, unit: Unit, asked: list[Sample]) -> Measured:
    given = _given(reader, asked)
    shares = [needle.right(sample, text) / len(sample.answers) for sample, text in zip(asked, given, strict=True)]
    return Measured(needle.records(asked, given), _answers(asked, given, shares))


def measure_ruler(reader: Reader, settings: Settings, unit: Unit, asked: list[Sample]) -> Measured:
    given = _given(reader, asked)
    shares = [scores.score(unit.part, text, sample.answers) / 100 for sample, text in zip(asked, given, strict=True)]
    nulls = sum(not scores.postprocess(text) for text in given)
    record = {"task": unit.part, "length": unit.length, "samples": len(asked), "score": 100 * sum(shares) / len(shares)}
    return Measured([record | {"nulls": nulls}], _answers(asked, given, shares))


DRAWS: dict[str, Callable[[Reader, Settings, Unit], Iterator[Sample]]] = {"needle": draw_needle, "ruler": draw_ruler}
MEASURES: dict[str, Callable[[Reader, Settings, Unit, list[Sample]], Measured]] = {
    "position": measure_position,
    "recall": measure_recall,
    "needle": measure_needle,
    "ruler": measure_ruler,
    "attention_mass": measure_attention,
    "key_tokens": measure_key_tokens,
    "harness": measure_harness,
}
SUITES = {"quick": ("position", "recall", "needle", "ruler", "attention_mass"), "full": tuple(MEASURES)}


def named(suite: str) -> tuple[str, ...]:
    """The evaluations of "quick", "full" or "needle,ruler"; ValueError names the nearest of what does not exist."""
    if suite in SUITES:
        return SUITES[suite]
    found = tuple(name.strip() for name in suite.split(","))
    for name in found:
        near = difflib.get_close_matches(name, (*SUITES, *MEASURES), 1, 0.0)
        trees.check(
            name in MEASURES,
            f"--suite={suite} names {name!r}; did you mean {near[0]!r}? There are {', '.join((*SUITES, *MEASURES))}",
        )
    return found


def units(settings: Settings, reader: Reader) -> list[Unit]:
    """All that `settings` ask for and the reader has the text for."""
    parts = {
        **dict.fromkeys(("position", "attention_mass", "key_tokens"), tuple(reader.heldout)),
        "recall": tuple(RECALL),
        "needle": ("1", "4"),
        "ruler": tuple(ruler.present(reader.haystack, reader.questions)),
        "harness": settings.tasks,
    }
    found = [Unit(name, part, length) for name in settings.evals for length in settings.lengths for part in parts[name]]
    return [unit for unit in found if unit.eval != "recall" or unit.length >= _shortest(unit.part)]


def run(
    reader: Reader,
    settings: Settings,
    provenance: Mapping,
    directory: Path,
    shared: Path,
    done: Callable[[Unit, int, int], None],
) -> None:
    """Measures the units that `directory` does not have; `done` hears of each, with how many are done and of how many.

    All samples are drawn before anything is asked: into `shared`, for every model with the same tokenizer. ValueError where one
    does not fit, and where the directory is of another run.
    """
    wanted = units(settings, reader)
    trees.check(bool(wanted), f"nothing to measure at lengths {', '.join(map(str, settings.lengths))}")
    files = {unit: _drawn(reader, settings, unit, shared) for unit in wanted if unit.eval in DRAWS}
    _begin(directory, {**provenance, "settings": trees.plain(settings._asdict()), "generator": GENERATOR})
    for number, unit in enumerate(wanted, 1):
        path = directory / "units" / f"{unit.name}.json"
        if not path.exists():
            asked = samples.read(files[unit])[0] if unit in files else []
            measured = MEASURES[unit.eval](reader, settings, unit, asked)
            records = [{"eval": unit.eval, **record} for record in measured.records]
            _write(path, json.dumps({"records": records, "answers": measured.answers}, ensure_ascii=False))
        done(unit, number, len(wanted))
    whole = [json.loads((directory / "units" / f"{unit.name}.json").read_text()) for unit in wanted]
    for name in ("records", "answers"):
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for found in whole for line in found[name]]
        _write(directory / f"{name}.jsonl", "".join(lines))


def _drawn(reader: Reader, settings: Settings, unit: Unit, shared: Path) -> Path:
    """The file of a unit's samples, in whose name is what they follow from."""
    about = [GENERATOR, settings.samples, settings.seed, settings.depths, reader.subject.tokenizer.hash, reader.haystack]
    path = shared / f"{unit.name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}.jsonl"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        samples.write(path, DRAWS[unit.eval](reader, settings, unit))
    return path


def _given(reader: Reader, asked: list[Sample]) -> list[str]:
    """What the model says to each; nothing is cut to fit."""
    words = reader.subject.tokenizer
    if (long := samples.too_long(asked, words)) is not None:
        raise ValueError(f"sample {long.index} of {long.task} does not fit into {long.length:,} tokens; its file was changed")
    most = max(sample.max_new_tokens for sample in asked)
    found = answers(reader.engine, words, [sample.prompt for sample in asked], most, stop_tokens=[words.eos])
    return [answer.text for answer in found]


def _answers(asked: list[Sample], given: list[str], shares: list[float]) -> list[dict]:
    """What is kept of each question: its end, what was wanted, what was given, and the share of it that was right."""
    found = []
    for sample, text, share in zip(asked, given, shares, strict=True):
        known = {name: getattr(sample, name) for name in ("task", "length", "index", "group", "meta")}
        told = {"prompt_end": sample.prompt[-PROMPT_END:], "wanted": list(sample.answers), "given": text, "score": share}
        found.append(known | told)
    return found


def _begin(directory: Path, about: Mapping) -> None:
    """Says in run.json what is measured here; ValueError where it says something else already."""
    path = directory / "run.json"
    if not path.exists():
        return _write(path, json.dumps(about, indent=1))
    lines = trees.differences(json.loads(path.read_text()), json.loads(json.dumps(about)), "  ")
    trees.check(
        not lines,
        f"{directory} holds another evaluation (there -> wanted):\n"
        + "\n".join(lines)
        + "\nuse another --out, or its settings",
    )


def _write(path: Path, text: str) -> None:
    """A file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.rename(path)


def _shortest(task: str) -> int:
    return config.shortest_row(config.Source((), None, 0, None, task, RECALL[task]))
