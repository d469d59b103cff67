"""Helpers of the tests of prepare: JSON lines, a run of prepare, and the content of a store."""

import dataclasses
import json
from pathlib import Path

import numpy as np

from hybrid_attn.data import chat, prepare, store
from hybrid_attn.data.conversations import Chat
from hybrid_attn.data.sources import Fields
from hybrid_attn.data.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[1]
BYTES = load_tokenizer("bytes")
OPTIONS = prepare.Options("bytes", Fields("text", "source"), None, "none", False, "stop", shard_bytes=900)


def records(n, seed=0):
    """Texts of many lengths, among them copies and empty ones, from three sources."""
    rng = np.random.default_rng(seed)
    texts = ["東京 " * (i % 7) + "x" * int(rng.integers(0, 60)) for i in range(n)]
    for i in range(9, n, 5):
        texts[i] = texts[i - 9]
    return [{"text": text, "source": "abc"[i % 3]} for i, text in enumerate(texts)]


def write(folder, files=6, each=15):
    """Files of JSON lines; returns their records in order."""
    folder.mkdir(exist_ok=True)
    made = [records(each, seed=i) for i in range(files)]
    for i, part in enumerate(made):
        (folder / f"{i}.jsonl").write_text("".join(json.dumps(x) + "\n" for x in part))
    return [x for part in made for x in part]


def run(tmp_path, out="out", inputs="raw/*.jsonl", workers=1, **changes):
    lines = []
    options = dataclasses.replace(OPTIONS, **changes)
    summary = prepare.prepare([str(tmp_path / inputs)], str(tmp_path / out), options, workers, lines.append)
    return summary, lines


def texts(path, tokenizer=BYTES):
    corpus = store.load(str(path), tokenizer)
    return [tokenizer.decode(x) for x in corpus.read((i, 0, n) for i, n in enumerate(corpus.lengths))]


def content(path):
    return {x.name: x.read_bytes() for x in path.iterdir() if x.name != store.PLAN}


def pairs_store(folder):
    """The path of a store of pairs, of which the chosen completion has a and the rejected one z."""
    halves = [{"chosen": "a" * (1 + i % 3), "rejected": "z" * (1 + i % 2)} for i in range(64)]
    made = [{"from": "us", "prompt": f"say {i}:"} | x for i, x in enumerate(halves)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(x) + "\n" for x in made))
    form = Chat("preference", chat.load_template(None, "bytes"), ("assistant",))
    run(folder, "store", "pairs.jsonl", form="jsonl", chat=form, fields=Fields("text", "from"), shard_bytes=None)
    return str(folder / "store")
