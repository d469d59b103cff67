"""What records and answers must hold, so that a report of files from elsewhere is right or names the line that is not."""

from collections.abc import Mapping, Sequence

from hybrid_attn.evals.records import ANY, COUNT, FLAG, NAME, SCALAR, SHARE, SIZE, TEXT, TEXTS, Kind, list_of, number, or_none
from hybrid_attn.evals.table import EVALS
from hybrid_attn.trees import check, suggestion

ANYTHING = Kind("anything", lambda _: True)
PART = Kind("all, recall or rest", lambda value: value in ("all", "recall", "rest"))

# Fields that a record of any evaluation may have beside its own.
BESIDE: dict[str, Kind] = {
    **{"part": PART, "first": COUNT, "end": SIZE, "stderr": ANY, "bits_per_byte": ANY, "by_row": list_of(number(), 1)},
    **dict.fromkeys(("nothing", "sink_rate", *(f"{x}_per_token" for x in ("begin", "needle", "context", "qc"))), ANY),
    **{"edges": list_of(COUNT, 2), "weights": list_of(ANY, 1)},
    **dict.fromkeys(("filter", "shots", "version", "documents", "requests", "truncated", "windowed"), SCALAR),
}
ANSWER = {
    **{"task": NAME, "length": SIZE, "index": COUNT, "prompt_hash": NAME, "prompt_end": TEXT, "wanted": TEXTS, "given": TEXT},
    **{"score": Kind("a share of right answers, 0 to 1", SHARE.holds), "group": TEXT, "meta": ANYTHING},
}
DATA = {  # of run.json: the flags that named what was read beside the checkpoint
    **{"trust_checkpoint_data": FLAG, "heldout": list_of(TEXT), "text": or_none(list_of(TEXT))},
    **dict.fromkeys(("squad", "hotpot", "english_words"), or_none(TEXT)),
}
ABSENT = (NAME, NAME, COUNT, TEXT)  # evaluation, part, length, reason


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
    _check(record, BESIDE | known[name], known[name], where)
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
    _check(answer, ANSWER, ANSWER, where)


def check_provenance(values: object, where: str) -> None:
    """ValueError where run.json does not say what a report reads of it."""
    check(isinstance(values, dict) and isinstance(values.get("model"), dict), f"{where} says no model.seq_len")
    model, settings = values["model"], values.get("settings", {})
    trained = model.get("seq_len")
    check(SIZE.holds(trained), f"{where}: model.seq_len={_short(trained)}, the length of training, is no number of tokens")
    known = {"layers": or_none(TEXT), "parameters": or_none(COUNT), "kinds": _object_of("names by letter", NAME)}
    _check(model, known, (), f"{where}: model")
    more = {"step": or_none(COUNT), "heldout": _object_of("names by source", SCALAR), "tokenizer": or_none(TEXT)}
    more |= {"vocab_size": or_none(SIZE), "mesh": or_none(TEXT), "checkpoint": TEXT}
    _check(values, more | dict.fromkeys(("settings", "data"), _object_of("object", ANYTHING)), (), where)
    _check(values.get("data", {}), DATA, (), f"{where}: data")
    _check(settings, {"compat": FLAG, "task_path": or_none(TEXT)}, (), f"{where}: settings")
    absent = settings.get("absent", [])
    ok = isinstance(absent, list) and all(isinstance(x, list) and len(x) == len(ABSENT) for x in absent)
    ok = ok and all(kind.holds(value) for x in absent for kind, value in zip(ABSENT, x, strict=True))
    check(ok, f"{where}: settings.absent must hold an evaluation, a part, a length and a reason each")


def _object_of(what: str, kind: Kind) -> Kind:
    return Kind(what, lambda value: isinstance(value, dict) and all(map(kind.holds, value.values())))


def _check(values: Mapping, known: Mapping[str, Kind], needed: Sequence[str] | Mapping, where: str) -> None:
    missing = [field for field in needed if field not in values]
    check(not missing, f"{where} lacks {', '.join(missing)}")
    for field, kind in known.items():
        if field in values:
            value, what = values[field], kind.what.removeprefix("a ")
            check(kind.holds(value), f"{where}: {field}={_short(value)} is no {what}")


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
