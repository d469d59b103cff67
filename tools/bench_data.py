"""How fast text is prepared on one core, packed, and read from a warm store: python tools/bench_data.py

The text is Python's standard library as JSON lines, again and again until there is enough. The tokenizer.json is --tokenizer,
or a byte-level BPE of 8,192 tokens that is trained on it.
"""

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
from hybrid_attn.data import documents, packed, packing, prepare, store
from hybrid_attn.data.sources import Fields
from hybrid_attn.data.tokenizer import ByteTokenizer, load_tokenizer

MEGABYTES = flags.DEFINE_integer("megabytes", 64, "Of text for bytes; half of it for the tokenizer.json.", 1)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "A tokenizer.json to use instead of the one trained here.")
SPANS = flags.DEFINE_list("spans", ["100", "1000", "8193", "131073"], "Tokens of a span; rows of 8,192 read one more.")
SECONDS = flags.DEFINE_float("seconds", 2.0, "Of reading at each length of spans.", 0.1)
TOGETHER = flags.DEFINE_integer("together", 8, "Spans asked for at a time.", 1)
DIRECTORY = flags.DEFINE_string("directory", None, "Where the temporary files go.")
SEQ_LEN = flags.DEFINE_integer("seq_len", 8192, "Tokens of a row.", 1)
DOCUMENTS = flags.DEFINE_integer("documents", 10_000_000, "In the store that is opened, and in the plan of rows.", 1)
OPENINGS = 5


def write_text(path: Path, num_bytes: int) -> int:
    """JSON lines of at least `num_bytes` of text; returns how many there are."""
    texts = [Path(found).read_text("utf-8") for _, found in documents.find(())]
    written = 0
    with open(path, "w", encoding="utf-8") as file:
        for text in itertools.cycle(texts):
            if written >= num_bytes:
                return written
            file.write(json.dumps({"text": text}) + "\n")
            written += len(text.encode())


def train_tokenizer(path: Path) -> None:
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=8192, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train([found for _, found in documents.find(())[:300]], trainer)
    made.save(str(path))


def time_prepare(folder: Path, name: str, tokenizer: str, num_bytes: int) -> None:
    text = folder / f"{name}.jsonl"
    written = write_text(text, num_bytes)
    options = prepare.Options(tokenizer, Fields("text", None), None, "text", False, "stop", shard_bytes=10**12)
    wall, core = time.perf_counter(), time.process_time()
    summary = prepare.prepare([str(text)], str(folder / name), options, workers=1)
    wall, core = time.perf_counter() - wall, time.process_time() - core
    print(
        f"prepare  {name:<10} {written / 1e6:,.0f} MB in {wall:.2f} s, {core:.2f} s of a core: "
        f"{written / 1e6 / core:.1f} MB/s a core, {summary['bytes'] / summary['tokens']:.2f} bytes a token"
    )


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


def time_rows(path: Path, way: str) -> None:
    corpus, tokenizer = store.load(str(path)), load_tokenizer("bytes")
    made = packed.PackedSequences(corpus, SEQ_LEN.value, 0, tokenizer.byte_lengths, way)
    read, began = 0, time.perf_counter()
    while time.perf_counter() - began < SECONDS.value:
        read += len(made.read([((read + i) % len(made), 0, SEQ_LEN.value) for i in range(TOGETHER.value)]))
    rate = read * SEQ_LEN.value / (time.perf_counter() - began) / 1e6
    counts = made.counts()
    print(
        f"rows     {way:<8} of {SEQ_LEN.value:,}: {rate:.1f} M tokens/s; {counts['padding'] / counts['tokens']:.2%} padding, "
        f"{counts['cut_documents'] / counts['documents']:.1%} of the documents cut"
    )


def time_plan() -> None:
    """Of documents whose lengths are log-normal with a median of 665 tokens and a long tail, as web text has."""
    lengths = np.random.default_rng(0).lognormal(6.5, 1.3, DOCUMENTS.value).clip(3, 2_000_000).astype(np.int64)
    began = time.perf_counter()
    plan = packing.best_fit(lengths, SEQ_LEN.value)
    took, size = time.perf_counter() - began, int(lengths.sum())
    padding = plan.num_sequences * SEQ_LEN.value / size - 1
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"plan     best_fit of {len(lengths):,} documents, {size:,} tokens: {took:.1f} s, {padding:.4%} padding")
    print(f"memory   {memory:.2f} GiB at most until here")


def time_opening(folder: Path) -> None:
    folder.mkdir()
    lengths, shards = np.full(-(-DOCUMENTS.value // 20), 1000), []
    index = store.index_bytes(lengths, np.arange(len(lengths)), np.zeros(len(lengths)))
    for i in range(20):
        (folder / store.index_name(i)).write_bytes(index)
        with open(folder / store.tokens_name(i), "wb") as file:
            file.truncate(2 * 1000 * len(lengths))  # holes: nobody reads them
        shards.append(store.Shard(len(lengths), 1000 * len(lengths), "", store.sha256([index])))
    manifest = store.Manifest(store.FORMAT, "bytes", ByteTokenizer.hash, "<u2", ("text",), tuple(shards), {})
    (folder / store.MANIFEST).write_text(manifest.to_json())
    took = []
    for _ in range(OPENINGS):
        began = time.perf_counter()
        corpus = store.load(str(folder))
        took.append(time.perf_counter() - began)
    what = f"{len(corpus):,} documents of {int(corpus.lengths.sum()):,} tokens"
    print(f"open     {what}: {sorted(took)[OPENINGS // 2]:.2f} s the median of {OPENINGS}, {max(took):.2f} s the longest")


def bench() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one core
    with tempfile.TemporaryDirectory(dir=DIRECTORY.value) as made:
        folder = Path(made)
        time_prepare(folder, "bytes", "bytes", MEGABYTES.value * 10**6)
        tokenizer = TOKENIZER.value or str(folder / "tokenizer.json")
        if TOKENIZER.value is None:
            try:
                train_tokenizer(folder / "tokenizer.json")
            except ImportError as error:
                raise ImportError("a tokenizer.json needs the library tokenizers; pip install 'hybrid_attn[hf]'") from error
        time_prepare(folder, "json", tokenizer, MEGABYTES.value * 10**6 // 2)
        for length in map(int, SPANS.value):
            time_reads(folder / "bytes", length)
        for way in packed.PLANS:
            time_rows(folder / "bytes", way)
        time_plan()
        time_opening(folder / "opened")


def main(argv):
    programs.run(bench, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
