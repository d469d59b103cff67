"""What the value of a record's field must be: the kinds of values, each with its name for an error."""

import math
from collections.abc import Callable
from typing import NamedTuple

LONGEST_NAME = 500  # characters


class Kind(NamedTuple):
    """What a value must be, in words, and whether it is."""

    what: str
    holds: Callable[[object], bool]


def integer(least: int, most: int = 2**53) -> Kind:
    def holds(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value < most

    return Kind(f"a whole number from {least}" + (f" to {most - 1:,}" if most < 2**53 else ""), holds)


def number(low: float = -math.inf, high: float = math.inf) -> Kind:
    def holds(value: object) -> bool:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high and abs(value) < 2**1000

    return Kind("a number" if math.isinf(low) else f"a number from {low:g} to {high:g}", holds)


def or_none(kind: Kind) -> Kind:
    return Kind(f"{kind.what}, or null", lambda value: value is None or kind.holds(value))


def list_of(kind: Kind, least: int = 0) -> Kind:
    def holds(value: object) -> bool:
        return isinstance(value, (list, tuple)) and len(value) >= least and all(map(kind.holds, value))

    return Kind(f"a list, each {kind.what}", holds)


NAME = Kind(f"a text of at most {LONGEST_NAME} characters", lambda value: isinstance(value, str) and len(value) <= LONGEST_NAME)
TEXT = Kind("a text", lambda value: isinstance(value, str))
TEXTS = Kind("a text or a list of texts", lambda value: TEXT.holds(value) or list_of(TEXT).holds(value))
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
SCALAR = Kind("a text, a number, true, false or null", lambda value: value is None or isinstance(value, (str, int, float)))
COUNT, SIZE, ANY, SHARE = integer(0), integer(1), or_none(number()), number(0, 1)
