"""The results of an evaluation as tables for a terminal, and the last lines of a finished run."""

import math
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from hybrid_attn.evals.report import contents
from hybrid_attn.train.console import aligned

HEADINGS = ("", "of", "score", "±", "bits/byte", "number")


def evaluation_tables(records: Sequence[Mapping], bigram: Sequence[Mapping], vocab_size: int, trained: int) -> list[str]:
    """A table for each length of the records: totals with their baselines, then their parts.

    `bigram` are records of a bigram model; chance is a uniform guess among the `vocab_size` tokens of the tokenizer.
    """
    lines = []
    for length in contents.lengths_of(records):
        of_length = [record for record in records if record["length"] == length]
        rows = [row for show in SHOWN for row in show(of_length, bigram, vocab_size)]
        note = " (the length of training)" if length == trained else ""
        lines += ["", f"at {length:,} tokens{note}", *aligned([HEADINGS, *rows])]
    return lines


def _losses(records: Sequence[Mapping], bigram: Sequence[Mapping], vocab_size: int) -> Iterable[tuple]:
    """The loss of all tokens, the losses of a bigram model and of chance, then losses by position."""
    matching = [record for record in records if record["eval"] == "position" and contents.part(record) == "all"]
    for source in dict.fromkeys(record["source"] for record in matching):
        of_source = [record for record in matching if record["source"] == source]
        for record in filter(contents.is_total, of_source):
            yield _loss("loss (nats)", record)
            for other in bigram:
                if other["source"] == source:
                    at = "" if other["length"] == record["length"] else f", at {other['length']:,}"
                    yield f"  bigram model{at}", source, "", "", f"{other['bits_per_byte']:.3f}", ""
            chance, bits = math.log(vocab_size), record["bits_per_byte"]
            yield "  chance", source, f"{chance:.3f}", "", f"{bits * chance / record['loss']:.3f}" if bits else "", ""
        for record in of_source:
            if not contents.is_total(record):
                yield _loss(f"  positions {record['first']:,} to {record['end'] - 1:,}", record)


def _loss(name: str, record: Mapping) -> tuple:
    spread = f"{record['stderr']:.3f}" if "stderr" in record else ""
    bits = "" if record["bits_per_byte"] is None else f"{record['bits_per_byte']:.3f}"
    return name, record["source"], f"{record['loss']:.3f}", spread, bits, f"{record['tokens']:,} tokens"


def _recall(records: Sequence[Mapping], *_) -> Iterable[tuple]:
    for record in _of(records, "recall"):
        yield "recall", record["source"], f"{record['accuracy']:.1%}", "", "", f"{record['answers']:,} answers"
        if (chance := contents.chance(record["task"])) is not None:
            yield "  chance", record["source"], f"{chance:.1%}", "", "", ""


def _needle(records: Sequence[Mapping], *_) -> Iterable[tuple]:
    matching = _of(records, "needle")
    for needles in sorted({record["needles"] for record in matching}):
        cells = [record for record in matching if record["needles"] == needles]
        answers = sum(record["answers"] for record in cells)
        yield "needles found", f"{needles} hidden", f"{contents.needles_found(cells):.1%}", "", "", f"{answers:,} answers"


def _ruler(records: Sequence[Mapping], *_) -> Iterable[tuple]:
    matching = _of(records, "ruler")
    if matching:
        yield "RULER, mean", f"{len(matching)} tasks", f"{contents.mean_of(matching, 'score'):.1f}", "", "", ""
    for record in matching:
        yield "  RULER", record["task"], f"{record['score']:.1f}", "", "", f"{record['samples']:,} questions"


def _attention(records: Sequence[Mapping], *_) -> Iterable[tuple]:
    matching = _of(records, "attention_mass")
    for source, kind in sorted({(record["source"], record["kind"]) for record in matching}):
        heads = [record for record in matching if (record["source"], record["kind"]) == (source, kind)]
        share = contents.mean_of(heads, "needle")
        yield "attention to the needle", f"{source}, layers {kind}", f"{share:.1%}", "", "", f"{len(heads)} heads"


def _key_tokens(records: Sequence[Mapping], *_) -> Iterable[tuple]:
    for record in _of(records, "key_tokens"):
        if record["loss"] is not None:
            number = f"{record['key_tokens']:,} tokens"
            yield "loss of key tokens (nats)", record["source"], f"{record['loss']:.3f}", "", "", number


SHOWN = (_losses, _recall, _needle, _ruler, _attention, _key_tokens)


def _of(records: Sequence[Mapping], evaluation: str) -> list[Mapping]:
    return [record for record in records if record["eval"] == evaluation]


def ending(workdir: str, step: int, report: Path | None, own_files: bool) -> list[str]:
    """Lines with the files of a finished run and with further commands; `own_files`: it was trained on files or URLs.

    The commands are the console scripts of an installed package where one of these trains, else those of the repository.
    """
    installed = Path(sys.argv[0]).name.startswith("hybrid-")
    generate, evaluate = (f"hybrid-{x}" if installed else f"python tools/{x}.py" for x in ("generate", "evaluate"))
    path = shlex.quote(str(workdir))
    trust = " --trust_checkpoint_data" if own_files else ""
    name = shlex.quote(f"evals/{Path(workdir).name}")
    return [
        "",
        *([f"report       {report}"] if report is not None else []),
        f"metrics      {workdir}/metrics.jsonl, evals.jsonl; tensorboard --logdir={path}",
        f"checkpoint   {workdir}/checkpoints/{step}",
        f"next         {generate} --checkpoint={path} --prompt='def main('",
        f"             {evaluate} --checkpoint={path} --suite=quick --out={name}{trust}",
        *([] if installed else [f"             python tools/plot_runs.py --workdir={path} --out=loss.png"]),
    ]
