"""The suite: evaluations cut into units, each of which is a file as soon as it is done.

The directory of a run has run.json (what was measured of which model), units/ (a file of records and answers each) and, when
all are done, records.jsonl and answers.jsonl, of which a report is made. After an interruption the same call measures the
missing units. What cannot be asked, or does not fit a length that nobody named, is absent, with the reason in run.json.
"""

import difflib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

import jax

from hybrid_attn import config, trees
from hybrid_attn.data.synthetic import Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.evals import attention, keytokens, marked, needle, position, recall, ruler, samples
from hybrid_attn.evals.ruler import compat, draws, scores
from hybrid_attn.evals.ruler.tasks import ESSAYS
from hybrid_attn.evals.samples import Sample, TooLongError
from hybrid_attn.evals.settings import Absent, Measured, Reader, Settings, Unit
from hybrid_attn.evals.subject import Spec
from hybrid_attn.files import object_of, write_atomically
from hybrid_attn.infer.text import answers
from hybrid_attn.parallel import fit
from hybrid_attn.parallel.mesh import broadcast_from_first

ATTENTION_PROMPTS = 2  # whose attention is averaged
PROMPT_END = 400  # characters of a prompt that are kept beside its answer
DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)  # percent of a text, where nobody says others
SEED = 0  # of the questions, where nobody says another
OF_SOURCES = ("position", "attention_mass", "key_tokens")  # what is measured on held-out rows of the model's own sources
EMPTY = {  # which part is missing where an evaluation has none, and why
    **dict.fromkeys(OF_SOURCES, ("documents", "the model's sources hold none out")),
    "recall": ("tasks", "no source of this run is a task"),
    "harness": ("tasks", "none is named"),
}
OTHER_TOKENIZER = "the tasks are in bytes, and this model has another tokenizer"
IN_ROWS = ("position", "recall", "key_tokens")  # what is measured on rows that are just as long
FREE = ("revision", "data")  # of run.json: what may differ where a run goes on, and makes no number another
GENERATOR = 4  # raised when the same settings give other samples


def draw_needle(reader: Reader, settings: Settings, unit: Unit) -> Iterator[Sample]:
    tokenizer, text = reader.subject.tokenizer, reader.haystack
    for depth in settings.depths:
        for index in range(settings.samples):
            yield needle.generate(unit.length, depth, int(unit.part), index, settings.seed, tokenizer, text)


def draw_ruler(reader: Reader, settings: Settings, unit: Unit) -> Iterator[Sample]:
    tokenizer, texts = reader.subject.tokenizer, (_text(reader, settings, unit), reader.questions)
    if settings.compat:
        cut = compat.sent_tokenize() if unit.part in ESSAYS else draws.sentences
        asked = unit.part, unit.length, settings.samples, settings.seed
        yield from compat.generate(*asked, tokenizer, reader.lists, *texts, cut)
        return
    for index in range(settings.samples):
        yield ruler.generate(unit.part, unit.length, index, settings.seed, tokenizer, *texts)


def _text(reader: Reader, settings: Settings, unit: Unit) -> str:
    """What the needles of a unit are hidden in."""
    return reader.essays if settings.compat and unit.eval == "ruler" else reader.haystack


def measure_position(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    spec = Spec(reader.heldout[unit.part], unit.length, settings.tokens)
    return _of_source(unit, position.run(reader.subject, spec))


def measure_recall(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    spec = Spec(reader.tasks[unit.part], unit.length, settings.tokens)
    return _of_source(unit, recall.run(reader.subject, spec))


def measure_attention(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    return _of_source(unit, attention.run(reader.subject, _attention_spec(reader, unit)))


def measure_key_tokens(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    spec = Spec(reader.heldout[unit.part], unit.length, settings.tokens)
    return _of_source(unit, keytokens.run(reader.subject, spec, min(unit.length, reader.trained) // 2))


def _of_source(unit: Unit, records: Iterable[dict]) -> Measured:
    return Measured([{"source": unit.part, **record} for record in records], [])


def measure_harness(reader: Reader, settings: Settings, unit: Unit, asked) -> Measured:
    """A task of lm-evaluation-harness, whose library is an extra; of longer prompts than the unit the beginning is lost."""
    from hybrid_attn.evals import harness

    tokenizer = reader.subject.tokenizer
    found = harness.evaluate(
        reader.engine, tokenizer, [unit.part], max_length=unit.length, include_path=settings.task_path, limit=settings.samples,
        stop_tokens=reader.stop_tokens,
    )  # fmt: skip
    return Measured([{"length": unit.length, **record} for record in harness.records(found)], [])


def measure_needle(reader: Reader, settings: Settings, unit: Unit, asked: list[Sample]) -> Measured:
    given = _given(reader, asked, 0)
    return Measured(needle.records(asked, given), _answers(asked, given, _shares(asked, given)))


def measure_ruler(reader: Reader, settings: Settings, unit: Unit, asked: list[Sample]) -> Measured:
    given = _given(reader, asked, settings.compat)  # RULER's lengths are without the mark
    shares = _shares(asked, given)
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
    """The evaluations of "quick", "full" or "quick,harness"; ValueError names the nearest of what does not exist."""
    groups = SUITES | {name: (name,) for name in MEASURES}
    found = [name.strip() for name in suite.split(",")]
    for name in found:
        near = difflib.get_close_matches(name, groups, 1, 0.0)
        hint = f"did you mean {near[0]!r}? There" if near and name else "there"
        trees.check(name in groups, f"--suite={suite} names {name!r}; {hint} are {', '.join(groups)}")
    return tuple(dict.fromkeys(evaluation for name in found for evaluation in groups[name]))


def units(settings: Settings, reader: Reader) -> list[Unit]:
    """All that `settings` ask for and the reader has the text for."""
    drawn = [name for name, x in reader.heldout.items() if isinstance(x, Task)]
    parts = {
        **dict.fromkeys(OF_SOURCES, tuple(name for name in reader.heldout if name not in drawn)),
        "attention_mass": tuple(x for x in reader.heldout if x not in drawn or reader.heldout[x].name == "recall"),
        "recall": tuple(reader.tasks) if isinstance(reader.subject.tokenizer, ByteTokenizer) else (),
        "needle": ("1", "4"),
        "ruler": tuple(task for task in settings.ruler_tasks if task not in missing(settings, reader)),
        "harness": settings.tasks,
    }
    found = [
        Unit(name, part, length) for name in settings.evals for length in settings.lengths_of(name) for part in parts[name]
    ]
    absent = {unit[:3] for unit in settings.absent}
    return [unit for unit in found if unit not in absent]


def some_units(settings: Settings, reader: Reader) -> list[Unit]:
    """`units`; ValueError where there is none, and why."""
    found = units(settings, reader)
    reasons = [x.reason if x.eval in x.reason else f"{x.eval} of {x.part}: {x.reason}" for x in settings.absent]
    reasons = list(dict.fromkeys(reasons))
    more = [f"and {len(reasons) - 3} more"] if len(reasons) > 3 else []
    lengths = sorted({length for name in settings.evals for length in settings.lengths_of(name)})
    nothing = f"nothing to measure at lengths {', '.join(map(str, lengths))}"
    trees.check(bool(found), "; ".join([nothing, *reasons[:3], *more]))
    return found


def missing(settings: Settings, reader: Reader) -> dict[str, str]:
    """Why tasks of RULER cannot be asked at any length, of those that cannot."""
    found = ruler.missing(reader.haystack, reader.questions)
    if settings.compat and not reader.essays:
        found |= dict.fromkeys(ESSAYS, "needs the text of RULER's essays, its PaulGrahamEssays.json, as --text")
    elif settings.compat and compat.sent_tokenize() is None:
        found |= dict.fromkeys(ESSAYS, "needs nltk with its punkt_tab, by which RULER cuts prose into sentences")
    return {task: reason for task, reason in found.items() if task in settings.ruler_tasks}


def fitting(settings: Settings, reader: Reader, shared: Path, named: bool) -> Settings:
    """`settings` with all in `absent` that cannot be measured; the samples of the rest are drawn into `shared`.

    Absent is what does not fit, too; but not of lengths that somebody has `named`: there it is a ValueError.
    """
    absent = []
    for length in settings.lengths_of("ruler") if "ruler" in settings.evals else ():
        absent += [Absent("ruler", task, length, reason) for task, reason in missing(settings, reader).items()]
    found = units(settings, reader)
    empty = EMPTY if isinstance(reader.subject.tokenizer, ByteTokenizer) else EMPTY | {"recall": ("tasks", OTHER_TOKENIZER)}
    without = [(name, *empty[name]) for name in settings.evals if name in empty and name not in {unit.eval for unit in found}]
    absent += [Absent(name, part, length, why) for name, part, why in without for length in settings.lengths_of(name)]
    for unit in found:
        try:
            _check_fits(settings, reader, unit, shared)
        except TooLongError as cause:
            if named:
                raise
            absent.append(Absent(*unit, str(cause)))
    return settings._replace(absent=tuple(absent))


def _check_fits(settings: Settings, reader: Reader, unit: Unit, shared: Path) -> None:
    if unit.eval in DRAWS:
        _drawn(reader, settings, unit, shared)
    if unit.eval in IN_ROWS:
        model, run, sizes = reader.subject.model, reader.subject.run, reader.subject.mesh.shape
        fit.check_length(f"{unit.eval} of {unit.part}: length", unit.length, sizes, run.zigzag)
        fit.check_schemes(model, run.context, sizes)
    task = {"recall": reader.tasks, "attention_mass": reader.heldout}.get(unit.eval, {}).get(unit.part)
    if isinstance(task, Task) and unit.length < (least := _shortest(task)):
        raise TooLongError(f"{unit.eval} of {unit.part}: its shortest row has {least} tokens, and {unit.length} are asked for")
    if unit.eval == "attention_mass":
        try:
            marked.prompts(_attention_spec(reader, unit), reader.subject.tokenizer)
        except ValueError as cause:
            raise TooLongError(f"attention_mass of {unit.part}: {cause}") from cause


def run(
    reader: Reader,
    settings: Settings,
    provenance: Mapping,
    directory: Path,
    shared: Path,
    done: Callable[[Unit, int, int], bool | None],
) -> bool:
    """Measures the units that `directory` does not have; `done` hears of each, with how many are done and of how many.

    Whether all is measured: True from `done` ends this before. All questions are drawn before anything is asked: into `shared`,
    for every model with the same tokenizer. Every process of a run makes the same call; the first one writes, and the others
    see its files. ValueError where a question does not fit, and where the directory is of another run than that of
    `provenance`, of which `FREE` may differ. FloatingPointError where a model computes NaN: no record has one.
    """
    wanted, writes = some_units(settings, reader), jax.process_index() == 0
    files = {unit: _drawn(reader, settings, unit, shared) for unit in wanted if unit.eval in DRAWS}
    broadcast_from_first(True)  # the others find what the first one has drawn
    drawn = {unit: _read_samples(settings, unit, path) for unit, path in files.items()}  # as they were, also of what is done
    if writes:
        _begin(directory, described(settings, provenance), not all(_is_done(directory, unit) for unit in wanted))
    for number, unit in enumerate(wanted, 1):
        if not broadcast_from_first(_is_done(directory, unit)):
            asked, digest = drawn.get(unit, ([], None))
            try:
                measured = MEASURES[unit.eval](reader, settings, unit, asked)
            except FloatingPointError as cause:
                raise FloatingPointError(f"{unit.name}: {cause}") from cause
            records = [{"eval": unit.eval, **record} for record in measured.records]
            given = [answer | {"samples_hash": digest} for answer in measured.answers]
            if writes:
                content = json.dumps({"records": records, "answers": given}, ensure_ascii=False)
                write_atomically(directory / "units" / f"{unit.name}.json", content)
        if done(unit, number, len(wanted)):
            return False
    if writes:
        all_measured = [measured_of(directory, unit) for unit in wanted]
        for name in Measured._fields:
            lines = [json.dumps(line, ensure_ascii=False) + "\n" for found in all_measured for line in getattr(found, name)]
            write_atomically(directory / f"{name}.jsonl", "".join(lines))
    return True


def described(settings: Settings, provenance: Mapping) -> dict:
    """What run.json says of a run."""
    return json.loads(json.dumps({**provenance, "settings": settings._asdict(), "generator": GENERATOR}))


def read_about(path: Path) -> dict:
    """What the run.json of a run says; ValueError where that is not what the suite writes."""
    cure = "; remove it, or use another directory"
    there = object_of(path.read_bytes(), str(path), cure)
    trees.check(isinstance(there.get("revision"), str), f"{path} says nothing of an evaluation{cure}")
    return there


def measured_of(directory: Path, unit: Unit) -> Measured:
    """What the file of a unit holds; ValueError where that is not what the suite writes of it."""
    path = directory / "units" / f"{unit.name}.json"
    values = object_of(path.read_bytes(), str(path))
    trees.check(
        tuple(values) == Measured._fields
        and all(isinstance(lines, list) for lines in values.values())
        and all(_is_of(unit, line) for lines in values.values() for line in lines)
        and all(record.get("eval") == unit.eval for record in values["records"]),
        f"{path} holds other things than what was measured of {unit.name}",
    )
    return Measured(**values)


def _is_of(unit: Unit, line) -> bool:
    """Whether a record or an answer is of the unit's part and length, by which a report names its files."""
    if not isinstance(line, dict) or type(line.get("length")) is not int or line["length"] != unit.length:
        return False
    if unit.eval == "harness":  # its groups have tasks of other names
        return isinstance(line.get("task"), str)
    if unit.eval == "needle":
        return line["task"] == needle.task_of(int(unit.part)) if "task" in line else line.get("needles") == int(unit.part)
    return line.get("task" if unit.eval == "ruler" else "source") == unit.part


def _is_done(directory: Path, unit: Unit) -> bool:
    """Whether the file of a unit is there, and whole: a machine that lost its power may leave less."""
    try:
        return bool(measured_of(directory, unit))
    except (OSError, ValueError):
        return False


def _read_samples(settings: Settings, unit: Unit, path: Path) -> tuple[list[Sample], str]:
    asked, digest = samples.read(path)
    task = needle.task_of(int(unit.part)) if unit.eval == "needle" else unit.part
    for sample in asked:
        known = (sample.task, sample.length) == (task, unit.length)
        known = known and (unit.eval != "needle" or sample.meta.get("depth") in settings.depths)
        trees.check(known, f"{path} holds other samples than those of {unit.name}; remove the file, and they are drawn again")
    return asked, digest


def _drawn(reader: Reader, settings: Settings, unit: Unit, shared: Path) -> Path:
    """The file of a unit's samples, in whose name is what they follow from; the first process writes it."""
    about = [GENERATOR, settings.samples, settings.seed, settings.depths, reader.subject.tokenizer.hash]
    about += [_text(reader, settings, unit)]
    about += [reader.questions.get(unit.part), *([reader.lists] if settings.compat and unit.eval == "ruler" else [])]
    path = shared / f"{unit.name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}.jsonl"
    if jax.process_index() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        samples.write(path, DRAWS[unit.eval](reader, settings, unit))
    return path


def _given(reader: Reader, asked: list[Sample], spare: int) -> list[str]:
    """What the model says to each, whose lengths may be passed by `spare` tokens; nothing is cut to fit."""
    tokenizer = reader.subject.tokenizer
    if (long := samples.too_long(asked, tokenizer, spare)) is not None:
        raise ValueError(f"sample {long.index} of {long.task} does not fit into {long.length:,} tokens; its file was changed")
    given: dict[int, str] = {}
    for most in sorted({sample.max_new_tokens for sample in asked}):  # of a question, whatever is asked beside it
        alike = [i for i, sample in enumerate(asked) if sample.max_new_tokens == most]
        found = answers(reader.engine, tokenizer, [asked[i].prompt for i in alike], most, stop_tokens=reader.stop_tokens)
        given |= {i: answer.text for i, answer in zip(alike, found, strict=True)}
    return [given[i] for i in range(len(asked))]


def _shares(asked: list[Sample], given: list[str]) -> list[float]:
    return [scores.score(sample.task, text, sample.answers) / 100 for sample, text in zip(asked, given, strict=True)]


def _answers(asked: list[Sample], given: list[str], shares: list[float]) -> list[dict]:
    """What is kept of each question: its hash and end, what was wanted and given, and the share of that which was right."""
    found = []
    for sample, text, share in zip(asked, given, shares, strict=True):
        known = {name: getattr(sample, name) for name in ("task", "length", "index", "group", "meta")}
        prompt = {"prompt_hash": hashlib.sha256(sample.prompt.encode()).hexdigest(), "prompt_end": sample.prompt[-PROMPT_END:]}
        found.append(known | prompt | {"wanted": list(sample.answers), "given": text, "score": share})
    return found


def _begin(directory: Path, about: Mapping, goes_on: bool) -> None:
    """Says in run.json what is measured here, with each revision that does; ValueError where it says something else already."""
    path = directory / "run.json"
    if not path.exists():
        return write_atomically(path, json.dumps(about, indent=1))
    there = read_about(path)
    revisions = there["revision"].split(", ")
    lines = trees.differences(*({name: x for name, x in y.items() if name not in FREE} for y in (there, about)), "  ")
    trees.check(
        not lines,
        f"{directory} holds another evaluation (there -> wanted):\n"
        + "\n".join(lines)
        + "\nuse another --out, or its settings",
    )
    if goes_on and about["revision"] not in revisions:
        revisions.append(about["revision"])
    now = {**about, "revision": ", ".join(revisions)}
    if now != there:
        write_atomically(path, json.dumps(now, indent=1))


def _attention_spec(reader: Reader, unit: Unit) -> Spec:
    return Spec(reader.heldout[unit.part], unit.length, ATTENTION_PROMPTS * unit.length)


def _shortest(task: Task) -> int:
    return config.shortest_row(config.Source((), None, 0, None, *task))
