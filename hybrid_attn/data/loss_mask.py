"""Loss masks: for each token of a document, 1 if it is trained on as a target, and 0 if the model only reads it.

A mask is a byte a token, in memory and in the files of a store. Bits would take an eighth of that, but documents would begin
inside bytes, and every copy and read of a span would have to shift them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from hybrid_attn.data import shard_files

DTYPE = np.dtype(np.uint8)
Piece = tuple[int, bool]  # the bytes of a piece of a text, at least 1, and whether it is trained on


class LossMask(NamedTuple):
    """The loss mask of documents: `fetch` reads spans of it; `fingerprint` differs between different masks."""

    fetch: Callable[[Sequence[tuple[int, int, int]]], list[np.ndarray]]
    fingerprint: str


def of_document(starts_n: np.ndarray, pieces: Sequence[Piece]) -> np.ndarray:
    """The mask [n + 2] of BOS, the tokens that begin at the bytes `starts_n` of a text, and EOS.

    A token belongs to the piece in which it begins, BOS to the first piece and EOS to the last. Without `pieces` the whole text
    is trained on.
    """
    if not pieces:
        return np.ones(len(starts_n) + 2, DTYPE)
    sizes, flags = (np.array(column) for column in zip(*pieces, strict=True))
    piece_n = np.searchsorted(np.cumsum(sizes), starts_n, side="right")
    piece_n = np.minimum(piece_n, len(flags) - 1)  # a token without characters may begin where the text ends
    return flags[np.concatenate([[0], piece_n, [len(flags) - 1]])].astype(DTYPE)


def problem(mask: np.ndarray, first: int) -> str | None:
    """What is wrong with the values of a mask. `mask` holds tokens of a document or shard, of which the first is `first`."""
    if not len(mask) or mask.max() <= 1:
        return None
    i = int(np.argmax(mask > 1))
    return f"token {first + i:,} has the value {int(mask[i])} in the loss mask, and 0 and 1 are the only ones"


def count(path: Path) -> int:
    """The number of tokens that the mask in a file trains on."""
    with open(path, "rb") as file:
        return sum(block.count(1) for block in iter(lambda: file.read(shard_files.BLOCK), b""))
