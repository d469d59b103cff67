"""What a compressed cache still answers: python tools/bench_compression.py --checkpoint=runs/recall

--checkpoint is the workdir of a run of configs/recall.py, or of any model of bytes that has learnt its task. Each held-out row
of --length tokens hides pairs of letters in noise. The layers that see the whole prefix keep a share of its slots; then it is
asked for one of the pairs. In half of the lines the question also stands among the last tokens that are read before, by whose
queries snapkv and its kin choose ("foretold"); in the others it is new. The table has the share of right answers; whoever
knows the values of a row and no pair has 1 / --pairs. PyramidKV is left out: it shares slots among layers, and the probe's
model has one that sees the whole prefix.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from absl import app, flags

from hybrid_attn import config, programs
from hybrid_attn.data.synthetic import SyntheticSequences, Task
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.infer import loading
from hybrid_attn.infer.compress import Compression
from hybrid_attn.infer.engine import Engine
from hybrid_attn.parallel.mesh import make_mesh
from hybrid_attn.train import measurement

METHODS = ("snapkv", "adakv", "streaming", "random")
CHECKPOINT = flags.DEFINE_string("checkpoint", None, "Workdir of a run, or directory of checkpoints.", required=True)
STEP = flags.DEFINE_integer("step", None, "Which of them; by default the newest.")
LENGTH = flags.DEFINE_integer("length", 1024, "Tokens of a row, questions included.", lower_bound=64)
PAIRS = flags.DEFINE_integer("pairs", 4, "Pairs that a row hides.", lower_bound=1)
ROWS = flags.DEFINE_integer("rows", 128, "Rows, with a question each.", lower_bound=1)
SHARES = flags.DEFINE_list("shares", ["1/2", "1/4", "1/8", "1/16", "1/32"], "Shares of the slots that are kept.")
WINDOW = flags.DEFINE_integer("window", 8, "The last tokens, whose queries choose what is kept.", lower_bound=2)
JSON = flags.DEFINE_string("json", None, "File for the numbers of the table.")


def caps(shares: list[str], length: int) -> dict[str, int]:
    """Slots that a head keeps of `length`, by the share as it was written."""
    found = {}
    for share in shares:
        try:
            above, _, below = share.partition("/")
            value = float(above) / float(below or 1)
        except (ValueError, ZeroDivisionError):
            raise ValueError(f"--shares has {share!r}, which is no number and no fraction such as 1/8") from None
        if not 0 < value < 1:
            raise ValueError(f"--shares has {share!r}, which does not lie between 0 and 1")
        found[share] = round(value * length)
    return found


def asked(
    rows: SyntheticSequences, number: int, window: int
) -> tuple[dict[str, list[np.ndarray]], list[np.ndarray], np.ndarray]:
    """The text of each row without and with its question in the window, the question, and the answer that is wanted."""
    texts, questions, answers = {"new": [], "foretold": []}, [], []
    for row in rows.read([(i, 0, rows.seq_len) for i in rows.spread(number)]):
        key = int(np.flatnonzero(row["weights"])[0])  # a question mark comes before it
        text, question = row["tokens"][: key - 1], row["tokens"][key - 1 : key + 1]
        before = 1 + 2 * -(-(len(text) + 1 - window) // 2)  # pairs begin at odd places: none is torn apart
        texts["new"].append(text)
        texts["foretold"].append(np.concatenate([text[:before], question, text[before:]]))
        questions.append(question)
        answers.append(row["targets"][key])
    return texts, questions, np.array(answers)


def accuracies(engine: Engine, rows: SyntheticSequences, number: int, kept: Mapping[str, int], window: int) -> list[dict]:
    """A record for each method, question and share of `kept`; the whole cache comes first."""
    texts, questions, answers = asked(rows, number, window)
    cases = [("full", "1", None)]
    cases += [(method, share, Compression(method, cap, window)) for method in METHODS for share, cap in kept.items()]
    records = []
    for method, share, compression in cases:
        for question, prompts in texts.items():
            found = engine.generate(prompts, 1, compression=compression, questions=questions)
            right = float(np.mean([x.tokens[0] == answer for x, answer in zip(found, answers, strict=True)]))
            records.append({"method": method, "question": question, "share": share, "accuracy": right})
    return records


def table(records: list[dict]) -> str:
    """Methods and questions down, shares across."""
    lines: dict[tuple, dict[str, str]] = {}
    for r in records:
        lines.setdefault((r["method"], r["question"]), {})[r["share"]] = f"{r['accuracy']:.3f}"
    shares = list(dict.fromkeys(r["share"] for r in records))
    rows = [[*key, *[cells.get(share, "") for share in shares]] for key, cells in lines.items()]
    return measurement.table(("method", "question", *shares), rows)


def bench() -> None:
    kept = caps(SHARES.value, LENGTH.value)
    if min(kept.values()) <= WINDOW.value:
        raise ValueError(
            f"--shares: {min(kept.values())} slots leave nothing beside --window={WINDOW.value}; use larger shares"
        )
    source = config.Source((), None, 0, None, "recall", PAIRS.value)
    if LENGTH.value < config.shortest_row(source):
        raise ValueError(f"--length={LENGTH.value}: {PAIRS.value} pairs need {config.shortest_row(source)} tokens")
    with jax.set_mesh(make_mesh(config.Mesh(1, 1, 1, 1, 1), jax.devices()[:1])):
        c, params, tokenizer = loading.load(CHECKPOINT.value, STEP.value)
        if not isinstance(tokenizer, ByteTokenizer):
            raise ValueError(f"{CHECKPOINT.value} has data.tokenizer={c.data.tokenizer!r}, and the rows are written in bytes")
        rows = SyntheticSequences(Task(source.task, source.pairs), LENGTH.value, None)
        records = accuracies(Engine(params, c), rows, ROWS.value, kept, WINDOW.value)
    print(f"{c.model.layers}; {ROWS.value} rows of {LENGTH.value:,} tokens, {PAIRS.value} pairs; window {WINDOW.value}")
    print(table(records))
    if JSON.value:
        Path(JSON.value).write_text(json.dumps(records, indent=1) + "\n")


def main(argv):
    programs.run(bench, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
