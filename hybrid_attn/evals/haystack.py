"""Text in which needles are hidden."""

import io
import os
from collections.abc import Sequence

from hybrid_attn.data import documents
from hybrid_attn.data import sources as source_files
from hybrid_attn.data.documents import Documents
from hybrid_attn.files import object_of
from hybrid_attn.trees import check

CHARACTERS = 2**22  # after which a text is repeated


def of_files(patterns: tuple[str, ...]) -> str:
    """The text of the files that `patterns` name, or of Python's standard library without any, as far as it is needed."""
    pieces, room = [], CHARACTERS
    for path in _files(patterns):
        if room <= 0:
            break
        text = _read(path)
        pieces.append((text if (essays := _essays(path, text)) is None else essays)[:room])
        room -= len(pieces[-1])
    text = "\n".join(pieces)
    check(bool(text.strip()), f"{', '.join(patterns)} has no word; name files with text")
    return text


def of_essays(patterns: tuple[str, ...]) -> str:
    """The text of RULER's essays as its scripts read it: all of their files with nothing between, or PaulGrahamEssays.json.

    ValueError for a .json file that is no object {"text": ...}: its JSON would be hidden in instead.
    """
    pieces = []
    for path in _files(patterns):
        text = _read(path)
        pieces.append(_essays(path, text) if path.endswith(".json") else text)
        check(pieces[-1] is not None, f'{path} is no JSON object with a text "text", as RULER makes it; copy it again')
    text = "".join(pieces)
    check(bool(text.strip()), f"{', '.join(patterns)} has no word; name the files of RULER's essays")
    return text


def of_documents(sources: Sequence[Documents], tokenizer) -> str:
    """The text of the first documents of each source, up to `CHARACTERS` in all: the same share of each."""
    pieces = []
    for source in sources:
        room = CHARACTERS // len(sources)
        for number, length in enumerate(source.lengths):
            if room <= 0:
                break
            (tokens,) = source.read([(number, 0, min(length, room))])  # a token but BOS and EOS has a character at least
            pieces.append(tokenizer.decode(tokens)[:room])
            room -= len(pieces[-1])
    return "\n".join(pieces)


def _files(patterns: tuple[str, ...]) -> list[str]:
    """Paths of files that are not empty, as for training: of patterns and directories, or of the standard library."""
    return [path for path in documents.find(patterns) if os.path.getsize(path)]


def _read(path: str) -> str:
    """The text of a file; ValueError for other formats."""
    plain = source_files.format_of(path) == "text" and not path.endswith(source_files.COMPRESSED)
    check(plain, f"{path} is packed or has records; name files of plain text")
    content = source_files.text_of(path, by_ending=False)
    check(isinstance(content, source_files.Text) and b"\0" not in content.text, f"{path} is no text")
    binary = io.BytesIO(content.text)
    return io.TextIOWrapper(binary, encoding="utf-8", errors="replace").read()  # all ends of lines as RULER reads them


def _essays(path: str, text: str) -> str | None:
    """The text in a file of the form of RULER's essays, a JSON object {"text": ...}; None if it has another form."""
    if not path.endswith(".json"):
        return None
    try:
        essay = object_of(text, path).get("text")
    except ValueError:
        return None
    return essay if isinstance(essay, str) else None
