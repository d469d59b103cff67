"""Trains a tokenizer: python tools/train_tokenizer.py --vocab_size=65536 --input='raw/**/*.jsonl.gz' --out=tokenizer.json

The tokenizer is byte-level BPE: it encodes any UTF-8 text and decodes it exactly. Inputs are those of tools/prepare_data.py,
by default the sources of Python's standard library. The same text gives the same file. If the text is too short, no pair of
tokens occurs twice any more, and the tokenizer has fewer ids than --vocab_size.
Needs the extra [hf].
"""

import os
from pathlib import Path

from absl import app, flags

from hybrid_attn import files, programs
from hybrid_attn.data import sources
from hybrid_attn.data.tokenizer import MAX_IDS, MIN_IDS, texts, train

VOCAB_SIZE = flags.DEFINE_integer(
    "vocab_size", None, "Largest number of ids; the vocab_size of the model.", MIN_IDS, MAX_IDS, required=True
)
OUT = flags.DEFINE_string("out", "tokenizer.json", "New file.")
INPUT = flags.DEFINE_multi_string("input", [], "Glob pattern or directory; may be repeated.")
FORMAT = flags.DEFINE_enum("format", None, sources.FORMATS, "Format of all inputs; by default the suffix of each file decides.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "Field of a record that holds the text; a.b is b within a.")


def train_tokenizer() -> None:
    files.check_named("out", OUT.value, "a new file")
    out = Path(OUT.value)
    if os.path.lexists(out):
        raise FileExistsError(f"{out} exists, and stores made with it would become unreadable; give --out another name")
    counts = {"documents": 0, "bytes": 0}

    def counted():
        for text in texts(INPUT.value, sources.Fields(TEXT_FIELD.value, None), FORMAT.value):
            counts["documents"] += 1
            counts["bytes"] += len(text.encode())
            yield text

    tokenizer = train(counted(), VOCAB_SIZE.value)
    files.write_atomically(out, tokenizer.to_str(pretty=True))
    size = tokenizer.get_vocab_size()
    print(f"{out}: {size:,} ids, from {counts['documents']:,} documents of {counts['bytes']:,} bytes")
    few = 2 * size < VOCAB_SIZE.value  # a model of --vocab_size would refuse it
    if size < VOCAB_SIZE.value:
        print(f"no pair of tokens occurs twice any more: {VOCAB_SIZE.value:,} ids need more text")
    print(f"use it with --config.data.tokenizer={out}" + (f" --config.model.vocab_size={-(-size // 128) * 128}" if few else ""))


def main(argv):
    programs.run(train_tokenizer, argv)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
