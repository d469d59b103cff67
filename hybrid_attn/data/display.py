"""Text of tokens for a terminal, where what is trained on is coloured, or for a file, where it is marked."""

import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.characters import visible

MARKS = ("⟦", "⟧")
COLOURS = ("\x1b[32m", "\x1b[0m")  # green, and as before
BETWEEN = " | "
CUT = " [...] "


class Character(NamedTuple):
    """A character, and whether the token that it is a part of is trained on."""

    text: str
    trained: bool


Characters = list[Character]


def characters(tokenizer, ids: Sequence[int], trained: np.ndarray | None) -> Characters:
    """The text of `ids` [n], of which some are `trained` [n], special tokens as they are spelled; with None, without these."""
    if trained is None:
        return [Character(x, False) for x in visible(tokenizer.decode(ids))]
    names = {i: name for name, i in tokenizer.special_tokens.items()}
    result = []
    tokens = zip(np.asarray(ids).tolist(), np.asarray(trained, bool).tolist(), strict=True)
    for (of_run, name), run in itertools.groupby(tokens, lambda x: (x[1], names.get(x[0]))):
        run = [i for i, _ in run]
        text = tokenizer.decode(run) if name is None else name * len(run)
        result += [Character(x, of_run) for x in visible(text)]
    return result


def clipped(first: Characters, last: Characters, size: int, cut: bool) -> Characters:
    """The beginning of `first` and the end of `last`, of `size` characters; unless `cut`, all of `first` if it is short."""
    if not cut and len(first) <= 2 * size:
        return first
    return [*first[:size], *(Character(x, False) for x in CUT), *last[-size:]]


def shown(text: Characters, colour: bool) -> str:
    """The text with `COLOURS` or `MARKS` around what is trained on, in each line."""
    before, after = COLOURS if colour else MARKS
    runs = itertools.groupby(text, lambda x: x.trained and x.text != "\n")
    texts = [("".join(x.text for x in run), trained) for trained, run in runs]
    return "".join(f"{before}{run}{after}" if trained else run for run, trained in texts)


def beside(left: Characters, right: Characters, width: int, colour: bool) -> Iterator[str]:
    """The lines of two texts beside each other, each at most half of `width` wide, without its marks."""
    columns = [[(shown(line, colour), _width(line, colour)) for line in _wrapped(x, width // 2 - 2)] for x in (left, right)]
    widest = max((size for _, size in columns[0]), default=0)
    for (one, size), (other, _) in itertools.zip_longest(*columns, fillvalue=("", 0)):
        yield f"{one}{' ' * (widest - size)}{BETWEEN}{other}".rstrip()


def _wrapped(text: Characters, width: int) -> list[Characters]:
    """The lines of a text, none wider than `width` columns of a terminal."""
    lines, size = [[]], 0
    for x in text:
        wide = _columns(x.text)
        if x.text == "\n" or size + wide > width:
            lines.append([])
            size = 0
        if x.text != "\n":
            lines[-1].append(Character(" ", x.trained) if x.text == "\t" else x)
            size += wide
    return lines


def _width(line: Characters, colour: bool) -> int:
    """The columns of a line on a terminal, marks included."""
    return sum(map(_columns, "".join(x.text for x in line) if colour else shown(line, False)))


def _columns(character: str) -> int:
    """The columns of a terminal that a character takes."""
    return 0 if unicodedata.combining(character) else 1 + (unicodedata.east_asian_width(character) in "WF")
