"""The results of reading a file in any format: documents, or the reason and position of what cannot be read."""

import dataclasses
import json
from collections.abc import Mapping, Sequence

from hybrid_attn.data.loss_mask import Piece

PIECE_TEXT = "text"  # the field of a piece that holds its text
MAX_BYTES = 10**8  # default limit of a line, a text in a table, or a decompressed text file: each is read into memory


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of the text field and the label field of a record; a.b is field b of the record in field a.

    `loss` is the name of the field of a piece that says whether it is trained on. With it, a text may be a list of pieces.
    """

    text: str
    label: str | None
    loss: str | None = None


@dataclasses.dataclass(frozen=True)
class Text:
    """A document in UTF-8, the value of its label field, and its pieces; without pieces all of it is trained on."""

    text: bytes
    label: str | None
    pieces: tuple[Piece, ...] = ()


@dataclasses.dataclass(frozen=True)
class Broken:
    """A document that cannot be read: the reason, with file and line. `too_long` means that a larger limit would accept it."""

    reason: str
    too_long: bool = False


@dataclasses.dataclass(frozen=True)
class Binary:
    """A binary file: it has a zero byte near its beginning, or begins like a known binary format."""

    path: str

    @property
    def reason(self) -> str:
        return f"{self.path}: binary or UTF-16, not UTF-8 text"


def limit(max_bytes: int) -> str:
    """The limit of a document, for messages."""
    return f"the {max_bytes:,} bytes that a document may have"


def document(record, fields: Fields) -> Text:
    """The document of a record; a text of null is empty. With `fields.loss`, a text may be a list of pieces."""
    text, pieces = _field(record, fields.text), ()
    if fields.loss is not None and _has(record, fields.loss):
        raise ValueError(f"the record has the field {fields.loss!r}, which belongs to the pieces of a text; put it there")
    if fields.loss is not None and isinstance(text, list):
        text, pieces = _joined(text, fields)
    if not isinstance(text, str | None):
        raise ValueError(f"the field {fields.text!r} is of type {type(text).__name__}, not text")
    label = None if fields.label is None else _field(record, fields.label)
    return Text((text or "").encode("utf-8"), None if label is None else str(label), pieces)


def _joined(pieces: Sequence, fields: Fields) -> tuple[str, tuple[Piece, ...]]:
    """The text of a list of pieces, with nothing between them, and their sizes in bytes; ValueError for a wrong piece."""
    texts, sizes = [], []
    for number, piece in enumerate(pieces, 1):
        try:
            text, trained = _field(piece, PIECE_TEXT), _field(piece, fields.loss)
        except ValueError as error:
            raise ValueError(f"piece {number} of the field {fields.text!r}: {error}") from error
        for name, value, kind in ((PIECE_TEXT, text, str), (fields.loss, trained, bool)):
            if not isinstance(value, kind):
                what = "text" if kind is str else "true or false"
                raise ValueError(
                    f"piece {number} of the field {fields.text!r}: its {name!r} is of type {type(value).__name__}, not {what}"
                )
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
        _field(record, name)
    except ValueError:
        return False
    return True


def _field(record, name: str):
    if isinstance(record, Mapping) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            has = f"has {', '.join(map(repr, record))}"[:500] if isinstance(record, Mapping) else "is not a record"
            raise ValueError(f"there is no field {name!r}: the record that should hold {part!r} {has}")
        record = record[part]
    return record
