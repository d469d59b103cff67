"""Text in which needles are hidden."""

import contextlib
import io
import os
from collections.abc import Iterator, Sequence

from hybrid_attn.data import documents
from hybrid_attn.data import sources as source_files
from hybrid_attn.data.documents import Documents
from hybrid_attn.files import object_of
from hybrid_attn.trees import check

CHARACTERS = 2**22  # after which a text is repeated


def of_files(patterns: tuple[str, ...]) -> str:
    """The text of the files that `patterns` name, or of Python's standard library without any, as far as it is needed."""
    pieces, room = [], CHARACTERS
    for _, text, _ in _texts(patterns):
        pieces.append(text[:room])
        room -= len(pieces[-1])
        if room <= 0:
            break
    text = "\n".join(pieces)
    check(bool(text.strip()), f"{', '.join(patterns)} has no word; name files with text")
    return text


def of_essays(patterns: tuple[str, ...]) -> str:
    """The text of RULER's essays as its scripts read it: all of their files with nothing between, or PaulGrahamEssays.json.

    ValueError for a .json file that is no object {"text": ...}: its JSON would be hidden in instead.
    """
    pieces = []
    for path, text, is_essays in _texts(patterns):
        pieces.append(text)
        ok = is_essays or not path.endswith(".json")
        check(ok, f'{path} is no JSON object with a text "text", as RULER makes it; copy it again')
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


def _texts(patterns: tuple[str, ...]) -> Iterator[tuple[str, str, bool]]:
    """The path and the text of each file that is not empty, and whether it has the form of RULER's essays.

    This is a JSON object {"text": ...} in a .json file, of which only that text is given. ValueError for other formats.
    """
    for path in filter(os.path.getsize, documents.find(patterns)):
        plain = source_files.format_of(path) == "text" and not path.endswith(source_files.COMPRESSED)
        check(plain, f"{path} is packed or has records; name files of plain text")
        content = source_files.text_of(path, by_ending=False)
        check(isinstance(content, source_files.Text) and b"\0" not in content.text, f"{path} is no text")
        text = io.StringIO(content.text.decode(errors="replace"), newline=None).read()  # all ends of lines as RULER reads them
        essays = None
        if path.endswith(".json"):
            with contextlib.suppress(ValueError):
                essays = object_of(text, path).get("text")
        is_essays = isinstance(essays, str)
        yield path, essays if is_essays else text, is_essays
