"""Accuracy of answers from a compressed KV cache: python tools/bench_compression.py --checkpoint=runs/recall

--checkpoint is the workdir of a run of configs/recall.py, or of any byte-level model that has learnt its task. Each held-out
sequence of --length tokens hides pairs of letters in noise. Layers that see all earlier tokens compress its cache; then the
question asks for one of the pairs. In half of the lines the question is known in advance ("known"): it is also among the
last tokens of the prompt, by whose queries snapkv, pyramid and adakv choose. In the other lines it is new. The table has the
share of right answers; a model that knows the values of a sequence and no pair gets 1 / --pairs. PyramidKV is not measured: it
shares slots among layers, and the model of configs/recall.py has only one layer that sees all earlier tokens.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from hybrid_attn import config, files, programs
from hybrid_attn.bench import measurement
from hybrid_attn.data.synthetic import SyntheticSequences, Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.infer import loading
from hybrid_attn.infer.cache import Compression
from hybrid_attn.infer.engine import Engine
from hybrid_attn.infer.requests import GenerateOptions
from hybrid_attn.parallel.mesh import mesh_over_first
from hybrid_attn.trees import check

METHODS = ("snapkv", "adakv", "streaming", "random")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or directory of checkpoints.", required=True)
STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; by default the newest.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a sequence, the question included.", lower_bound=64)
PAIRS = flags.DEFINE_integer("pairs", 4, "Pairs that a sequence hides.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 128, "Sequences, with one question each.", lower_bound=1)
SHARES = flags.DEFINE_list("shares", ["1/2", "1/4", "1/8", "1/16", "1/32"], "Shares of its slots that a cache keeps.")
WINDOW = flags.DEFINE_integer("window", 8, "The last tokens of a prompt, whose queries choose the slots.", lower_bound=2)
JSON = flags.DEFINE_string("json", None, "JSON file for the numbers of the table.")


def caps(shares: list[str], length: int) -> dict[str, int]:
    """The number of slots that a head keeps of `length`, for each share as written in the flag."""
    slots = {}
    for share in shares:
        try:
            numerator, _, denominator = share.partition("/")
            value = float(numerator) / float(denominator or 1)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"--shares has {share!r}, which is neither a number nor a fraction such as 1/8") from None
        check(0 < value < 1, f"--shares has {share!r}, which is not between 0 and 1")
        slots[share] = round(value * length)
    return slots


def make_prompts(rows: SyntheticSequences, number: int, window: int) -> tuple[dict[str, list], list, np.ndarray]:
    """Prompts by whether their question is new or known in advance, the questions, and the right answers."""
    prompts, questions, answers = {"new": [], "known": []}, [], []
    for row in rows.read([(i, 0, rows.seq_len) for i in rows.spread(number)]):
        key = int(np.flatnonzero(row["weights"])[0])  # a question mark comes before it
        text, question = row["tokens"][: key - 1], row["tokens"][key - 1 : key + 1]
        split = 1 + 2 * -(-(len(text) + 1 - window) // 2)  # pairs start at odd positions: none is split
        prompts["new"].append(text)
        prompts["known"].append(np.concatenate([text[:split], question, text[split:]]))
        questions.append(question)
        answers.append(row["targets"][key])
    return prompts, questions, np.array(answers)


def accuracies(engine: Engine, rows: SyntheticSequences, number: int, caps: Mapping[str, int], window: int) -> list[dict]:
    """A record for each method, type of question and share of `caps`; the uncompressed cache comes first."""
    by_question, questions, answers = make_prompts(rows, number, window)
    cases = [("full", "1", None)]
    cases += [(method, share, Compression(method, cap, window)) for method in METHODS for share, cap in caps.items()]
    records = []
    for method, share, compression in cases:
        options = GenerateOptions(compression=compression)
        for question, prompts in by_question.items():
            generated = engine.generate(prompts, 1, options=options, questions=questions)
            accuracy = float(np.mean([x.tokens[0] == answer for x, answer in zip(generated, answers, strict=True)]))
            records.append({"method": method, "question": question, "share": share, "accuracy": accuracy})
    return records


def bench() -> None:
    slots = caps(SHARES.value, LENGTH.value)
    least = min(slots.values())
    check(least > WINDOW.value, f"--shares: {least} slots leave nothing beside --window={WINDOW.value}; use larger shares")
    source = config.Source((), None, 0, None, "recall", PAIRS.value)
    shortest = config.shortest_sequence(source.task, source.pairs)
    check(LENGTH.value >= shortest, f"--length={LENGTH.value}: {PAIRS.value} pairs need {shortest} tokens")
    with jax.set_mesh(mesh_over_first()):
        c, params, tokenizer = loading.load(CHECKPOINT.value, STEP.value)
        of_bytes = isinstance(tokenizer, ByteTokenizer)
        check(of_bytes, f"{CHECKPOINT.value} has data.tokenizer={c.data.tokenizer!r}, and the sequences are bytes")
        rows = SyntheticSequences(Task(source.task, source.pairs), LENGTH.value, None)
        records = accuracies(Engine(params, c), rows, ROWS.value, slots, WINDOW.value)
    print(f"{c.model.layers}; {ROWS.value} sequences of {LENGTH.value:,} tokens, {PAIRS.value} pairs; window {WINDOW.value}")
    lines: dict[tuple, dict[str, str]] = {}
    for r in records:
        lines.setdefault((r["method"], r["question"]), {})[r["share"]] = f"{r['accuracy']:.3f}"
    shares = ["1", *slots]
    table = [[*key, *[cells.get(share, "") for share in shares]] for key, cells in lines.items()]
    print(measurement.table(("method", "question", *shares), table))
    if JSON.value:
        files.write_atomically(Path(JSON.value), json.dumps(records, indent=1) + "\n")


def main(argv):
    programs.run(bench, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
