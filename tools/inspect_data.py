"""Shows a token store, or the batch of a step.

python tools/inspect_data.py STORE                          what is in it, by label and length
python tools/inspect_data.py STORE --verify                 and compares all checksums
python tools/inspect_data.py STORE --document=17            and the text of a document
python tools/inspect_data.py --config=configs/hybrid_8k.py --stage=0 --step=12      rows, decoded, documents apart
"""

import os

import jax
import numpy as np
import tqdm
from absl import app, flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.characters import line, visible
from hybrid_attn.data import corpora, documents, pipeline, store, summary
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.parallel.mesh import make_mesh

VERIFY = flags.DEFINE_bool("verify", False, "Compare the checksums of all files, and the ids with the tokenizer.")
DOCUMENT = flags.DEFINE_integer("document", None, "Number of a document whose text to show.", 0)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes or a tokenizer.json; by default the one that the store names.")
CONFIG = config_file.define("config", None, "Config of a run, of which to show a batch.", config.Config)
STAGE = flags.DEFINE_integer("stage", 0, "Stage of the config, from 0.", 0)
STEP = flags.DEFINE_integer("step", 0, "Step of the stage, from 0.", 0)
CHARACTERS = flags.DEFINE_integer("characters", 200, "Shown of the beginning, and of the end, of a text.", 1)


def show_store(path: str) -> None:
    manifest = store.read_manifest(path)
    store.load(path)  # which looks at every file
    print(f"store        {path}: {len(manifest.shards)} shards of {manifest.dtype} ids, all there and of their sizes")
    print(line(f"tokenizer    {manifest.tokenizer}, hash {manifest.tokenizer_hash[:12]}"))
    print(*summary.lines(manifest.summary), sep="\n")
    if VERIFY.value:
        verify(path, manifest)
    if DOCUMENT.value is not None:
        try:
            tokenizer = load_tokenizer(TOKENIZER.value or manifest.tokenizer)
        except ValueError as error:
            raise ValueError(f"{error}; name the one that made the store with --tokenizer") from error
        show_document(store.load(path, tokenizer), tokenizer)


def verify(path: str, manifest: store.Manifest) -> None:
    name = TOKENIZER.value or manifest.tokenizer
    known = name == "bytes" or TOKENIZER.value or os.path.isfile(name)
    tokenizer = load_tokenizer(name) if known else None
    if tokenizer is not None:
        store.load(path, tokenizer)  # which refuses another tokenizer than the store's
    for _ in tqdm.tqdm(store.verify(path, tokenizer), total=len(manifest.shards), unit=" shards", desc="verify"):
        pass
    print("verified     every checksum is the manifest's")
    if tokenizer is None:
        print(f"not verified the ids, for {name!r} is not here; name the tokenizer that made the store with --tokenizer")
    else:
        print("verified     every id is the tokenizer's, and every document is between its marks")


def show_document(corpus: documents.Documents, tokenizer) -> None:
    number = DOCUMENT.value
    if number >= len(corpus):
        raise ValueError(f"--document={number}: the store has {len(corpus):,} documents, numbered from 0")
    length, label = int(corpus.lengths[number]), corpus.label_names[corpus.labels[number]]
    print(line(f"document     {number}: label {label}, {length:,} tokens, hash {int(corpus.hashes[number]):016x}"))
    most = 4 * CHARACTERS.value + 1  # tokens: a character has at most four bytes, and a token at least one
    ends = [(number, 0, min(most, length)), (number, max(0, length - most), length)]
    first, last = corpus.read([(number, 0, length)] * 2 if length <= 2 * most else ends)
    print(clipped(tokenizer.decode(first), tokenizer.decode(last), length > 2 * most))


def clipped(first: str, last: str, cut: bool) -> str:
    """The beginning of `first` and the end of `last`, which are the same text where nothing was `cut` from between.

    Of the text of others, nothing reaches the terminal that it would take for a command.
    """
    if not cut and len(first) <= 2 * CHARACTERS.value:
        return visible(first)
    return visible(f"{first[: CHARACTERS.value]} [...] {last[-CHARACTERS.value :]}")


def show_step(c: config.Config) -> None:
    if STAGE.value >= len(c.stages) or STEP.value >= c.stages[STAGE.value].steps:
        steps = ", ".join(str(stage.steps) for stage in c.stages)
        raise ValueError(f"--stage={STAGE.value} --step={STEP.value}: the stages have {steps} steps, both are counted from 0")
    tokenizer = load_tokenizer(c.data.tokenizer)
    loaded = corpora.load(c.data, c.sources, tokenizer)
    stages = pipeline.stage_sequences(c, {name: corpus.training for name, corpus in loaded.items()}, tokenizer)
    mesh = make_mesh(config.Mesh(1, 1, 1, 1, 1), jax.local_devices(backend="cpu")[:1])
    step = sum(stage.steps for stage in c.stages[: STAGE.value]) + STEP.value
    batches = pipeline.batches(c, stages, mesh, step)
    batch = {name: np.asarray(array) for name, array in next(batches)[1].items()}
    batches.close()
    for row in range(len(batch["tokens"])):
        source, number = stages[STAGE.value].mixture.source_of(STEP.value * len(batch["tokens"]) + row)
        show_row(f"row {row}, row {number:,} of {source}", {name: array[row] for name, array in batch.items()}, tokenizer)


def show_row(title: str, row: dict, tokenizer) -> None:
    segments = row["segments"]
    padding = int(np.sum(segments == 0))
    print(f"{title}: {len(segments):,} tokens, {int(row['weights'].sum()):,} targets, {padding:,} of padding")
    for segment in range(1, segments.max() + 1):
        places = np.flatnonzero(segments == segment)
        first, last = int(places[0]), int(places[-1])
        tokens = row["tokens"][places]
        begins = "from its beginning" if tokens[0] == tokenizer.bos else "from within"
        ends = "to its end" if tokens[-1] == tokenizer.eos else "cut at the row's edge"
        print(f"--- document {segment}, tokens {first:,} to {last:,}, {begins}, {ends}")
        text = tokenizer.decode(tokens)
        print(clipped(text, text, cut=False))


def show(*stores: str) -> None:
    of_step, of_store = (any(flag.present for flag in group) for group in ((STAGE, STEP), (VERIFY, DOCUMENT, TOKENIZER)))
    of_config = CONFIG.value is not None
    if len(stores) + of_config != 1 or (of_store if of_config else of_step):
        raise ValueError("name a STORE, with --verify or --document, or a --config with --stage and --step")
    show_step(config.build(CONFIG.value.values)) if of_config else show_store(stores[0])


def main(argv):
    programs.run(show, argv, arguments=1)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
