"""The parts of a store that is being prepared: tokens, loss masks and columns of the documents of a group of input files.

The worker processes of `prepare` write them. A later run reads those that are finished, after a kill or a disk failure.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hybrid_attn import files
from hybrid_attn.data import conversations, documents, sources, store
from hybrid_attn.data.conversations import Chat, Conversation
from hybrid_attn.data.records import MAX_BYTES, Binary, Broken, Fields, Text, loss_mask
from hybrid_attn.data.tokenizer import load_tokenizer
from hybrid_attn.trees import check

FOLDER = "parts"
COLUMNS = {"lengths": np.int64, "hashes": np.uint64, "labels": np.int64, "bytes": np.int64}  # of each document
DAMAGE = (
    AttributeError, EOFError, FileNotFoundError, LookupError, NotImplementedError, OverflowError, RecursionError, TypeError,
    ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip
ENCODED = 2**20  # bytes of text that a tokenizer encodes at a time
REPORTED = 20  # skipped documents of a part that are named


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that, with the input files, determine the content of a store.

    Without `form` the suffix of each file decides. `label` is that of documents without one in `fields`. `on_error` is "skip"
    or "stop". A shard gets at most `shard_bytes` of input unless a file cannot be split; None goes by the total size. A line, a
    text in a table and a decompressed text file have at most `document_bytes`. With `chat`, records hold conversations or
    pairs, and of `fields` only the label counts.
    """

    tokenizer: str
    fields: Fields
    form: str | None
    label: str
    drop_duplicates: bool
    on_error: str
    shard_bytes: int | None
    document_bytes: int = MAX_BYTES
    chat: Chat | None = None

    @property
    def has_mask(self) -> bool:
        return self.fields.loss is not None or self.chat is not None

    @property
    def pairs(self) -> bool:
        return self.chat is not None and self.chat.pairs


_tokenizer = functools.cache(load_tokenizer)


def encode(folder: Path, index: int, pieces: list[tuple[str, int, int]], options: Options) -> None:
    """Writes part `index`, with all documents of `pieces`."""
    tokenizer = _tokenizer(options.tokenizer)
    group, names = _Group(options, tokenizer), ("tokens", "loss_mask") if options.has_mask else ("tokens",)
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(writing(path(folder, index, name))) for name in names]
        for batch in _batches(group.texts(pieces)):
            encoded = _encoded(tokenizer, batch, options.has_mask)
            group.columns["lengths"] += map(len, encoded[0])
            for output, arrays in zip(outputs, encoded, strict=True):
                output.write(np.concatenate(arrays).data)
    digests = {f"{name}_sha256": output.digest.hexdigest() for name, output in zip(names, outputs, strict=True)}
    with writing(path(folder, index, "npz")) as output:
        np.savez(output.file, **{name: np.array(values, COLUMNS[name]) for name, values in group.columns.items()})
    part = {"sha256": digests.pop("tokens_sha256"), **digests, "labels": list(group.labels)}
    part |= {"skipped": group.skipped, "places": group.reasons[:REPORTED]}
    write(path(folder, index, "json"), [json.dumps(part).encode()])


def _encoded(tokenizer, batch: list[Text | Conversation], has_mask: bool) -> list[list[np.ndarray]]:
    """The tokens of each document, from BOS to EOS; with `has_mask`, their loss masks too."""
    if isinstance(batch[0], Conversation):
        halves = [half for x in batch for half in x.documents]
        return [[half.tokens for half in halves], [half.mask for half in halves]]
    texts = [x.text for x in batch]
    if not has_mask:
        return [[documents.with_boundaries(tokenizer, ids) for ids in tokenizer.encode_batch(texts)]]
    encoded = tokenizer.encode_with_starts(texts)
    masks = [loss_mask(starts, x.pieces) for (_, starts), x in zip(encoded, batch, strict=True)]
    return [[documents.with_boundaries(tokenizer, ids) for ids, _ in encoded], masks]


class _Group:
    """What is known of the documents of a group of files once they are read: their columns, and what was skipped."""

    def __init__(self, options: Options, tokenizer):
        self.options, self.reader = options, options.fields
        if options.chat is not None:
            self.reader = conversations.Reader(options.chat, options.fields.label, tokenizer)
        self.columns, self.labels = {name: [] for name in COLUMNS}, {}
        self.skipped, self.reasons = collections.Counter(), []

    def texts(self, pieces: list[tuple[str, int, int]]) -> Iterator[Text | Conversation]:
        """The documents of `pieces` (file, start byte, stop byte) that have text."""
        options = self.options
        for path, start, stop in pieces:
            for result in sources.read(path, options.form, self.reader, start, stop, options.document_bytes):
                if isinstance(result, Broken | Binary):
                    self.skip(result)
                elif not result.text:
                    self.skipped["empty"] += 1
                else:
                    label = self.labels.setdefault(result.label or options.label, len(self.labels))
                    self.columns["hashes"] += [documents.content_hash(result.text)] * len(result.sizes)
                    self.columns["labels"] += [label] * len(result.sizes)
                    self.columns["bytes"] += result.sizes
                    yield result

    def skip(self, result: Broken | Binary) -> None:
        """Counts what cannot be read; ValueError where the options say so."""
        too_long = isinstance(result, Broken) and result.too_long
        reason = f"{result.reason}, which --max_document_mb raises" if too_long else result.reason
        if isinstance(result, Broken) and self.options.on_error == "stop":
            raise ValueError(f"{reason}; continue with --on_error=skip, or repair it and use another --out")
        self.skipped["broken" if isinstance(result, Broken) else "binary"] += 1
        self.reasons.append(reason)


def _batches(texts: Iterable[Text | Conversation]) -> Iterator[list[Text | Conversation]]:
    """Consecutive texts, about `ENCODED` bytes at a time."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text.text)
        if size >= ENCODED:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def path(folder: Path, index: int, suffix: str) -> Path:
    """A file of a part: `tokens`, their `loss_mask`, columns in `npz`, or labels, checksums and skipped documents in `json`."""
    return folder / FOLDER / store.file_name(index, suffix)


def columns(folder: Path, index: int) -> dict[str, np.ndarray]:
    """The `COLUMNS` of a part, each [n]."""
    with np.load(path(folder, index, "npz")) as arrays:
        return {name: arrays[name] for name in COLUMNS}


def read(folder: Path, index: int, token_bytes: int, has_mask: bool) -> dict:
    """The content of the JSON file of a part; ValueError if one of its files is damaged. A token has `token_bytes` bytes."""
    json_path = path(folder, index, "json")
    try:
        part = json.loads(json_path.read_text())
        tokens = path(folder, index, "tokens").stat().st_size // token_bytes
        _check(part, columns(folder, index), tokens)
        masked = path(folder, index, "loss_mask").stat().st_size if has_mask else tokens
        check(masked == tokens, f"its loss mask has {masked:,} tokens, and not {tokens:,}")
        return part
    except DAMAGE as error:
        cure = f"delete {json_path}, and the same command makes the part again"
        raise ValueError(f"the part {json_path.with_suffix('')} is damaged: {error!r}; {cure}") from error


def _check(part: dict, x: dict[str, np.ndarray], tokens: int) -> None:
    n, names = len(x["lengths"]), part["labels"]
    strings = [part["sha256"], part.get("loss_mask_sha256", ""), *names, *part["places"], *part["skipped"]]
    columns_fit = all(x[name].dtype == dtype and x[name].shape == (n,) for name, dtype in COLUMNS.items())
    counts_fit = x["lengths"].min(initial=1) >= 1 and x["lengths"].sum() == tokens
    check(all(isinstance(x, str) for x in strings), "a label, reason or checksum is not a string")
    check(all(type(count) is int for count in part["skipped"].values()), "a count is not a whole number")
    check(columns_fit, "its columns differ")
    check(counts_fit, f"its documents do not have {tokens:,} tokens")
    check(x["bytes"].min(initial=0) >= 0, "a document has a negative number of bytes")
    check(x["labels"].min(initial=0) >= 0 and x["labels"].max(initial=-1) < len(names), "a document's label is unknown")


class Output:
    """A file that is being written, and the SHA-256 of what was written to it."""

    def __init__(self, file: BinaryIO):
        self.file, self.digest = file, hashlib.sha256()

    def write(self, block) -> None:
        self.file.write(block)
        self.digest.update(block)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Output]:
    """A file to write to. It appears at `path` when the context ends without an error."""
    with files.opened_atomically(path, f"partial{os.getpid()}") as file:  # a worker of a killed run may still write it
        yield Output(file)


def write(path: Path, blocks: Iterable) -> str:
    """Writes a file atomically and returns its SHA-256."""
    with writing(path) as output:
        for block in blocks:
            output.write(block)
    return output.digest.hexdigest()
