"""Rows that ask a model to find again what the row has said: drawn, not read, each a pure function of its number.

Every row begins with bos and goes on in bytes, so that it decodes to text. A target that weighs something is an answer,
and can be told from the row alone; `config.TASKS` has the most pairs and the least tokens of each task. n tokens in a row
before its padding, T with it.
"""

import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn import config
from hybrid_attn.config import HOPS, QUERIES
from hybrid_attn.data.packed import ARRAYS, check_len
from hybrid_attn.data.tokenizer import ByteTokenizer

QUERY = ord("?")
KEYS = np.frombuffer(b"ABCDEFGH", np.uint8)
VALUES = np.frombuffer(b"abcdefgh", np.uint8)
VARIABLES = np.frombuffer(string.ascii_uppercase[: config.TASKS["tracking"].pairs * (HOPS + 1)].encode(), np.uint8)
NOISE = np.frombuffer((string.punctuation.replace("?", "") + " ").encode(), np.uint8)
IS = ord("=")
MQAR_WORDS = 256  # the bytes: 0 is no key, the others below the middle are, and those from the middle on are values
MQAR_POWER = 0.01  # zoology's: the gap to the query of a pair falls about as 1 / gap

Raw = Callable[[int], np.ndarray]  # so many random uint64
Drawn = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, targets and weights, each [n]


class Task(NamedTuple):
    """What stands for the documents of a synthetic source: one of `TASKS`, and the pairs of a row if it has any."""

    name: str
    pairs: int

    def fingerprint(self) -> str:
        """Tells the rows of this task from those of others."""
        return self.name if config.TASKS[self.name].pairs is None else f"{self.name} of {self.pairs} pairs"


class SyntheticSequences:
    """The rows of a task, in the form of `packed.PackedSequences`.

    Those that `seed` draws, for training, have from half of `seq_len` tokens up to all of them. None draws the held-out
    rows, which are full, of other numbers than any seed's, and the same for every config; no answer is told before it.
    """

    def __init__(self, task: Task, seq_len: int, seed: int | None):
        check_len(seq_len)
        self.task, self.seq_len = task, seq_len
        self._heldout = seed is None
        self.shortest = seq_len if seed is None else seq_len // 2
        self._entropy = (1, seq_len) if seed is None else (0, seed)

    def __len__(self) -> int:
        """Rows of one epoch: as many as there are numbers for them."""
        return 2**62

    def spread(self, wanted: int) -> list[int]:
        """The numbers of the first `wanted` rows, which are like all others."""
        return list(range(wanted))

    def read(self, slices: Sequence[tuple[int, int, int]]) -> list[dict[str, np.ndarray]]:
        """The positions [start, stop) of row `index`, for each (index, start, stop), as `PackedSequences.read` does."""
        return [{name: x[start:stop] for name, x in self._row(index).items()} for index, start, stop in slices]

    def _row(self, index: int) -> dict[str, np.ndarray]:
        # NumPy promises the raw stream of a bit generator for ever, but not what Generator.choice makes of it.
        raw = np.random.Philox(np.random.SeedSequence((*self._entropy, index))).random_raw
        n = self.shortest + int(raw(1)[0] % (self.seq_len - self.shortest + 1))
        tokens_n, targets_n, weights_n = TASKS[self.task.name](raw, n, self.task.pairs)
        if self.task.name == "recall" and self._heldout:
            weights_n = _first(tokens_n, weights_n)
        n = len(tokens_n)
        row = {name: np.zeros(self.seq_len, dtype) for name, dtype in ARRAYS.items()}
        row["tokens"][:n], row["positions"][:n], row["segments"][:n] = tokens_n, np.arange(n), 1
        row["targets"][:n], row["weights"][:n] = targets_n * weights_n, weights_n
        row["bytes"][:n] = weights_n  # an answer is a byte
        return row


def recall(raw: Raw, n: int, pairs: int) -> Drawn:
    """Pairs Aa somewhere in noise, then queries ?Aa, drawn with replacement.

    A key's second answer follows from the first, a few tokens before it, where any window sees it: that is soon learnt, and
    from it to look farther back. Held-out rows want only the first.
    """
    keys, values = _choose(raw, KEYS, pairs), _choose(raw, VALUES, pairs)
    noise = NOISE[raw(n - 3 * QUERIES) % len(NOISE)]
    places = 2 * _choose(raw, np.arange(len(noise) // 2), pairs)
    noise[places], noise[places + 1] = keys, values
    asked = raw(QUERIES) % pairs
    queries = np.stack([np.full(QUERIES, QUERY), keys[asked], values[asked]], 1)
    return _next_tokens(np.concatenate([[ByteTokenizer.bos], noise, queries.ravel()]), len(noise) + 3, 3)


def mqar(raw: Raw, n: int, pairs: int) -> Drawn:
    """Multi-query associative recall (Arora et al., Zoology, 2312.04927, its code's words and places) behind a bos.

    Pairs, then each key once more in random words, sooner rather than later; its value is wanted there, and never told.
    """
    keys = _choose(raw, np.arange(1, MQAR_WORDS // 2), pairs)
    values = _choose(raw, np.arange(MQAR_WORDS // 2, MQAR_WORDS), pairs)
    tokens_n = np.concatenate([[ByteTokenizer.bos], np.stack([keys, values], 1).ravel(), raw(n - 1 - 2 * pairs) % MQAR_WORDS])
    gaps = np.arange(1, (n - 1 - 2 * pairs) // 2 + 1)
    # The least of exponential times, each at the rate of its weight, are a weighted draw without replacement.
    uniform = (raw(len(gaps)) >> np.uint64(11)) * 2.0**-53
    times = -np.log1p(-uniform) / gaps ** (MQAR_POWER - 1)
    places = 1 + 2 * pairs + 2 * np.argsort(times, kind="stable")[:pairs]
    targets_n, weights_n = np.zeros((2, n), np.int64)
    tokens_n[places], targets_n[places], weights_n[places] = keys, values, 1
    return tokens_n, targets_n, weights_n


def copy(raw: Raw, n: int, pairs: int) -> Drawn:
    """Letters, a question mark, the same letters: of any length, and the order of all of them matters."""
    alphabet = np.concatenate([KEYS, VALUES])
    letters = alphabet[raw((n - 1) // 2) % len(alphabet)]
    return _next_tokens(np.concatenate([[ByteTokenizer.bos], letters, [QUERY], letters]), len(letters) + 2, 1)


def tracking(raw: Raw, n: int, pairs: int) -> Drawn:
    """Chains of assignments A=a, B=A, … somewhere in noise, one for each pair, then ?a and all variables that hold a, in order.

    RULER's variable tracking (arXiv 2404.06654) in letters, with three hops for four: assignments keep the order of their
    chain, and chains lie between one another. Each answer but the first follows from the one before it.
    """
    values, names = _choose(raw, VALUES, pairs), _choose(raw, VARIABLES, pairs * (HOPS + 1)).reshape(pairs, HOPS + 1)
    chains_CA3 = np.full((*names.shape, 3), IS)
    chains_CA3[..., 0], chains_CA3[:, 0, 2], chains_CA3[:, 1:, 2] = names, values, names[:, :-1]
    quiet = NOISE[NOISE != IS]
    text = quiet[raw(n - HOPS - 3) % len(quiet)]
    places = 3 * np.sort(_choose(raw, np.arange(len(text) // 3), names.size))
    turns = _choose(raw, np.repeat(np.arange(pairs), HOPS + 1), names.size)
    text[places[np.argsort(turns, kind="stable"), None] + np.arange(3)] = chains_CA3.reshape(-1, 3)
    asked = int(raw(1)[0] % pairs)
    return _next_tokens(np.concatenate([[ByteTokenizer.bos], text, [QUERY, values[asked]], names[asked]]), len(text) + 3, 1)


TASKS = {"recall": recall, "mqar": mqar, "copy": copy, "tracking": tracking}


def _first(tokens_n: np.ndarray, weights_n: np.ndarray) -> np.ndarray:
    """The weights with none for an answer after a token that has had one."""
    answers = np.flatnonzero(weights_n)
    first_n = np.zeros_like(weights_n)
    first_n[answers[np.unique(tokens_n[answers], return_index=True)[1]]] = 1
    return first_n


def _choose(raw: Raw, things: np.ndarray, number: int) -> np.ndarray:
    """So many different ones of `things`, in random order."""
    return things[np.argsort(raw(len(things)), kind="stable")[:number]]


def _next_tokens(text: np.ndarray, first: int, every: int) -> Drawn:
    """Next-token prediction in which only text[first], text[first + every], … count."""
    weights = np.zeros(len(text), np.int64)
    weights[first::every] = 1
    return text[:-1], text[1:], weights[1:]
