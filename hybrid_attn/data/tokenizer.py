"""Text to token ids and back: plain bytes, or a `tokenizer.json`, which may be trained here."""

import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from hybrid_attn.data import documents, sources
from hybrid_attn.data.records import Fields, Text, library
from hybrid_attn.trees import check

BOS_TOKENS = "<s> <bos> <BOS_TOKEN> [BOS] <|begin_of_text|> <|startoftext|> <｜begin▁of▁sentence｜> <|endoftext|> [CLS]".split()
EOS_TOKENS = "</s> <eos> <EOS_TOKEN> [EOS] <|end_of_text|> <|endoftext|> <｜end▁of▁sentence｜> [SEP]".split()
MIN_IDS = 256 + 2  # of a trained vocabulary: all bytes, BOS and EOS
MAX_IDS = 2**24  # of a vocabulary, because there are tables of all ids
PIECE = 2**20  # characters that are passed to the library at a time
PROBES = (*"~é東🙂", "~ ~")  # characters of one to four bytes in UTF-8, some of which a vocabulary may lack, and a space


class ByteTokenizer:
    """Ids 0 to 255 are the bytes, 256 is BOS and 257 is EOS, which a chat template writes as <|bos|> and <|eos|>."""

    vocab_size = 258
    bos, bos_token = 256, "<|bos|>"
    eos, eos_token = 257, "<|eos|>"
    special_tokens = {bos_token: bos, eos_token: eos}
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

    def encode_rendered(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text that a chat template wrote, special tokens included, and the byte [n] at which each begins."""
        ids, begins = self.encode(text), np.ones(len(text), bool)
        for match in re.finditer(special_pattern(self).pattern.encode(), text):
            ids[match.start()], begins[match.start() + 1 : match.end()] = self.special_tokens[match[0].decode()], False
        return ids[begins], np.flatnonzero(begins)

    def decode(self, ids) -> str:
        """The text of `ids`, without BOS and EOS; invalid UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if 0 <= i < 256).decode("utf-8", errors="replace")


class JsonTokenizer:
    """A `tokenizer.json`; ValueError if it would drop characters or encode a text at random.

    Its special tokens never result from text, even if the text spells them. `byte_lengths` [vocab_size] counts the space that
    some tokenizers put before a text as a byte of the first token. `hash` is the SHA-256 of all that decides the ids: it
    ignores the layout of the file, and truncation and padding, which are not used.
    """

    def __init__(self, path: str):
        self._tokenizer, state = _read_json(path)
        decoder = json.dumps(state.get("decoder"), ensure_ascii=False)
        relevant = {key: value for key, value in state.items() if key not in ("truncation", "padding")}
        self.hash = hashlib.sha256(json.dumps(relevant, sort_keys=True).encode()).hexdigest()
        vocab = self._tokenizer.get_vocab()
        self.vocab_size = max(vocab.values(), default=0) + 1  # ids may be missing in between, so their number is not enough
        largest = self.vocab_size - 1
        check(largest < MAX_IDS, f"{path} has the id {largest}, and {MAX_IDS - 1} is the largest that is supported")
        self.bos_token = _first_known(vocab, BOS_TOKENS, path, "BOS")
        self.eos_token = _first_known(vocab, EOS_TOKENS, path, "EOS")
        self.bos, self.eos = vocab[self.bos_token], vocab[self.eos_token]
        _check_exact(self._tokenizer, state, path)
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        self.special_tokens |= {self.bos_token: self.bos, self.eos_token: self.eos}
        self._specials = set(self.special_tokens.values())
        self.byte_lengths = np.zeros(self.vocab_size, np.int64)
        for piece, i in vocab.items():
            if i not in self._specials:
                self.byte_lengths[i] = len(piece.encode()) if i in added else _piece_bytes(piece, decoder)

    def encode(self, text: bytes) -> np.ndarray:
        """int32 ids [n] of UTF-8 text; UnicodeDecodeError if it is not UTF-8."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[bytes]) -> list[np.ndarray]:
        """`encode` of each text."""
        return [np.array(x.ids, np.int32) for x in self._encoded(self._tokenizer.encode_batch_fast, texts)]

    def encode_with_starts(self, texts: Sequence[bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each text, `encode` of it and the byte [n] at which each token, or the character that it is a part of, begins."""
        encoded = self._encoded(self._with_offsets.encode_batch, texts)
        return [_ids_and_starts(text, x) for text, x in zip(texts, encoded, strict=True)]

    def encode_rendered(self, text: bytes) -> tuple[np.ndarray, np.ndarray]:
        """The ids of a text that a chat template wrote, special tokens included, and the byte [n] at which each begins."""
        return _ids_and_starts(text, *self._encoded(self._with_specials.encode_batch, [text]))

    def _encoded(self, encode_batch: Callable, texts: Sequence[bytes]) -> list:
        """The library's encodings of texts, by one of its functions."""
        decoded = [text.decode("utf-8") for text in texts]
        with _library_errors("the tokenizer cannot encode a text"):
            return encode_batch(decoded, add_special_tokens=False)

    @functools.cached_property
    def _with_offsets(self):
        """The library's tokenizer without a post-processor. That of ByteLevel moves offsets past the spaces of a token."""
        copy = type(self._tokenizer).from_str(self._tokenizer.to_str())
        copy.encode_special_tokens = True
        copy.post_processor = None
        return copy

    @functools.cached_property
    def _with_specials(self):
        """The same, for which a special token that a text spells is that token."""
        copy = type(self._tokenizer).from_str(self._with_offsets.to_str())
        copy.encode_special_tokens = False
        copy.add_special_tokens([self.bos_token, self.eos_token])
        return copy

    def decode(self, ids) -> str:
        """The text of `ids`, without special and unknown ids; invalid UTF-8 becomes U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids if 0 <= int(i) < self.vocab_size and int(i) not in self._specials])


def special_pattern(tokenizer: ByteTokenizer | JsonTokenizer) -> re.Pattern:
    """Matches what spells a special token in a text."""
    return re.compile("|".join(map(re.escape, sorted(tokenizer.special_tokens, key=len, reverse=True))))


def load_tokenizer(name: str) -> ByteTokenizer | JsonTokenizer:
    """The tokenizer `name`: "bytes", or the path of a `tokenizer.json`."""
    if name == "bytes":
        return ByteTokenizer()
    check(os.path.isfile(name), f"the tokenizer {name!r} is not a file; use 'bytes' or the path of a tokenizer.json")
    return JsonTokenizer(name)


def check_vocab(tokenizer: ByteTokenizer | JsonTokenizer, model_vocab_size: int, name: str) -> None:
    """ValueError if a model of `model_vocab_size` lacks ids of the tokenizer `name`, or has far more ids than the tokenizer.

    A tokenizer.json may use only half of the ids: training ends early if the text has no more pairs, and published models leave
    room for later tokens.
    """
    used = tokenizer.vocab_size
    limit = int(1.05 * used + 128) if isinstance(tokenizer, ByteTokenizer) else 2 * used
    cure = f"set model.vocab_size={-(-used // 128) * 128}"
    size, ids = f"model.vocab_size={model_vocab_size}", f"the {used} ids of data.tokenizer={name!r}"
    check(model_vocab_size >= used, f"{size} is below {ids}; {cure}")
    check(
        model_vocab_size <= limit,
        f"{size} wastes memory on {ids} (at most {limit} is padding); train a tokenizer with "
        f"tools/train_tokenizer.py --vocab_size={model_vocab_size} and name it with --config.data.tokenizer=tokenizer.json; "
        f"or, to keep {name!r}, {cure}",
    )


def _read_json(path: str):
    """The library's tokenizer, and the file's own JSON."""
    tokenizers = library("tokenizers", path, "hf")
    with _library_errors(f"the tokenizer {path!r} is not a tokenizer.json"):
        text = Path(path).read_text(encoding="utf-8")
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
    except (KeyboardInterrupt, SystemExit, OSError):
        raise
    except BaseException as error:
        raise ValueError(f"{what}: {error}") from error


def _check_exact(tokenizer, state: dict, path: str) -> None:
    """ValueError if a `tokenizer.json` encodes at random, drops characters without a token, or decodes to another text."""
    dropout, decoder = state["model"].get("dropout"), state.get("decoder")
    check(not dropout, f"{path} has dropout={dropout}, so it encodes a text in many ways; set its model.dropout to null")
    no_decoder = f"{path} has no decoder, so its ids cannot be decoded; add the decoder of its type, such as ByteLevel"
    check(decoder is not None, no_decoder)
    for text in PROBES:
        with _library_errors(f"{path} cannot encode {text!r}, for which a model may need an unk_token"):
            normalized = text if tokenizer.normalizer is None else tokenizer.normalizer.normalize_str(text)
            ids = tokenizer.encode(text, add_special_tokens=False).ids
            decoded = tokenizer.decode(ids)
            unknown = [state["model"].get("unk_id"), tokenizer.token_to_id(state["model"].get("unk_token") or "")]
        dropped = bool(normalized) and (not ids or "\ufffd" in decoded)
        cure = "use a vocabulary of all bytes, byte_fallback or an unk_token"
        check(not dropped, f"{path} drops the character {text!r}, or bytes of it, without a token; {cure}")
        # A text that its normalizer changes, or that has unknown tokens, may decode to another text.
        exact = normalized != text or text in decoded or any(i in unknown for i in ids)
        check(exact, f"{path} decodes its ids of {text!r} to {decoded!r}; use the decoder of its type, such as ByteLevel")


def _ids_and_starts(text: bytes, encoding) -> tuple[np.ndarray, np.ndarray]:
    """The ids [n] in the library's `encoding` of a text, and the byte [n] at which each begins."""
    return np.array(encoding.ids, np.int32), _bytes_of_characters(text, [first for first, _ in encoding.offsets])


def _bytes_of_characters(text: bytes, characters: Sequence[int]) -> np.ndarray:
    """The bytes [n] at which the `characters` of a text in UTF-8 begin; ValueError where they are not in order."""
    first_bytes = np.flatnonzero((np.frombuffer(text, np.uint8) & 0xC0) != 0x80)
    starts = np.append(first_bytes, len(text))[np.array(characters, np.int64)]
    in_order = not np.any(np.diff(starts) < 0)
    check(in_order, "the tokenizer does not say in order where its tokens begin, so no loss mask can be made with it")
    return starts


def _first_known(vocab: dict[str, int], names: Sequence[str], path: str, role: str) -> str:
    """The first of `names` in a vocabulary."""
    known = [name for name in names if name in vocab]
    check(bool(known), f"{path} has no {role} token; add one of {' '.join(names)} to its added_tokens")
    return known[0]


def _piece_bytes(piece: str, decoder: str) -> int:
    """The UTF-8 bytes of the text of a vocabulary entry, by the JSON of the decoder."""
    if "ByteLevel" in decoder:
        return len(piece)  # each letter of the GPT-2 alphabet is one byte
    if "ByteFallback" in decoder and re.fullmatch("<0x[0-9A-F]{2}>", piece):
        return 1
    if "▁" in decoder:
        piece = piece.replace("▁", " ")
    return len(piece.encode())


def texts(inputs: Sequence[str], fields: Fields, form: str | None = None) -> Iterator[str]:
    """The texts of `inputs`, which are files for `documents.find`; ValueError for what is broken or binary, or without text."""
    empty = True
    for path in documents.find(inputs):
        for document in sources.read(path, form or sources.format_of(path), fields):
            if not isinstance(document, Text):
                raise ValueError(f"{document.reason}; repair or split the file, or leave it out of --input")
            if document.text:
                empty = False
                yield document.text.decode("utf-8")
    check(not empty, f"no text in {', '.join(inputs)}")


def train(texts: Iterable[str], vocab_size: int):
    """A byte-level BPE tokenizer with at most `vocab_size` ids; fewer if no pair of tokens occurs twice any more.

    Its vocabulary has all bytes, so it encodes every text. The same texts give the same tokenizer. As in GPT-2, no token
    crosses runs of letters, digits and other characters.
    """
    tokenizers = library("tokenizers", "training a tokenizer", "hf")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[BOS_TOKENS[0], EOS_TOKENS[0]],
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
