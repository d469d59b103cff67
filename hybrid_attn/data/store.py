"""The token store: documents of token ids in shards of raw files, on a disk or in a bucket.

    manifest.json         format, tokenizer, type of the ids, labels, and the size and SHA-256 of each shard's files
    shard-00000.tokens    the ids of the shard's documents back to back, little-endian
    shard-00000.index     of each document: tokens int64 [n], hashes uint64 [n], labels uint16 [n], one array after the other

Files are read through TensorStore's key-value stores, so a path may be a URL such as gs://bucket/corpus/.
"""

import dataclasses
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import tensorstore

from hybrid_attn.data.documents import Documents, Span

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"  # of a store that is being prepared
DTYPES = ("<u2", "<u4")
BLOCK = 2**24  # bytes read at a time to take a checksum
CURE = "copy the file again, or prepare the store again"
INDEX = {"lengths": np.dtype("<i8"), "hashes": np.dtype("<u8"), "labels": np.dtype("<u2")}


@dataclasses.dataclass(frozen=True)
class Shard:
    """What the manifest says of a shard, in its order."""

    documents: int
    tokens: int
    tokens_sha256: str
    index_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """`summary` is what `prepare` counted; `tokenizer` is the name that it was given."""

    format: int
    tokenizer: str
    tokenizer_hash: str
    dtype: str
    label_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    summary: dict

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False) + "\n"


def tokens_name(shard: int) -> str:
    return f"shard-{shard:05}.tokens"


def index_name(shard: int) -> str:
    return f"shard-{shard:05}.index"


def index_bytes(lengths: np.ndarray, hashes: np.ndarray, labels: np.ndarray) -> bytes:
    """The content of a shard's index."""
    columns = zip((lengths, hashes, labels), INDEX.values(), strict=True)
    return b"".join(column.astype(dtype).tobytes() for column, dtype in columns)


def load(path: str, tokenizer=None) -> Documents:
    """The documents of the store at `path`; ValueError names what does not fit, or the shard that is not whole.

    With a `tokenizer`, a store whose ids another one made is refused.
    """
    files, manifest = _open(path)
    if tokenizer is not None and tokenizer.hash != manifest.tokenizer_hash:
        raise ValueError(
            f"{path} was made by the tokenizer {manifest.tokenizer!r} of hash {manifest.tokenizer_hash[:12]}, and the run's "
            f"has hash {tokenizer.hash[:12]}; set data.tokenizer to the former, or prepare the text again with the latter"
        )
    documents = np.concatenate([[0], np.cumsum([shard.documents for shard in manifest.shards])])
    columns = {name: np.empty(documents[-1], dtype) for name, dtype in INDEX.items()}
    for (first, last), index in zip(itertools.pairwise(documents), _read_indices(path, files, manifest), strict=True):
        for name, column in _columns(index, last - first).items():
            columns[name][first:last] = column
    ends = np.cumsum(columns["lengths"])
    tokens = np.concatenate([[0], np.cumsum([shard.tokens for shard in manifest.shards])])
    dtype = np.dtype(manifest.dtype)

    def fetch(spans: Sequence[Span]) -> list[np.ndarray]:
        pending = []
        for i, start, stop in spans:
            shard = int(np.searchsorted(documents, i, side="right")) - 1
            first = int(ends[i] - columns["lengths"][i] - tokens[shard]) + start
            byte_range = slice(first * dtype.itemsize, (first + stop - start) * dtype.itemsize)
            pending.append((tokens_name(shard), files.read(tokens_name(shard), byte_range=byte_range)))
        return [np.frombuffer(_value(read, f"{path}: {name}"), dtype) for name, read in pending]

    return Documents(**columns, label_names=manifest.label_names, dtype=dtype, fetch=fetch)


def read_manifest(path: str) -> Manifest:
    """ValueError where there is no store at `path`, or one of another format."""
    return _open(path)[1]


def verify(path: str) -> Iterator[int]:
    """Yields the number of each shard once its checksums agree; ValueError names the first file that was changed."""
    files, manifest = _open(path)
    for _ in _read_indices(path, files, manifest):
        pass  # each is checked as it is read
    for i, shard in enumerate(manifest.shards):
        (name, wanted, size), _ = _files_of(i, shard, manifest)
        ranges = (slice(at, min(at + BLOCK, size)) for at in range(0, size, BLOCK))
        _check_sum(path, name, wanted, (_value(files.read(name, byte_range=x), f"{path}: {name}") for x in ranges))
        yield i


def _check_sum(path: str, name: str, wanted: str, blocks: Iterable[bytes]) -> None:
    if sha256(blocks) != wanted:
        raise ValueError(f"{path}: the checksum of {name} differs from the manifest's, so it was altered; {CURE}")


def sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _open(path: str) -> tuple[tensorstore.KvStore, Manifest]:
    local = {"driver": "file", "path": os.path.abspath(os.path.expanduser(path)) + "/"}  # in a URL, # and % mean something
    try:
        files = tensorstore.KvStore.open(path.rstrip("/") + "/" if "://" in path else local).result()
        found, plan = (files.read(name).result() for name in (MANIFEST, PLAN))
    except ValueError as error:  # every failure of the library's
        raise ValueError(f"{path} cannot be read as a token store: {error}") from error
    if found.state != "value" and plan.state == "value":
        raise ValueError(f"{path} is not finished; the same command of tools/prepare_data.py goes on with it")
    if found.state != "value":
        raise ValueError(f"{path} is no token store, for it has no {MANIFEST}; make one with tools/prepare_data.py")
    try:
        values = json.loads(found.value)
        if values["format"] != FORMAT:
            raise ValueError(f"it has format {values['format']}, and this code reads {FORMAT}")
        if values["dtype"] not in DTYPES:
            raise ValueError(f"its ids are {values['dtype']!r}, and there are {' and '.join(DTYPES)}")
        shards = tuple(Shard(**shard) for shard in values.pop("shards"))
        if not all(isinstance(count, int) for shard in shards for count in (shard.documents, shard.tokens)):
            raise ValueError("its counts of documents and tokens are no numbers")
        return files, Manifest(**values | {"shards": shards, "label_names": tuple(values["label_names"])})
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/{MANIFEST} is not as it was written: {error}; {CURE}") from error


def _files_of(index: int, shard: Shard, manifest: Manifest) -> list[tuple[str, str, int]]:
    """Name, SHA-256 and bytes of the files of a shard."""
    row = sum(dtype.itemsize for dtype in INDEX.values())
    size = shard.tokens * np.dtype(manifest.dtype).itemsize
    return [
        (tokens_name(index), shard.tokens_sha256, size),
        (index_name(index), shard.index_sha256, shard.documents * row),
    ]


def _read_indices(path: str, files: tensorstore.KvStore, manifest: Manifest) -> Iterator[bytes]:
    """The index of each shard; ValueError names one that was altered, and a file that is missing or has another size.

    Of the tokens only the last one's last byte is read.
    """
    reads = []
    for i, shard in enumerate(manifest.shards):
        for name, wanted, size in _files_of(i, shard, manifest):
            first = max(size - 1, 0) if name.endswith(".tokens") else 0
            reads.append((name, wanted, first, size, files.read(name, byte_range=slice(first, None))))
    for name, wanted, first, size, read in reads:
        value = _value(read, f"{path}: {name}")
        if len(value) != size - first:
            raise ValueError(f"{path}: {name} has {first + len(value):,} bytes or more instead of {size:,}; {CURE}")
        if name.endswith(".index"):
            _check_sum(path, name, wanted, [value])
            yield value


def _value(read: tensorstore.Future, what: str) -> bytes:
    """The bytes of a read; ValueError where there are none."""
    try:
        result = read.result()
    except ValueError as error:
        problem = "is shorter than it was" if "OUT_OF_RANGE" in str(error) else f"cannot be read ({error})"
        raise ValueError(f"{what} {problem}; {CURE}") from error
    if result.state != "value":
        raise ValueError(f"{what} is missing; {CURE}")
    return result.value


def _columns(index: bytes, documents: int) -> dict[str, np.ndarray]:
    columns, at = {}, 0
    for name, dtype in INDEX.items():
        columns[name] = np.frombuffer(index, dtype, documents, at)
        at += documents * dtype.itemsize
    return columns
