"""What one question draws: numbers, words and orders, from one generator."""

import dataclasses
import itertools
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence

NEAR = 0.03  # of a text, within which a needle goes to the end of a sentence: code has pages without one


def sentences(text: str) -> list[str]:
    """`text` cut at spaces after a full stop, an exclamation or a question mark."""
    return re.split(r"(?<=[.!?]) +", text)


def between_sentences(cut: Callable[[str], list[str]], text: str, needles: Sequence[str], depths: Sequence[float]) -> str:
    """`text` with each needle at its depth, in percent of the sentences into which `cut` divides it; `depths` do not fall."""
    lines = cut(text)
    cuts, pieces = [int(len(lines) * (depth / 100)) for depth in depths], []
    for first, end, needle in zip([0, *cuts], cuts, needles, strict=False):
        pieces += [" ".join(lines[first:end]), needle]
    return " ".join([*pieces, " ".join(lines[cuts[-1] :])])


def hidden(text: str, needles: Sequence[str], depths: Sequence[float]) -> str:
    """`text` with each needle at its depth, in percent of the characters of `text`; `depths` do not fall."""
    cuts = [_cut(text, depth) for depth in depths]
    pieces = []
    for first, end, needle in zip([0, *cuts], cuts, needles, strict=False):
        pieces += [text[first:end].strip(), needle]
    return " ".join(piece for piece in (*pieces, text[cuts[-1] :]) if piece)


def _cut(text: str, depth: float) -> int:
    """Where a word begins after the end of a sentence, the nearest to `depth`; after any word where none ends near."""
    at = len(text) * depth / 100
    for end in (r"[.!?] +", " "):
        cut = min((0, *(match.end() for match in re.finditer(end, text)), len(text)), key=lambda end: abs(end - at))
        if abs(cut - at) <= NEAR * len(text):
            break
    return cut


@dataclasses.dataclass(frozen=True)
class Draws:
    """`integer(low, high)` is below `high`; `words(n)` are those of which n can be drawn.

    What `fresh` and `lists` give was not given before, or may repeat where `taken` is None. Of a text of n words the sample's
    part begins with the word `start(n)`; `hide(text, needles, depths)` is that part with needles in it.
    """

    rng: random.Random
    integer: Callable[[int, int], int]
    shuffle: Callable[[list], None]
    keys: Sequence[str]
    words: Callable[[int], Sequence[str]]
    taken: set[str] | None
    hide: Callable[[str, Sequence[str], Sequence[float]], str] = hidden
    start: Callable[[int], int] = lambda words: 0

    def fresh(self, draw: Callable[[], str]) -> str:
        text = draw()
        if self.taken is not None:
            while text in self.taken:
                text = draw()
            self.taken.add(text)
        return text

    def magic(self, kind: str) -> str:
        """A key or value of a needle: one of the words, a number of seven digits, or a random UUID."""
        return self.fresh(lambda: MAGIC[kind](self))

    def letters(self, count: int, alphabet: str = string.ascii_uppercase) -> str:
        return "".join(self.rng.choices(alphabet, k=count))

    def lists(self, *sizes: int) -> list[list[str]]:
        """Lists of so many words."""
        if self.taken is None:
            return [self.rng.sample(self.words(size), size) for size in sizes]
        sample = iter(self.rng.sample(self.words(sum(sizes)), sum(sizes)))
        return [list(itertools.islice(sample, size)) for size in sizes]

    def value(self) -> str:
        """Five digits."""
        return self.fresh(lambda: str(self.integer(10_000, 99_999)))


MAGIC = {
    "words": lambda draws: draws.rng.choice(draws.keys),
    "numbers": lambda draws: str(draws.rng.randint(10**6, 10**7 - 1)),
    "uuids": lambda draws: str(uuid.UUID(int=draws.rng.getrandbits(128), version=4)),
}


def of_sample(seed: str, words: Sequence[str], keys: Sequence[str]) -> Draws:
    """All that follows from `seed` alone: nothing repeats, and every order and every part of a text is the sample's own."""
    rng, start = random.Random(seed), random.Random(f"{seed} text").randrange
    return Draws(rng, rng.randrange, rng.shuffle, keys, lambda n: words, {"VAR"}, start=start)
