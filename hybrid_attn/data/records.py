"""Documents of records: JSON objects, rows of Parquet files, and rows of Arrow streams as the library datasets saves them."""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.trees import check

Piece = tuple[int, bool]  # the bytes of a piece of a text, at least 1, and whether it is trained on
PIECE_TEXT = "text"  # the field of a piece that holds its text
MAX_BYTES = 10**8  # default limit of a line, a text in a table, or a decompressed text file: each is read into memory
BATCH = 256  # rows of a table in memory at a time


class Text(NamedTuple):
    """A document in UTF-8, the value of its label field, and its pieces; without pieces all of it is trained on."""

    text: bytes
    label: str | None
    pieces: tuple[Piece, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """The bytes of each document: of one."""
        return [len(self.text)]


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of the text field and the label field of a record; a.b is field b of the record in field a.

    `loss` is the name of the field of a piece that says whether it is trained on. With it, a text may be a list of pieces.
    """

    text: str
    label: str | None
    loss: str | None = None

    def document(self, record) -> Text:
        """The document of a record; a text of null is empty. With `loss`, a text may be a list of pieces."""
        text, pieces = field(record, self.text), ()
        misplaced = self.loss is not None and _has(record, self.loss)
        check(not misplaced, f"the record has the field {self.loss!r}, which belongs to the pieces of a text; put it there")
        if self.loss is not None and isinstance(text, list):
            text, pieces = _joined(text, self)
        check(isinstance(text, str | None), f"the field {self.text!r} is of type {type(text).__name__}, not text")
        label = None if self.label is None else field(record, self.label)
        return Text((text or "").encode("utf-8"), None if label is None else str(label), pieces)


class Broken(NamedTuple):
    """A document that cannot be read: the reason, with file and line. `too_long` means that a larger limit would accept it."""

    reason: str
    too_long: bool = False


class Binary(NamedTuple):
    """A binary file: it has a zero byte near its beginning, or begins like a known binary format."""

    reason: str


def too_long(what: str, max_bytes: int) -> Broken:
    """The result for a document with more than `max_bytes`. `what` begins the message: "x.jsonl, line 2: it has"."""
    return Broken(f"{what} more than the {max_bytes:,} bytes that a document may have", too_long=True)


def loss_mask(starts_n: np.ndarray, pieces: Sequence[Piece]) -> np.ndarray:
    """The mask [n + 2] of BOS, the tokens that begin at the bytes `starts_n` of a text, and EOS.

    A token belongs to the piece in which it begins, BOS to the first and EOS to the last. Without `pieces` all are trained on.
    """
    if not pieces:
        return np.ones(len(starts_n) + 2, np.uint8)
    sizes, flags = (np.array(column) for column in zip(*pieces, strict=True))
    piece_n = np.searchsorted(np.cumsum(sizes), starts_n, side="right")
    piece_n = np.minimum(piece_n, len(flags) - 1)  # a token without characters may begin where the text ends
    return flags[np.concatenate([[0], piece_n, [len(flags) - 1]])].astype(np.uint8)


def _joined(pieces: Sequence, fields: Fields) -> tuple[str, tuple[Piece, ...]]:
    """The text of a list of pieces, with nothing between them, and their sizes in bytes; ValueError for a wrong piece."""
    texts, sizes = [], []
    for number, piece in enumerate(pieces, 1):
        try:
            text, trained = field(piece, PIECE_TEXT), field(piece, fields.loss)
            for name, value, kind, what in ((PIECE_TEXT, text, str, "text"), (fields.loss, trained, bool, "true or false")):
                check(isinstance(value, kind), f"its {name!r} is of type {type(value).__name__}, not {what}")
        except ValueError as error:
            raise ValueError(f"piece {number} of the field {fields.text!r}: {error}") from error
        if text:
            texts.append(text)
            sizes.append((len(text.encode("utf-8")), trained))
    return "".join(texts), tuple(sizes)


def reason(error: Exception) -> str:
    """The message for an error in a record."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x}, {error.start + 1} from its start"
    if isinstance(error, UnicodeEncodeError):
        return "it has half of a surrogate pair, which is not a character"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    return str(error)


def _has(record, name: str) -> bool:
    try:
        field(record, name)
    except ValueError:
        return False
    return True


def field(record, name: str):
    """The field `name` of a record; a.b is field b of the record in field a. ValueError if there is none."""
    if isinstance(record, Mapping) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            has = f"has {', '.join(map(repr, record))}"[:500] if isinstance(record, Mapping) else "is not a record"
            raise ValueError(f"there is no field {name!r}: the record that should hold {part!r} {has}")
        record = record[part]
    return record


def library(name: str, user: str, extra: str = "data"):
    """Imports the module `name` and returns its package; ImportError says that `user` needs the library, and in which extra."""
    try:
        return __import__(name)
    except ImportError as error:
        raise ImportError(f"{user} needs the library {name.partition('.')[0]}; pip install 'hybrid_attn[{extra}]'") from error


def raise_if_of_disk(error: Exception) -> None:
    """Raises an error of the operating system again. An OSError of a library, for damaged content, has no errno."""
    if isinstance(error, OSError) and error.errno is not None:
        raise error


def parquet(path: str, fields: Fields, max_bytes: int) -> Iterator[Text | Broken]:
    """The documents of a Parquet file. It is not read if the rows of a row group have more than `max_bytes` on average."""
    pyarrow = library("pyarrow.parquet", path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = _columns(path, file.schema_arrow.names, fields)
            mean = _mean_bytes(file.metadata, columns)
            if mean > max_bytes:
                yield too_long(f"{path}: a row group has rows of {mean:,} bytes on average,", max_bytes)
                return
            rows = max(1, min(BATCH, max_bytes // max(1, mean)))
            yield from _rows(path, fields, max_bytes, file.iter_batches(rows, columns=columns))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:  # column names may not be UTF-8
        raise_if_of_disk(error)
        yield Broken(f"{path}: not Parquet: {' '.join(str(error).split())}")


def arrow(path: str, fields: Fields, max_bytes: int) -> Iterator[Text | Broken]:
    """The documents of a stream of Arrow batches."""
    pyarrow = library("pyarrow.ipc", path)

    def batches(stream, columns: list[str]) -> Iterator:
        for batch in stream:
            batch = batch.select(columns)
            for column in batch.columns:
                _check_offsets(column)
            yield from (batch.slice(first, BATCH) for first in range(0, len(batch), BATCH))

    try:
        with pyarrow.memory_map(path) as file, pyarrow.ipc.open_stream(file) as stream:
            columns = _columns(path, stream.schema.names, fields)
            yield from _rows(path, fields, max_bytes, batches(stream, columns))
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as error:  # column names may not be UTF-8
        raise_if_of_disk(error)
        yield Broken(f"{path}: not a stream of Arrow batches: {error}")


def _mean_bytes(metadata, columns: list[str]) -> int:
    """Decompressed bytes per row of `columns`, in the row group with the largest mean."""
    largest = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        parts = [group.column(i) for i in range(group.num_columns)]
        size = sum(part.total_uncompressed_size for part in parts if part.path_in_schema.split(".")[0] in columns)
        largest = max(largest, size // max(1, group.num_rows))
    return largest


def _check_offsets(column) -> None:
    """ArrowInvalid if a column refers to memory outside its buffers: the library would read there and may crash."""
    try:
        column.validate(full=True)
    except ValueError as error:
        if "UTF8" not in str(error) or str(column.type) not in ("string", "large_string"):
            raise  # `_rows` names the rows that are merely not UTF-8


def _rows(path: str, fields: Fields, max_bytes: int, batches: Iterable) -> Iterator[Text | Broken]:
    number = 0
    for batch in batches:
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = (batch.slice(i, 1) for i in range(len(batch)))  # to find the row
        for row in rows:
            number += 1
            try:
                read = fields.document(row if isinstance(row, dict) else row.to_pylist()[0])
            except ValueError as error:
                yield Broken(f"{path}, row {number}: {reason(error)}")
                continue
            size = len(read.text)
            yield read if size <= max_bytes else too_long(f"{path}, row {number}: it has {size:,} bytes,", max_bytes)


def _columns(path: str, names: list[str], fields: Fields) -> list[str]:
    """The columns of a table to read; ValueError if one is missing. `Fields.document` refuses that of `fields.loss`."""
    needed, refused = (
        {name if name in names else name.split(".")[0] for name in group if name is not None}
        for group in ((fields.text, fields.label), (fields.loss,))
    )
    missing = needed - set(names)
    check(not missing, f"{path} has no column {', '.join(missing)}; it has {', '.join(names)}")
    return [name for name in names if name in needed | refused]
