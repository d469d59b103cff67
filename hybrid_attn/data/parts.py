"""The finished parts of a store that is being prepared. A later run reads them after a kill or a disk failure."""

import contextlib
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
from hybrid_attn.data import shard_files

FOLDER = "parts"
COLUMNS = {"lengths": np.int64, "hashes": np.uint64, "labels": np.int64, "bytes": np.int64}  # of each document
DAMAGE = (
    AttributeError, EOFError, FileNotFoundError, LookupError, NotImplementedError, OverflowError, RecursionError, TypeError,
    ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def path(folder: Path, index: int, suffix: str) -> Path:
    """A file of a part: `tokens`, their `loss_mask`, columns in `npz`, or labels, checksums and skipped documents in `json`."""
    return folder / FOLDER / shard_files.name(index, suffix)


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
        if has_mask and (size := path(folder, index, "loss_mask").stat().st_size) != tokens:
            raise ValueError(f"its loss mask has {size:,} tokens, and not {tokens:,}")
        return part
    except DAMAGE as error:
        cure = f"delete {json_path}, and the same command makes the part again"
        raise ValueError(f"the part {json_path.with_suffix('')} is damaged: {error!r}; {cure}") from error


def _check(part: dict, x: dict[str, np.ndarray], tokens: int) -> None:
    n, names = len(x["lengths"]), part["labels"]
    strings = [part["sha256"], part.get("loss_mask_sha256", ""), *names, *part["places"], *part["skipped"]]
    for ok, problem in (
        (all(isinstance(x, str) for x in strings), "a label, reason or checksum is not a string"),
        (all(type(count) is int for count in part["skipped"].values()), "a count is not a whole number"),
        (all(x[name].dtype == dtype and x[name].shape == (n,) for name, dtype in COLUMNS.items()), "its columns differ"),
        (x["lengths"].min(initial=1) >= 1 and x["lengths"].sum() == tokens, f"its documents do not have {tokens:,} tokens"),
        (x["bytes"].min(initial=0) >= 0, "a document has a negative number of bytes"),
        (x["labels"].min(initial=0) >= 0 and x["labels"].max(initial=-1) < len(names), "a document's label is unknown"),
    ):
        if not ok:
            raise ValueError(problem)


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
