"""Synthetic sequences that test recall. Each is generated from random numbers and is a pure function of its number.

A sequence is BOS and then bytes, so that it decodes to text. Every target with a weight is an answer that the earlier tokens
of the sequence determine. `config.TASKS` has the largest number of pairs and the shortest sequence of each task. A sequence has
n tokens and T positions, padding included. Those of the task "needle" are made of the text of documents: `data.needles`.
"""

import string
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from hybrid_attn import config
from hybrid_attn.config import HOPS, QUERIES
from hybrid_attn.data import needles
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.needles import Raw, Sample
from hybrid_attn.data.packed import check_len, padding_arrays
from hybrid_attn.data.tokenizer import ByteTokenizer

QUERY = ord("?")
KEYS = np.frombuffer(b"ABCDEFGH", np.uint8)
VALUES = np.frombuffer(b"abcdefgh", np.uint8)
VARIABLES = np.frombuffer(string.ascii_uppercase[: config.TASKS["tracking"].pairs * (HOPS + 1)].encode(), np.uint8)
NOISE = np.frombuffer((string.punctuation.replace("?", "") + " ").encode(), np.uint8)
IS = ord("=")
MQAR_TOKENS = 256  # the bytes: those from 1 to below the middle are keys, those from the middle on are values
MQAR_POWER = 0.01  # as in zoology: the gap between a pair and its query has a density of about 1 / gap


class Task(NamedTuple):
    """A synthetic source: the name of a task, the number of pairs in a sequence if it has pairs, and its text if it has one."""

    name: str
    pairs: int
    text: Documents | None = None

    def fingerprint(self) -> str:
        """Distinguishes the sequences of this task from those of others."""
        name = self.name if config.TASKS[self.name].pairs is None else f"{self.name} of {self.pairs} pairs"
        return name if self.text is None else f"{name} in {self.text.fingerprint()}"


class SyntheticSequences:
    """The sequences of a task, with the interface of `packed.PackedSequences`.

    With a `seed` they are for training and have `seq_len` / 2 to `seq_len` tokens; of the task "needle" each is filled with
    documents. Without one they are held out: full, independent of the sequences of every seed, and the same for every config;
    a repeated query has no weight.
    """

    paired = False  # no sequence is made of pairs of completions

    def __init__(self, task: Task, seq_len: int, seed: int | None):
        check_len(seq_len)
        self.task, self.seq_len = task, seq_len
        self._heldout = seed is None
        self.shortest = seq_len if seed is None or task.text else seq_len // 2
        self._entropy = (1, seq_len) if seed is None else (0, seed)

    def __len__(self) -> int:
        """Sequences of one epoch: in effect without end."""
        return 2**62

    def spread(self, count: int) -> list[int]:
        """The numbers of the first `count` sequences, which are as random as any others."""
        return list(range(count))

    def read(self, slices: Sequence[tuple[int, int, int]]) -> list[dict[str, np.ndarray]]:
        """Positions [start, stop) of sequence `index`, for each (index, start, stop), in the form of `PackedSequences.read`."""
        return [{name: x[start:stop] for name, x in self._sequence(index).items()} for index, start, stop in slices]

    def _sequence(self, index: int) -> dict[str, np.ndarray]:
        # NumPy promises that the raw stream of a bit generator never changes; it does not promise this of Generator.choice.
        raw = np.random.Philox(np.random.SeedSequence((*self._entropy, index))).random_raw
        n = self.shortest + int(raw(1)[0] % (self.seq_len - self.shortest + 1))
        arrays, start = padding_arrays(self.seq_len), 0
        for segment, (tokens_n, targets_n, weights_n) in enumerate(self._samples(raw, n), 1):
            part = slice(start, start := start + len(tokens_n))
            arrays["tokens"][part], arrays["positions"][part], arrays["segments"][part] = (
                tokens_n,
                np.arange(len(tokens_n)),
                segment,
            )
            arrays["targets"][part], arrays["weights"][part] = targets_n * weights_n, weights_n
            arrays["bytes"][part] = weights_n  # an answer is a byte
        return arrays

    def _samples(self, raw: Raw, n: int) -> Iterable[Sample]:
        """The documents of a sequence of `n` tokens."""
        name, pairs, text = self.task
        if text is not None:
            return [needles.document(raw, n, pairs, text)] if self._heldout else needles.filling(raw, n, pairs, text)
        tokens_n, targets_n, weights_n = TASKS[name](raw, n, pairs)
        if name == "recall" and self._heldout:
            answers = np.flatnonzero(weights_n)
            weights_n = np.zeros_like(weights_n)  # but for the first query of each key
            weights_n[answers[np.unique(tokens_n[answers], return_index=True)[1]]] = 1
        return [(tokens_n, targets_n, weights_n)]


def recall(raw: Raw, n: int, pairs: int) -> Sample:
    """Pairs Aa at random positions in noise, then queries ?Aa, sampled with replacement.

    When a key is queried again, its answer also stands a few tokens back, where any window sees it. A model learns this case
    first, and then to look farther back. In held-out sequences only the first query of a key has a weight.
    """
    keys, values = _choose(raw, KEYS, pairs), _choose(raw, VALUES, pairs)
    noise = NOISE[raw(n - 3 * QUERIES) % len(NOISE)]
    positions = 2 * _choose(raw, np.arange(len(noise) // 2), pairs)
    noise[positions], noise[positions + 1] = keys, values
    chosen = raw(QUERIES) % pairs
    queries = np.stack([np.full(QUERIES, QUERY), keys[chosen], values[chosen]], 1)
    return _next_tokens(np.concatenate([[ByteTokenizer.bos], noise, queries.ravel()]), len(noise) + 3, 3)


def mqar(raw: Raw, n: int, pairs: int) -> Sample:
    """Multi-query associative recall (Zoology, arXiv 2312.04927): BOS, then the tokens and positions of the authors' code.

    Pairs come first, then random tokens among which each key occurs once more, more often early than late. The target there is
    the value of the key; the value itself does not occur again.
    """
    keys = _choose(raw, np.arange(1, MQAR_TOKENS // 2), pairs)
    values = _choose(raw, np.arange(MQAR_TOKENS // 2, MQAR_TOKENS), pairs)
    tokens_n = np.concatenate([[ByteTokenizer.bos], np.stack([keys, values], 1).ravel(), raw(n - 1 - 2 * pairs) % MQAR_TOKENS])
    gaps = np.arange(1, (n - 1 - 2 * pairs) // 2 + 1)
    # The smallest of exponential times, each with its weight as rate, are a weighted sample without replacement.
    uniform = (raw(len(gaps)) >> np.uint64(11)) * 2.0**-53
    times = -np.log1p(-uniform) / gaps ** (MQAR_POWER - 1)
    positions = 1 + 2 * pairs + 2 * np.argsort(times, kind="stable")[:pairs]
    targets_n, weights_n = np.zeros((2, n), np.int64)
    tokens_n[positions], targets_n[positions], weights_n[positions] = keys, values, 1
    return tokens_n, targets_n, weights_n


def copy(raw: Raw, n: int, pairs: int) -> Sample:
    """Random letters, a question mark, and the same letters in the same order."""
    alphabet = np.concatenate([KEYS, VALUES])
    letters = alphabet[raw((n - 1) // 2) % len(alphabet)]
    return _next_tokens(np.concatenate([[ByteTokenizer.bos], letters, [QUERY], letters]), len(letters) + 2, 1)


def tracking(raw: Raw, n: int, pairs: int) -> Sample:
    """Chains of assignments A=a, B=A, … in noise, one for each pair, then ?a and all variables with the value a, in order.

    This is RULER's variable tracking (arXiv 2404.06654) in letters, with three hops instead of four. The assignments of a chain
    are in order and interleaved with those of other chains. Each answer but the first follows from the one before it.
    """
    values, names = _choose(raw, VALUES, pairs), _choose(raw, VARIABLES, pairs * (HOPS + 1)).reshape(pairs, HOPS + 1)
    chains_CA3 = np.full((*names.shape, 3), IS)
    chains_CA3[..., 0], chains_CA3[:, 0, 2], chains_CA3[:, 1:, 2] = names, values, names[:, :-1]
    noise = NOISE[NOISE != IS]
    text = noise[raw(n - HOPS - 3) % len(noise)]
    positions = 3 * np.sort(_choose(raw, np.arange(len(text) // 3), names.size))
    turns = _choose(raw, np.repeat(np.arange(pairs), HOPS + 1), names.size)
    text[positions[np.argsort(turns, kind="stable"), None] + np.arange(3)] = chains_CA3.reshape(-1, 3)
    chosen = int(raw(1)[0] % pairs)
    return _next_tokens(np.concatenate([[ByteTokenizer.bos], text, [QUERY, values[chosen]], names[chosen]]), len(text) + 3, 1)


TASKS = {"recall": recall, "mqar": mqar, "copy": copy, "tracking": tracking}


def _choose(raw: Raw, options: np.ndarray, number: int) -> np.ndarray:
    """`number` different elements of `options`, in random order."""
    return options[np.argsort(raw(len(options)), kind="stable")[:number]]


def _next_tokens(text: np.ndarray, first: int, every: int) -> Sample:
    """Next-token prediction in which only the targets text[first], text[first + every], … have a weight."""
    weights = np.zeros(len(text), np.int64)
    weights[first::every] = 1
    return text[:-1], text[1:], weights[1:]
