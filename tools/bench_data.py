"""Measures how fast one core prepares, packs and reads text from a store in the page cache: python tools/bench_data.py

The text is Python's standard library as JSON lines, repeated to the size of --megabytes. The tokenizer.json is --tokenizer or a
byte-level BPE of 8,192 tokens that is trained on this text.
"""

import hashlib
import itertools
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
from absl import app, flags

from hybrid_attn import programs
from hybrid_attn.data import documents, packed, prepare, store
from hybrid_attn.data.sources import Fields
from hybrid_attn.data.tokenizer import ByteTokenizer, load_tokenizer, train

MEGABYTES = flags.DEFINE_integer("megabytes", 64, "MB of text for the byte tokenizer; the tokenizer.json gets half.", 1)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json, instead of training one.")
SPANS = flags.DEFINE_list("spans", ["100", "1000", "8193", "131073"], "Tokens of a span; a packed sequence reads one more.")
SECONDS = flags.DEFINE_float("seconds", 2.0, "Seconds of reading at each length of span.", 0.1)
TOGETHER = flags.DEFINE_integer("together", 8, "Spans or sequences that are read in one call.", 1)
DIRECTORY = flags.DEFINE_string("directory", None, "Directory of the temporary files.")
SEQ_LEN = flags.DEFINE_integer("seq_len", 8192, "Tokens of a packed sequence.", 1)
DOCUMENTS = flags.DEFINE_integer("documents", 10_000_000, "Documents in the store that is opened, and in the packing plan.", 1)
OPENINGS = 5


def write_text(path: Path, num_bytes: int) -> int:
    """Writes JSON lines with at least `num_bytes` of text, and returns the number of bytes."""
    texts = [Path(file).read_text("utf-8") for file in documents.find(())]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in itertools.cycle(texts):
            if written >= num_bytes:
                return written
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())


def time_prepare(folder: Path, name: str, tokenizer: str, num_bytes: int) -> None:
    text = folder / f"{name}.jsonl"
    written = write_text(text, num_bytes)
    options = prepare.Options(tokenizer, Fields("text", None), None, "text", False, "stop", shard_bytes=10**12)
    wall, core = time.perf_counter(), time.process_time()
    summary = prepare.prepare([str(text)], str(folder / name), options, workers=1)
    wall, core = time.perf_counter() - wall, time.process_time() - core
    rate = f"{written / 1e6 / core:.1f} MB/s a core, {summary['bytes'] / summary['tokens']:.2f} bytes a token"
    print(f"prepare  {name:<10} {written / 1e6:,.0f} MB in {wall:.2f} s, {core:.2f} s of a core: {rate}")


def time_reads(path: Path, length: int) -> None:
    corpus = store.load(str(path))
    long = np.flatnonzero(corpus.lengths >= length)
    if not len(long):
        print(f"read     spans of {length:,} tokens: no document is as long")
        return
    rng, tokens = np.random.default_rng(0), 0
    began = time.perf_counter()
    while time.perf_counter() - began < SECONDS.value:
        chosen = long[rng.integers(0, len(long), TOGETHER.value)]
        firsts = rng.integers(0, corpus.lengths[chosen] - length + 1)
        tokens += sum(map(len, corpus.read(zip(chosen, firsts, firsts + length, strict=True))))
    print(f"read     spans of {length:,} tokens: {tokens / (time.perf_counter() - began) / 1e6:,.1f} M tokens/s")


def time_packing(path: Path, way: str) -> None:
    corpus, tokenizer = store.load(str(path)), load_tokenizer("bytes")
    sequences = packed.PackedSequences(corpus, SEQ_LEN.value, 0, tokenizer.byte_lengths, way)
    read, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS.value:
        read += len(sequences.read([((read + i) % len(sequences), 0, SEQ_LEN.value) for i in range(TOGETHER.value)]))
    rate = read * SEQ_LEN.value / (time.perf_counter() - began) / 1e6
    counts = sequences.counts()
    padding, cut = counts["padding"] / counts["tokens"], counts["cut_documents"] / counts["documents"]
    title = f"packed   {way:<8} of {SEQ_LEN.value:,}"
    print(f"{title}: {rate:.1f} M tokens/s; {padding:.2%} padding, {cut:.1%} of the documents cut")


def time_plan() -> None:
    """The documents have log-normal lengths with a median of 665 tokens and a long tail, like web text."""
    lengths = np.random.default_rng(0).lognormal(6.5, 1.3, DOCUMENTS.value).clip(3, 2_000_000).astype(np.int64)
    began = time.perf_counter()
    plan = packed.BestFit(lengths, SEQ_LEN.value, 0)
    took, size = time.perf_counter() - began, int(lengths.sum())
    padding = len(plan) * SEQ_LEN.value / size - 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"plan     best_fit of {len(lengths):,} documents, {size:,} tokens: {took:.1f} s, {padding:.4%} padding")
    print(f"memory   {memory:.2f} GiB at most so far")


def time_opening(folder: Path) -> None:
    folder.mkdir()
    lengths, shards = np.full(-(-DOCUMENTS.value // 20), 1000), []
    index = store.index_bytes(lengths, np.arange(len(lengths)), np.zeros(len(lengths)))
    for i in range(20):
        (folder / store.file_name(i, "index")).write_bytes(index)
        with open(folder / store.file_name(i, "tokens"), "wb") as file:
            file.truncate(2 * 1000 * len(lengths))  # sparse: they are not read
        shards.append(store.Shard(len(lengths), 1000 * len(lengths), "", hashlib.sha256(index).hexdigest()))
    manifest = store.Manifest(store.FORMAT, "bytes", ByteTokenizer.hash, "<u2", ("text",), tuple(shards), {})
    (folder / store.MANIFEST).write_text(manifest.to_json())
    seconds = []
    for _ in range(OPENINGS):
        began = time.perf_counter()
        corpus = store.load(str(folder))
        seconds.append(time.perf_counter() - began)
    what = f"{len(corpus):,} documents of {int(corpus.lengths.sum()):,} tokens"
    print(f"open     {what}: {sorted(seconds)[OPENINGS // 2]:.2f} s (median of {OPENINGS}), at most {max(seconds):.2f} s")


def bench() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    with tempfile.TemporaryDirectory(dir=DIRECTORY.value) as temporary:
        folder = Path(temporary)
        time_prepare(folder, "bytes", "bytes", MEGABYTES.value * 10**6)
        tokenizer = TOKENIZER.value or str(folder / "tokenizer.json")
        if TOKENIZER.value is None:
            texts = (Path(file).read_text("utf-8") for file in documents.find(())[:300])
            train(texts, 8192).save(tokenizer)
        time_prepare(folder, "json", tokenizer, MEGABYTES.value * 10**6 // 2)
        for length in map(int, SPANS.value):
            time_reads(folder / "bytes", length)
        for way in packed.PLANS:
            time_packing(folder / "bytes", way)
        time_plan()
        time_opening(folder / "opened")


def main(argv):
    programs.run(bench, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
