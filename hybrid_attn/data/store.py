"""The token store: documents of token ids in shards of raw files, on a disk or in a bucket.

    manifest.json           format, tokenizer, type of the ids, labels, and the sizes and checksums of the files of each shard
    shard-00000.tokens      the ids of all documents of the shard back to back, little-endian
    shard-00000.loss_mask   a byte for each token: 1 if it is trained on, else 0; only in a store with loss masks
    shard-00000.index       three arrays, one after the other: lengths int64 [n], hashes uint64 [n], labels uint16 [n]

Files are read through TensorStore's key-value stores, so a path may be a URL such as gs://bucket/corpus/. A loss mask in bits
would take an eighth of the bytes, but documents would begin inside them, and every copy and read of a span would have to shift.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import tensorstore

from hybrid_attn.data import references
from hybrid_attn.data.documents import Documents, LossMask, Span
from hybrid_attn.files import JSON_BYTES
from hybrid_attn.trees import check

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"  # of a store that is being prepared
DTYPES = ("<u2", "<u4")
CURE = "copy the file again, or prepare the store again"
MAX_COUNT = 2**48  # documents or tokens of a shard; their sums stay far below 2^63
INDEX = {"lengths": np.dtype("<i8"), "hashes": np.dtype("<u8"), "labels": np.dtype("<u2")}
BLOCK = 2**24  # bytes of a file in memory at a time


def file_name(index: int, suffix: str) -> str:
    """The name of a file of shard `index`, such as shard-00000.tokens."""
    return f"shard-{index:05}.{suffix}"


class _Values(NamedTuple):
    """The files with a value for each token: suffix, dtype, and the limit below which values are valid; None: all are."""

    suffix: str
    dtype: np.dtype
    limit: int | None
    invalid: str  # the message for a value that is not below the limit

    def problem(self, values: np.ndarray, first: int) -> str | None:
        """The problem if a value is invalid. `values` are of tokens of a document or shard, of which the first is `first`."""
        if self.limit is None or not len(values) or values.max() < self.limit:
            return None
        i = int(np.argmax(values >= self.limit))
        return f"token {first + i:,} has the {self.invalid.format(int(values[i]))}"


LOSS_MASK = _Values("loss_mask", np.dtype(np.uint8), 2, "value {} in the loss mask, and 0 and 1 are the only ones")


def _ids(dtype: str, tokenizer) -> _Values:
    """The token files; with a `tokenizer`, the ids of its vocabulary are valid."""
    limit = None if tokenizer is None else tokenizer.vocab_size
    largest = "" if tokenizer is None else f"id {{}}, and the largest of the tokenizer is {limit - 1}"
    return _Values("tokens", np.dtype(dtype), limit, largest)


@dataclasses.dataclass(frozen=True)
class Shard:
    """The entry of a shard in the manifest; `loss_mask_sha256` is None, and left out, in a store without loss masks."""

    documents: int
    tokens: int
    tokens_sha256: str
    index_sha256: str
    loss_mask_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The content of manifest.json. `summary` has the counts of `prepare`, `tokenizer` the name that `prepare` got.

    `chat_template` is the text of the template that wrote the documents, and None, and left out, without one. Where `pairs`,
    documents 2i and 2i + 1 of each shard are the chosen and the rejected completion of a prompt; else it is left out.
    """

    format: int
    tokenizer: str
    tokenizer_hash: str
    dtype: str
    label_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    summary: dict
    chat_template: str | None = None
    pairs: bool = False

    def to_json(self) -> str:
        def present(fields: list) -> dict:
            return {name: x for name, x in fields if x is not None and x is not False}

        values = dataclasses.asdict(self, dict_factory=present)
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

    @property
    def identity(self) -> str:
        """Hexadecimal digits that identify the content of all shards, whose checksums they are made of."""
        sums = [(x.tokens_sha256, x.index_sha256, x.loss_mask_sha256) for x in self.shards]
        return hashlib.sha256(json.dumps(sums).encode()).hexdigest()

    @property
    def has_loss_mask(self) -> bool:
        return self.shards[0].loss_mask_sha256 is not None


def index_bytes(lengths: np.ndarray, hashes: np.ndarray, labels: np.ndarray) -> bytes:
    """The content of a shard's index."""
    columns = zip((lengths, hashes, labels), INDEX.values(), strict=True)
    return b"".join(column.astype(dtype).tobytes() for column, dtype in columns)


def load(path: str, tokenizer=None) -> Documents:
    """The documents of the store at `path`; ValueError names what does not fit, or the file that is damaged.

    With a `tokenizer`, a store that another tokenizer made is refused, and so is a read of ids outside its vocabulary.
    """
    store = _open(path)
    manifest = store.manifest
    if tokenizer is not None and tokenizer.hash != manifest.tokenizer_hash:
        raise ValueError(
            f"{path} was made by the tokenizer {manifest.tokenizer!r} of hash {manifest.tokenizer_hash[:12]}, and that of the "
            f"run has hash {tokenizer.hash[:12]}; set data.tokenizer to the former, or prepare the text again with the latter"
        )
    shards = list(store.read_indices())
    columns = {name: np.concatenate([shard[name] for shard in shards]) for name in INDEX}
    if manifest.pairs:
        halves = all((columns[name][::2] == columns[name][1::2]).all() for name in ("hashes", "labels"))
        check(halves, f"{path}: its index has other hashes or labels for chosen than for rejected documents; {CURE}")
    ids, reader = _ids(manifest.dtype, tokenizer), _Reader(store, columns["lengths"])
    mask = None
    if manifest.has_loss_mask:
        fingerprint = "".join(shard.loss_mask_sha256 for shard in manifest.shards)
        mask = LossMask(functools.partial(reader.read, LOSS_MASK), fingerprint)
    fetch = functools.partial(reader.read, ids)
    beside = functools.partial(references.read, path, store.file, manifest.identity, len(columns["lengths"]))
    about = {"label_names": manifest.label_names, "dtype": ids.dtype, "paired": manifest.pairs}
    extra = {"loss_mask": mask, "references": functools.cache(beside), "chat_template": manifest.chat_template}
    return Documents(**columns, **about, fetch=fetch, **extra)


def read_manifest(path: str) -> Manifest:
    """The manifest of the store at `path`; ValueError if there is none, or one of another format."""
    return _open(path).manifest


def verify(path: str, tokenizer=None) -> Iterator[int]:
    """Yields the number of each shard after its files agree with the manifest; ValueError names the first file that does not.

    A loss mask must have the values 0 and 1 alone. With the tokenizer of the store, every id must be in its vocabulary, and
    every document must go from BOS to EOS.
    """
    store = _open(path)
    ids = _ids(store.manifest.dtype, tokenizer)
    for i, index in enumerate(store.read_indices()):  # which compares the checksums of the indices
        boundaries, ends = [], np.cumsum(index["lengths"])
        if tokenizer is not None:
            boundaries = [("BOS", tokenizer.bos, ends - index["lengths"]), ("EOS", tokenizer.eos, ends - 1)]
        store.verify(i, ids, boundaries)
        if store.manifest.has_loss_mask:
            store.verify(i, LOSS_MASK, [])
        yield i


@dataclasses.dataclass(frozen=True)
class _Store:
    """A store that was opened."""

    path: str
    files: tensorstore.KvStore
    manifest: Manifest

    def file(self, name: str) -> bytes | None:
        """The bytes of a file beside the shards; None if it is not there."""
        try:
            result = self.files.read(name).result()
        except ValueError as error:
            raise ValueError(f"{self.path}: {name} cannot be read ({error})") from error
        return result.value if result.state == "value" else None

    def verify(self, index: int, values: _Values, boundaries: Iterable[tuple[str, int, np.ndarray]]) -> None:
        """ValueError if a file of a shard differs from its checksum, has an invalid value, or lacks one of the `boundaries`."""
        name, checksum, size = self.files_of(index)[values.suffix]
        digest, problem = hashlib.sha256(), None
        for start in range(0, size, BLOCK):
            block = self.result(name, self.files.read(name, byte_range=slice(start, min(start + BLOCK, size))))
            digest.update(block)
            if values.limit is not None and not problem:
                read, first = np.frombuffer(block, values.dtype), start // values.dtype.itemsize
                problem = values.problem(read, first) or _missing_boundary(read, first, boundaries)
        self.check_sum(name, checksum, digest.hexdigest())
        check(not problem, f"{self.path}: {name}: {problem}; {CURE}")

    def check_sum(self, name: str, expected: str, digest: str) -> None:
        problem = f"the checksum of {name} differs from the manifest's, so the file was changed"
        check(digest == expected, f"{self.path}: {problem}; {CURE}")

    def files_of(self, index: int) -> dict[str, tuple[str, str, int]]:
        """Name, SHA-256 and bytes of each file of a shard, by suffix."""
        shard, token_bytes = self.manifest.shards[index], np.dtype(self.manifest.dtype).itemsize
        sizes = {"tokens": shard.tokens * token_bytes}
        if self.manifest.has_loss_mask:
            sizes["loss_mask"] = shard.tokens
        sizes["index"] = shard.documents * sum(dtype.itemsize for dtype in INDEX.values())
        return {x: (file_name(index, x), getattr(shard, f"{x}_sha256"), size) for x, size in sizes.items()}

    def read_indices(self) -> Iterator[dict[str, np.ndarray]]:
        """The columns of the index of each shard; ValueError names a file that is missing or of another size, or a wrong index.

        Of the tokens and masks only the last byte is read. Of a file that is too long, one byte after its expected end is read.
        """
        reads = []
        for i, shard in enumerate(self.manifest.shards):
            for suffix, (name, checksum, size) in self.files_of(i).items():
                first = 0 if suffix == "index" else max(size - 1, 0)
                ranges = slice(first, size), slice(size, size + 1)
                reads.append((shard, name, checksum, size, *[self.files.read(name, byte_range=x) for x in ranges]))
        for shard, name, checksum, size, read, behind in reads:
            value = self.result(name, read)
            check(not _has_byte(behind), f"{self.path}: {name} has more than its {size:,} bytes; {CURE}")
            if name.endswith(".index"):
                self.check_sum(name, checksum, hashlib.sha256(value).hexdigest())
                yield _read_index(f"{self.path}: {name}", value, shard, self.manifest.label_names)

    def result(self, name: str, read: tensorstore.Future) -> bytes:
        """The bytes of a read of the file `name`; ValueError if it failed."""
        try:
            result = read.result()
        except ValueError as error:
            problem = "is shorter than the manifest says" if "OUT_OF_RANGE" in str(error) else f"cannot be read ({error})"
            raise ValueError(f"{self.path}: {name} {problem}; {CURE}") from error
        check(result.state == "value", f"{self.path}: {name} is missing; {CURE}")
        return result.value


class _Reader:
    """Reads spans of the files that hold a value for each token."""

    def __init__(self, store: _Store, lengths: np.ndarray):
        self.store, self.begins = store, np.cumsum(lengths) - lengths
        self.documents = np.cumsum([0, *[shard.documents for shard in store.manifest.shards]])
        self.tokens = np.cumsum([0, *[shard.tokens for shard in store.manifest.shards]])

    def read(self, values: _Values, spans: Sequence[Span]) -> list[np.ndarray]:
        """The values of each span; ValueError names the document of the first that is invalid."""
        pending, size = [], values.dtype.itemsize
        for i, start, stop in spans:
            shard = int(np.searchsorted(self.documents, i, side="right")) - 1
            name, first = file_name(shard, values.suffix), int(self.begins[i] - self.tokens[shard]) + start
            byte_range = slice(first * size, (first + stop - start) * size)
            pending.append((name, self.store.files.read(name, byte_range=byte_range)))
        read = [np.frombuffer(self.store.result(name, future), values.dtype) for name, future in pending]
        if values.limit is not None and _largest(read) >= values.limit:
            for (i, start, _), (name, _), of_span in zip(spans, pending, read, strict=True):
                problem = values.problem(of_span, start)
                check(not problem, f"{self.store.path}: {name}, document {i}: {problem}; {CURE}")
        return read


def _largest(arrays: list[np.ndarray]) -> int:
    """The largest of all ids, or 0."""
    if sum(map(len, arrays)) < 4096 * len(arrays):  # one copy of short arrays costs less than a call for each
        arrays = [np.concatenate(arrays)]
    return max((int(np.maximum.reduce(x)) for x in arrays if len(x)), default=0)


def _missing_boundary(ids: np.ndarray, first: int, boundaries: Iterable[tuple[str, int, np.ndarray]]) -> str | None:
    """The problem if BOS or EOS is not at its sorted positions in a shard. `ids` are its tokens from `first` on."""
    for name, expected, positions in boundaries:
        offsets = positions[slice(*np.searchsorted(positions, (first, first + len(ids))))] - first
        wrong = offsets[ids[offsets] != expected]
        if len(wrong):
            return f"token {first + wrong[0]:,} is {int(ids[wrong[0]])}, and by the index it is {name} ({expected})"
    return None


def _open(path: str) -> _Store:
    # A path is no URL, in which # and % have a meaning.
    local = {"driver": "file", "path": os.path.abspath(os.path.expanduser(path)) + "/"}
    try:
        files = tensorstore.KvStore.open(path.rstrip("/") + "/" if "://" in path else local).result()
        plan = files.read(PLAN, byte_range=slice(0, 0))
        too_long = _has_byte(files.read(MANIFEST, byte_range=slice(JSON_BYTES, JSON_BYTES + 1)))
        check(not too_long, f"its {MANIFEST} has more than {JSON_BYTES:,} bytes; {CURE}")
        manifest, plan = files.read(MANIFEST).result(), plan.result()
    except ValueError as error:  # the library raises no other
        raise ValueError(f"{path} cannot be read as a token store: {error}") from error
    exists, begun = manifest.state == "value", plan.state == "value"
    check(exists or not begun, f"{path} is not finished; the same command of tools/prepare_data.py continues it")
    check(exists, f"{path} is not a token store: it has no {MANIFEST}; make one with tools/prepare_data.py")
    try:
        return _Store(path, files, _manifest(json.loads(manifest.value)))
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/{MANIFEST} is damaged: {error}; {CURE}") from error


def _manifest(values: dict) -> Manifest:
    """The manifest in a JSON value; KeyError, TypeError or ValueError if it is not one."""
    check(values["format"] == FORMAT, f"it has format {values['format']}, and this code reads {FORMAT}")
    check(values["dtype"] in DTYPES, f"its ids have type {values['dtype']!r}, which must be {' or '.join(DTYPES)}")
    shards = tuple(Shard(**shard) for shard in values["shards"])
    manifest = Manifest(**values | {"shards": shards, "label_names": tuple(values["label_names"])})
    counts = [count for shard in shards for count in (shard.documents, shard.tokens)]
    masks = [shard.loss_mask_sha256 for shard in shards]
    texts = [manifest.tokenizer, manifest.tokenizer_hash, *manifest.label_names, *[text for text in masks if text is not None]]
    texts += [text for shard in shards for text in (shard.tokens_sha256, shard.index_sha256)]
    check(all(type(count) is int for count in counts), "its counts of documents and tokens are not all whole numbers")
    check(all(isinstance(text, str) for text in texts), "its names and checksums are not all strings")
    check(isinstance(values["label_names"], list), "its label_names are not a list")
    check(isinstance(manifest.summary, dict), "its summary is not an object")
    check(isinstance(manifest.chat_template, str | None), "its chat_template is not text")
    check(type(manifest.pairs) is bool, "its pairs are not true or false")
    check(not manifest.pairs or None not in masks, "it has pairs without a loss mask")
    check(bool(shards), "it has no shards")
    check(masks.count(None) in (0, len(masks)), "some of its shards have a loss mask and others have none")
    for i, shard in enumerate(shards):
        possible = 0 <= shard.documents <= shard.tokens <= MAX_COUNT
        check(possible, f"shard {i} has {shard.documents:,} documents of {shard.tokens:,} tokens, which is impossible")
        halves = not manifest.pairs or shard.documents % 2 == 0
        check(halves, f"shard {i} has {shard.documents:,} documents, which are no pairs")
    return manifest


def _has_byte(read: tensorstore.Future) -> bool:
    """Whether a read of one byte gave one; ValueError if the read failed."""
    try:
        return bool(read.result().value)
    except ValueError as error:
        if "OUT_OF_RANGE" in str(error):
            return False
        raise


def _read_index(what: str, index: bytes, shard: Shard, label_names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """The columns of the index of a shard; ValueError where they contradict the manifest."""
    columns, offset = {}, 0
    for name, dtype in INDEX.items():
        columns[name] = np.frombuffer(index, dtype, shard.documents, offset)
        offset += columns[name].nbytes
    lengths, labels = columns["lengths"], columns["labels"]
    shortest, longest = lengths.min(initial=MAX_COUNT), lengths.max(initial=0)
    length = shortest if shortest < 1 else longest
    possible = shortest >= 1 and longest <= shard.tokens
    check(possible, f"{what} has a document of {length:,} tokens, and the shard has {shard.tokens:,}; {CURE}")
    # In halves: a sum of wrong lengths could overflow int64 and still be equal.
    tokens = (int((lengths >> 24).sum()) << 24) + int((lengths & (2**24 - 1)).sum())
    check(tokens == shard.tokens, f"{what} has {tokens:,} tokens, and the manifest {shard.tokens:,}; {CURE}")
    largest, known = labels.max(initial=0), len(label_names)
    check(not len(labels) or largest < known, f"{what} has the label {largest}, and the manifest {known} labels from 0; {CURE}")
    return columns
