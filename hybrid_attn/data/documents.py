"""Text files as documents of token ids, some of them held out."""

import concurrent.futures
import dataclasses
import glob
import hashlib
import os
import re
import sysconfig

import numpy as np

from hybrid_attn import config

NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(frozen=True, eq=False)
class Documents:
    """Documents back to back: document i is `tokens[offsets[i]:offsets[i + 1]]`, from its bos to its eos.

    `tokens` is uint16 or uint32 [sum of lengths], `offsets` int64 [n + 1], `names` has n entries.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    names: tuple[str, ...]


def load(data: config.Data, tokenizer, heldout: bool) -> Documents:
    """The documents of one split, each file whole; ValueError where the split is empty or a file does not encode."""
    found = find(data.paths)
    chosen = [(name, path) for name, path in found if is_held_out(name, data.holdout) == heldout]
    if not chosen:
        split = "held-out" if heldout else "training"
        raise ValueError(
            f"data.holdout={data.holdout} leaves none of the {len(found)} documents to the {split} split; "
            f"{'raise' if heldout else 'lower'} data.holdout, or cut the text into more files"
        )
    with concurrent.futures.ThreadPoolExecutor() as pool:
        documents = list(pool.map(lambda item: _encode(item[1], tokenizer), chosen))
    offsets = np.zeros(len(documents) + 1, np.int64)
    np.cumsum([len(tokens) for tokens in documents], out=offsets[1:])
    return Documents(np.concatenate(documents), offsets, tuple(name for name, _ in chosen))


def find(paths: tuple[str, ...]) -> list[tuple[str, str]]:
    """Name and path of each file that holds text, in an order that is the same on every machine.

    No `paths` means the sources of this interpreter's standard library. A file that several patterns match, or that
    links point to, is one document.
    """
    if not paths:
        return _standard_library()
    files = {}
    for pattern in paths:
        for name, path in _matches(os.path.expanduser(pattern)):
            files.setdefault(os.path.realpath(path), (name, path))
    texts = [(name, path) for name, path in files.values() if os.path.getsize(path)]
    if not texts:
        raise ValueError(f"data.paths={paths} matches {len(files)} files and all are empty; name files with text")
    return texts


def is_held_out(name: str, holdout: float) -> bool:
    """Whether the document `name` is held out: its own hash decides, so other documents come and go without effect."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < holdout * 2**64


def _matches(pattern: str) -> list[tuple[str, str]]:
    """Sorted names and paths of the files that `pattern` matches; names start where its fixed folders end."""
    if os.path.isdir(pattern):
        raise ValueError(f"data.paths: {pattern!r} is a directory; use {os.path.join(pattern, '**')!r} for all its files")
    paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not paths:
        raise ValueError(f"data.paths: {pattern!r} matches no file, seen from {os.getcwd()}; correct the path or pattern")
    root = os.path.dirname(re.split(r"[*?[]", pattern, maxsplit=1)[0]) or os.curdir
    return sorted((os.path.relpath(path, root).replace(os.sep, "/"), path) for path in paths)


def _standard_library() -> list[tuple[str, str]]:
    """Sorted names and paths of the standard library's sources.

    Left out are empty ones and the few test fixtures that are not UTF-8, so that every tokenizer reads the same corpus.
    """
    root = sysconfig.get_path("stdlib")
    found = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = set(subfolders) - NOT_SOURCES
        paths = [os.path.join(folder, file) for file in files if file.endswith(".py")]
        found += [(os.path.relpath(path, root).replace(os.sep, "/"), path) for path in paths if _is_text(path)]
    if not found:
        raise ValueError(f"the standard library at {root} has no .py sources; name text files in data.paths")
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


def _encode(path: str, tokenizer) -> np.ndarray:
    """bos, the file's ids, eos in the narrowest type that holds the vocabulary."""
    try:
        ids = tokenizer.encode(_read(path))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 at byte {error.start}, and a tokenizer.json reads text; "
            "convert the file, leave it out of data.paths, or use data.tokenizer='bytes'"
        ) from error
    tokens = np.empty(len(ids) + 2, np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)
    tokens[0], tokens[1:-1], tokens[-1] = tokenizer.bos, ids, tokenizer.eos
    return tokens
