"""What a corpus is to everybody else, and the corpus of text files in memory. Its documents may lie anywhere."""

import concurrent.futures
import dataclasses
import hashlib
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from hybrid_attn.data import sources
from hybrid_attn.data.records import Fields, Text

NO_LABEL = "text"  # of documents that nobody gave a label
FIELDS = Fields("text", None)  # of records that no store was made of

Span = tuple[int, int, int]  # a document's number, and the tokens [start, stop) of it


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Documents of token ids, each from its bos to its eos; their tokens are read span by span.

    `lengths` int64 [n] counts tokens, bos and eos included; `hashes` uint64 [n] are `content_hash` of the texts; `labels`
    uint16 [n] are places in `label_names`; `dtype` is that of the tokens. `fetch` reads spans, whose documents it knows by
    `numbers` int64 [n], or by their place where that is None.
    """

    lengths: np.ndarray
    hashes: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    dtype: np.dtype
    fetch: Callable[[Sequence[Span]], list[np.ndarray]]
    numbers: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, spans: Iterable[Span]) -> list[np.ndarray]:
        """The tokens of each span; nothing beyond the spans is read, and they are read together."""
        spans = [(int(i), int(start), int(stop)) for i, start, stop in spans]
        for i, start, stop in spans:
            assert 0 <= start <= stop <= self.lengths[i], f"document {i} has {self.lengths[i]} tokens, not [{start}, {stop})"
        if self.numbers is not None:
            spans = [(int(self.numbers[i]), start, stop) for i, start, stop in spans]
        return self.fetch(spans)

    def select(self, mask: np.ndarray) -> "Documents":
        """The documents where `mask` bool [n] holds, in order; no token is copied."""
        chosen = np.flatnonzero(mask)
        return dataclasses.replace(
            self,
            lengths=self.lengths[chosen],
            hashes=self.hashes[chosen],
            labels=self.labels[chosen],
            numbers=chosen if self.numbers is None else self.numbers[chosen],
        )

    def fingerprint(self) -> str:
        """Hexadecimal digits that tell these documents, in this order, from others, wherever they lie."""
        return hashlib.sha256(self.lengths.tobytes() + self.hashes.tobytes()).hexdigest()[:16]

    def split(self, holdout: float, heldout: bool) -> "Documents":
        """The held-out documents or all others: a text's own hash decides, so its exact copies are on the same side."""
        return self.select((self.hashes < np.uint64(holdout * 2**64)) == heldout)


def content_hash(text: bytes) -> int:
    """The first 8 bytes of SHA-256, big-endian."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def in_memory(tokens: Sequence[np.ndarray], hashes: Sequence[int]) -> Documents:
    """Documents of the given token arrays, all of one dtype and of one label."""
    return Documents(
        lengths=np.array([len(x) for x in tokens], np.int64),
        hashes=np.array(hashes, np.uint64),
        labels=np.zeros(len(tokens), np.uint16),
        label_names=(NO_LABEL,),
        dtype=tokens[0].dtype,
        fetch=lambda spans: [tokens[i][start:stop] for i, start, stop in spans],
    )


def token_dtype(vocab_size: int) -> np.dtype:
    """The narrowest type that holds the ids of a vocabulary, little-endian."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def load(paths: tuple[str, ...], tokenizer) -> Documents:
    """The documents of the files and directories that `paths` name, read as `sources.read` reads them: a file of text is one.

    No `paths` means the sources of this interpreter's standard library. A record's text is its field `FIELDS.text`. ValueError
    names what cannot be read or does not encode, and where there is no text at all.
    """
    files = sources.find(paths) if paths else [path for _, path in find(())]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        encoded = [pair for pairs in pool.map(lambda path: _encode(path, tokenizer), files) for pair in pairs]
    if not encoded:
        raise ValueError(f"paths={paths} matches {len(files)} files and all are empty; name files with text")
    tokens, hashes = zip(*encoded, strict=True)
    return in_memory(tokens, hashes)


def find(paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """Name and path of each file that holds text, in an order that is the same on every machine.

    No `paths` means the sources of this interpreter's standard library. A file that several patterns match, or that
    links point to, is one document.
    """
    if not paths:
        return _standard_library()
    files = {}
    for pattern in paths:
        for name, path in sources.matches(os.path.expanduser(pattern)):
            files.setdefault(os.path.realpath(path), (name, path))
    texts = [(name, path) for name, path in files.values() if os.path.getsize(path)]
    if not texts:
        raise ValueError(f"paths={paths} matches {len(files)} files and all are empty; name files with text")
    return texts


def _standard_library() -> list[tuple[str, str]]:
    """Sorted names and paths of the standard library's sources.

    Left out are empty ones and the few test fixtures that are not UTF-8, so that every tokenizer reads the same corpus.
    """
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - sources.NOT_SOURCES
        paths = [os.path.join(folder, file) for file in files if file.endswith(".py")]
        found += [(os.path.relpath(path, root).replace(os.sep, "/"), path) for path in paths if _is_text(path)]
    if not found:
        raise ValueError(f"the standard library at {root} has no .py sources; name text files in paths")
    return sorted(found)


def _is_text(path: str) -> bool:
    """Whether the file holds at least one character and all of it is UTF-8."""
    try:
        return bool(_read(path).decode("utf-8"))
    except UnicodeDecodeError:
        return False


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _texts(path: str) -> Iterator[bytes]:
    """The texts of a file's documents but for empty ones; a file of text need not be UTF-8."""
    is_text = sources.format_of(path) == "text"
    for found in [sources.text_of(path)] if is_text else sources.read(path, None, FIELDS):
        text = found.text if isinstance(found, Text) else found
        if not isinstance(text, bytes):
            raise ValueError(
                f"{text.reason}; mend the file, leave it out of paths, or make a store with tools/prepare_data.py, which has "
                "--text_field, --max_document_mb and --on_error=skip"
            )
        if text:
            yield text


def _encode(path: str, tokenizer) -> list[tuple[np.ndarray, int]]:
    """Of each document bos, its ids, eos in the narrowest type that holds the vocabulary; and the hash of its text."""
    encoded = []
    for text in _texts(path):
        try:
            ids = tokenizer.encode(text)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 at byte {error.start}, and a tokenizer.json reads text; "
                "convert the file, leave it out of paths, or use data.tokenizer='bytes'"
            ) from error
        tokens = np.empty(len(ids) + 2, token_dtype(tokenizer.vocab_size))
        tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos, ids, tokenizer.eos
        encoded.append((tokens, content_hash(text)))
    return encoded
