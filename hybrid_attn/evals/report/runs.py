"""What the suite wrote of one model: records, answers, and where they come from."""

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from hybrid_attn.trees import check

# The evaluations that a report knows, with the fields without which a record of theirs says nothing.
FIELDS = {
    "position": ("source", "length", "tokens", "loss"),
    "recall": ("source", "task", "length", "answers", "accuracy", "by_row"),
    "needle": ("length", "depth", "needles", "answers", "right"),
    "ruler": ("task", "length", "samples", "score", "nulls"),
    "attention_mass": (
        *("source", "prompts", "layer", "kind", "head", "length", "begin", "needle", "context", "qc"),
        *("entropy_bits", "needle_lift", "retrieval", "reach"),
    ),
    "key_tokens": ("source", "length", "short", "key_tokens", "tokens", "loss", "perplexity"),
    "harness": ("task", "length", "metric", "value"),
}
ANSWER = ("task", "length", "index", "prompt_hash", "prompt_end", "wanted", "given", "score", "group", "meta")


class Run(NamedTuple):
    """One evaluated model.

    `provenance` is what its run.json holds, in which `model.seq_len` is the length of training. The scores of answers lie
    between 0 and 1, and their `wanted` is a list.
    """

    name: str
    records: tuple[dict, ...]
    answers: tuple[dict, ...]
    provenance: dict

    @property
    def absent(self) -> list[tuple[str, str, int, str]]:
        """What was not measured: evaluation, part, length and the reason."""
        return [tuple(x) for x in self.provenance.get("settings", {}).get("absent", ())]

    @property
    def compat(self) -> bool:
        """Whether it was asked RULER's own prompts."""
        return self.provenance.get("settings", {}).get("compat", False)

    @property
    def trained(self) -> int:
        """Tokens in a row of training."""
        return self.provenance["model"]["seq_len"]

    def of(self, evaluation: str) -> list[dict]:
        """The records of one evaluation, in the order of the file."""
        return [record for record in self.records if record["eval"] == evaluation]


def read(directory: Path) -> Run:
    """The run in `directory`: run.json, records.jsonl and, if questions were asked, answers.jsonl.

    ValueError names the file and the line that does not fit.
    """
    source, records, answers = (directory / name for name in ("run.json", "records.jsonl", "answers.jsonl"))
    for path in (source, records):
        check(path.is_file(), f"{path} does not exist; evaluate the model into {directory} first")
    try:
        provenance = json.loads(source.read_text())
        trained = provenance["model"]["seq_len"]
    except (ValueError, KeyError, TypeError) as cause:
        raise ValueError(f"{source} says no model.seq_len, the length of training: {cause!r}") from cause
    check(isinstance(trained, int) and trained > 0, f"{source}: model.seq_len={trained!r} is no number of tokens")
    found = Run(
        directory.name,
        tuple(_record(record, where) for where, record in _lines(records)),
        tuple(_answer(answer, where) for where, answer in _lines(answers)) if answers.exists() else (),
        provenance,
    )
    check(bool(found.records), f"{records} is empty; evaluate the model again, it goes on where it stopped")
    return found


def sample_of(answer: Mapping) -> tuple:
    """What makes two answers answers to the same question: the whole prompt, of which the answer holds the end and a hash."""
    return (*(answer[key] for key in ("task", "length", "index", "group", "prompt_hash")), *answer["wanted"])


def rows_of(run: Run, record: Mapping) -> tuple:
    """What makes the rows of two records the same: drawn ones of a task, or those of the same held-out documents in tokens."""
    known = run.provenance.get("heldout", {}).get(record["source"]), run.provenance.get("tokenizer")
    what = record["task"] if record["eval"] == "recall" else (record["source"], *known)
    return record["eval"], what, record["length"], len(record["by_row"])


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """Where each line of a file stands, and what it holds; numbers that are not finite are None."""
    if not path.stat().st_size:
        return
    for number, line in enumerate(path.read_text().removesuffix("\n").split("\n"), 1):
        where = f"{path}, line {number}"
        try:
            values = json.loads(line, parse_constant=lambda name: None)
        except ValueError as cause:
            raise ValueError(
                f"{where} is cut short or no JSON: {cause}; evaluate again, it goes on where it stopped"
            ) from cause
        check(isinstance(values, dict), f"{where} holds {line[:40]!r}, which is no record")
        yield where, values


def _record(record: dict, where: str) -> dict:
    name = record.get("eval")
    if name not in FIELDS:
        near = difflib.get_close_matches(str(name), FIELDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(FIELDS)}"
        raise ValueError(f"{where}: eval={name!r} is not known; {hint}")
    _check_fields(record, FIELDS[name], where)
    for field in ("answers", "samples"):
        check(record.get(field) != 0, f"{where}: {name} with {field}=0 says nothing; ask one question at least")
    return record


def _answer(answer: dict, where: str) -> dict:
    _check_fields(answer, ANSWER, where)
    score = answer["score"]
    check(isinstance(score, (int, float)) and 0 <= score <= 1, f"{where}: score={score!r} is no share of right answers, 0 to 1")
    wanted = answer["wanted"]
    return answer | {"wanted": [wanted] if isinstance(wanted, str) else wanted}


def _check_fields(values: Mapping, fields: tuple[str, ...], where: str) -> None:
    missing = [field for field in fields if field not in values]
    check(not missing, f"{where} lacks {', '.join(missing)}")
