"""Packs documents into sequences of a fixed length. Each packed sequence is a pure function of its number.

A packed sequence has T positions, S = T + 1 tokens with the one after it, and K spans of documents. The spans follow from the
lengths of the documents, in one of two ways. `Concat` puts all documents of an epoch back to back in a shuffled order and cuts
them every T tokens; only one sequence is padded. `BestFit` cuts documents longer than T into full sequences and packs what
remains of them together with the shorter documents. In both, an epoch holds every token once, in the same number of sequences.
The sequences are shuffled too: in order, the sequences of one long document would fill the batches of many steps.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.data import packing
from hybrid_attn.data.documents import Documents

ARRAYS = {"tokens": np.int32, "targets": np.int32, "positions": np.int32, "segments": np.int32}
ARRAYS |= {"weights": np.float32, "bytes": np.float32}
MAX_LEN = 2**31 - 1  # tokens of a sequence: positions are int32


class Spans(NamedTuple):
    """The spans of a packed sequence: document, first token, and number of tokens, the target of the last one included."""

    documents_K: np.ndarray
    firsts_K: np.ndarray
    sizes_K: np.ndarray


class PackedSequences:
    """The sequences of `documents`, packed by "concat" or "best_fit".

    `seed` gives each epoch its own order; None keeps the order of the documents. `byte_lengths` [vocab_size] has the number of
    UTF-8 bytes of each id.
    """

    def __init__(self, documents: Documents, seq_len: int, seed: int | None, byte_lengths: np.ndarray, packing: str = "concat"):
        check_len(seq_len)
        self.seq_len = seq_len
        self._documents = documents
        self._byte_lengths = byte_lengths
        self._plan = PLANS[packing](documents.lengths, seq_len, seed)

    def __len__(self) -> int:
        """Sequences of one epoch."""
        return len(self._plan)

    def __iter__(self):
        """The sequences of the first epoch."""
        return map(self.__getitem__, range(len(self)))

    def spread(self, count: int) -> list[int]:
        """The numbers of at most `count` sequences, evenly spaced over the first epoch, so no document fills them."""
        count = min(count, len(self))
        return [i * len(self) // count for i in range(count)]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Sequence `index`, counted through all epochs, in the form of `read`."""
        return self.read([(index, 0, self.seq_len)])[0]

    def read(self, slices: Sequence[tuple[int, int, int]]) -> list[dict[str, np.ndarray]]:
        """Positions [start, stop) of sequence `index`, for each (index, start, stop). Only these tokens and the next are read.

        `tokens`, `targets`, `positions`, `segments` are int32 [stop - start], `weights` and `bytes` float32. A target is the
        next token of the same document, even where the sequence ends; without one its weight is 0, as it is where the loss mask
        of the documents leaves the target out. Positions and segments (from 1; 0 is padding) start again in each sequence.
        `bytes` has the UTF-8 bytes of each target with a weight.
        """
        layouts = [self._layout(index, start, stop) for index, start, stop in slices]
        spans = [span for columns, *_ in layouts for span in zip(*columns, strict=True)]
        tokens = iter(self._documents.read(spans))
        masks = None if self._documents.loss_mask is None else iter(self._documents.read_loss_mask(spans))
        sequences = []
        for (columns, positions_S, segments_S), (_, start, stop) in zip(layouts, slices, strict=True):
            number, size = len(columns[0]), stop - start + 1
            tokens_S = _joined(tokens, number, np.zeros(size, np.int32))
            mask_S = np.ones(size, bool) if masks is None else _joined(masks, number, np.zeros(size, bool))
            sequences.append(self._arrays(tokens_S, mask_S, positions_S, segments_S))
        return sequences

    def counts(self, epoch: int = 0) -> dict[str, int]:
        """One epoch: documents, tokens, sequences, padding, cuts (ends of sequences inside a document), documents cut."""
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

    def _layout(self, index: int, start: int, stop: int) -> tuple[tuple, np.ndarray, np.ndarray]:
        """The spans (documents, starts, stops) at positions [start, stop] of a sequence, with their positions and segments."""
        assert index >= 0, f"sequence {index} is before the first"
        documents_K, firsts_K, sizes_K = self._plan.spans(*divmod(index, len(self)))
        ends_K = np.cumsum(sizes_K)
        begins_K = ends_K - sizes_K
        first, last = np.searchsorted(ends_K, start, side="right"), np.searchsorted(begins_K, stop + 1)
        overlap = slice(first, last)
        left_K, right_K = np.maximum(begins_K[overlap], start), np.minimum(ends_K[overlap], stop + 1)
        shift_K = firsts_K[overlap] - begins_K[overlap]
        positions_S, segments_S = np.zeros((2, stop - start + 1), np.int32)
        n = int((right_K - left_K).sum())
        positions_S[:n] = np.arange(start, start + n) - np.repeat(begins_K[overlap], right_K - left_K)
        segments_S[:n] = np.repeat(np.arange(first + 1, last + 1), right_K - left_K)
        return (documents_K[overlap], left_K + shift_K, right_K + shift_K), positions_S, segments_S

    def _arrays(
        self, tokens_S: np.ndarray, mask_S: np.ndarray, positions_S: np.ndarray, segments_S: np.ndarray
    ) -> dict[str, np.ndarray]:
        has_target_T = (segments_S[:-1] == segments_S[1:]) & (segments_S[:-1] > 0)
        targets_T, trained_T = np.where(has_target_T, tokens_S[1:], 0), has_target_T & mask_S[1:]
        return {
            "tokens": tokens_S[:-1],
            "targets": targets_T,
            "positions": positions_S[:-1],
            "segments": segments_S[:-1],
            "weights": trained_T.astype(np.float32),
            "bytes": np.where(trained_T, self._byte_lengths[targets_T], 0).astype(np.float32),
        }


def _joined(pieces: Iterator[np.ndarray], number: int, out_S: np.ndarray) -> np.ndarray:
    """`out_S` with the next `number` of `pieces` at its beginning."""
    arrays = list(itertools.islice(pieces, number))
    if arrays:
        np.concatenate(arrays, out=out_S[: sum(map(len, arrays))], casting="unsafe")
    return out_S


class Concat:
    """All documents back to back, cut every `seq_len` tokens, in shuffled order."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int | None):
        self._lengths, self._seq_len, self._seed = lengths, seq_len, seed
        self._num_tokens = int(lengths.sum())
        self._order = functools.lru_cache(maxsize=2)(self._order_of)  # two: a batch may span two epochs

    def __len__(self) -> int:
        return -(-self._num_tokens // self._seq_len)

    def spans(self, epoch: int, index: int) -> Spans:
        """The spans of sequence `index` of an epoch."""
        order, ends, sequences = self._order(epoch)
        start = int(sequences[index]) * self._seq_len
        stop = min(start + self._seq_len + 1, self._num_tokens)
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        documents_K, ends_K = order[first : last + 1], ends[first : last + 1]
        starts_K = ends_K - self._lengths[documents_K]
        firsts_K = np.maximum(starts_K, start)
        return Spans(documents_K, firsts_K - starts_K, np.minimum(ends_K, stop) - firsts_K)

    def cuts(self, epoch: int) -> tuple[int, int]:
        """Ends of sequences inside a document, and documents with such an end."""
        _, ends, _ = self._order(epoch)
        edges = np.arange(self._seq_len, self._num_tokens, self._seq_len)
        holders = np.searchsorted(ends, edges)
        inside = ends[holders] != edges
        return int(inside.sum()), int(np.count_nonzero(np.diff(holders[inside], prepend=-1)))

    def _order_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The order of the documents in an epoch, where each ends in their concatenation, and the order of the sequences."""
        order = _permutation(len(self._lengths), self._seed, epoch)
        return order, np.cumsum(self._lengths[order]), _permutation(len(self), self._seed, epoch, 1)


class BestFit:
    """The sequences of `packing.best_fit`, in shuffled order."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int | None):
        self._lengths, self._seq_len, self._seed = lengths, seq_len, seed
        self._packed = packing.best_fit(lengths, seq_len)
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: _permutation(len(self), seed, epoch))

    def __len__(self) -> int:
        return self._packed.num_sequences

    def spans(self, epoch: int, index: int) -> Spans:
        """The spans of sequence `index` of an epoch."""
        documents_K, firsts_K = self._packed.pieces(int(self._order(epoch)[index]))
        sizes_K = np.minimum(self._lengths[documents_K] - firsts_K, self._seq_len)
        continues = firsts_K + sizes_K < self._lengths[documents_K]  # only a document that fills the sequence
        return Spans(documents_K, firsts_K, sizes_K + continues)

    def cuts(self, epoch: int) -> tuple[int, int]:
        """Ends of sequences inside a document, and documents with such an end. Both are the same in every epoch."""
        edges = (self._lengths - 1) // self._seq_len
        return int(edges.sum()), int(np.count_nonzero(edges))


def check_len(seq_len: int) -> None:
    """ValueError where the positions of a sequence of `seq_len` tokens do not fit int32."""
    if not 1 <= seq_len <= MAX_LEN:
        raise ValueError(f"sequences of {seq_len:,} tokens: use 1 to {MAX_LEN:,}, because positions are int32")


def padding_arrays(size: int) -> dict[str, np.ndarray]:
    """The arrays of `size` positions of padding."""
    return {name: np.zeros(size, dtype) for name, dtype in ARRAYS.items()}


PLANS = {"concat": Concat, "best_fit": BestFit}


def _permutation(n: int, seed: int | None, *stream: int) -> np.ndarray:
    """A random order of 0 to n - 1, its own for each `stream`, and the same under every version of NumPy."""
    if seed is None:
        return np.arange(n)
    # NumPy promises that the raw stream of a bit generator never changes; it does not promise this of Generator.permutation.
    return np.argsort(np.random.Philox(np.random.SeedSequence((seed, *stream))).random_raw(n), kind="stable")
