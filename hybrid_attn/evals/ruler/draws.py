"""What one question draws: numbers, words and orders, from one generator."""

import dataclasses
import random
import re
import string
import uuid
from collections.abc import Callable, Sequence


def sentences(text: str) -> list[str]:
    """`text` cut at spaces after a full stop, an exclamation or a question mark."""
    return re.split(r"(?<=[.!?]) +", text)


@dataclasses.dataclass(frozen=True)
class Draws:
    """`integer(low, high)` is below `high`; `words(n)` are those of which n can be drawn.

    What `fresh` gives was not in `taken`, or may repeat where that is None.
    """

    rng: random.Random
    integer: Callable[[int, int], int]
    shuffle: Callable[[list], None]
    keys: Sequence[str]
    words: Callable[[int], Sequence[str]]
    taken: set[str] | None
    sentences: Callable[[str], list[str]] = sentences

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

    def value(self) -> str:
        """Five digits."""
        return self.fresh(lambda: str(self.integer(10_000, 99_999)))


MAGIC = {
    "words": lambda draws: draws.rng.choice(draws.keys),
    "numbers": lambda draws: str(draws.rng.randint(10**6, 10**7 - 1)),
    "uuids": lambda draws: str(uuid.UUID(int=draws.rng.getrandbits(128), version=4)),
}


def of_sample(seed: str, words: Sequence[str], keys: Sequence[str]) -> Draws:
    """All that follows from `seed` alone: nothing repeats, and every order is the sample's own."""
    rng = random.Random(seed)
    return Draws(rng, rng.randrange, rng.shuffle, keys, lambda n: words, {"VAR"})
