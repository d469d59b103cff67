"""Packs documents into sequences of a fixed length. Each packed sequence is a pure function of its number.

A packed sequence has T positions, S = T + 1 tokens with the one after it, and K spans of documents. The spans follow from the
lengths of the documents, in one of three ways. `Concat` puts all documents of an epoch back to back in a shuffled order and
cuts them every T tokens; only one sequence is padded. `BestFit` cuts documents longer than T into full sequences and packs
what remains of them together with the shorter documents. `Pairs` has both halves of a pair of completions in one sequence, and
cuts none. In each, an epoch holds every token once, in the same number of sequences. The sequences are shuffled too: in order,
the sequences of one long document would fill the batches of many steps.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn.config import StageConfig
from hybrid_attn.data.documents import Documents, pair_lengths
from hybrid_attn.trees import check

ARRAYS = {"tokens": np.int32, "targets": np.int32, "positions": np.int32, "segments": np.int32}
ARRAYS |= {"weights": np.float32, "bytes": np.float32}
STORED = {"references": np.float32}  # of stages whose reference stands in the store
MAX_LEN = 2**31 - 1  # tokens of a sequence: positions are int32


class PackedSequences:
    """The sequences of `documents`, packed by "concat" or "best_fit", or by pairs if the documents are pairs.

    `seed` gives each epoch its own order; None keeps that of the documents. `byte_lengths` [vocab_size] has the UTF-8 bytes of
    each id. With `references` they have the log-probabilities of the documents, which the first `read` reads.
    """

    def __init__(
        self, documents: Documents, seq_len: int, seed: int | None, byte_lengths: np.ndarray, packing: str = "concat",
        references: bool = False,
    ):  # fmt: skip
        check_len(seq_len)
        self._references = functools.cache(documents.reference_log_probs) if references else None
        self.seq_len = seq_len
        self._documents, self._byte_lengths = documents, byte_lengths
        plan = Pairs if documents.paired else PLANS[packing]
        self._plan = plan(documents.lengths, seq_len, seed)

    @property
    def paired(self) -> bool:
        """Whether every sequence has complete pairs alone."""
        return self._documents.paired

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
        of the documents leaves the target out. Positions and segments (from 1; 0 is padding) start again in each sequence. Of
        pair j of a sequence, counted from 1, chosen has the segment 2j - 1 and rejected 2j.
        `bytes` has the UTF-8 bytes of each target with a weight. `references`, if there are any, has the log-probability of a
        document at its first token, and 0 elsewhere.
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
            has_target_T = (segments_S[:-1] == segments_S[1:]) & (segments_S[:-1] > 0)
            targets_T, trained_T = np.where(has_target_T, tokens_S[1:], 0), has_target_T & mask_S[1:]
            arrays = {"tokens": tokens_S[:-1], "targets": targets_T, "positions": positions_S[:-1], "segments": segments_S[:-1]}
            bytes_T = np.where(trained_T, self._byte_lengths[targets_T], 0).astype(np.float32)
            arrays |= {"weights": trained_T.astype(np.float32), "bytes": bytes_T}
            sequences.append(arrays | self._stored(columns, stop - start))
        return sequences

    def _stored(self, columns: tuple, size: int) -> dict[str, np.ndarray]:
        """The references of the documents that begin in these spans, at `size` positions."""
        if self._references is None:
            return {}
        documents_K, lefts_K, rights_K = columns
        begins_K = np.cumsum(rights_K - lefts_K) - (rights_K - lefts_K)
        here_K = (lefts_K == 0) & (begins_K < size)  # the last position is of the next token
        references_T = np.zeros(size, np.float32)
        references_T[begins_K[here_K]] = self._references()[documents_K[here_K]]
        return {"references": references_T}

    def documents_of(self, index: int) -> np.ndarray:
        """The numbers of the documents of a sequence of the first epoch, in order."""
        return self._plan.spans(0, index).documents_K

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


def fields_of(stage: StageConfig) -> dict[str, np.dtype]:
    """The arrays of a batch of a stage, by name, with their dtypes."""
    return ARRAYS | STORED if has_stored_reference(stage) else ARRAYS


def has_stored_reference(stage: StageConfig) -> bool:
    """Whether the log-probabilities of the reference of a stage stand in its token stores."""
    return stage.preference is not None and stage.preference.reference == "store"


def _joined(pieces: Iterator[np.ndarray], number: int, out_S: np.ndarray) -> np.ndarray:
    """`out_S` with the next `number` of `pieces` at its beginning."""
    arrays = list(itertools.islice(pieces, number))
    if arrays:
        np.concatenate(arrays, out=out_S[: sum(map(len, arrays))], casting="unsafe")
    return out_S


def check_len(seq_len: int) -> None:
    """ValueError where the positions of a sequence of `seq_len` tokens do not fit int32."""
    fits = 1 <= seq_len <= MAX_LEN
    check(fits, f"sequences of {seq_len:,} tokens: use 1 to {MAX_LEN:,}, because positions are int32")


def padding_arrays(size: int) -> dict[str, np.ndarray]:
    """The arrays of `size` positions of padding."""
    return {name: np.zeros(size, dtype) for name, dtype in ARRAYS.items()}


class Spans(NamedTuple):
    """The spans of a packed sequence: document, first token, and number of tokens, the target of the last one included."""

    documents_K: np.ndarray
    firsts_K: np.ndarray
    sizes_K: np.ndarray


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
    """Best-fit decreasing: the longest piece first, each into the fullest sequence that still has room.

    A document longer than a sequence is first cut into full sequences; what remains of it is packed like a short document. No
    document that fits a sequence is cut. Full sequences come first, in document order: `full_ends` [n] counts those of
    documents 0 to i. The j-th sequence after these holds the last pieces of the documents `packed[offsets[j]:offsets[j + 1]]`.
    """

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int | None):
        self._lengths, self._seq_len = lengths, seq_len
        self._order = functools.lru_cache(maxsize=2)(lambda epoch: _permutation(len(self), seed, epoch))
        self._full_ends = np.cumsum(lengths // seq_len)
        remainders = lengths % seq_len
        pieces = np.argsort(-remainders, kind="stable")[: np.count_nonzero(remainders)]
        first, count, per_sequence = np.array(list(groups(np.bincount(remainders)[1:], seq_len)), np.int64).reshape(-1, 3).T
        sizes = count * per_sequence
        index_in_group = np.arange(len(pieces)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        sequence = np.repeat(first, sizes) + index_in_group // np.repeat(per_sequence, sizes)
        self._offsets = np.concatenate([[0], np.cumsum(np.bincount(sequence))]).astype(np.int64)
        self._packed = pieces[np.argsort(sequence, kind="stable")]

    def __len__(self) -> int:
        return int(self._full_ends[-1]) + len(self._offsets) - 1

    def spans(self, epoch: int, index: int) -> Spans:
        """The spans of sequence `index` of an epoch."""
        number = int(self._order(epoch)[index])
        packed = number - int(self._full_ends[-1])
        if packed < 0:
            documents_K = np.searchsorted(self._full_ends, [number], side="right")
            following_K = self._full_ends[documents_K] - number  # sequences that the document still fills
        else:
            documents_K = self._packed[self._offsets[packed] : self._offsets[packed + 1]]
            following_K = 0
        lengths_K = self._lengths[documents_K]
        firsts_K = (lengths_K // self._seq_len - following_K) * self._seq_len
        sizes_K = np.minimum(lengths_K - firsts_K, self._seq_len)
        continues = firsts_K + sizes_K < lengths_K  # only a document that fills the sequence
        return Spans(documents_K, firsts_K, sizes_K + continues)

    def cuts(self, epoch: int) -> tuple[int, int]:
        """Ends of sequences inside a document, and documents with such an end. Both are the same in every epoch."""
        edges = (self._lengths - 1) // self._seq_len
        return int(edges.sum()), int(np.count_nonzero(edges))


class Pairs:
    """Best-fit decreasing over pairs, each of documents 2i and 2i + 1 in one sequence; ValueError where one does not fit."""

    def __init__(self, lengths: np.ndarray, seq_len: int, seed: int | None):
        of_pairs = pair_lengths(lengths)
        longest = int(of_pairs.max())
        cure = f"raise seq_len, or prepare the pairs again with --max_tokens={seq_len} and --on_error=skip"
        check(longest <= seq_len, f"the longest pair has {longest:,} tokens, and a sequence {seq_len:,}; {cure}")
        self._lengths, self._plan = lengths, BestFit(of_pairs, seq_len, seed)

    def __len__(self) -> int:
        return len(self._plan)

    def spans(self, epoch: int, index: int) -> Spans:
        """The spans of sequence `index` of an epoch."""
        pairs_K, *_ = self._plan.spans(epoch, index)
        documents_K = (2 * pairs_K[:, None] + np.arange(2)).reshape(-1)
        return Spans(documents_K, np.zeros_like(documents_K), self._lengths[documents_K])

    def cuts(self, epoch: int) -> tuple[int, int]:
        """No sequence ends inside a document."""
        return 0, 0


PLANS = {"concat": Concat, "best_fit": BestFit}  # of documents that are no pairs, by data.packing


def _permutation(n: int, seed: int | None, *stream: int) -> np.ndarray:
    """A random order of 0 to n - 1, its own for each `stream`, and the same under every version of NumPy."""
    if seed is None:
        return np.arange(n)
    # NumPy promises that the raw stream of a bit generator never changes; it does not promise this of Generator.permutation.
    return np.argsort(np.random.Philox(np.random.SeedSequence((seed, *stream))).random_raw(n), kind="stable")


def groups(counts: np.ndarray, seq_len: int) -> Iterator[tuple[int, int, int]]:
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
