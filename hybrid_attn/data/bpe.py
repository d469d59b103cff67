"""Training of a tokenizer: byte-level BPE, whose vocabulary holds all bytes, so that every text has ids."""

from collections.abc import Iterable, Iterator

from hybrid_attn.data import documents, sources
from hybrid_attn.data.sources import Binary, Broken, Fields

BOS, EOS = "<s>", "</s>"
LEAST = 256 + 2  # ids: all bytes, and where a document begins and ends
MOST = 2**24
PIECE = 2**20  # characters of a text that are counted at a time


def texts(inputs: Iterable[str], fields: Fields, form: str | None = None) -> Iterator[str]:
    """The texts of what `inputs` name, as tools/prepare_data.py reads it, or of the sources of Python's standard library.

    ValueError for the first that is broken or binary, and where there is none.
    """
    files = sources.find(inputs) if inputs else [path for _, path in documents.find(())]
    number = 0
    for path in files:
        for document in sources.read(path, form or sources.format_of(path), fields):
            if isinstance(document, (Broken, Binary)):
                raise ValueError(f"{document.reason}; mend or split the file, or leave it out of --input")
            if document.text:
                number += 1
                yield document.text.decode("utf-8")
    if not number:
        raise ValueError(f"there is no text in {', '.join(inputs)}")


def train(texts: Iterable[str], vocab_size: int):
    """A tokenizer of the library `tokenizers`, of at most `vocab_size` ids, fewer where no pair of tokens occurs twice.

    The same texts give the same tokenizer. No token crosses the borders that GPT-2 draws between letters, digits and others.
    """
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError("training a tokenizer needs the library tokenizers; pip install 'hybrid_attn[hf]'") from error
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS, EOS],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_pieces(texts), trainer)
    return tokenizer


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    """The texts, long ones in pieces that end with a line, because the library copies each several times."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
            yield text[start:end]
            start = end
