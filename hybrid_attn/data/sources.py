"""Files of text to documents: plain text and source code, JSON lines, Parquet, and Hugging Face datasets on disk."""

import codecs
import contextlib
import dataclasses
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping

from hybrid_attn.data import documents

FORMATS = ("text", "jsonl", "parquet", "arrow")
SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
PACKED = (".gz", ".zst")
SKIPPED_FOLDERS = documents.NOT_SOURCES | {"node_modules"}
SNIFFED = 8192  # bytes that show whether a file is text, as git looks at them
BATCH = 256  # rows of a table that are in memory at a time


@dataclasses.dataclass(frozen=True)
class Fields:
    """Where a record has its text, and its label if that is not None; dots lead into records within it."""

    text: str
    label: str | None


@dataclasses.dataclass(frozen=True)
class Text:
    """A document, UTF-8, and what its label field says."""

    text: bytes
    label: str | None


@dataclasses.dataclass(frozen=True)
class Broken:
    """What cannot be read, with its file and line."""

    reason: str


@dataclasses.dataclass(frozen=True)
class Binary:
    """A file that is no text at all: it has a zero byte near its beginning."""

    path: str


def find(inputs: Iterable[str]) -> list[str]:
    """Paths of the files that `inputs` name, each once, in an order that is the same on every machine.

    An input is a glob pattern, a directory that `datasets` saved, or any other directory for all files under it but
    those in hidden folders, caches and installed packages. ValueError where one has nothing.
    """
    found = {}
    for name in inputs:
        name = os.path.expanduser(name)
        for path in _files_under(name) if os.path.isdir(name) else [path for _, path in documents.matches(name)]:
            found.setdefault(os.path.realpath(path), path)
    return list(found.values())


def format_of(path: str) -> str:
    """The format that a path's ending tells: .jsonl and .ndjson, .json only where it is packed, .parquet, .arrow, or text."""
    stem, packed = os.path.splitext(path) if path.endswith(PACKED) else (path, "")
    suffix = os.path.splitext(stem)[1]
    return "jsonl" if packed and suffix == ".json" else SUFFIXES.get(suffix, "text")


def splits(path: str, form: str) -> bool:
    """Whether a part of the file can be read without the rest."""
    return form == "jsonl" and not path.endswith(PACKED)


def read(path: str, form: str, fields: Fields, start: int = 0, stop: int | None = None) -> Iterator[Text | Broken | Binary]:
    """The documents of a file and, in their places, what cannot be read; ImportError where a library is missing.

    Of a file that `splits` only the records that begin at bytes [start, stop).
    """
    try:
        yield from _jsonl(path, fields, start, stop) if splits(path, form) else _READERS[form](path, fields)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        yield Broken(f"{path}: its packing is broken: {error}")


def _files_under(folder: str) -> list[str]:
    if os.path.isfile(os.path.join(folder, "dataset_dict.json")):
        with open(os.path.join(folder, "dataset_dict.json"), encoding="utf-8") as file:
            splits = [os.path.join(folder, split) for split in json.load(file)["splits"]]
        raise ValueError(f"{folder} holds several datasets; name those you want: {', '.join(splits)}")
    if os.path.isfile(os.path.join(folder, "dataset_info.json")) and os.path.isfile(os.path.join(folder, "state.json")):
        with open(os.path.join(folder, "state.json"), encoding="utf-8") as file:
            state = json.load(file)
        if state.get("_indices_data_files"):
            raise ValueError(f"{folder} keeps an order of rows beside its rows; save it again after flatten_indices()")
        return [os.path.join(folder, file["filename"]) for file in state["_data_files"]]
    found = []
    for root, subfolders, files in os.walk(folder):
        subfolders[:] = sorted(x for x in subfolders if x not in SKIPPED_FOLDERS and not x.startswith("."))
        found += [os.path.join(root, file) for file in files]
    if not found:
        raise ValueError(f"{folder} has no files under it")
    return sorted(found, key=lambda path: os.path.relpath(path, folder).replace(os.sep, "/"))


def _text(path: str, fields: Fields) -> Iterator[Text | Broken | Binary]:
    with _opened(path) as file:
        text = file.read()
    if b"\0" in text[:SNIFFED]:
        yield Binary(path)
        return
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        yield Broken(f"{path}, line {text.count(10, 0, error.start) + 1}: {_reason(error)}")
        return
    yield Text(text, None)


def _jsonl(path: str, fields: Fields, start: int = 0, stop: int | None = None) -> Iterator[Text | Broken]:
    with _opened(path) as file:
        if start:
            file.seek(start - 1)
            start += len(file.readline()) - 1  # of the record that began before
        at = start
        for number, line in enumerate(file, 1):
            if stop is not None and at >= stop:
                return
            at += len(line)
            if number == 1 and not start:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            try:
                yield _of_record(json.loads(line.decode("utf-8")), fields)
            except (RecursionError, ValueError) as error:
                yield Broken(f"{path}, line {number + _lines(path, start)}: {_reason(error)}")


def _lines(path: str, stop: int) -> int:
    """Lines that end before byte `stop`."""
    found = 0
    if stop:
        with open(path, "rb") as file:
            while stop and (block := file.read(min(stop, 2**20))):
                found += block.count(b"\n")
                stop -= len(block)
    return found


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x}, {error.start + 1} from its start"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair is no character"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    return str(error)


def _parquet(path: str, fields: Fields) -> Iterator[Text | Broken]:
    pyarrow = _library("pyarrow.parquet", path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, fields)
            yield from _rows(path, fields, file.iter_batches(BATCH, columns=columns))
    except (pyarrow.ArrowInvalid, OSError) as error:
        _stop_if_unreadable(error)
        yield Broken(f"{path}: not Parquet: {error}")


def _arrow(path: str, fields: Fields) -> Iterator[Text | Broken]:
    pyarrow = _library("pyarrow.ipc", path)
    try:
        with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as stream:
            columns = _columns(path, stream.schema.names, fields)
            slices = (batch.slice(at, BATCH) for batch in stream for at in range(0, len(batch), BATCH))
            yield from _rows(path, fields, (batch.select(columns) for batch in slices))
    except (pyarrow.ArrowInvalid, OSError) as error:
        _stop_if_unreadable(error)
        yield Broken(f"{path}: not a stream of Arrow batches: {error}")


_READERS = {"text": _text, "jsonl": _jsonl, "parquet": _parquet, "arrow": _arrow}


def _rows(path: str, fields: Fields, batches: Iterable) -> Iterator[Text | Broken]:
    number = 0
    for batch in batches:
        try:
            records = batch.to_pylist()
        except UnicodeDecodeError:
            records = (batch.slice(i, 1) for i in range(len(batch)))  # to find the row
        for record in records:
            number += 1
            try:
                yield _of_record(record if isinstance(record, dict) else record.to_pylist()[0], fields)
            except ValueError as error:
                yield Broken(f"{path}, row {number}: {_reason(error)}")


def _stop_if_unreadable(error: Exception) -> None:
    """Raises what the operating system reports again; the library's own OSErrors have no number."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def _columns(path: str, names: list[str], fields: Fields) -> list[str]:
    """The columns to read of a table; ValueError where it lacks one."""
    wanted = {name if name in names else name.split(".")[0] for name in (fields.text, fields.label) if name is not None}
    if wanted - set(names):
        raise ValueError(f"{path} has no column {', '.join(wanted - set(names))}; it has {', '.join(names)}")
    return [name for name in names if name in wanted]


def _of_record(record, fields: Fields) -> Text:
    """The document of a record; null is no text."""
    text = _field(record, fields.text)
    if not isinstance(text, str | None):
        raise ValueError(f"the field {fields.text!r} is no text but {type(text).__name__}")
    label = None if fields.label is None else _field(record, fields.label)
    return Text((text or "").encode("utf-8"), None if label is None else str(label))


def _field(record, name: str):
    if isinstance(record, Mapping) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            has = f"has {', '.join(map(repr, record))}" if isinstance(record, Mapping) else "is no record"
            raise ValueError(f"there is no field {name!r}; what should hold {part!r} {has}")
        record = record[part]
    return record


def _opened(path: str) -> contextlib.AbstractContextManager[io.BufferedIOBase]:
    if path.endswith(".gz"):
        return gzip.open(path, "rb")
    if path.endswith(".zst"):
        return io.BufferedReader(_Blocks(_unpacked(path)), 2**20)
    return open(path, "rb", 2**20)


def _unpacked(path: str) -> Iterator[bytes]:
    """Blocks of a .zst file; zlib.error where it is broken or cut short, which the library's own reader passes over."""
    zstandard = _library("zstandard", path)
    with open(path, "rb") as file:
        frame = None
        while packed := file.read(2**17):
            while packed:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                try:
                    yield frame.decompress(packed)
                except zstandard.ZstdError as error:
                    raise zlib.error(str(error)) from error
                packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    if frame is not None:
        raise zlib.error("it ends within a frame")


class _Blocks(io.RawIOBase):
    """The file whose content is the given blocks."""

    def __init__(self, blocks: Iterator[bytes]):
        self._blocks = blocks
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._left:
            block = next(self._blocks, None)
            if block is None:
                return 0
            self._left = memoryview(block)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size


def _library(name: str, path: str):
    """The package of a module, the module loaded."""
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"{path} needs the library {name.partition('.')[0]}; pip install 'hybrid_attn[data]'") from error
