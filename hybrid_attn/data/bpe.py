"""Trains a byte-level BPE tokenizer. Its vocabulary has all bytes, so it encodes every text."""

from collections.abc import Iterable, Iterator, Sequence

from hybrid_attn.data import documents, sources
from hybrid_attn.data.sources import Binary, Broken, Fields

BOS, EOS = "<s>", "</s>"
MIN_VOCAB = 256 + 2  # all bytes, BOS and EOS
MAX_VOCAB = 2**24
PIECE = 2**20  # characters that are passed to the library at a time


def texts(inputs: Sequence[str], fields: Fields, form: str | None = None) -> Iterator[str]:
    """The texts of `inputs`, read as tools/prepare_data.py does; without inputs, the sources of Python's standard library.

    ValueError for the first document that is broken or binary, or if there is no text.
    """
    number = 0
    for path in documents.find(inputs):
        for document in sources.read(path, form or sources.format_of(path), fields):
            if isinstance(document, (Broken, Binary)):
                raise ValueError(f"{document.reason}; repair or split the file, or leave it out of --input")
            if document.text:
                number += 1
                yield document.text.decode("utf-8")
    if not number:
        raise ValueError(f"no text in {', '.join(inputs)}")


def train(texts: Iterable[str], vocab_size: int):
    """A tokenizer of the library `tokenizers` with at most `vocab_size` ids; fewer if no pair of tokens occurs twice any more.

    The same texts give the same tokenizer. As in GPT-2, no token crosses runs of letters, digits and other characters.
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
    """The texts, long ones in pieces that end at a line break: the library makes several copies of each."""
    for text in texts:
        start = 0
        while start < len(text):
            end = text.rfind("\n", start, start + PIECE) + 1 or start + PIECE
            yield text[start:end]
            start = end
