"""What every format of a file of text gives: documents, and what cannot be read with its place."""

import dataclasses
import json
from collections.abc import Mapping

MAX_BYTES = 10**8  # of a line, a text in a table, or a decompressed file of text, by default: each is read into memory


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
    """What cannot be read, with its file and line; `too_long` if a larger bound of a document would let it pass."""

    reason: str
    too_long: bool = False


@dataclasses.dataclass(frozen=True)
class Binary:
    """A file that is no text at all: it has a zero byte near its beginning, or begins as a known binary format does."""

    path: str

    @property
    def reason(self) -> str:
        return f"{self.path}: no UTF-8 text but binary, or UTF-16"


def most(max_bytes: int) -> str:
    """How a message names the bound of a document."""
    return f"the {max_bytes:,} bytes that a document may have"


def document(record, fields: Fields) -> Text:
    """The document of a record; null is no text."""
    text = _field(record, fields.text)
    if not isinstance(text, str | None):
        raise ValueError(f"the field {fields.text!r} is no text but {type(text).__name__}")
    label = None if fields.label is None else _field(record, fields.label)
    return Text((text or "").encode("utf-8"), None if label is None else str(label))


def reason(error: Exception) -> str:
    """What is wrong with a record."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: byte 0x{error.object[error.start]:02x}, {error.start + 1} from its start"
    if isinstance(error, UnicodeEncodeError):
        return "half of a surrogate pair is no character"
    if isinstance(error, json.JSONDecodeError):
        return f"not JSON: {error.msg} at character {error.pos + 1}"
    return str(error)


def _field(record, name: str):
    if isinstance(record, Mapping) and name in record:
        return record[name]
    for part in name.split("."):
        if not isinstance(record, Mapping) or part not in record:
            has = f"has {', '.join(map(repr, record))}"[:500] if isinstance(record, Mapping) else "is no record"
            raise ValueError(f"there is no field {name!r}; what should hold {part!r} {has}")
        record = record[part]
    return record
