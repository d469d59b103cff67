"""Encodes a group of input files as a part of a store. The worker processes of `prepare` run this."""

import collections
import dataclasses
import functools
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hybrid_attn.data import documents, parts, sources
from hybrid_attn.data.records import MAX_BYTES, Binary, Broken, Fields
from hybrid_attn.data.tokenizer import load_tokenizer

ENCODED = 2**20  # bytes of text that a tokenizer encodes at a time
REPORTED = 20  # skipped documents of a part that are named


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that determine the content of a store, together with its input files.

    Without `form` the suffix of each file decides. `label` is the label of documents without one in `fields`. `on_error` is
    "skip" or "stop". A shard gets at most `shard_bytes` of input unless a file cannot be split; None goes by the total size. A
    line, a text in a table and a decompressed text file have at most `document_bytes`.
    """

    tokenizer: str
    fields: Fields
    form: str | None
    label: str
    drop_duplicates: bool
    on_error: str
    shard_bytes: int | None
    document_bytes: int = MAX_BYTES


_tokenizer = functools.cache(load_tokenizer)


def encode_shard(folder: Path, index: int, pieces: list[tuple[str, int, int]], options: Options) -> None:
    """Writes part `index`, with all documents of `pieces`."""
    tokenizer = _tokenizer(options.tokenizer)
    dtype = documents.token_dtype(tokenizer.vocab_size)
    columns, labels = {name: [] for name in parts.COLUMNS}, {}
    skipped, reasons = collections.Counter(), []

    def texts() -> Iterator[bytes]:
        for path, start, stop in pieces:
            for result in sources.read(path, options.form, options.fields, start, stop, options.document_bytes):
                if isinstance(result, Broken):
                    reason = f"{result.reason}, which --max_document_mb raises" if result.too_long else result.reason
                    if options.on_error == "stop":
                        raise ValueError(f"{reason}; continue with --on_error=skip, or repair it and use another --out")
                    skipped["broken"] += 1
                    reasons.append(reason)
                elif isinstance(result, Binary):
                    skipped["binary"] += 1
                    reasons.append(result.reason)
                elif not result.text:
                    skipped["empty"] += 1
                else:
                    columns["hashes"].append(documents.content_hash(result.text))
                    columns["labels"].append(labels.setdefault(result.label or options.label, len(labels)))
                    columns["bytes"].append(len(result.text))
                    yield result.text

    def blocks() -> Iterator[bytes]:
        for batch in _batches(texts()):
            encoded = tokenizer.encode_batch(batch)
            lengths = [len(ids) + 2 for ids in encoded]
            columns["lengths"] += lengths
            tokens = np.empty(sum(lengths), dtype)
            first = 0
            for ids, length in zip(encoded, lengths, strict=True):
                last = first + length - 1
                tokens[first], tokens[first + 1 : last], tokens[last] = tokenizer.bos, ids, tokenizer.eos
                first += length
            yield tokens.data

    digest = parts.write(parts.path(folder, index, "tokens"), blocks())
    archive = io.BytesIO()
    np.savez(archive, **{name: np.array(values, parts.COLUMNS[name]) for name, values in columns.items()})
    parts.write(parts.path(folder, index, "npz"), [archive.getbuffer()])
    part = {"sha256": digest, "labels": list(labels), "skipped": skipped, "places": reasons[:REPORTED]}
    parts.write(parts.path(folder, index, "json"), [json.dumps(part).encode()])


def _batches(texts: Iterable[bytes]) -> Iterator[list[bytes]]:
    """Consecutive texts, about `ENCODED` bytes at a time."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= ENCODED:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
