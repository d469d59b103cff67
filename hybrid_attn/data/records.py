"""The results of reading a file in any format: documents, or the reason and position of what cannot be read."""

import dataclasses
import json
from collections.abc import Mapping

MAX_BYTES = 10**8  # default limit of a line, a text in a table, or a decompressed text file: each is read into memory


@dataclasses.dataclass(frozen=True)
class Fields:
    """The names of the text field and the label field of a record; a.b is field b of the record in field a."""

    text: str
    label: str | None


@dataclasses.dataclass(frozen=True)
class Text:
    """A document in UTF-8, and the value of its label field."""

    text: bytes
    label: str | None


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
    """The document of a record; a text of null is empty."""
    text = _field(record, fields.text)
    if not isinstance(text, str | None):
        raise ValueError(f"the field {fields.text!r} is of type {type(text).__name__}, not text")
    label = None if fields.label is None else _field(record, fields.label)
    return Text((text or "").encode("utf-8"), None if label is None else str(label))


def reason(error: Exception) -> str:
    """The message for an error in a record."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x}, {error.start + 1} from its start"
    if isinstance(error, UnicodeEncodeError):
        return "it has half of a surrogate pair, which is not a character"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    return str(error)


def _field(record, name: str):
    if isinstance(record, Mapping) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            has = f"has {', '.join(map(repr, record))}"[:500] if isinstance(record, Mapping) else "is not a record"
            raise ValueError(f"there is no field {name!r}: the record that should hold {part!r} {has}")
        record = record[part]
    return record
