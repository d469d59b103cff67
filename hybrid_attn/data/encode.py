"""Encodes a group of input files as a part of a store: tokens, and loss masks where records may have pieces.

The worker processes of `prepare` run this.
"""

import collections
import contextlib
import dataclasses
import functools
import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from hybrid_attn.data import documents, loss_mask, parts, sources
from hybrid_attn.data.records import MAX_BYTES, Binary, Broken, Fields, Text
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
    tokenizer, group = _tokenizer(options.tokenizer), _Group(options)
    has_mask = options.fields.loss is not None
    names = ("tokens", "loss_mask") if has_mask else ("tokens",)
    with contextlib.ExitStack() as stack:
        outputs = [stack.enter_context(parts.writing(parts.path(folder, index, name))) for name in names]
        for batch in _batches(group.texts(pieces)):
            encoded = _encoded_with_mask(tokenizer, batch) if has_mask else [_encoded(tokenizer, batch)]
            group.columns["lengths"] += map(len, encoded[0])
            for output, arrays in zip(outputs, encoded, strict=True):
                output.write(np.concatenate(arrays).data)
    digests = {f"{name}_sha256": output.digest.hexdigest() for name, output in zip(names, outputs, strict=True)}
    archive = io.BytesIO()
    np.savez(archive, **{name: np.array(values, parts.COLUMNS[name]) for name, values in group.columns.items()})
    parts.write(parts.path(folder, index, "npz"), [archive.getbuffer()])
    part = {"sha256": digests.pop("tokens_sha256"), **digests, "labels": list(group.labels)}
    part |= {"skipped": group.skipped, "places": group.reasons[:REPORTED]}
    parts.write(parts.path(folder, index, "json"), [json.dumps(part).encode()])


def _encoded(tokenizer, batch: list[Text]) -> list[np.ndarray]:
    """The tokens of each text, from BOS to EOS."""
    return [documents.with_boundaries(tokenizer, ids) for ids in tokenizer.encode_batch([x.text for x in batch])]


def _encoded_with_mask(tokenizer, batch: list[Text]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The tokens of each text, and their loss masks."""
    encoded = tokenizer.encode_with_starts([x.text for x in batch])
    masks = [loss_mask.of_document(starts, x.pieces) for (_, starts), x in zip(encoded, batch, strict=True)]
    return [documents.with_boundaries(tokenizer, ids) for ids, _ in encoded], masks


class _Group:
    """What is known of the documents of a group of files after they are read: their columns, and what was skipped."""

    def __init__(self, options: Options):
        self.options = options
        self.columns, self.labels = {name: [] for name in parts.COLUMNS}, {}
        self.skipped, self.reasons = collections.Counter(), []

    def texts(self, pieces: list[tuple[str, int, int]]) -> Iterator[Text]:
        """The documents of `pieces` (file, start byte, stop byte) that have text."""
        options = self.options
        for path, start, stop in pieces:
            for result in sources.read(path, options.form, options.fields, start, stop, options.document_bytes):
                if isinstance(result, Broken | Binary):
                    self.skip(result)
                elif not result.text:
                    self.skipped["empty"] += 1
                else:
                    self.columns["hashes"].append(documents.content_hash(result.text))
                    self.columns["labels"].append(self.labels.setdefault(result.label or options.label, len(self.labels)))
                    self.columns["bytes"].append(len(result.text))
                    yield result

    def skip(self, result: Broken | Binary) -> None:
        """Counts what cannot be read; ValueError where the options say so."""
        too_long = isinstance(result, Broken) and result.too_long
        reason = f"{result.reason}, which --max_document_mb raises" if too_long else result.reason
        if isinstance(result, Broken) and self.options.on_error == "stop":
            raise ValueError(f"{reason}; continue with --on_error=skip, or repair it and use another --out")
        self.skipped["broken" if isinstance(result, Broken) else "binary"] += 1
        self.reasons.append(reason)


def _batches(texts: Iterable[Text]) -> Iterator[list[Text]]:
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
