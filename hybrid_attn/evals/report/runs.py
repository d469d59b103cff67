"""What the suite wrote of one model: records, answers, and where they come from."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from hybrid_attn.evals.evaluation import Evaluation
from hybrid_attn.evals.report.fields import check_answer, check_provenance, check_record
from hybrid_attn.evals.table import EVALS
from hybrid_attn.files import object_of
from hybrid_attn.trees import check


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
        """The units that were not measured: evaluation, part, length and the reason."""
        return [tuple(x) for x in self.provenance.get("settings", {}).get("absent", ())]

    @property
    def compat(self) -> bool:
        """Whether the prompts were RULER's own."""
        return self.provenance.get("settings", {}).get("compat", False)

    @property
    def layer_types(self) -> dict[str, str]:
        """The name of each layer type by its letter, such as "local, window 512, RoPE"; older runs have none."""
        return self.provenance["model"].get("kinds", {})

    def layer_type(self, record: Mapping) -> str:
        """The name of the layer type of a record, or its letter where the run names none."""
        return self.layer_types.get(record["kind"], record["kind"])

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


def read(directory: Path) -> Run:
    """The run in `directory`: run.json, records.jsonl and, if there were questions, answers.jsonl.

    ValueError names the file and the line that does not fit.
    """
    source, records, answers = (directory / name for name in ("run.json", "records.jsonl", "answers.jsonl"))
    for path in (source, records):
        check(path.is_file(), f"{path} does not exist; evaluate the model into {directory} first")
    provenance = _parse(_text(source), str(source))
    check_provenance(provenance, str(source))
    run = Run(
        directory.name,
        tuple(_record(record, where) for where, record in _lines(records)),
        tuple(_answer(answer, where) for where, answer in _lines(answers)) if answers.exists() else (),
        provenance,
    )
    check(bool(run.records), f"{records} is empty; evaluate the model again, it goes on where it stopped")
    return run


def sample_of(answer: Mapping) -> tuple:
    """A key that answers to the same question share. It has the hash of the full prompt: an answer holds only its end."""
    return (*(answer[key] for key in ("task", "length", "index", "group", "prompt_hash")), *answer["wanted"])


def sequences_of(run: Run, record: Mapping) -> tuple:
    """A key that records of the same sequences share: those of a task, or of the same held-out documents and tokenizer."""
    known = run.provenance.get("heldout", {}).get(record["source"]), run.provenance.get("tokenizer")
    what = record["task"] if "task" in EVALS[record["eval"]].fields else (record["source"], *known)
    return record["eval"], what, record["length"], len(record["by_row"])


def _lines(path: Path) -> Iterator[tuple[str, dict]]:
    """The file and the number of each line, for messages, and its object."""
    if not path.stat().st_size:
        return
    for number, line in enumerate(_text(path).removesuffix("\n").split("\n"), 1):
        where = f"{path}, line {number}"
        yield where, _parse(line, where)


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as cause:
        raise ValueError(f"{path} is no UTF-8 text: {cause.reason} at byte {cause.start:,}; evaluate again") from cause


def _parse(text: str, where: str) -> dict:
    """An object of JSON, in which numbers that are not finite are None."""
    cure = "; evaluate again, it goes on where it stopped"
    return object_of(text, where, cure, parse_constant=lambda name: None, parse_float=_finite)


def _finite(digits: str) -> float | None:
    return number if math.isfinite(number := float(digits)) else None


def _record(record: dict, where: str) -> dict:
    check_record(record, where)
    return record


def _answer(answer: dict, where: str) -> dict:
    check_answer(answer, where)
    wanted = answer["wanted"]
    return answer | {"wanted": [wanted] if isinstance(wanted, str) else wanted}
