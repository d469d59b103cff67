"""Best-fit packing of documents into sequences, from their lengths alone.

A document longer than a sequence is first cut into full sequences; what remains of it is packed like a short document.
Packing is best-fit decreasing: the longest piece first, each into the fullest sequence that still has room. No document that
fits a sequence is cut, and nothing is dropped.
"""

import bisect
import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class BestFitPlan:
    """Which pieces of documents each sequence holds. Sequences that one document fills come first, in document order.

    `full_ends` int64 [n] counts the full sequences of documents 0 to i. The j-th sequence after these holds the last pieces of
    the documents `packed[offsets[j]:offsets[j + 1]]`.
    """

    seq_len: int
    full_ends: np.ndarray
    packed: np.ndarray
    offsets: np.ndarray

    @property
    def num_sequences(self) -> int:
        return self._num_full + len(self.offsets) - 1

    @property
    def _num_full(self) -> int:
        return int(self.full_ends[-1])

    def pieces(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents [K] of a sequence, and the first token of each piece."""
        if number < self._num_full:
            document = np.searchsorted(self.full_ends, number, side="right")
            before = self.full_ends[document - 1] if document else 0
            return np.array([document]), np.array([(number - before) * self.seq_len])
        documents_K = self.packed[slice(*self.offsets[number - self._num_full : number - self._num_full + 2])]
        full_K = self.full_ends[documents_K] - np.where(documents_K > 0, self.full_ends[documents_K - 1], 0)
        return documents_K, full_K * self.seq_len


def best_fit(lengths: np.ndarray, seq_len: int) -> BestFitPlan:
    """Packs documents of `lengths` int64 [n] into sequences of `seq_len` tokens."""
    remainders = lengths % seq_len
    pieces = np.argsort(-remainders, kind="stable")[: np.count_nonzero(remainders)]
    first, count, per_sequence = np.array(list(_groups(np.bincount(remainders)[1:], seq_len)), np.int64).reshape(-1, 3).T
    sizes = count * per_sequence
    index_in_group = np.arange(len(pieces)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    sequence = np.repeat(first, sizes) + index_in_group // np.repeat(per_sequence, sizes)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(sequence))]).astype(np.int64)
    return BestFitPlan(seq_len, np.cumsum(lengths // seq_len), pieces[np.argsort(sequence, kind="stable")], offsets)


def _groups(counts: np.ndarray, seq_len: int) -> Iterator[tuple[int, int, int]]:
    """Yields (first, count, per_sequence): the next longest pieces fill sequences [first, first + count), so many in each.

    `counts[i]` is the number of pieces of i + 1 tokens. Equal pieces are placed together, and sequences with equal room form
    runs (first, count). So the work grows with the number of different lengths and rooms, not with the documents.
    """
    rooms = _Rooms()
    opened = 0
    for length in (np.flatnonzero(counts)[::-1] + 1).tolist():
        left = int(counts[length - 1])
        while left:
            if not rooms.fits(length):
                count = -(-left // (seq_len // length))
                rooms.add(seq_len, opened, count)
                opened += count
            room, first, count = rooms.pop_fullest(length)
            # The fullest sequence with room for one piece stays the fullest as long as it has room for more.
            per_sequence = room // length
            filled = min(count, left // per_sequence)
            if filled:
                yield first, filled, per_sequence
                rooms.add(room - per_sequence * length, first, filled)
            left -= filled * per_sequence
            if left and filled < count:
                yield first + filled, 1, left
                rooms.add(room - left * length, first + filled, 1)
                filled, left = filled + 1, 0
            rooms.add(room, first + filled, count - filled)


class _Rooms:
    """Runs of sequences (first, count) by the room, in tokens, that each of them still has."""

    def __init__(self):
        self._sizes: list[int] = []  # sorted
        self._runs: dict[int, list[tuple[int, int]]] = {}

    def add(self, room: int, first: int, count: int) -> None:
        if not room or not count:
            return
        if room not in self._runs:
            bisect.insort(self._sizes, room)
        self._runs.setdefault(room, []).append((first, count))

    def fits(self, length: int) -> bool:
        return bool(self._sizes) and self._sizes[-1] >= length

    def pop_fullest(self, length: int) -> tuple[int, int, int]:
        """(room, first, count) of the run with the least room that holds `length` tokens."""
        i = bisect.bisect_left(self._sizes, length)
        room = self._sizes[i]
        run = self._runs[room].pop()
        if not self._runs[room]:
            del self._runs[room], self._sizes[i]
        return room, *run
