"""Best-fit packing of documents into rows, from their lengths alone.

A document longer than a row is first cut into whole rows; what remains of it is packed like a document that fits a row.
Packing is best-fit decreasing: the longest first, each into the fullest row that still has room. No document that fits a
row is cut, and nothing is dropped.
"""

import bisect
import dataclasses
from collections.abc import Iterator

import numpy as np


@dataclasses.dataclass(frozen=True, eq=False)
class BestFitPlan:
    """Rows by number: first the whole ones, in the order of their documents, then the packed ones.

    `full_ends` int64 [n] counts the whole rows up to and with each document. Packed row j has the last part of the documents
    `packed[offsets[j]:offsets[j + 1]]`.
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
        """The documents [K] of a row, and the first token of each that it has."""
        if number < self._num_full:
            document = np.searchsorted(self.full_ends, number, side="right")
            before = self.full_ends[document - 1] if document else 0
            return np.array([document]), np.array([(number - before) * self.seq_len])
        at = slice(*self.offsets[number - self._num_full : number - self._num_full + 2])
        documents_K = self.packed[at]
        whole_K = self.full_ends[documents_K] - np.where(documents_K > 0, self.full_ends[documents_K - 1], 0)
        return documents_K, whole_K * self.seq_len


def best_fit(lengths: np.ndarray, seq_len: int) -> BestFitPlan:
    """The best-fit rows of `seq_len` tokens of documents of `lengths` int64 [n]."""
    rests = lengths % seq_len
    pieces = np.argsort(-rests, kind="stable")[: np.count_nonzero(rests)]
    first, rows, per_row = np.array(list(_groups(np.bincount(rests)[1:], seq_len)), np.int64).reshape(-1, 3).T
    sizes = rows * per_row
    nth = np.arange(len(pieces)) - np.repeat(np.cumsum(sizes) - sizes, sizes)  # of its group
    row = np.repeat(first, sizes) + nth // np.repeat(per_row, sizes)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(row))]).astype(np.int64)
    return BestFitPlan(seq_len, np.cumsum(lengths // seq_len), pieces[np.argsort(row, kind="stable")], offsets)


def _groups(counts: np.ndarray, seq_len: int) -> Iterator[tuple[int, int, int]]:
    """The next `rows * per_row` pieces, from the longest to the shortest, go into rows `first` on: (first, rows, per_row).

    `counts[i]` is the number of pieces of i + 1 tokens. Equal pieces are placed together and rows with equal room are kept as
    runs (first, rows), so the work grows with the different lengths and rooms, not with the documents.
    """
    rooms, runs = [], {}  # the rooms that some rows have, sorted, and the runs of rows that have them
    opened = 0

    def put(room: int, first: int, rows: int) -> None:
        if room and rows:
            if room not in runs:
                bisect.insort(rooms, room)
            runs.setdefault(room, []).append((first, rows))

    for length in (np.flatnonzero(counts)[::-1] + 1).tolist():
        left = int(counts[length - 1])
        while left:
            at = bisect.bisect_left(rooms, length)
            if at == len(rooms):
                rows = -(-left // (seq_len // length))
                put(seq_len, opened, rows)
                opened += rows
            room = rooms[at]
            first, rows = runs[room].pop()
            if not runs[room]:
                del runs[room], rooms[at]
            # The fullest row with room for one piece stays the fullest as long as it has room for more.
            per_row = room // length
            full = min(rows, left // per_row)
            if full:
                yield first, full, per_row
                put(room - per_row * length, first, full)
            left -= full * per_row
            if left and full < rows:
                yield first + full, 1, left
                put(room - left * length, first + full, 1)
                full, left = full + 1, 0
            put(room, first + full, rows - full)
