"""Names of parameters: the path of one, such as periods/L0/attention/q, or of a group, which stands for all in it."""

import itertools
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from hybrid_attn import trees
from hybrid_attn.trees import check


def matching(field: str, patterns: Sequence[str], names: Iterable[str], owner: str) -> set[str]:
    """The names that match one of the `patterns` of a config's `field`, which may be names, groups and wildcards.

    ValueError for a pattern that matches none of them, with the nearest name of the `owner`.
    """
    matched = set()
    for pattern in patterns:
        more = {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*")}
        check(bool(more), f"{field} names {pattern!r}, and {owner} has no such parameter{nearest(pattern, names)}")
        matched |= more
    return matched


def nearest(name: str, names: Iterable[str]) -> str:
    """The most similar name of a parameter or a group, or else the first part of every name."""
    groups = {prefix for known in names for prefix in prefixes(known)}
    first = ", ".join(sorted(group for group in groups if "/" not in group))
    return trees.suggestion(name, sorted(groups), "; ", f"; it has {first}")


def prefixes(name: str) -> Iterable[str]:
    """periods, periods/L0 and periods/L0/norm of periods/L0/norm."""
    return itertools.accumulate(name.split("/"), "{}/{}".format)
