"""What the suite wrote of one model, checked: a report of files from elsewhere is right or names the line that is not."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hybrid_attn.evals.evaluation import Evaluation
from hybrid_attn.evals.records import ANY, COUNT, FLAG, NAME, SCALAR, SHARE, SIZE, TEXT, TEXTS, Kind, list_of, number, or_none
from hybrid_attn.evals.report.escape import shortened
from hybrid_attn.evals.table import EVALS
from hybrid_attn.files import object_of
from hybrid_attn.trees import check, suggestion


def _object_of(what: str, kind: Kind) -> Kind:
    return Kind(what, lambda value: isinstance(value, dict) and all(map(kind.holds, value.values())))


ANYTHING = Kind("anything", lambda _: True)
OBJECT = _object_of("object", ANYTHING)
PART = Kind("all, recall or rest", lambda value: value in ("all", "recall", "rest"))
HARNESS = ("filter", "shots", "version", "documents", "requests", "truncated", "windowed")  # beside a value of the harness
BESIDE: dict[str, Kind] = {  # fields that a record of any evaluation may have beside its own
    **{"part": PART, "first": COUNT, "end": SIZE, "stderr": ANY, "bits_per_byte": ANY, "by_row": list_of(number(), 1)},
    **dict.fromkeys(("nothing", "sink_rate", *(f"{x}_per_token" for x in ("begin", "needle", "context", "qc"))), ANY),
    **{"edges": list_of(COUNT, 2), "weights": list_of(ANY, 1)},
    **dict.fromkeys(HARNESS, SCALAR),
}
ANSWER = {
    **{"task": NAME, "length": SIZE, "index": COUNT, "prompt_hash": NAME, "prompt_end": TEXT, "wanted": TEXTS, "given": TEXT},
    **{"score": Kind("a share of right answers, 0 to 1", SHARE.holds), "group": TEXT, "meta": ANYTHING},
}
MODEL = {"layers": or_none(TEXT), "parameters": or_none(COUNT), "kinds": _object_of("names by letter", NAME)}
PROVENANCE = {  # of run.json
    **{"step": or_none(COUNT), "heldout": _object_of("names by source", SCALAR), "tokenizer": or_none(TEXT)},
    **{"vocab_size": or_none(SIZE), "mesh": or_none(TEXT), "checkpoint": TEXT, "settings": OBJECT, "data": OBJECT},
}
SETTINGS = {"compat": FLAG, "task_path": or_none(TEXT)}
DATA = {  # the flags that named what was read beside the checkpoint
    **{"trust_checkpoint_data": FLAG, "heldout": list_of(TEXT), "text": or_none(list_of(TEXT))},
    **dict.fromkeys(("squad", "hotpot", "english_words"), or_none(TEXT)),
}
ABSENT = (NAME, NAME, COUNT, TEXT)  # evaluation, part, length, reason


class Run(NamedTuple):
    """One evaluated model; `provenance` is its run.json. Scores of answers lie between 0 and 1, their `wanted` is a list."""

    name: str
    records: tuple[dict, ...]
    answers: tuple[dict, ...]
    provenance: dict

    @property
    def compat(self) -> bool:
        """Whether the prompts were RULER's own."""
        return self.provenance.get("settings", {}).get("compat", False)

    @property
    def layer_types(self) -> dict[str, str]:
        """The name of each layer type by its letter, such as "local, window 512, RoPE"; older runs have none."""
        return self.provenance["model"].get("kinds", {})

    @property
    def trained(self) -> int:
        """Tokens of a sequence in training."""
        return self.provenance["model"]["seq_len"]

    @property
    def chance(self) -> float | None:
        """Nats a token where all tokens are equally likely; None of runs that do not name the size of their vocabulary."""
        size = self.provenance.get("vocab_size")
        return None if size is None else math.log(size)

    def of(self, evaluation: str) -> list[dict]:
        """The records of one evaluation, in the order of the file."""
        return [record for record in self.records if record["eval"] == evaluation]


def measured(runs: Sequence[Run]) -> list[Evaluation]:
    """The evaluations that the runs have records of, in the order of their sections."""
    names = {record["eval"] for run in runs for record in run.records}
    return sorted((x for x in EVALS.values() if x.name in names), key=lambda x: x.section_order)


def records_of(runs: Sequence[Run], evaluation: str) -> list[tuple[Run, dict]]:
    """The records of one evaluation, each with its run."""
    return [(run, record) for run in runs for record in run.of(evaluation)]


def sample_of(answer: Mapping) -> tuple:
    """A key that answers to the same question share. It has the hash of the full prompt: an answer holds only its end."""
    return (*(answer[key] for key in ("task", "length", "index", "group", "prompt_hash")), *answer["wanted"])


def sequences_of(run: Run, record: Mapping) -> tuple:
    """A key that records of the same sequences share: those of a task, or of the same held-out documents and tokenizer."""
    known = run.provenance.get("heldout", {}).get(record["source"]), run.provenance.get("tokenizer")
    what = record["task"] if "task" in EVALS[record["eval"]].fields else (record["source"], *known)
    return record["eval"], what, record["length"], len(record["by_row"])


def read(directory: Path) -> Run:
    """The run in `directory`, without answers if there were no questions; ValueError names the line that does not fit."""
    source, records, answers = (directory / name for name in ("run.json", "records.jsonl", "answers.jsonl"))
    for path in (source, records):
        check(path.is_file(), f"{path} does not exist; evaluate the model into {directory} first")
    provenance = _object(_text(source), str(source), check_provenance)
    of_records = _lines(records, check_record)
    check(bool(of_records), f"{records} is empty; evaluate the model again, it goes on where it stopped")
    of_answers = _lines(answers, check_answer) if answers.exists() else []
    listed = [x | {"wanted": [x["wanted"]]} if isinstance(x["wanted"], str) else x for x in of_answers]
    return Run(directory.name, tuple(of_records), tuple(listed), provenance)


def _lines(path: Path, check_object: Callable[[dict, str], None]) -> list[dict]:
    """The object of each line."""
    lines = _text(path).removesuffix("\n").split("\n") if path.stat().st_size else []
    return [_object(line, f"{path}, line {number}", check_object) for number, line in enumerate(lines, 1)]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as cause:
        raise ValueError(f"{path} is no UTF-8 text: {cause.reason} at byte {cause.start:,}; evaluate again") from cause


def _object(text: str, where: str, check_object: Callable[[dict, str], None]) -> dict:
    """An object of JSON that passes the check, in which numbers that are not finite are None."""
    cure = "; evaluate again, it goes on where it stopped"
    values = object_of(text, where, cure, parse_constant=lambda name: None, parse_float=_finite)
    check_object(values, where)
    return values


def _finite(digits: str) -> float | None:
    return number if math.isfinite(number := float(digits)) else None


def required() -> dict[str, Mapping[str, Kind]]:
    """By evaluation, the fields without which a record is refused; those of the baselines, too."""
    baselines = [evaluation.baseline for evaluation in EVALS.values() if evaluation.baseline]
    return {record.name: record.fields for record in (*EVALS.values(), *baselines)}


def check_record(record: Mapping, where: str) -> None:
    """ValueError names the field that is not what a record of its evaluation holds."""
    name, known = record.get("eval"), required()
    if not isinstance(name, str) or name not in known:
        hint = suggestion(name, known, otherwise=f"known are {', '.join(known)}")
        raise ValueError(f"{where}: eval={_short(name)} is not known; {hint}")
    for field in ("answers", "samples"):
        check(record.get(field) != 0, f"{where}: {name} with {field}=0 says nothing; ask one question at least")
    _check(record, BESIDE | known[name], where, known[name])
    if name in EVALS:
        EVALS[name].check_record(record, where)
    if "first" in record or "end" in record:
        first, end = record.get("first", -1), record.get("end", -1)
        check(0 <= first < end, f"{where}: a bucket from first={first} to end={end} has no position")
    if "weights" in record:
        edges = record.get("edges", ())
        rises = all(a < b for a, b in zip(edges, edges[1:], strict=False))
        check(rises and len(edges) == len(record["weights"]) + 1, f"{where}: edges must rise, one more than the weights")


def check_answer(answer: Mapping, where: str) -> None:
    _check(answer, ANSWER, where, ANSWER)


def check_provenance(values: Mapping, where: str) -> None:
    """ValueError where run.json does not say what a report reads of it."""
    check(isinstance(values.get("model"), dict), f"{where} says no model.seq_len")
    trained = values["model"].get("seq_len")
    check(SIZE.holds(trained), f"{where}: model.seq_len={_short(trained)}, the length of training, is no number of tokens")
    _check(values["model"], MODEL, f"{where}: model")
    _check(values, PROVENANCE, where)
    _check(values.get("data", {}), DATA, f"{where}: data")
    _check(values.get("settings", {}), SETTINGS, f"{where}: settings")
    absent = values.get("settings", {}).get("absent", [])
    ok = isinstance(absent, list) and all(isinstance(x, list) and len(x) == len(ABSENT) for x in absent)
    ok = ok and all(kind.holds(value) for x in absent for kind, value in zip(ABSENT, x, strict=True))
    check(ok, f"{where}: settings.absent must hold an evaluation, a part, a length and a reason each")


def _check(values: Mapping, known: Mapping[str, Kind], where: str, needed: Iterable[str] = ()) -> None:
    missing = [field for field in needed if field not in values]
    check(not missing, f"{where} lacks {', '.join(missing)}")
    for field, kind in known.items():
        if field in values:
            what = kind.what.removeprefix("a ")
            check(kind.holds(values[field]), f"{where}: {field}={_short(values[field])} is no {what}")


def _short(value: object) -> str:
    return shortened(repr(value), 60)
