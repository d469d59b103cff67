"""How diverse texts are: their distinct n-grams, plain and adjusted for their number."""

import math
from collections.abc import Sequence

LONGEST = 5  # n-grams of 1 to so many tokens


def distinct(texts: Sequence[Sequence[int]], vocab_size: int) -> tuple[list[float | None], list[float | None]]:
    """For n from 1 to `LONGEST`, distinct n-grams over all n-grams of the texts (arXiv 1510.03055), and over those expected.

    Of C tokens drawn from a uniform distribution over V, V (1 - ((V - 1) / V)^C) are expected to be distinct: EAD, the
    expectation-adjusted distinct of arXiv 2202.13587, equation 3. For n-grams V is the number of possible ones, vocab_size^n.
    None where no text has n tokens.
    """
    plain, adjusted = [], []
    for n in range(1, LONGEST + 1):
        grams = [tuple(text[i : i + n]) for text in texts for i in range(len(text) - n + 1)]
        number, possible = len({*grams}), float(vocab_size) ** n
        expected = -possible * math.expm1(len(grams) * math.log1p(-1 / possible))
        plain.append(number / len(grams) if grams else None)
        adjusted.append(number / expected if grams else None)
    return plain, adjusted
