"""Files of text to documents: plain text and source code, JSON lines, Parquet, and Hugging Face datasets on disk."""

import codecs
import functools
import glob
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator

from hybrid_attn.data import compressed, records, tables
from hybrid_attn.data.compressed import opened
from hybrid_attn.data.records import MAX_BYTES, Binary, Broken, Fields, Text

FORMATS = ("text", "jsonl", "parquet", "arrow")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
PACKED = compressed.SUFFIXES
NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__"}
SKIPPED_FOLDERS = NOT_SOURCES | {"node_modules"}
SNIFFED = 8192  # bytes that show whether a file is text, as git looks at them
# What binary files begin with that need have no zero byte there: gzip, bzip2, xz, zstd, zip, Parquet, PDF, UTF-16.
BINARY = re.compile(rb"\x1f\x8b|BZh[1-9]1AY&SY|\xfd7zXZ|\x28\xb5\x2f\xfd|PK\x03\x04|PAR1|%PDF-|\xff\xfe|\xfe\xff")


def find(inputs: Iterable[str]) -> list[str]:
    """Paths of the files that `inputs` name, each once, in an order that is the same on every machine.

    An input is a glob pattern, a directory that `datasets` saved, or any other directory for all files under it but hidden
    ones and those in hidden folders, caches and installed packages. ValueError where one has nothing.
    """
    found = {}
    for name in inputs:
        name = os.path.expanduser(name)
        for path in _files_under(name) if os.path.isdir(name) else [path for _, path in matches(name)]:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def matches(pattern: str) -> list[tuple[str, str]]:
    """Sorted names and paths of the files that `pattern` matches; names start where its fixed folders end."""
    if os.path.isdir(pattern):
        raise ValueError(f"{pattern!r} is a directory; use {os.path.join(pattern, '**')!r} for all its files")
    paths = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    if not paths:
        raise ValueError(f"{pattern!r} matches no file, seen from {os.getcwd()}; correct the path or pattern")
    root = os.path.dirname(re.split(r"[*?[]", pattern, maxsplit=1)[0]) or os.curdir
    return sorted((os.path.relpath(path, root).replace(os.sep, "/"), path) for path in paths)


def format_of(path: str) -> str:
    """The format that a path's ending tells: .jsonl and .ndjson, .json only where it is packed, .parquet, .arrow, or text."""
    stem, packed = os.path.splitext(path) if path.endswith(PACKED) else (path, "")
    suffix = os.path.splitext(stem)[1]
    return "jsonl" if packed and suffix == ".json" else SUFFIXES.get(suffix, "text")


def splits(path: str, form: str) -> bool:
    """Whether a part of the file can be read without the rest."""
    return form == "jsonl" and not path.endswith(PACKED)


def read(
    path: str, form: str | None, fields: Fields, start: int = 0, stop: int | None = None, max_bytes: int = MAX_BYTES
) -> Iterator[Text | Broken | Binary]:
    """The documents of a file and, in their places, what cannot be read; ImportError where a library is missing.

    `form` None goes by the file's ending. Of a file that `splits` only the records that begin at bytes [start, stop). A line, a
    text in a table and a decompressed file of text have at most `max_bytes`.
    """
    kind = form or format_of(path)
    try:
        if kind == "text":
            yield from _text(path, max_bytes, by_ending=form is None)
        elif kind == "jsonl":
            part = (start, stop) if splits(path, kind) else (0, None)
            yield from _jsonl(path, fields, max_bytes, *part)
        else:
            yield from _TABLES[kind](path, fields, max_bytes)
    except compressed.ERRORS as error:
        yield Broken(f"{path}: its packing is broken: {error}")


_TABLES = {"parquet": tables.parquet, "arrow": tables.arrow}


def text_of(path: str, max_bytes: int = MAX_BYTES, by_ending: bool = True) -> bytes | Broken | Binary:
    """The content of a file of text, UTF-8 or not; `by_ending` if only its ending says that it is text, and not records."""
    packed = path.endswith(PACKED)
    try:
        with opened(path) as file:
            head = file.read(SNIFFED)
            if b"\0" in head or BINARY.match(head):
                return Binary(path)
            text = head + (file.read(max_bytes) if packed else file.read())
    except compressed.ERRORS as error:
        return Broken(f"{path}: its packing is broken: {error}")
    if packed and len(text) > max_bytes:
        return Broken(f"{path}: decompressed, it has more than {records.most(max_bytes)}", too_long=True)
    if by_ending and path.endswith(".json") and _holds_records(text):
        return Broken(
            f"{path}: it holds JSON records, and a .json file is read as one document; name it .jsonl, a record a line, or "
            "read it by tools/prepare_data.py with --format=jsonl, or with --format=text as one document"
        )
    return text


def _holds_records(text: bytes) -> bool:
    """Whether a text is several JSON records: one after the other, or as a list."""
    try:
        decoded = text.decode("utf-8-sig").lstrip()
        value, end = json.JSONDecoder().raw_decode(decoded)
    except (RecursionError, ValueError):
        return False
    if isinstance(value, list):
        return len(value) > 1 and all(isinstance(x, dict) for x in value)
    return isinstance(value, dict) and bool(decoded[end:].strip())


def _files_under(folder: str) -> list[str]:
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        names = _from_json(folder, "dataset_dict.json", lambda state: [str(name) for name in state["splits"]])
        splits = [os.path.join(folder, name) for name in names]
        raise ValueError(f"{folder} holds several datasets; name those you want: {', '.join(splits)}")
    if os.path.isfile(os.path.join(folder, "dataset_info.json")) and os.path.isfile(os.path.join(folder, "state.json")):
        names, reordered = _from_json(folder, "state.json", _dataset_files)
        if reordered:
            raise ValueError(f"{folder} keeps an order of rows beside its rows; save it again after flatten_indices()")
        return [os.path.join(folder, name) for name in names]
    found = []
    for root, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(x for x in subfolders if x not in SKIPPED_FOLDERS and not x.startswith("."))
        paths = [os.path.join(root, file) for file in files if not file.startswith(".")]  # .env and .netrc hold secrets
        found += [path for path in paths if os.path.isfile(path) or os.path.islink(path)]  # and no pipe, which would block
    if not found:
        raise ValueError(f"{folder} has no files under it that are not hidden")
    return sorted(found, key=lambda path: os.path.relpath(path, folder).replace(os.sep, "/"))


def _from_json(folder: str, name: str, read: Callable):
    """What `read` takes from a JSON file in `folder`; ValueError names the file where it is not as `datasets` writes it."""
    path = os.path.join(folder, name)
    try:
        with open(path, encoding="utf-8") as file:
            return read(json.load(file))
    except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is not as datasets writes it: {type(error).__name__}: {error}") from error


def _dataset_files(state: dict) -> tuple[list[str], bool]:
    """Names of the files of rows, all in the folder itself; and whether there is an order of rows beside them.

    A name with a path in it would have the tool read any file of the machine.
    """
    names = [file["filename"] for file in state["_data_files"]]
    for name in names:
        if os.path.basename(name) != name or not name.endswith(".arrow"):
            raise ValueError(f"{name!r} is no name of an .arrow file in the folder itself")
    if not names:
        raise ValueError("it names no file")
    return names, bool(state.get("_indices_data_files"))


def _text(path: str, max_bytes: int, by_ending: bool) -> Iterator[Text | Broken | Binary]:
    text = text_of(path, max_bytes, by_ending)
    if not isinstance(text, bytes):
        yield text
        return
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Broken(f"{path}, line {text.count(10, 0, error.start) + 1}: {records.reason(error)}")
        return
    yield Text(text, None)


def _jsonl(path: str, fields: Fields, max_bytes: int, start: int, stop: int | None) -> Iterator[Text | Broken]:
    end = sys.maxsize if stop is None else stop
    with opened(path) as file:
        if start:
            file.seek(start - 1)
            start += _skip_line(file, end - start + 1) - 1  # of the record that began before
        at = start
        for number, line in enumerate(iter(functools.partial(file.readline, max_bytes + 1), b""), 1):
            if at >= end:
                return
            at += len(line)
            if len(line) > max_bytes:
                where = f"{path}, line {number + _lines(path, start)}"
                yield Broken(f"{where}: it has more than {records.most(max_bytes)}", too_long=True)
                at += 0 if line.endswith(b"\n") else _skip_line(file, sys.maxsize)
                continue
            if number == 1 and not start:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            try:
                yield records.document(json.loads(line.decode("utf-8")), fields)
            except (RecursionError, ValueError) as error:
                yield Broken(f"{path}, line {number + _lines(path, start)}: {records.reason(error)}")


def _skip_line(file, limit: int) -> int:
    """Reads on behind the end of the line, at most `limit` bytes; returns how many bytes were read."""
    skipped = 0
    while piece := file.readline(min(compressed.BUFFER, limit - skipped)):
        skipped += len(piece)
        if piece.endswith(b"\n"):
            break
    return skipped


def _lines(path: str, stop: int) -> int:
    """Lines that end before byte `stop`."""
    found = 0
    if stop:
        with open(path, "rb") as file:
            while stop and (block := file.read(min(stop, 2**20))):
                found += block.count(b"\n")
                stop -= len(block)
    return found
