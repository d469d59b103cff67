"""Text in which needles are hidden."""

import json
from collections.abc import Sequence
from pathlib import Path

from hybrid_attn.data import documents, sources
from hybrid_attn.data.documents import Documents
from hybrid_attn.trees import check

CHARACTERS = 2**22  # after which a text is repeated


def of_files(patterns: tuple[str, ...]) -> str:
    """The text of the files that `patterns` match, or of Python's standard library without any, as far as it is needed."""
    pieces, room = [], CHARACTERS
    for name, path in documents.find(patterns):
        if room <= 0:
            break
        pieces.append(_read(name, path)[:room])
        room -= len(pieces[-1])
    found = "\n".join(pieces)
    check(bool(found.strip()), f"{', '.join(patterns)} has no word; name files with text")
    return found


def of_essays(patterns: tuple[str, ...]) -> str:
    """The text of RULER's essays as its scripts read it: all of their files with nothing between, or PaulGrahamEssays.json."""
    found = "".join(_read(name, path) for name, path in documents.find(patterns))
    check(bool(found.strip()), f"{', '.join(patterns)} has no word; name the files of RULER's essays")
    return found


def of_documents(several: Sequence[Documents], tokenizer) -> str:
    """The text of documents of several sources, as far as it is needed: of each source the same share."""
    pieces = []
    for found in several:
        room = CHARACTERS // len(several)
        for number, length in enumerate(found.lengths):
            if room <= 0:
                break
            (tokens,) = found.read([(number, 0, min(length, room))])  # a token has a character at least, but for marks
            pieces.append(tokenizer.decode(tokens)[:room])
            room -= len(pieces[-1])
    return "\n".join(pieces)


def _read(name: str, path: str) -> str:
    """The text of a file, which in the form of RULER's essays is a JSON object {"text": ...}; ValueError for other formats."""
    form = sources.format_of(path)
    check(form == "text" and not path.endswith((".gz", ".zst")), f"{name} is packed or has records; name files of plain text")
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    check("\0" not in text, f"{name} is no text")
    if not path.endswith(".json"):
        return text
    try:
        values = json.loads(text)
    except (RecursionError, ValueError):
        return text
    return values["text"] if isinstance(values, dict) and isinstance(values.get("text"), str) else text
