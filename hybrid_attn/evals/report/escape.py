"""Text that is whatever a file says, made safe for Markdown, CSV, a picture and a file name; templates escape HTML."""

import hashlib
import re

from hybrid_attn.characters import visible

TAG = re.compile(r"<(?=[A-Za-z/!?])|&(?=#?\w+;)")  # "<4K" begins none, and reads better as it is
MARKUP = re.compile(  # emphasis, code, links, tables and formulas anywhere; quotes, headings and lists at the beginning
    r"[\\`*\[\]~|$]|(?<![0-9A-Za-z])_|_(?![0-9A-Za-z])|:(?=//)|(?<=www)\.|@"
    r"|^(?:#|>(?!\d)|[+-](?=[\s-]|$)|=)|(?<=^\d)[.)](?=\s|$)|(?<=^\d\d)[.)](?=\s|$)"
)
SAFE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*")
LONGEST = 80  # characters of a file name
NUMBER = re.compile(r"[+-]?\d+(\.\d*)?([eE][+-]?\d+)?")


def markdown(text: str) -> str:
    """For a line or a cell of Markdown: no tag, link, emphasis, code, formula, heading or list of the text's own."""
    line = " ".join(visible(text).split())
    line = TAG.sub(lambda match: {"&": "&amp;", "<": "&lt;"}[match[0]], line)
    return MARKUP.sub(lambda match: f"\\{match[0]}", line)


def csv(value: str | int | float | None) -> str | int | float | None:
    """For a cell of CSV: a spreadsheet would run a text that begins like a formula, so that an apostrophe goes before it."""
    if not isinstance(value, str) or NUMBER.fullmatch(value):
        return value
    return f"'{value}" if value.lstrip()[:1] in tuple("=+-@") or value[:1] in ("\t", "\r") else value


def label(text: str) -> str:
    """For one line in a picture, where matplotlib reads no formula (`pictures.STYLE`)."""
    return " ".join(visible(text).split())


def shortened(text: str, most: int) -> str:
    """At most so many characters, and an ellipsis for the others."""
    return text if len(text) <= most else f"{text[:most]}…"


def file_name(name: str) -> str:
    """A file name, and part of an SVG id, of ASCII letters, digits, "_", "-" and single dots; other names get a hash."""
    if SAFE.fullmatch(name) and len(name) <= LONGEST:
        return name
    digest = hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    safe = re.sub(r"[^A-Za-z0-9_-]", "_", name)[: LONGEST - len(digest) - 1]
    return f"{safe if SAFE.match(safe) else f'_{safe[1:]}'}-{digest}"
