"""The token store: documents of token ids in shards of raw files, on a disk or in a bucket.

    manifest.json           format, tokenizer, type of the ids, labels, and the sizes and checksums of the files of each shard
    shard-00000.tokens      the ids of all documents of the shard back to back, little-endian
    shard-00000.loss_mask   a byte for each token: 1 if it is trained on, else 0; only in a store with loss masks
    shard-00000.index       three arrays, one after the other: lengths int64 [n], hashes uint64 [n], labels uint16 [n]

Files are read through TensorStore's key-value stores, so a path may be a URL such as gs://bucket/corpus/.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import tensorstore

from hybrid_attn.data import loss_mask, shard_files
from hybrid_attn.data.documents import Documents, Span
from hybrid_attn.data.loss_mask import LossMask
from hybrid_attn.files import JSON_BYTES

FORMAT = 1
MANIFEST = "manifest.json"
PLAN = "plan.json"  # of a store that is being prepared
DTYPES = ("<u2", "<u4")
CURE = "copy the file again, or prepare the store again"
MAX_COUNT = 2**48  # documents or tokens of a shard; their sums stay far below 2^63
INDEX = {"lengths": np.dtype("<i8"), "hashes": np.dtype("<u8"), "labels": np.dtype("<u2")}


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
    """The content of manifest.json. `summary` has the counts of `prepare`, `tokenizer` the name that `prepare` got."""

    format: int
    tokenizer: str
    tokenizer_hash: str
    dtype: str
    label_names: tuple[str, ...]
    shards: tuple[Shard, ...]
    summary: dict

    def to_json(self) -> str:
        values = dataclasses.asdict(self)
        if not self.has_loss_mask:
            for shard in values["shards"]:
                del shard["loss_mask_sha256"]
        return json.dumps(values, indent=1, ensure_ascii=False) + "\n"

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
    files, manifest = _open(path)
    if tokenizer is not None and tokenizer.hash != manifest.tokenizer_hash:
        raise ValueError(
            f"{path} was made by the tokenizer {manifest.tokenizer!r} of hash {manifest.tokenizer_hash[:12]}, and that of the "
            f"run has hash {tokenizer.hash[:12]}; set data.tokenizer to the former, or prepare the text again with the latter"
        )
    shards = list(_read_indices(path, files, manifest))
    columns = {name: np.concatenate([shard[name] for shard in shards]) for name in INDEX}
    dtype, reader = np.dtype(manifest.dtype), _Reader(path, files, manifest, columns["lengths"])

    def fetch(spans: Sequence[Span]) -> list[np.ndarray]:
        read = reader.read(spans, "tokens", dtype)
        if tokenizer is not None and _largest(read) >= tokenizer.vocab_size:
            reader.check("tokens", spans, read, lambda ids, start: _unknown_id(ids, start, tokenizer))
        return read

    def fetch_mask(spans: Sequence[Span]) -> list[np.ndarray]:
        read = reader.read(spans, "loss_mask", loss_mask.DTYPE)
        if _largest(read) > 1:
            reader.check("loss_mask", spans, read, loss_mask.problem)
        return read

    fingerprint = "".join(shard.loss_mask_sha256 or "" for shard in manifest.shards)
    mask = LossMask(fetch_mask, fingerprint) if manifest.has_loss_mask else None
    return Documents(**columns, label_names=manifest.label_names, dtype=dtype, fetch=fetch, loss_mask=mask)


class _Reader:
    """Reads spans of the files that hold a value for each token."""

    def __init__(self, path: str, files: tensorstore.KvStore, manifest: Manifest, lengths: np.ndarray):
        self.path, self.files, self.lengths, self.ends = path, files, lengths, np.cumsum(lengths)
        self.documents = np.concatenate([[0], np.cumsum([shard.documents for shard in manifest.shards])])
        self.tokens = np.concatenate([[0], np.cumsum([shard.tokens for shard in manifest.shards])])

    def shard_of(self, document: int) -> int:
        return int(np.searchsorted(self.documents, document, side="right")) - 1

    def read(self, spans: Sequence[Span], suffix: str, dtype: np.dtype) -> list[np.ndarray]:
        """The values of each span, from the files with this suffix."""
        pending = []
        for i, start, stop in spans:
            shard = self.shard_of(i)
            name = shard_files.name(shard, suffix)
            first = int(self.ends[i] - self.lengths[i] - self.tokens[shard]) + start
            byte_range = slice(first * dtype.itemsize, (first + stop - start) * dtype.itemsize)
            pending.append((name, self.files.read(name, byte_range=byte_range)))
        return [np.frombuffer(_value(read, f"{self.path}: {name}"), dtype) for name, read in pending]

    def check(self, suffix: str, spans: Sequence[Span], values: list[np.ndarray], problem: Callable) -> None:
        """ValueError names the document with the first `problem(values, start)`."""
        for (i, start, _), of_span in zip(spans, values, strict=True):
            if message := problem(of_span, start):
                name = shard_files.name(self.shard_of(i), suffix)
                raise ValueError(f"{self.path}: {name}, document {i}: {message}; {CURE}")


def read_manifest(path: str) -> Manifest:
    """The manifest of the store at `path`; ValueError if there is none, or one of another format."""
    return _open(path)[1]


def verify(path: str, tokenizer=None) -> Iterator[int]:
    """Yields the number of each shard after its files agree with the manifest; ValueError names the first file that does not.

    A loss mask must have the values 0 and 1 alone. With the tokenizer of the store, every id must be in its vocabulary, and
    every document must go from BOS to EOS.
    """
    files, manifest = _open(path)
    for i, (shard, index) in enumerate(zip(manifest.shards, _read_indices(path, files, manifest), strict=True)):
        for name, checksum, size in _files_of(i, shard, manifest):
            ranges = (slice(start, min(start + shard_files.BLOCK, size)) for start in range(0, size, shard_files.BLOCK))
            blocks, problems = (_value(files.read(name, byte_range=x), f"{path}: {name}") for x in ranges), []
            if name == shard_files.name(i, "tokens") and tokenizer is not None:
                blocks = _checked_ids(blocks, np.dtype(manifest.dtype), index["lengths"], tokenizer, problems)
            elif name == shard_files.name(i, "loss_mask"):
                blocks = _checked_mask(blocks, problems)
            elif name == shard_files.name(i, "index"):
                continue  # `_read_indices` has compared its checksum
            _check_sum(path, name, checksum, blocks)
            if problems:
                raise ValueError(f"{path}: {name}: {problems[0]}; {CURE}")
        yield i


def _checked_mask(blocks: Iterable[bytes], problems: list) -> Iterator[bytes]:
    """Yields the `blocks` of a loss mask, and appends to `problems` what is neither 0 nor 1."""
    first = 0
    for block in blocks:
        yield block
        problems += filter(None, [loss_mask.problem(np.frombuffer(block, loss_mask.DTYPE), first)])
        first += len(block)


def _checked_ids(blocks: Iterable[bytes], dtype: np.dtype, lengths: np.ndarray, tokenizer, problems: list) -> Iterator[bytes]:
    """Yields the `blocks` of a token file, and appends to `problems` what does not fit the lengths or the tokenizer."""
    ends = np.cumsum(lengths)
    boundaries = [("BOS", tokenizer.bos, ends - lengths), ("EOS", tokenizer.eos, ends - 1)]
    first = 0
    for block in blocks:
        yield block
        ids = np.frombuffer(block, dtype)
        problems += filter(None, [_unknown_id(ids, first, tokenizer), _missing_boundary(ids, first, boundaries)])
        first += len(ids)


def _largest(arrays: list[np.ndarray]) -> int:
    """The largest of all ids, or 0."""
    if sum(map(len, arrays)) < 4096 * len(arrays):  # one copy of short arrays costs less than a call for each
        arrays = [np.concatenate(arrays)]
    return max((int(np.maximum.reduce(x)) for x in arrays if len(x)), default=0)


def _unknown_id(ids: np.ndarray, first: int, tokenizer) -> str | None:
    """The problem if an id is not in the vocabulary. `ids` are tokens of a document or shard, of which the first is `first`."""
    if not len(ids) or ids.max() < tokenizer.vocab_size:
        return None
    i = int(np.argmax(ids >= tokenizer.vocab_size))
    return f"token {first + i:,} has the id {int(ids[i])}, and the largest of the tokenizer is {tokenizer.vocab_size - 1}"


def _missing_boundary(ids: np.ndarray, first: int, boundaries: Iterable[tuple[str, int, np.ndarray]]) -> str | None:
    """The problem if BOS or EOS is not at its sorted positions in a shard. `ids` are its tokens from `first` on."""
    for name, expected, positions in boundaries:
        offsets = positions[slice(*np.searchsorted(positions, (first, first + len(ids))))] - first
        wrong = offsets[ids[offsets] != expected]
        if len(wrong):
            return f"token {first + wrong[0]:,} is {int(ids[wrong[0]])}, and by the index it is {name} ({expected})"
    return None


def _check_sum(path: str, name: str, expected: str, blocks: Iterable[bytes]) -> None:
    if sha256(blocks) != expected:
        raise ValueError(f"{path}: the checksum of {name} differs from the manifest's, so the file was changed; {CURE}")


def sha256(blocks: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for block in blocks:
        digest.update(block)
    return digest.hexdigest()


def _open(path: str) -> tuple[tensorstore.KvStore, Manifest]:
    local = {
        "driver": "file",
        "path": os.path.abspath(os.path.expanduser(path)) + "/",
    }  # not a URL, in which # and % have a meaning
    try:
        files = tensorstore.KvStore.open(path.rstrip("/") + "/" if "://" in path else local).result()
        plan = files.read(PLAN, byte_range=slice(0, 0))
        if _has_byte(files.read(MANIFEST, byte_range=slice(JSON_BYTES, JSON_BYTES + 1))):
            raise ValueError(f"its {MANIFEST} has more than {JSON_BYTES:,} bytes; {CURE}")
        manifest, plan = files.read(MANIFEST).result(), plan.result()
    except ValueError as error:  # the library raises no other
        raise ValueError(f"{path} cannot be read as a token store: {error}") from error
    if manifest.state != "value" and plan.state == "value":
        raise ValueError(f"{path} is not finished; the same command of tools/prepare_data.py continues it")
    if manifest.state != "value":
        raise ValueError(f"{path} is not a token store: it has no {MANIFEST}; make one with tools/prepare_data.py")
    try:
        return files, _manifest(json.loads(manifest.value))
    except (KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path}/{MANIFEST} is damaged: {error}; {CURE}") from error


def _manifest(values: dict) -> Manifest:
    """The manifest in a JSON value; KeyError, TypeError or ValueError if it is not one."""
    if values["format"] != FORMAT:
        raise ValueError(f"it has format {values['format']}, and this code reads {FORMAT}")
    if values["dtype"] not in DTYPES:
        raise ValueError(f"its ids have type {values['dtype']!r}, which must be {' or '.join(DTYPES)}")
    shards = tuple(Shard(**shard) for shard in values["shards"])
    manifest = Manifest(**values | {"shards": shards, "label_names": tuple(values["label_names"])})
    counts = [count for shard in shards for count in (shard.documents, shard.tokens)]
    texts = [manifest.tokenizer, manifest.tokenizer_hash, *manifest.label_names]
    texts += [text for shard in shards for text in (shard.tokens_sha256, shard.index_sha256)]
    masks = [shard.loss_mask_sha256 for shard in shards]
    texts += [text for text in masks if text is not None]
    for ok, problem in (
        (all(type(count) is int for count in counts), "its counts of documents and tokens are not all whole numbers"),
        (all(isinstance(text, str) for text in texts), "its names and checksums are not all strings"),
        (isinstance(values["label_names"], list), "its label_names are not a list"),
        (isinstance(manifest.summary, dict), "its summary is not an object"),
        (bool(shards), "it has no shards"),
        (masks.count(None) in (0, len(masks)), "some of its shards have a loss mask and others have none"),
    ):
        if not ok:
            raise ValueError(problem)
    for i, shard in enumerate(shards):
        if not 0 <= shard.documents <= shard.tokens <= MAX_COUNT:
            raise ValueError(f"shard {i} has {shard.documents:,} documents of {shard.tokens:,} tokens, which is impossible")
    return manifest


def _files_of(index: int, shard: Shard, manifest: Manifest) -> list[tuple[str, str, int]]:
    """Name, SHA-256 and bytes of the files of a shard."""
    document_size = sum(dtype.itemsize for dtype in INDEX.values())
    size = shard.tokens * np.dtype(manifest.dtype).itemsize
    mask = [(shard_files.name(index, "loss_mask"), shard.loss_mask_sha256, shard.tokens)] if manifest.has_loss_mask else []
    return [
        (shard_files.name(index, "tokens"), shard.tokens_sha256, size),
        *mask,
        (shard_files.name(index, "index"), shard.index_sha256, shard.documents * document_size),
    ]


def _read_indices(path: str, files: tensorstore.KvStore, manifest: Manifest) -> Iterator[dict[str, np.ndarray]]:
    """The columns of the index of each shard; ValueError names a file that is missing or has another size, or a wrong index.

    Of the tokens and masks only the last byte is read. Of a file that is too long, one byte after its expected end is read.
    """
    reads = []
    for i, shard in enumerate(manifest.shards):
        for name, checksum, size in _files_of(i, shard, manifest):
            first = 0 if name.endswith(".index") else max(size - 1, 0)
            ranges = slice(first, size), slice(size, size + 1)
            reads.append((shard, name, checksum, size, *[files.read(name, byte_range=x) for x in ranges]))
    for shard, name, checksum, size, read, behind in reads:
        value = _value(read, f"{path}: {name}")
        if _has_byte(behind):
            raise ValueError(f"{path}: {name} has more than its {size:,} bytes; {CURE}")
        if name.endswith(".index"):
            _check_sum(path, name, checksum, [value])
            columns = _columns(value, shard.documents)
            _check_index(f"{path}: {name}", columns, shard, manifest.label_names)
            yield columns


def _value(read: tensorstore.Future, what: str) -> bytes:
    """The bytes of a read; ValueError if it failed."""
    try:
        result = read.result()
    except ValueError as error:
        problem = "is shorter than the manifest says" if "OUT_OF_RANGE" in str(error) else f"cannot be read ({error})"
        raise ValueError(f"{what} {problem}; {CURE}") from error
    if result.state != "value":
        raise ValueError(f"{what} is missing; {CURE}")
    return result.value


def _has_byte(read: tensorstore.Future) -> bool:
    """Whether a read of one byte gave one; ValueError if the read failed."""
    try:
        return bool(read.result().value)
    except ValueError as error:
        if "OUT_OF_RANGE" in str(error):
            return False
        raise


def _check_index(what: str, columns: dict[str, np.ndarray], shard: Shard, label_names: tuple[str, ...]) -> None:
    """ValueError where the index of a shard contradicts the manifest."""
    lengths, labels = columns["lengths"], columns["labels"]
    shortest, longest = lengths.min(initial=MAX_COUNT), lengths.max(initial=0)
    if shortest < 1 or longest > shard.tokens:
        length = shortest if shortest < 1 else longest
        raise ValueError(f"{what} has a document of {length:,} tokens, and the shard has {shard.tokens:,}; {CURE}")
    # In halves: a sum of wrong lengths could overflow int64 and still be equal.
    tokens = (int((lengths >> 24).sum()) << 24) + int((lengths & (2**24 - 1)).sum())
    if tokens != shard.tokens:
        raise ValueError(f"{what} has {tokens:,} tokens, and the manifest {shard.tokens:,}; {CURE}")
    if len(labels) and labels.max() >= len(label_names):
        raise ValueError(f"{what} has the label {labels.max()}, and the manifest {len(label_names)} labels from 0; {CURE}")


def _columns(index: bytes, documents: int) -> dict[str, np.ndarray]:
    columns, offset = {}, 0
    for name, dtype in INDEX.items():
        columns[name] = np.frombuffer(index, dtype, documents, offset)
        offset += documents * dtype.itemsize
    return columns
