"""Reads documents from files: plain text and source code, JSON lines, Parquet, and Hugging Face datasets on disk."""

import codecs
import contextlib
import functools
import glob
import gzip
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator

from hybrid_attn.data import records
from hybrid_attn.data.records import MAX_BYTES, Binary, Broken, Fields, Text
from hybrid_attn.trees import check

TABLES = {"parquet": records.parquet, "arrow": records.arrow}
FORMATS = ("text", "jsonl", *TABLES)
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
COMPRESSED = (".gz", ".zst")
DAMAGE = (EOFError, OSError, zlib.error)  # errors where a compressed file is damaged or truncated
BUFFER = 2**20  # bytes of a file in memory at a time
NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__"}
SKIPPED_FOLDERS = NOT_SOURCES | {"node_modules"}
SNIFFED = 8192  # bytes that decide whether a file is text, as in git
# How binary formats begin that may have no zero byte there: gzip, bzip2, xz, zstd, zip, Parquet, PDF, UTF-16.
BINARY = re.compile(rb"\x1f\x8b|BZh[1-9]1AY&SY|\xfd7zXZ|\x28\xb5\x2f\xfd|PK\x03\x04|PAR1|%PDF-|\xff\xfe|\xfe\xff")


def find(inputs: Iterable[str]) -> list[str]:
    """The paths of all files of `inputs`, each once, in an order that is the same on every machine.

    An input is a glob pattern, a directory that the library datasets saved, or another directory: all files under it that are
    not hidden and not in caches or installed packages. ValueError if an input has no file.
    """
    paths = {}
    for name in map(os.path.expanduser, inputs):
        for path in _files_under(name) if os.path.isdir(name) else _matches(name):
            paths.setdefault(os.path.realpath(path), path)
    return list(paths.values())


def _matches(pattern: str) -> list[str]:
    """The files that `pattern` matches, sorted by their paths below the last folder before a wildcard."""
    paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    check(bool(paths), f"{pattern!r} matches no file; the working directory is {os.getcwd()}; correct the path or pattern")
    root = os.path.dirname(re.split(r"[*?[]", pattern, maxsplit=1)[0]) or os.curdir
    return sorted_below(root, paths)


def format_of(path: str) -> str:
    """The format by the suffix of a path: .jsonl and .ndjson, compressed .json, .parquet, .arrow; all others are text."""
    stem, compression = os.path.splitext(path) if path.endswith(COMPRESSED) else (path, "")
    suffix = os.path.splitext(stem)[1]
    return "jsonl" if compression and suffix == ".json" else SUFFIXES.get(suffix, "text")


def splits(path: str, form: str) -> bool:
    """Whether the records of a file can be read from any byte on."""
    return form == "jsonl" and not path.endswith(COMPRESSED)


def read(
    path: str, form: str | None, fields: Fields, start: int = 0, stop: int = sys.maxsize, max_bytes: int = MAX_BYTES
) -> Iterator[Text | Broken | Binary]:
    """The documents of a file in order, with `Broken` or `Binary` for what cannot be read; ImportError without its library.

    Records become documents by `fields.document`. Without `form` the suffix decides. Of a file that `splits`, only the records
    that begin at bytes [start, stop) are read. A line, a text in a table and a decompressed text file have at most `max_bytes`.
    """
    file_format = form or format_of(path)
    try:
        if file_format == "text":
            yield text_of(path, max_bytes, by_ending=form is None, only_utf8=True)
        elif file_format == "jsonl":
            part = (start, stop) if splits(path, file_format) else (0, sys.maxsize)
            yield from _jsonl(path, fields, max_bytes, *part)
        else:
            yield from TABLES[file_format](path, fields, max_bytes)
    except DAMAGE as error:
        yield _damaged(path, error)


def _opened(path: str) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
    """The content of a file, decompressed if its suffix is .gz or .zst; ImportError if the library for .zst is missing."""
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):  # the library zstandard would not notice that a file ends within a frame
        return io.BufferedReader(records.library("pyarrow", path).input_stream(path, compression="zstd"), BUFFER)
    return open(path, "rb", BUFFER)


def _damaged(path: str, error: Exception) -> Broken:
    records.raise_if_of_disk(error)
    return Broken(f"{path}: its compression is damaged: {error}")


def text_of(path: str, max_bytes: int = MAX_BYTES, by_ending: bool = True, only_utf8: bool = False) -> Text | Broken | Binary:
    """The content of a text file. With `by_ending`, only its suffix says that it is one document, not records."""
    is_compressed = path.endswith(COMPRESSED)
    try:
        with _opened(path) as file:
            head = file.read(SNIFFED)
            if b"\0" in head or BINARY.match(head):
                return Binary(f"{path}: binary or UTF-16, not UTF-8 text")
            text = head + (file.read(max_bytes) if is_compressed else file.read())
    except DAMAGE as error:
        return _damaged(path, error)
    if is_compressed and len(text) > max_bytes:
        return records.too_long(f"{path}: decompressed, it has", max_bytes)
    if by_ending and path.endswith(".json") and _holds_records(text):
        return Broken(
            f"{path}: it holds JSON records, and a .json file is read as one document; rename it to .jsonl, one record a line, "
            "or read it with tools/prepare_data.py with --format=jsonl, or with --format=text as one document"
        )
    try:
        if only_utf8:
            text.decode("utf-8")
    except UnicodeDecodeError as error:
        return Broken(f"{path}, line {text.count(10, 0, error.start) + 1}: {records.reason(error)}")
    return Text(text, None)


def _holds_records(text: bytes) -> bool:
    """Whether a text is more than one JSON record, one after the other or in a list."""
    try:
        decoded = text.decode("utf-8-sig").lstrip()
        value, end = json.JSONDecoder().raw_decode(decoded)
    except (RecursionError, ValueError):
        return False
    if isinstance(value, list):
        return len(value) > 1 and all(isinstance(x, dict) for x in value)
    return isinstance(value, dict) and bool(decoded[end:].strip())


def _files_under(folder: str) -> list[str]:
    index, info, state = (os.path.join(folder, f"{name}.json") for name in ("dataset_dict", "dataset_info", "state"))
    if os.path.isfile(index):
        splits = [os.path.join(folder, name) for name in _from_json(index, lambda x: [str(name) for name in x["splits"]])]
        raise ValueError(f"{folder} holds several datasets; name some of them: {', '.join(splits)}")
    if os.path.isfile(info) and os.path.isfile(state):
        names, reordered = _from_json(state, _dataset_files)
        cure = "save it again after flatten_indices()"
        check(not reordered, f"{folder} stores an order of its rows in a file of indices; {cure}")
        return [os.path.join(folder, name) for name in names]
    all_paths = []
    for root, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(x for x in subfolders if x not in SKIPPED_FOLDERS and not x.startswith("."))
        paths = [os.path.join(root, file) for file in files if not file.startswith(".")]  # .env and .netrc hold secrets
        all_paths += [path for path in paths if os.path.isfile(path) or os.path.islink(path)]  # a pipe would block
    check(bool(all_paths), f"{folder} has no files that are not hidden")
    return sorted_below(folder, all_paths)


def sorted_below(folder: str, paths: list[str]) -> list[str]:
    """Paths in the order of their names below `folder`, which is the same wherever that is."""
    return sorted(paths, key=lambda path: (os.path.relpath(path, folder).replace(os.sep, "/"), path))


def _from_json(path: str, read: Callable):
    """`read` of the content of a JSON file; ValueError names the file if the library datasets did not write it."""
    try:
        with open(path, encoding="utf-8") as file:
            return read(json.load(file))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} was not written by the library datasets: {type(error).__name__}: {error}") from error


def _dataset_files(state: dict) -> tuple[list[str], bool]:
    """Names of the Arrow files, and whether there is a file of indices with their order."""
    names = [file["filename"] for file in state["_data_files"]]
    for name in names:  # with a path in it, it could make the tool read any file of the machine
        inside = os.path.basename(name) == name and name.endswith(".arrow")
        check(inside, f"{name!r} is not the name of an .arrow file in the folder itself")
    check(bool(names), "it names no file")
    return names, bool(state.get("_indices_data_files"))


def _jsonl(path: str, fields: Fields, max_bytes: int, start: int, stop: int) -> Iterator[Text | Broken]:
    with _opened(path) as file:
        if start:
            file.seek(start - 1)
            start += _skip_line(file, stop - start + 1) - 1  # a record that began before
        position = start
        for number, line in enumerate(iter(functools.partial(file.readline, max_bytes + 1), b""), 1):
            if position >= stop:
                return
            position += len(line)
            if len(line) > max_bytes:
                yield records.too_long(f"{path}, line {number + _lines(path, start)}: it has", max_bytes)
                position += 0 if line.endswith(b"\n") else _skip_line(file, sys.maxsize)
                continue
            if number == 1 and not start:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            try:
                yield fields.document(json.loads(line.decode("utf-8")))
            except (RecursionError, ValueError) as error:
                yield Broken(f"{path}, line {number + _lines(path, start)}: {records.reason(error)}")


def _skip_line(file, limit: int) -> int:
    """Reads to the end of the line, at most `limit` bytes, and returns the number of bytes."""
    skipped = 0
    while piece := file.readline(min(BUFFER, limit - skipped)):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _lines(path: str, stop: int) -> int:
    """The number of lines that end before byte `stop`."""
    with open(path, "rb") as file:
        blocks = iter(lambda: file.read(min(BUFFER, stop - file.tell())), b"")
        return sum(block.count(b"\n") for block in blocks)
