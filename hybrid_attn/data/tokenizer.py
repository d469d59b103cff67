"""Text to token ids and back: plain bytes, or a `tokenizer.json`."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np

BOS_TOKENS = (
    "<s>",
    "<bos>",
    "<BOS_TOKEN>",
    "[BOS]",
    "<|begin_of_text|>",
    "<|startoftext|>",
    "<｜begin▁of▁sentence｜>",
    "<|endoftext|>",
    "[CLS]",
)
EOS_TOKENS = (
    "</s>",
    "<eos>",
    "<EOS_TOKEN>",
    "[EOS]",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "[SEP]",
)


MAX_IDS = 2**24  # of a vocabulary, because there are tables of all ids
PROBES = (*"~é東🙂", "~ ~")  # characters of one to four bytes in UTF-8, some of which a vocabulary may lack, and a space


class ByteTokenizer:
    """Ids 0 to 255 are the bytes, 256 is BOS and 257 is EOS."""

    vocab_size = 258
    bos = 256
    eos = 257
    hash = "bytes"

    def __init__(self):
        self.byte_lengths = (np.arange(self.vocab_size) < 256).astype(np.int64)

    def encode(self, text: bytes) -> np.ndarray:
        """int32 ids [len(text)]."""
        return np.frombuffer(text, np.uint8).astype(np.int32)

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_with_starts(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text, `encode` of it and the byte [n] at which each token begins."""
        return [(self.encode(text), np.arange(len(text))) for text in texts]

    def decode(self, ids) -> str:
        """The text of `ids`, without BOS and EOS; invalid UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A `tokenizer.json`. Its special tokens never result from text, even if the text spells them.

    ValueError if it would drop characters or encode a text at random.

    `byte_lengths` [vocab_size] counts the space that some tokenizers put before a text as a byte of the first token. `hash` is
    the SHA-256 of all that decides the ids: it ignores the layout of the file, and truncation and padding, which are not used.
    """

    def __init__(self, path: str):
        self._tokenizer, state = _read_json(path)
        decoder = json.dumps(state.get("decoder"), ensure_ascii=False)
        self.hash = _hash(state)
        vocab = self._tokenizer.get_vocab()
        self.vocab_size = max(vocab.values(), default=0) + 1  # ids may be missing in between, so their number is not enough
        if self.vocab_size > MAX_IDS:
            raise ValueError(f"{path} has the id {self.vocab_size - 1}, and {MAX_IDS - 1} is the largest that is supported")
        self.bos = _first_known(vocab, BOS_TOKENS, path, "BOS")
        self.eos = _first_known(vocab, EOS_TOKENS, path, "EOS")
        _check_exact(self._tokenizer, state, path)
        added = self._tokenizer.get_added_tokens_decoder()
        self._specials = {i for i, token in added.items() if token.special} | {self.bos, self.eos}
        self.byte_lengths = np.zeros(self.vocab_size, np.int64)
        for piece, i in vocab.items():
            if i not in self._specials:
                self.byte_lengths[i] = len(piece.encode()) if i in added else _piece_bytes(piece, decoder)

    def encode(self, text: bytes) -> np.ndarray:
        """int32 ids [n] of UTF-8 text; UnicodeDecodeError if it is not UTF-8."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of each text."""
        decoded = [text.decode("utf-8") for text in texts]
        with _library_errors("the tokenizer cannot encode a text"):
            encoded = self._tokenizer.encode_batch_fast(decoded, add_special_tokens=False)
        return [np.array(x.ids, np.int32) for x in encoded]

    def encode_with_starts(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text, `encode` of it and the byte [n] of the text at which each token begins.

        A token of some bytes of a character begins where the character does.
        """
        decoded = [text.decode("utf-8") for text in texts]
        with _library_errors("the tokenizer cannot encode a text"):
            encoded = self._with_offsets.encode_batch(decoded, add_special_tokens=False)
        starts = [_bytes_of_characters(text, [first for first, _ in x.offsets]) for text, x in zip(texts, encoded, strict=True)]
        return [(np.array(x.ids, np.int32), starts_n) for x, starts_n in zip(encoded, starts, strict=True)]

    @functools.cached_property
    def _with_offsets(self):
        """The library's tokenizer without a post-processor. That of ByteLevel moves offsets past the spaces of a token."""
        copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        copy.post_processor = None
        return copy

    def decode(self, ids) -> str:
        """The text of `ids`, without special and unknown ids; invalid UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids if 0 <= int(i) < self.vocab_size and int(i) not in self._specials])


def load_tokenizer(name: str) -> ByteTokenizer | JsonTokenizer:
    """The tokenizer `name`: "bytes", or the path of a `tokenizer.json`."""
    if name == "bytes":
        return ByteTokenizer()
    if not os.path.isfile(name):
        raise ValueError(f"the tokenizer {name!r} is not a file; use 'bytes' or the path of a tokenizer.json")
    return JsonTokenizer(name)


def check_vocab(tokenizer: ByteTokenizer | JsonTokenizer, model_vocab_size: int, name: str) -> None:
    """ValueError if a model of `model_vocab_size` lacks ids of the tokenizer `name`, or has far more ids than the tokenizer.

    The byte tokenizer always has 258 ids, so all others are padding. A tokenizer.json may use only half of the ids: training
    ends early if the text has no more pairs, and published models leave room for later tokens.
    """
    used = tokenizer.vocab_size
    limit = int(1.05 * used + 128) if isinstance(tokenizer, ByteTokenizer) else 2 * used
    cure = f"set model.vocab_size={-(-used // 128) * 128}"
    if model_vocab_size < used:
        raise ValueError(f"model.vocab_size={model_vocab_size} is below the {used} ids of data.tokenizer={name!r}; {cure}")
    if model_vocab_size > limit:
        raise ValueError(
            f"model.vocab_size={model_vocab_size} wastes memory on the {used} ids of data.tokenizer={name!r} (at most {limit} "
            f"is padding); train a tokenizer with tools/train_tokenizer.py --vocab_size={model_vocab_size} and name it with "
            f"--config.data.tokenizer=tokenizer.json; or, to keep {name!r}, {cure}"
        )


def _read_json(path: str):
    """The library's tokenizer, and the file's own JSON."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(f"{path} needs the library tokenizers; pip install 'hybrid_attn[hf]'") from error
    refusal = f"the tokenizer {path!r} is not a tokenizer.json"
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"{refusal}: {error}") from error
    with _library_errors(refusal):
        tokenizer = tokenizers.Tokenizer.from_str(text)
        state = json.loads(text)
    tokenizer.no_truncation()  # files saved for fine-tuning set both, and a document must be encoded completely
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True  # "</s>" in a text is four characters, not EOS
    return tokenizer, state


@contextlib.contextmanager
def _library_errors(what: str) -> Iterator[None]:
    """Turns errors of the library into ValueErrors: it raises plain Exceptions, and a BaseException if its Rust code panics."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from error


def _check_exact(tokenizer, state: dict, path: str) -> None:
    """ValueError if a `tokenizer.json` encodes at random, drops characters without a token, or decodes to another text.

    A text that its normalizer changes, or that has unknown tokens, may decode to another text.
    """
    dropout = state["model"].get("dropout")
    if dropout:
        raise ValueError(f"{path} has dropout={dropout}, so it encodes a text in many ways; set its model.dropout to null")
    if state.get("decoder") is None:
        raise ValueError(f"{path} has no decoder, so its ids cannot be decoded; add the decoder of its type, such as ByteLevel")
    for text in PROBES:
        with _library_errors(f"{path} cannot encode {text!r}, for which a model may need an unk_token"):
            normalized = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            decoded = tokenizer.decode(ids)
            unknown = [state["model"].get("unk_id"), tokenizer.token_to_id(state["model"].get("unk_token") or "")]
        if normalized and (not ids or "\ufffd" in decoded):
            cure = "use a vocabulary of all bytes, byte_fallback or an unk_token"
            raise ValueError(f"{path} drops the character {text!r}, or bytes of it, without a token; {cure}")
        if normalized == text and text not in decoded and not any(i in unknown for i in ids):
            cure = "use the decoder of its type, such as ByteLevel"
            raise ValueError(f"{path} decodes its ids of {text!r} to {decoded!r}; {cure}")


def _hash(state: dict) -> str:
    relevant = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()


def _bytes_of_characters(text: bytes, characters: Sequence[int]) -> np.ndarray:
    """The bytes [n] at which the `characters` of a text in UTF-8 begin; ValueError where they are not in order."""
    first_bytes = np.flatnonzero((np.frombuffer(text, np.uint8) & 0xC0) != 0x80)
    starts = np.append(first_bytes, len(text))[np.array(characters, np.int64)]
    if np.any(np.diff(starts) < 0):
        raise ValueError("the tokenizer does not say in order where its tokens begin, so no loss mask can be made with it")
    return starts


def _first_known(vocab: dict[str, int], names: tuple[str, ...], path: str, role: str) -> int:
    """The id of the first of `names` in a vocabulary."""
    for name in names:
        if name in vocab:
            return vocab[name]
    raise ValueError(f"{path} has no {role} token; add one of {' '.join(names)} to its added_tokens")


def _piece_bytes(piece: str, decoder: str) -> int:
    """The UTF-8 bytes of the text of a vocabulary entry, by the JSON of the decoder."""
    if "ByteLevel" in decoder:
        return len(piece)  # each letter of the GPT-2 alphabet is one byte
    if "ByteFallback" in decoder and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return 1
    if "▁" in decoder:
        piece = piece.replace("▁", " ")
    return len(piece.encode())
