"""Control characters and other hidden ones, shown by their number: they could send commands to a terminal."""

import re

# Control characters, marks that change the direction of text, and half surrogate pairs, which no output can hold.
HIDDEN = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def visible(text: str) -> str:
    r"""Hidden characters as \xNN or \uNNNN; line breaks and tabs stay, half a surrogate pair is a question mark."""
    return HIDDEN.sub(_code, text)


def line(text: str) -> str:
    """Like `visible`, in one line."""
    return visible(text).replace("\n", " ")


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can hold a text: Python decodes other bytes of arguments and of stdin to halves of surrogate pairs."""
    return not any("\ud800" <= x <= "\udfff" for x in text)


def _code(match: re.Match) -> str:
    number = ord(match[0])
    if 0xD800 <= number < 0xE000:
        return "?"
    return f"\\x{number:02x}" if number < 256 else f"\\u{number:04x}"
