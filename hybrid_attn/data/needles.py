"""Documents with needles, to train on: numbers hidden in a text, and questions about them at its end.

Their words are those in which evaluations hide a number, RULER's (arXiv 2404.06654). Keys and numbers are others: a key here is
a verb and a noun, where that of an evaluation is an adjective and a noun; and no number here has as many digits as theirs.
"""

import functools
from collections.abc import Callable, Iterator

import numpy as np

from hybrid_attn import config
from hybrid_attn.data.documents import Documents
from hybrid_attn.data.tokenizer import ByteTokenizer
from hybrid_attn.data.words import NOUNS, VERBS

NEEDLE = "One of the special magic {kind} for {key} is: {value}."
FIND_ONE = (
    "A special magic {kind} is hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What is the special magic {kind} for {query} mentioned in the provided text?"
    " The special magic {kind} for {query} mentioned in the provided text is"
)
BEFORE, QUESTION = FIND_ONE.split("{context}")
DIGITS = (5, 6, 8, 9, 16, 32, 64)  # of a number; those of evaluations have 7
READ = 3  # bytes that are read for each byte of a document: source code has much white space, which documents leave out

Raw = Callable[[int], np.ndarray]  # n -> n random uint64
Sample = tuple[np.ndarray, np.ndarray, np.ndarray]  # tokens, targets and weights, each [n]


def filling(raw: Raw, n: int, pairs: int, text: Documents) -> Iterator[Sample]:
    """Documents of 1 to `pairs` needles that together have at most `n` tokens.

    The length of each is log-uniform between the shortest and the tokens that are left, so that short and long distances
    between needle and question are equally frequent.
    """
    form = config.TASKS["needle"]
    while n >= (least := form.tokens + form.tokens_a_pair):
        uniform, number = raw(2)
        length = round(least * (n / least) ** (int(uniform) / 2**64))
        most = min(pairs, (length - form.tokens) // form.tokens_a_pair)
        tokens_n, targets_n, weights_n = document(raw, length, 1 + int(number) % most, text)
        yield tokens_n, targets_n, weights_n
        n -= len(tokens_n)


def document(raw: Raw, n: int, needles: int, text: Documents) -> Sample:
    """A document of at most `n` tokens, which asks once for each of its numbers; only the digits of answers have a weight.

    Words of `text` from a random one on are joined by spaces, as in the evaluation, and needles stand between any of them.
    """
    nouns = np.argsort(raw(len(NOUNS)), kind="stable")[:needles]
    keys = [f"{VERBS[int(verb) % len(VERBS)]}-{NOUNS[noun]}" for verb, noun in zip(raw(needles), nouns, strict=True)]
    numbers = [_number(raw) for _ in keys]
    hidden = [NEEDLE.format(kind="numbers", key=key, value=x).encode() for key, x in zip(keys, numbers, strict=True)]
    order = np.argsort(raw(needles), kind="stable")
    end = [x.encode() for i in order for x in (QUESTION.format(kind="number", query=keys[i]) + " ", numbers[i])]
    before = BEFORE.format(kind="number").encode()
    words = _words(raw, n - len(before) - sum(len(x) + 1 for x in hidden) - sum(map(len, end)), text)
    for index, needle in zip(sorted(raw(needles) % (len(words) + 1), reverse=True), hidden, strict=True):
        words.insert(int(index), needle)
    pieces = [before + b" ".join(words), *end]
    tokens = np.concatenate([[ByteTokenizer.bos], np.frombuffer(b"".join(pieces), np.uint8)])
    weights_n = np.repeat([0, *[0, 1] * needles], [len(x) for x in pieces])
    return tokens[:-1], tokens[1:], weights_n


def _number(raw: Raw) -> str:
    """Digits that are all equally likely, but for the first, which is not 0."""
    first, *others = raw(DIGITS[int(raw(1)[0]) % len(DIGITS)])
    return "".join(str(int(x)) for x in (1 + first % 9, *(x % 10 for x in others)))


def _words(raw: Raw, size: int, text: Documents) -> list[bytes]:
    """Complete words of the documents, from a random token of these on: as many as have `size` bytes with their spaces."""
    ends = _ends(text)
    spans = _spans(text.lengths, ends, int(raw(1)[0] % ends[-1]), READ * size)
    read = [tokens[tokens < ByteTokenizer.bos].astype(np.uint8).tobytes() for tokens in text.read(spans)]
    words = b"\n".join(read).split()[1:-1]
    return words[: int(np.searchsorted(np.cumsum([len(x) + 1 for x in words]), size, side="right"))]


@functools.lru_cache(maxsize=8)
def _ends(text: Documents) -> np.ndarray:
    """Where each document ends if all follow one another."""
    return np.cumsum(text.lengths)


def _spans(lengths: np.ndarray, ends: np.ndarray, start: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The spans of `size` tokens from the token `start` of all documents on; after the last document comes the first."""
    while size > 0:
        number = int(np.searchsorted(ends, start, side="right"))
        first = start - int(ends[number] - lengths[number])
        stop = min(first + size, int(lengths[number]))
        yield number, first, stop
        size -= stop - first
        start = int(ends[number] % ends[-1])
