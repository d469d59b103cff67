"""Documents of token ids: the interface that all readers share, and documents of text files in memory."""

import concurrent.futures
import dataclasses
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_attn.data import sources
from hybrid_attn.data.records import Fields, Text
from hybrid_attn.data.references import References
from hybrid_attn.trees import check

NO_LABEL = "text"  # label of documents without a label of their own
FIELDS = Fields("text", None)  # of records that are read without a store

SPAN, SPANS = 2**20, 64  # tokens of a span, and spans read together, where a loss mask is searched
Span = tuple[int, int, int]  # the number of a document, and the tokens [start, stop) of it


class LossMask(NamedTuple):
    """For each token, uint8 1 if it is trained on as a target, else 0. Different masks have different fingerprints."""

    fetch: Callable[[Sequence[Span]], list[np.ndarray]]
    fingerprint: str


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Documents of token ids, each from BOS to EOS. Their tokens are read span by span.

    `lengths` int64 [n] counts tokens, BOS and EOS included; `hashes` uint64 [n] are `content_hash` of the texts; `labels`
    uint16 [n] are indices into `label_names`; `dtype` is that of the tokens. `fetch` reads spans; it numbers documents by
    `numbers` int64 [n], or from 0 to n - 1 where that is None. Without a `loss_mask` every token is trained on. Where `paired`,
    documents 2i and 2i + 1 are the chosen and the rejected completion of a prompt, with one hash and one label. `references`
    reads the log-probabilities that stand beside a store, numbered as `fetch` does. `chat_template` is the text of the template
    that wrote the documents, if one did.
    """

    lengths: np.ndarray
    hashes: np.ndarray
    labels: np.ndarray
    label_names: tuple[str, ...]
    dtype: np.dtype
    fetch: Callable[[Sequence[Span]], list[np.ndarray]]
    numbers: np.ndarray | None = None
    loss_mask: LossMask | None = None
    paired: bool = False
    references: Callable[[], References] | None = None
    chat_template: str | None = None

    def __len__(self) -> int:
        return len(self.lengths)

    def read(self, spans: Iterable[Span]) -> list[np.ndarray]:
        """The tokens of each span, all read together, and nothing beyond them."""
        return self.fetch(self._located(spans))

    def read_loss_mask(self, spans: Iterable[Span]) -> list[np.ndarray]:
        """The loss mask of each span, read like the tokens. The documents must have one."""
        return self.loss_mask.fetch(self._located(spans))

    def reference_log_probs(self) -> np.ndarray:
        """The log-probability [n] of each document under the reference; ValueError where there are none."""
        log_probs = self.references().log_probs
        return log_probs if self.numbers is None else log_probs[self.numbers]

    def _located(self, spans: Iterable[Span]) -> list[Span]:
        """The spans as `fetch` numbers them."""
        spans = [(int(i), int(start), int(stop)) for i, start, stop in spans]
        for i, start, stop in spans:
            assert 0 <= start <= stop <= self.lengths[i], f"document {i} has {self.lengths[i]} tokens, not [{start}, {stop})"
        if self.numbers is not None:
            spans = [(int(self.numbers[i]), start, stop) for i, start, stop in spans]
        return spans

    def select(self, mask: np.ndarray) -> "Documents":
        """The documents where `mask` bool [n] holds, in order; no token is copied."""
        assert not self.paired or (mask[::2] == mask[1::2]).all(), "a pair is selected as one"
        chosen = np.flatnonzero(mask)
        return dataclasses.replace(
            self,
            lengths=self.lengths[chosen],
            hashes=self.hashes[chosen],
            labels=self.labels[chosen],
            numbers=chosen if self.numbers is None else self.numbers[chosen],
        )

    def fingerprint(self) -> str:
        """Hexadecimal digits that identify these documents in this order, and the files of their loss mask, wherever stored."""
        mask = "" if self.loss_mask is None else self.loss_mask.fingerprint
        mask += "pairs" if self.paired else ""
        return hashlib.sha256(self.lengths.tobytes() + self.hashes.tobytes() + mask.encode()).hexdigest()[:16]

    def joint_lengths(self) -> np.ndarray:
        """The tokens int64 [n] of each document; of the halves of a pair, those of both together."""
        return np.repeat(pair_lengths(self.lengths), 2) if self.paired else self.lengths

    def has_trained_tokens(self) -> bool:
        """Whether any token is trained on. The loss mask is read up to the first such token."""
        if self.loss_mask is None:
            return True
        spans = ((i, start, min(start + SPAN, n)) for i, n in enumerate(self.lengths) for start in range(0, n, SPAN))
        groups = iter(lambda: list(itertools.islice(spans, SPANS)), [])
        return any(mask.any() for group in groups for mask in self.read_loss_mask(group))

    def without_loss_mask(self) -> "Documents":
        """The same documents, of which every token counts, and each for itself."""
        return dataclasses.replace(self, loss_mask=None, paired=False)

    def split(self, holdout: float, heldout: bool) -> "Documents":
        """The held-out documents, or all others. The hash of the text decides, so copies and halves of a pair stay together."""
        return self.select((self.hashes < np.uint64(holdout * 2**64)) == heldout)


def pair_lengths(lengths: np.ndarray) -> np.ndarray:
    """The tokens [n / 2] of each pair, of the `lengths` [n] of documents."""
    return lengths[::2] + lengths[1::2]


def content_hash(text: bytes) -> int:
    """The first 8 bytes of SHA-256, big-endian."""
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big")


def in_memory(tokens: Sequence[np.ndarray], hashes: Sequence[int]) -> Documents:
    """Documents of these token arrays, all of one dtype and one label."""
    return Documents(
        lengths=np.array([len(x) for x in tokens], np.int64),
        hashes=np.array(hashes, np.uint64),
        labels=np.zeros(len(tokens), np.uint16),
        label_names=(NO_LABEL,),
        dtype=tokens[0].dtype,
        fetch=lambda spans: [tokens[i][start:stop] for i, start, stop in spans],
    )


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest little-endian type that holds the ids of a vocabulary."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def with_boundaries(tokenizer, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """The tokens of a document: BOS, its ids and EOS, in `token_dtype` of the vocabulary."""
    tokens = np.empty(len(ids) + 2, token_dtype(tokenizer.vocab_size))
    tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos, ids, tokenizer.eos
    return tokens


def load(paths: tuple[str, ...], tokenizer) -> Documents:
    """The documents of the files that `find` finds, one of each file of plain text; ValueError names what cannot be used."""
    files = find(paths)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        encoded = list(itertools.chain.from_iterable(pool.map(lambda path: _encode(path, tokenizer), files)))
    check(bool(encoded), f"paths={paths} matches {len(files)} files and all are empty; name files with text")
    tokens, hashes = zip(*encoded, strict=True)
    return in_memory(tokens, hashes)


def find(paths: Sequence[str]) -> list[str]:
    """The files that `sources.find` finds in `paths`; without these, the sources of this interpreter's standard library.

    Of that, empty files and the few that are not UTF-8 are left out, so that every tokenizer reads the same corpus.
    """
    if paths:
        return sources.find(paths)
    root, files = sysconfig.get_path("stdlib"), []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = set(subfolders) - sources.NOT_SOURCES
        python = [os.path.join(folder, name) for name in names if name.endswith(".py")]
        files += [path for path in python if _is_text(path)]
    check(bool(files), f"the standard library at {root} has no .py sources; name text files in paths")
    return sources.sorted_below(root, files)


def _is_text(path: str) -> bool:
    """Whether the file is not empty and all of it is UTF-8."""
    try:
        return bool(Path(path).read_text("utf-8"))
    except UnicodeDecodeError:
        return False


def _encode(path: str, tokenizer) -> list[tuple[np.ndarray, int]]:
    """The tokens of each document of a file, from BOS to EOS, and the hash of its text. Plain text need not be UTF-8."""
    encoded, is_text = [], sources.format_of(path) == "text"
    for result in [sources.text_of(path)] if is_text else sources.read(path, None, FIELDS):
        if not isinstance(result, Text):
            cure = "repair the file, leave it out of paths, or make a store with tools/prepare_data.py, which has"
            raise ValueError(f"{result.reason}; {cure} --text_field, --max_document_mb and --on_error=skip")
        try:
            ids = tokenizer.encode(result.text)
        except UnicodeDecodeError as error:
            cure = "convert the file, leave it out of paths, or use data.tokenizer='bytes'"
            raise ValueError(f"{path} is not UTF-8 at byte {error.start}, and a tokenizer.json reads text; {cure}") from error
        if result.text:
            encoded.append((with_boundaries(tokenizer, ids), content_hash(result.text)))
    return encoded
