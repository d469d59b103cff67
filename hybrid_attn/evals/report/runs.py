"""What the suite wrote of one model, checked: a report of files from elsewhere is right or names the line that is not."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hybrid_attn.evals.evaluation import Evaluation
from hybrid_attn.evals.records import ANY, COUNT, NAME, SCALAR, SHARE, SIZE, TEXT, TEXTS, Kind, list_of, number, or_none
from hybrid_attn.evals.report.escape import shortened
from hybrid_attn.evals.table import EVALS
from hybrid_attn.files import object_of
from hybrid_attn.trees import check, suggestion


def each(kind: Kind) -> Kind:
    return Kind("an object", lambda value: isinstance(value, dict) and all(map(kind.holds, value.values())))


def _is_absent(value: object) -> bool:
    kinds = NAME, NAME, COUNT, TEXT
    return isinstance(value, list) and len(value) == 4 and all(kind.holds(x) for kind, x in zip(kinds, value, strict=True))


# Fields by name, of which those with a question mark may be missing; a mapping is that of an object.
BESIDE = {  # fields that a record of any evaluation may have beside its own
    **{"part?": Kind("all, recall or rest", lambda value: value in ("all", "recall", "rest")), "first?": COUNT, "end?": SIZE},
    **{"by_row?": list_of(number(), 1), "edges?": list_of(COUNT, 2), "weights?": list_of(ANY, 1)},
    **dict.fromkeys(("stderr?", "bits_per_byte?", "nothing?", "sink_rate?"), ANY),
    **dict.fromkeys([f"{x}_per_token?" for x in ("begin", "needle", "context", "qc")], ANY),
}
ANSWER = {
    **{"task": NAME, "length": SIZE, "index": COUNT, "prompt_hash": NAME, "prompt_end": TEXT, "wanted": TEXTS, "given": TEXT},
    **{"score": Kind("a share of right answers, 0 to 1", SHARE.holds), "group": TEXT},
}
PROVENANCE = {  # run.json, which may hold more
    "model": {"seq_len": SIZE, "layers?": or_none(NAME), "parameters?": or_none(COUNT), "kinds?": each(NAME)},
    **{"step?": or_none(COUNT), "heldout?": each(SCALAR), "tokenizer?": SCALAR, "vocab_size?": or_none(SIZE), "data?": {}},
    "settings?": {"absent?": list_of(Kind("an evaluation, a part, a length and a reason", _is_absent))},
}


class Run(NamedTuple):
    """One evaluated model; `provenance` is its run.json. Scores of answers lie between 0 and 1, their `wanted` is a list."""

    name: str
    records: tuple[dict, ...]
    answers: tuple[dict, ...]
    provenance: dict

    @property
    def compat(self) -> bool:
        """Whether the prompts were RULER's own."""
        return bool(self.provenance.get("settings", {}).get("compat"))

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
    path = directory / "records.jsonl"
    (provenance,) = _objects(directory / "run.json", check_provenance, in_lines=False)
    records = _objects(path, check_record)
    check(bool(records), f"{path} is empty; evaluate the model again, it goes on where it stopped")
    path = directory / "answers.jsonl"
    answers = _objects(path, check_answer) if path.exists() else []
    listed = [x | {"wanted": [x["wanted"]]} if isinstance(x["wanted"], str) else x for x in answers]
    return Run(directory.name, tuple(records), tuple(listed), provenance)


def _objects(path: Path, check_object: Callable[[dict, str], None], in_lines: bool = True) -> list[dict]:
    """The objects of a file, one in each line or a single one, checked; numbers that are not finite are None."""
    check(path.is_file(), f"{path} does not exist; evaluate the model into {path.parent} first")
    cure, objects = "; evaluate again, it goes on where it stopped", []
    for i, text in enumerate(path.read_bytes().splitlines() if in_lines else [path.read_bytes()], 1):
        where = f"{path}, line {i}" if in_lines else str(path)
        objects.append(object_of(text, where, cure, parse_constant=lambda name: None, parse_float=_finite))
        check_object(objects[-1], where)
    return objects


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
    check_fields(record, where, {**known[name], **BESIDE})
    if name in EVALS:
        EVALS[name].check_record(record, where)
    is_bucket, (first, end) = "first" in record, (record.get(x, 0) for x in ("first", "end"))
    check(first < end or not is_bucket, f"{where}: a bucket from first={first} to end={end} has no position")
    edges, weights = (len(record.get(x, ())) for x in ("edges", "weights"))
    check(edges == weights + 1 or not weights, f"{where}: {weights} weights need {weights + 1} edges, and there are {edges}")


def check_answer(answer: Mapping, where: str) -> None:
    check_fields(answer, where, ANSWER)


def check_provenance(values: Mapping, where: str) -> None:
    check_fields(values, where, PROVENANCE)


def check_fields(values: object, where: str, fields: Mapping[str, Kind | Mapping]) -> None:
    """ValueError names the fields that are missing, or the first that does not hold what `fields` says."""
    check(isinstance(values, dict), f"{where}={_short(values)} is no object")
    missing = [name for name in fields if not name.endswith("?") and name not in values]
    check(not missing, f"{where} lacks {', '.join(missing)}")
    for name, kind in ((name.removesuffix("?"), kind) for name, kind in fields.items()):
        if name in values and isinstance(kind, Mapping):
            check_fields(values[name], f"{where}: {name}", kind)
        elif name in values:
            check(kind.holds(values[name]), f"{where}: {name}={_short(values[name])} is no {kind.what.removeprefix('a ')}")


def _short(value: object) -> str:
    return shortened(repr(value), 60)
