"""Documents to rows of a fixed length, each a pure function of its number.

T positions of a row, S = T + 1 with the token after it, K documents in a row. An epoch is all documents back to back
in a shuffled order, cut at row edges. Its last row is filled up with padding, so that every epoch holds every token
once, in the same number of rows.
"""

import numpy as np

from hybrid_attn.data.documents import Documents


class Rows:
    """The rows of `documents`; `seed` shuffles them anew each epoch and None keeps reading order.

    `byte_lengths` [vocab_size] gives the UTF-8 bytes that an id stands for.
    """

    def __init__(self, documents: Documents, seq_len: int, seed: int | None, byte_lengths: np.ndarray):
        self.seq_len = seq_len
        self._documents = documents
        self._seed = seed
        self._byte_lengths = byte_lengths
        self._lengths = documents.lengths
        self._num_tokens = int(documents.lengths.sum())
        self._permuted = (None, None, None)

    def __len__(self) -> int:
        """Rows of one epoch."""
        return -(-self._num_tokens // self.seq_len)

    def __iter__(self):
        """The rows of the first epoch."""
        return map(self.__getitem__, range(len(self)))

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`, counted through all epochs.

        `tokens`, `targets`, `positions`, `segments` are int32 [T], `weights` float32 [T] and `bytes` a float32 scalar.
        A target is the next token of the same document, in the next row where the row ends; where there is none, its
        weight is 0. Positions and segments (from 1; 0 is padding) start afresh in each row. `bytes` is what the
        weighted targets stand for.
        """
        assert index >= 0, f"row {index} is before the first"
        epoch, row = divmod(index, len(self))
        tokens_S, positions_S, segments_S = self._cut(epoch, row * self.seq_len)
        counts_T = (segments_S[:-1] == segments_S[1:]) & (segments_S[:-1] > 0)
        return {
            "tokens": tokens_S[:-1],
            "targets": np.where(counts_T, tokens_S[1:], 0),
            "positions": positions_S[:-1],
            "segments": segments_S[:-1],
            "weights": counts_T.astype(np.float32),
            "bytes": np.float32(self._byte_lengths[tokens_S[1:][counts_T]].sum()),
        }

    def counts(self, epoch: int = 0) -> dict[str, int]:
        """Documents, tokens, rows, padding positions, and cuts (row edges inside a document) of one epoch."""
        _, ends = self._order(epoch)
        edges = np.arange(self.seq_len, self._num_tokens, self.seq_len)
        return {
            "documents": len(self._lengths),
            "tokens": self._num_tokens,
            "rows": len(self),
            "padding": len(self) * self.seq_len - self._num_tokens,
            "cuts": int(np.sum(ends[np.searchsorted(ends, edges)] != edges)),
        }

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The documents' order in `epoch`, and where each of them ends in the epoch's stream."""
        cached, order, ends = self._permuted
        if cached != epoch:
            order = _permutation(len(self._lengths), self._seed, epoch)
            ends = np.cumsum(self._lengths[order])
            self._permuted = (epoch, order, ends)
        return order, ends

    def _cut(self, epoch: int, start: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, positions and segments [S] of an epoch's stream from token `start` on, zeros beyond its end."""
        order, ends = self._order(epoch)
        stop = min(start + self.seq_len + 1, self._num_tokens)
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        documents_K, ends_K = order[first : last + 1], ends[first : last + 1]
        starts_K = ends_K - self._lengths[documents_K]
        from_K, to_K = np.maximum(starts_K, start), np.minimum(ends_K, stop)
        tokens_S, positions_S, segments_S = np.zeros((3, self.seq_len + 1), np.int32)
        n = stop - start
        spans = zip(documents_K, from_K - starts_K, to_K - starts_K, strict=True)
        tokens_S[:n] = np.concatenate(self._documents.read(spans))
        positions_S[:n] = np.arange(n) - np.repeat(from_K - start, to_K - from_K)
        segments_S[:n] = np.repeat(np.arange(1, len(documents_K) + 1), to_K - from_K)
        return tokens_S, positions_S, segments_S


def _permutation(n: int, seed: int | None, epoch: int) -> np.ndarray:
    """Order of `n` documents in `epoch`, the same under every version of NumPy."""
    if seed is None:
        return np.arange(n)
    # NumPy promises the raw stream of a bit generator for ever, but not what Generator.permutation makes of it.
    return np.argsort(np.random.Philox(np.random.SeedSequence((seed, epoch))).random_raw(n), kind="stable")
