"""The parts of a store that is being prepared, as a later run finds them: after a kill or a fault of the disk."""

import json
import zipfile
import zlib
from pathlib import Path

import numpy as np

FOLDER = "parts"
COLUMNS = {"lengths": np.int64, "hashes": np.uint64, "labels": np.int64, "bytes": np.int64}  # of each document
DAMAGE = (
    AttributeError, EOFError, FileNotFoundError, LookupError, NotImplementedError, OverflowError, RecursionError, TypeError,
    ValueError, zipfile.BadZipFile, zlib.error,
)  # fmt: skip


def path(folder: Path, index: int, kind: str) -> Path:
    """The file of a part: its `tokens`, `npz` of columns, or `json` of the rest."""
    return folder / FOLDER / f"shard-{index:05}.{kind}"


def columns(folder: Path, index: int) -> dict[str, np.ndarray]:
    """The `COLUMNS` of a part, each [n]."""
    with np.load(path(folder, index, "npz")) as found:
        return {name: found[name] for name in COLUMNS}


def read(folder: Path, index: int, token_bytes: int) -> dict:
    """What the JSON file of a part holds; ValueError where one of its files is damaged. A token has `token_bytes`."""
    json_path = path(folder, index, "json")
    try:
        part = json.loads(json_path.read_text())
        _check(part, columns(folder, index), path(folder, index, "tokens").stat().st_size // token_bytes)
        return part
    except DAMAGE as error:
        cure = f"delete {json_path}, and the same command makes the part again"
        raise ValueError(f"the part {json_path.with_suffix('')} is damaged: {error!r}; {cure}") from error


def _check(part: dict, x: dict[str, np.ndarray], tokens: int) -> None:
    n, names = len(x["lengths"]), part["labels"]
    texts = [part["sha256"], *names, *part["places"], *part["skipped"]]
    for ok, what in (
        (all(isinstance(text, str) for text in texts), "a label, place or checksum is no text"),
        (all(type(count) is int for count in part["skipped"].values()), "a count is no number"),
        (all(x[name].dtype == dtype and x[name].shape == (n,) for name, dtype in COLUMNS.items()), "its columns differ"),
        (x["lengths"].min(initial=1) >= 1 and x["lengths"].sum() == tokens, f"its documents do not have {tokens:,} tokens"),
        (x["bytes"].min(initial=0) >= 0, "a document has less than no bytes"),
        (x["labels"].min(initial=0) >= 0 and x["labels"].max(initial=-1) < len(names), "a document's label is unknown"),
    ):
        if not ok:
            raise ValueError(what)
