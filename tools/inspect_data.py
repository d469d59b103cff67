"""Prints the content of a token store, or the batch of a step.

python tools/inspect_data.py STORE                          its documents and tokens, by label and length
python tools/inspect_data.py STORE --verify                 and checks all checksums and ids
python tools/inspect_data.py STORE --document=17            and the text of one document, or of the pair that it is half of
python tools/inspect_data.py --config=configs/hybrid_8k.py --stage=0 --step=12      its packed sequences, decoded

Where a loss mask leaves tokens out, a terminal shows those that are trained on in green; elsewhere they have marks around them.
"""

import os
import shutil
import sys
from collections.abc import Sequence

import jax
import numpy as np
import tqdm
from absl import app, flags

from hybrid_attn import config, config_file, programs
from hybrid_attn.characters import line
from hybrid_attn.data import corpora, display, documents, pipeline, prepare, store
from hybrid_attn.data.conversations import HALVES
from hybrid_attn.data.packed import PackedSequences
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
    if manifest.pairs:
        print(f"pairs        {sum(shard.documents for shard in manifest.shards) // 2:,}, {' before '.join(HALVES)}")
    if manifest.chat_template is not None:
        print(f"template     a chat template of {len(manifest.chat_template):,} characters")
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
    first = number - number % 2 if corpus.paired else number
    texts = [text_of(corpus, i, tokenizer) for i in range(first, first + 1 + corpus.paired)]
    if corpus.loss_mask is not None:
        explain_marks()
    print_texts(texts)


def text_of(corpus: documents.Documents, number: int, tokenizer) -> display.Characters:
    """Prints the lines about a document, and returns both ends of its text."""
    length, label = int(corpus.lengths[number]), corpus.label_names[corpus.labels[number]]
    half = "" if not corpus.paired else f"{HALVES[number % 2]}, "
    print(line(f"document     {number}: {half}label {label}, {length:,} tokens, hash {int(corpus.hashes[number]):016x}"))
    limit = 4 * CHARACTERS.value + 1  # tokens: a character has at most four bytes, and a token at least one
    cut = length > 2 * limit
    ends = [(0, limit), (length - limit, length)] if cut else [(0, length)] * 2
    masks = [None, None]
    if corpus.loss_mask is not None:
        (mask,) = corpus.read_loss_mask([(number, 0, length)])
        print(f"loss mask    {int(mask.sum(dtype=np.int64)):,} tokens are trained on ({mask.mean():.1%})")
        masks = [mask[start:stop] for start, stop in ends]
    tokens = corpus.read([(number, start, stop) for start, stop in ends])
    first, last = (display.characters(tokenizer, *x) for x in zip(tokens, masks, strict=True))
    return display.clipped(first, last, CHARACTERS.value, cut)


def explain_marks() -> None:
    """Says how `print_texts` shows what is trained on."""
    how = "in green" if sys.stdout.isatty() else f"between {' and '.join(display.MARKS)}"
    print(f"trained on   {how}")


def print_texts(texts: Sequence[display.Characters]) -> None:
    """Prints a text, or the two of a pair beside each other."""
    colour = sys.stdout.isatty()
    if len(texts) == 1:
        print(display.shown(texts[0], colour))
    else:
        print(*display.beside(*texts, shutil.get_terminal_size().columns, colour), sep="\n")


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
        of_source = stages[STAGE.value].sources[source]
        paired = isinstance(of_source, PackedSequences) and of_source.paired
        show_sequence(title, {name: array[i] for name, array in batch.items()}, tokenizer, paired)


def show_sequence(title: str, arrays: dict, tokenizer, paired: bool) -> None:
    segments, weights = arrays["segments"], arrays["weights"]
    padding = int(np.sum(segments == 0))
    print(f"{title}: {len(segments):,} tokens, {int(weights.sum()):,} trained targets, {padding:,} of padding")
    masked = bool((weights[:-1] < (segments[1:] == segments[:-1]) * (segments[1:] > 0)).any())
    if masked:
        explain_marks()
    each = 1 + paired
    for first in range(1, segments.max() + 1, each):
        texts = []
        for segment, half in zip(range(first, first + each), HALVES, strict=False):
            positions = np.flatnonzero(segments == segment)
            tokens = arrays["tokens"][positions]
            name = f"{half} document {segment}" if paired else f"document {segment}"
            print(f"--- {name}, {extent(positions, tokens, tokenizer)}")
            trained = np.concatenate([[False], weights[positions[:-1]] > 0]) if masked else None
            text = display.characters(tokenizer, tokens, trained)
            texts.append(display.clipped(text, text, CHARACTERS.value, cut=False))
        print_texts(texts)


def extent(positions: np.ndarray, tokens: np.ndarray, tokenizer) -> str:
    """Which tokens of a sequence a document has, and whether these are all of it."""
    begins = "from its beginning" if tokens[0] == tokenizer.bos else "from the middle"
    ends = "to its end" if tokens[-1] == tokenizer.eos else "cut at the end of the sequence"
    return f"tokens {int(positions[0]):,} to {int(positions[-1]):,}, {begins}, {ends}"


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
