"""Documents to rows of a fixed length, each a pure function of its number.

T positions of a row, S = T + 1 with the token after it, K spans of documents in a row. Which spans a row has follows from
the lengths of the documents, in one of two ways. `Concat`: an epoch is all documents back to back in a shuffled order, cut
at row edges, and only one row is padded. `BestFit`: documents longer than a row are cut into whole rows, and what remains of
them is packed with the documents that fit a row. Either way an epoch holds every token once, in the same number of rows, and
the rows are shuffled: in order, the rows of one long document would be the batches of many steps.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.data import packing
from hybrid_attn.data.documents import Documents

ARRAYS = {"tokens": np.int32, "targets": np.int32, "positions": np.int32, "segments": np.int32}
ARRAYS |= {"weights": np.float32, "bytes": np.float32}
MAX_LEN = 2**31 - 1  # tokens of a row: positions are int32


class Spans(NamedTuple):
    """The documents [K] of a row, from which token on, and how many tokens of each, with the one after the row."""

    documents_K: np.ndarray
    from_K: np.ndarray
    sizes_K: np.ndarray


class PackedSequences:
    """The rows of `documents`, packed as "concat" or "best_fit"; `seed` shuffles them anew each epoch, None does not.

    `byte_lengths` [vocab_size] gives the UTF-8 bytes that an id stands for.
    """

    def __init__(self, documents: Documents, seq_len: int, seed: int | None, byte_lengths: np.ndarray, packing: str = "concat"):
        check_len(seq_len)
        self.seq_len = seq_len
        self._documents = documents
        self._byte_lengths = byte_lengths
        self._plan = PLANS[packing](documents.lengths, seq_len, seed)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return len(self._plan)

    def __iter__(self):
        """The rows of the first epoch."""
        return map(self.__getitem__, range(len(self)))

    def spread(self, wanted: int) -> list[int]:
        """The numbers of at most `wanted` rows, evenly spaced over the first epoch: a sample that no single document fills."""
        wanted = min(wanted, len(self))
        return [i * len(self) // wanted for i in range(wanted)]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`, counted through all epochs, as `read` gives it."""
        return self.read([(index, 0, self.seq_len)])[0]

    def read(self, slices: Sequence[tuple[int, int, int]]) -> list[dict[str, np.ndarray]]:
        """The positions [start, stop) of row `index`, for each (index, start, stop); no token beyond the next one is read.

        `tokens`, `targets`, `positions`, `segments` are int32 [stop - start], `weights` and `bytes` float32. A target is
        the next token of the same document, in another row where the row ends; where there is none, its weight is 0.
        Positions and segments (from 1; 0 is padding) start afresh in each row. `bytes` are those of the weighted targets.
        """
        cut = [self._cut(index, start, stop) for index, start, stop in slices]
        tokens = iter(self._documents.read(span for spans, *_ in cut for span in zip(*spans, strict=True)))
        rows = []
        for (spans, positions_S, segments_S), (_, start, stop) in zip(cut, slices, strict=True):
            tokens_S = np.zeros(stop - start + 1, np.int32)
            pieces = [next(tokens) for _ in spans[0]]
            if pieces:
                np.concatenate(pieces, out=tokens_S[: sum(map(len, pieces))], casting="unsafe")
            rows.append(self._row(tokens_S, positions_S, segments_S))
        return rows

    def counts(self, epoch: int = 0) -> dict[str, int]:
        """Of one epoch: documents, tokens, rows, padding positions, cuts (row edges inside a document), documents cut."""
        tokens = int(self._documents.lengths.sum())
        cuts, cut_documents = self._plan.cuts(epoch)
        return {
            "documents": len(self._documents),
            "tokens": tokens,
            "sequences": len(self),
            "padding": len(self) * self.seq_len - tokens,
            "cuts": cuts,
            "cut_documents": cut_documents,
        }

    def _cut(self, index: int, start: int, stop: int) -> tuple[tuple, np.ndarray, np.ndarray]:
        """What to read for positions [start, stop] of a row (documents, starts, stops), and their positions and segments."""
        assert index >= 0, f"row {index} is before the first"
        documents_K, from_K, sizes_K = self._plan.spans(*divmod(index, len(self)))
        ends_K = np.cumsum(sizes_K)
        begins_K = ends_K - sizes_K
        first, last = np.searchsorted(ends_K, start, side="right"), np.searchsorted(begins_K, stop + 1)
        at = slice(first, last)
        left_K, right_K = np.maximum(begins_K[at], start), np.minimum(ends_K[at], stop + 1)
        shift_K = from_K[at] - begins_K[at]
        positions_S, segments_S = np.zeros((2, stop - start + 1), np.int32)
        n = int((right_K - left_K).sum())
        positions_S[:n] = np.arange(start, start + n) - np.repeat(begins_K[at], right_K - left_K)
        segments_S[:n] = np.repeat(np.arange(first + 1, last + 1), right_K - left_K)
        return (documents_K[at], left_K + shift_K, right_K + shift_K), positions_S, segments_S

    def _row(self, tokens_S: np.ndarray, positions_S: np.ndarray, segments_S: np.ndarray) -> dict[str, np.ndarray]:
        counts_T = (segments_S[:-1] == segments_S[1:]) & (segments_S[:-1] > 0)
        targets_T = np.where(counts_T, tokens_S[1:], 0)
        return {
            "tokens": tokens_S[:-1],
            "targets": targets_T,
            "positions": positions_S[:-1],
            "segments": segments_S[:-1],
            "weights": counts_T.astype(np.float32),
            "bytes": np.where(counts_T, self._byte_lengths[targets_T], 0).astype(np.float32),
        }


class Concat:
    """All documents back to back, cut at row edges, in shuffled order."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int | None):
        self._lengths, self._seq_len, self._seed = lengths, seq_len, seed
        self._num_tokens = int(lengths.sum())
        self._order = functools.lru_cache(maxsize=2)(self._order_of)  # two: rows on both sides of an epoch's edge

    def __len__(self) -> int:
        return -(-self._num_tokens // self._seq_len)

    def spans(self, epoch: int, row: int) -> Spans:
        order, ends, rows = self._order(epoch)
        start = int(rows[row]) * self._seq_len
        stop = min(start + self._seq_len + 1, self._num_tokens)
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        documents_K, ends_K = order[first : last + 1], ends[first : last + 1]
        starts_K = ends_K - self._lengths[documents_K]
        from_K = np.maximum(starts_K, start)
        return Spans(documents_K, from_K - starts_K, np.minimum(ends_K, stop) - from_K)

    def cuts(self, epoch: int) -> tuple[int, int]:
        """Row edges inside a document, and documents with such an edge."""
        _, ends, _ = self._order(epoch)
        edges = np.arange(self._seq_len, self._num_tokens, self._seq_len)
        holders = np.searchsorted(ends, edges)
        inside = ends[holders] != edges
        return int(inside.sum()), int(np.count_nonzero(np.diff(holders[inside], prepend=-1)))

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The documents' order in `epoch`, where each of them ends in the epoch's stream, and the order of the rows."""
        order = _permutation(len(self._lengths), self._seed, epoch)
        return order, np.cumsum(self._lengths[order]), _permutation(len(self), self._seed, epoch, 1)


class BestFit:
    """The rows of `packing.best_fit`, in shuffled order."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int | None):
        self._lengths, self._seq_len, self._seed = lengths, seq_len, seed
        self._packed = packing.best_fit(lengths, seq_len)
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: _permutation(len(self), seed, epoch))

    def __len__(self) -> int:
        return self._packed.num_sequences

    def spans(self, epoch: int, row: int) -> Spans:
        documents_K, from_K = self._packed.pieces(int(self._order(epoch)[row]))
        sizes_K = np.minimum(self._lengths[documents_K] - from_K, self._seq_len)
        goes_on = from_K + sizes_K < self._lengths[documents_K]  # only of a document that fills the whole row
        return Spans(documents_K, from_K, sizes_K + goes_on)

    def cuts(self, epoch: int) -> tuple[int, int]:
        """Row edges inside a document, and documents with such an edge: the same in every epoch."""
        edges = (self._lengths - 1) // self._seq_len
        return int(edges.sum()), int(np.count_nonzero(edges))


def check_len(seq_len: int) -> None:
    """ValueError where rows of `seq_len` tokens have positions that are no int32."""
    if not 1 <= seq_len <= MAX_LEN:
        raise ValueError(f"rows of {seq_len:,} tokens: they have at least 1 and at most {MAX_LEN:,}, for positions are int32")


def padding_arrays(size: int) -> dict[str, np.ndarray]:
    """So many positions of padding."""
    return {name: np.zeros(size, dtype) for name, dtype in ARRAYS.items()}


PLANS = {"concat": Concat, "best_fit": BestFit}


def _permutation(n: int, seed: int | None, *which: int) -> np.ndarray:
    """Order of `n` things, another one for each `which`, the same under every version of NumPy."""
    if seed is None:
        return np.arange(n)
    # NumPy promises the raw stream of a bit generator for ever, but not what Generator.permutation makes of it.
    return np.argsort(np.random.Philox(np.random.SeedSequence((seed, *which))).random_raw(n), kind="stable")
