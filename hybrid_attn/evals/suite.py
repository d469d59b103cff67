"""The suite: evaluations cut into units, each of which is a file as soon as it is done.

The directory of a run has run.json (what was measured of which model), units/ (a file of records and answers each) and, when
all are done, records.jsonl and answers.jsonl, of which a report is made. After an interruption the same call measures the
missing units. A unit that cannot be measured, or that does not fit a length which no flag names, is absent: run.json has the
reason.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from hybrid_attn import trees
from hybrid_attn.evals import samples
from hybrid_attn.evals.samples import Sample, TooLongError
from hybrid_attn.evals.table import EVALS
from hybrid_attn.evals.types import Absent, EvalContext, Measured, Settings, Unit
from hybrid_attn.files import object_of, write_atomically
from hybrid_attn.parallel.mesh import broadcast_from_first

DEPTHS = (0.0, 25.0, 50.0, 75.0, 100.0)  # percent of a text, by default
SEED = 0  # of the questions, by default
FREE = ("revision", "data")  # keys of run.json that may change where a run goes on; they change no number
GENERATOR = 4  # version of the samples, raised when the same settings give others


def suites() -> dict[str, tuple[str, ...]]:
    """The names of the evaluations of each suite."""
    return {"quick": tuple(name for name, x in EVALS.items() if x.in_quick_suite), "full": tuple(EVALS)}


def names_of(suite: str) -> tuple[str, ...]:
    """The evaluations of "quick", "full" or "quick,harness"; ValueError for an unknown name names the nearest."""
    groups = suites() | {name: (name,) for name in EVALS}
    names = [name.strip() for name in suite.split(",")]
    for name in names:
        problem = trees.not_among(name, tuple(groups))
        trees.check(not problem, f"--suite={suite} names {name!r}, which {problem}")
    return tuple(dict.fromkeys(evaluation for name in names for evaluation in groups[name]))


def units(settings: Settings, context: EvalContext) -> list[Unit]:
    """The units of `settings.evals` that the context has data for, without those of `settings.absent`."""
    absent = {unit[:3] for unit in settings.absent}
    return [unit for name in settings.evals for unit in EVALS[name].units(context, settings) if unit not in absent]


def checked_units(settings: Settings, context: EvalContext) -> list[Unit]:
    """The same as `units`; ValueError with the reasons where there is none."""
    to_measure = units(settings, context)
    reasons = [x.reason if x.eval in x.reason else f"{x.eval} of {x.part}: {x.reason}" for x in settings.absent]
    reasons = list(dict.fromkeys(reasons))
    more = [f"and {len(reasons) - 3} more"] if len(reasons) > 3 else []
    lengths = sorted({length for name in settings.evals for length in EVALS[name].lengths(settings)})
    nothing = f"nothing to measure at lengths {', '.join(map(str, lengths))}"
    trees.check(bool(to_measure), "; ".join([nothing, *reasons[:3], *more]))
    return to_measure


def fitting(settings: Settings, context: EvalContext, shared: Path, lengths_are_fixed: bool) -> Settings:
    """`settings` with the units that cannot be measured in `absent`. Draws the samples of the other units into `shared`.

    A unit that does not fit its length is absent too; but if `lengths_are_fixed`, it is a TooLongError.
    """
    to_measure, absent = units(settings, context), []
    for name in settings.evals:
        missing, lengths = EVALS[name].missing(context, settings), EVALS[name].lengths(settings)
        absent += [Absent(name, part, length, why) for length in lengths for part, why in missing.items()]
    for name in settings.evals:
        if EVALS[name].empty and not any(unit.eval == name for unit in to_measure):
            part, why = EVALS[name].empty(context)
            absent += [Absent(name, part, length, why) for length in EVALS[name].lengths(settings)]
    for unit in to_measure:
        try:
            if EVALS[unit.eval].questions:
                _draw(context, settings, unit, shared)
            EVALS[unit.eval].check_fits(context, settings, unit)
        except TooLongError as cause:
            if lengths_are_fixed:
                raise
            absent.append(Absent(*unit, str(cause)))
    return settings._replace(absent=tuple(absent))


def measure_units(
    context: EvalContext, settings: Settings, provenance: Mapping, directory: Path, shared: Path,
    done: Callable[[Unit, int, int], bool | None],
) -> bool:  # fmt: skip
    """Measures the units that `directory` does not have. Calls `done(unit, number, of)` after each, and stops if that is True.

    Returns whether all is measured. All samples are drawn before anything is measured: into `shared`, for every model with the
    same tokenizer. Every process of a run makes the same call; the first one writes, and the others read its files. ValueError
    where a question does not fit, and where the directory has the results of another `provenance` (only `FREE` may differ).
    FloatingPointError where a model computes NaN: no record has one.
    """
    to_measure, writes = checked_units(settings, context), jax.process_index() == 0
    files = {unit: _draw(context, settings, unit, shared) for unit in to_measure if EVALS[unit.eval].questions}
    broadcast_from_first(True)  # the files of the first process are complete
    samples_of = {unit: _read_samples(settings, unit, path) for unit, path in files.items()}  # of finished units, too
    if writes:
        _begin(directory, described(settings, provenance), not all(_is_done(directory, unit) for unit in to_measure))
    for number, unit in enumerate(to_measure, 1):
        if not broadcast_from_first(_is_done(directory, unit)):
            content = _measure(context, settings, unit, *samples_of.get(unit, ([], None)))
            if writes:
                write_atomically(directory / "units" / f"{unit.name}.json", content)
        if done(unit, number, len(to_measure)):
            return False
    if writes:
        _join(directory, to_measure)
    return True


def _measure(context: EvalContext, settings: Settings, unit: Unit, unit_samples: list[Sample], digest: str | None) -> str:
    """What the file of a unit holds."""
    try:
        measured = EVALS[unit.eval].measure(context, settings, unit, unit_samples)
    except FloatingPointError as cause:
        raise FloatingPointError(f"{unit.name}: {cause}") from cause
    records = [{"eval": unit.eval, **record} for record in measured.records]
    replies = [answer | {"samples_hash": digest} for answer in measured.answers]
    return json.dumps({"records": records, "answers": replies}, ensure_ascii=False)


def _join(directory: Path, measured: list[Unit]) -> None:
    """Writes records.jsonl and answers.jsonl from the files of the units."""
    contents = [measured_of(directory, unit) for unit in measured]
    for name in Measured._fields:
        lines = [json.dumps(line, ensure_ascii=False) + "\n" for content in contents for line in getattr(content, name)]
        write_atomically(directory / f"{name}.jsonl", "".join(lines))


def described(settings: Settings, provenance: Mapping) -> dict:
    """What run.json says of a run."""
    return json.loads(json.dumps({**provenance, "settings": settings.as_written(), "generator": GENERATOR}))


def read_about(path: Path) -> dict:
    """What the run.json of a run says; ValueError where that is not what the suite writes."""
    cure = "; remove it, or use another directory"
    about = object_of(path.read_bytes(), str(path), cure)
    trees.check(isinstance(about.get("revision"), str), f"{path} says nothing of an evaluation{cure}")
    return about


def measured_of(directory: Path, unit: Unit) -> Measured:
    """What the file of a unit holds; ValueError where that is not what the suite writes of it."""

    def is_of_unit(line) -> bool:  # a report names its files by the part and the length
        has_length = isinstance(line, dict) and type(line.get("length")) is int and line["length"] == unit.length
        return has_length and EVALS[unit.eval].is_of(unit, line)

    path = directory / "units" / f"{unit.name}.json"
    values = object_of(path.read_bytes(), str(path))
    trees.check(
        tuple(values) == Measured._fields
        and all(isinstance(lines, list) for lines in values.values())
        and all(is_of_unit(line) for lines in values.values() for line in lines)
        and all(record.get("eval") == unit.eval for record in values["records"]),
        f"{path} holds other things than what was measured of {unit.name}",
    )
    return Measured(**values)


def _is_done(directory: Path, unit: Unit) -> bool:
    """Whether the file of a unit exists and is complete: a machine that lost its power may leave less."""
    try:
        return bool(measured_of(directory, unit))
    except (OSError, ValueError):
        return False


def _read_samples(settings: Settings, unit: Unit, path: Path) -> tuple[list[Sample], str]:
    unit_samples, digest = samples.read(path)
    for sample in unit_samples:
        known = sample.length == unit.length and EVALS[unit.eval].questions.matches(settings, unit, sample)
        trees.check(known, f"{path} holds other samples than those of {unit.name}; remove the file, and they are drawn again")
    return unit_samples, digest


def _draw(context: EvalContext, settings: Settings, unit: Unit, shared: Path) -> Path:
    """The file of a unit's samples, whose name has a hash of what determines them; the first process writes it."""
    questions = EVALS[unit.eval].questions
    about = [GENERATOR, settings.samples, settings.seed, settings.depths, context.eval_model.tokenizer.hash]
    about += questions.sources(context, settings, unit)
    path = shared / f"{unit.name}-{hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]}.jsonl"
    if jax.process_index() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        samples.write(path, questions.draw(context, settings, unit))
    return path


def _begin(directory: Path, about: Mapping, goes_on: bool) -> None:
    """Writes run.json, with each revision that measured a part; ValueError where it describes another evaluation already."""
    path = directory / "run.json"
    if not path.exists():
        return write_atomically(path, json.dumps(about, indent=1))
    known = read_about(path)
    revisions = known["revision"].split(", ")
    lines = trees.differences(*({name: x for name, x in y.items() if name not in FREE} for y in (known, about)), "  ")
    problem = [f"{directory} holds another evaluation (there -> wanted):", *lines, "use another --out, or its settings"]
    trees.check(not lines, "\n".join(problem))
    if goes_on and about["revision"] not in revisions:
        revisions.append(about["revision"])
    now = {**about, "revision": ", ".join(revisions)}
    if now != known:
        write_atomically(path, json.dumps(now, indent=1))
