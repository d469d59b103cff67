"""Prints the content of a token store, or the batch of a step.

python tools/inspect_data.py STORE                          its documents and tokens, by label and length
python tools/inspect_data.py STORE --verify                 and checks all checksums and ids
python tools/inspect_data.py STORE --document=17            and the text of one document
python tools/inspect_data.py --config=configs/hybrid_8k.py --stage=0 --step=12      its packed sequences, decoded
"""

import os

import jax
import numpy as np
import tqdm
from absl import app, flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.characters import line, visible
from hybrid_attn.data import corpora, documents, pipeline, prepare, store
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.parallel.mesh import AXES, make_mesh
from hybrid_attn.trees import check

VERIFY = flags.DEFINE_bool("verify", False, "Check the checksums of files, the ids against the tokenizer, and loss masks.")
DOCUMENT = flags.DEFINE_integer("document", None, "Number of the document whose text is printed.", 0)
TOKENIZER = flags.DEFINE_string("tokenizer", None, "bytes or a tokenizer.json; by default the tokenizer that the store names.")
CONFIG = config_file.define("config", None, "Config of the run whose batch is printed.", config.Config)
STAGE = flags.DEFINE_integer("stage", 0, "Stage of the config, from 0.", 0)
STEP = flags.DEFINE_integer("step", 0, "Step of the stage, from 0.", 0)
CHARACTERS = flags.DEFINE_integer("characters", 200, "Characters that are printed of each end of a text.", 1)


def show_store(path: str) -> None:
    manifest = store.read_manifest(path)
    store.load(path)  # checks the size of every file
    print(f"store        {path}: {len(manifest.shards)} shards of {manifest.dtype} ids, complete")
    print(line(f"tokenizer    {manifest.tokenizer}, hash {manifest.tokenizer_hash[:12]}"))
    print(*prepare.summary_lines(manifest.summary), sep="\n")
    if VERIFY.value:
        verify(path, manifest)
    if DOCUMENT.value is not None:
        try:
            tokenizer = load_tokenizer(TOKENIZER.value or manifest.tokenizer)
        except ValueError as error:
            raise ValueError(f"{error}; pass the tokenizer of the store with --tokenizer") from error
        show_document(store.load(path, tokenizer), tokenizer)


def verify(path: str, manifest: store.Manifest) -> None:
    name = TOKENIZER.value or manifest.tokenizer
    available = name == "bytes" or TOKENIZER.value or os.path.isfile(name)
    tokenizer = load_tokenizer(name) if available else None
    if tokenizer is not None:
        store.load(path, tokenizer)  # refuses any other tokenizer
    for _ in tqdm.tqdm(store.verify(path, tokenizer), total=len(manifest.shards), unit=" shards", desc="verify"):
        pass
    print("verified     all files have the checksums of the manifest")
    if tokenizer is None:
        print(f"not verified the ids: {name!r} does not exist; pass the tokenizer of the store with --tokenizer")
    else:
        print("verified     all ids are in the vocabulary, and all documents go from BOS to EOS")
    if manifest.has_loss_mask:
        print("verified     all values of the loss masks are 0 or 1")


def show_document(corpus: documents.Documents, tokenizer) -> None:
    number = DOCUMENT.value
    check(number < len(corpus), f"--document={number}: the store has {len(corpus):,} documents, numbered from 0")
    length, label = int(corpus.lengths[number]), corpus.label_names[corpus.labels[number]]
    print(line(f"document     {number}: label {label}, {length:,} tokens, hash {int(corpus.hashes[number]):016x}"))
    if corpus.loss_mask is not None:
        (mask,) = corpus.read_loss_mask([(number, 0, length)])
        print(f"loss mask    {int(mask.sum(dtype=np.int64)):,} tokens are trained on ({mask.mean():.1%})")
    limit = 4 * CHARACTERS.value + 1  # tokens: a character has at most four bytes, and a token at least one
    ends = [(number, 0, min(limit, length)), (number, max(0, length - limit), length)]
    first, last = corpus.read([(number, 0, length)] * 2 if length <= 2 * limit else ends)
    print(clipped(tokenizer.decode(first), tokenizer.decode(last), length > 2 * limit))


def clipped(first: str, last: str, cut: bool) -> str:
    """The beginning of `first` and the end of `last`, one text unless `cut`; no control character reaches the terminal."""
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
    mesh = make_mesh(config.Mesh(**dict.fromkeys(AXES, 1)), jax.local_devices(backend="cpu")[:1])
    step = sum(stage.steps for stage in c.stages[: STAGE.value]) + STEP.value
    batches = pipeline.batches(c, stages, [mesh] * len(c.stages), step)
    batch = {name: np.asarray(array) for name, array in next(batches)[1].items()}
    batches.close()
    first = c.stages[STAGE.value].sequences(STEP.value)
    for i in range(len(batch["tokens"])):
        source, number = stages[STAGE.value].mixture.source_of(first + i)
        title = f"sequence {i}, number {number:,} of {source}"
        show_sequence(title, {name: array[i] for name, array in batch.items()}, tokenizer)


def show_sequence(title: str, arrays: dict, tokenizer) -> None:
    segments = arrays["segments"]
    padding = int(np.sum(segments == 0))
    print(f"{title}: {len(segments):,} tokens, {int(arrays['weights'].sum()):,} trained targets, {padding:,} of padding")
    for segment in range(1, segments.max() + 1):
        positions = np.flatnonzero(segments == segment)
        first, last = int(positions[0]), int(positions[-1])
        tokens = arrays["tokens"][positions]
        begins = "from its beginning" if tokens[0] == tokenizer.bos else "from the middle"
        ends = "to its end" if tokens[-1] == tokenizer.eos else "cut at the end of the sequence"
        print(f"--- document {segment}, tokens {first:,} to {last:,}, {begins}, {ends}")
        text = tokenizer.decode(tokens)
        print(clipped(text, text, cut=False))


def show(*stores: str) -> None:
    of_step, of_store = (any(flag.present for flag in group) for group in ((STAGE, STEP), (VERIFY, DOCUMENT, TOKENIZER)))
    of_config = CONFIG.value is not None
    if len(stores) + of_config != 1 or (of_store if of_config else of_step):
        raise ValueError("pass a STORE, with --verify or --document, or a --config with --stage and --step")
    show_step(config.build(CONFIG.value.values)) if of_config else show_store(stores[0])


def main(argv):
    programs.run(show, argv, arguments=1)


if __name__ == "__main__":
    app.run(main, flags_parser=programs.parse)
