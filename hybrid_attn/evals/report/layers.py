"""What layers are called in a report: by what they see and how positions enter, not by the letters of a config."""

from collections.abc import Mapping, Sequence

from hybrid_attn.config import LayerType, reach
from hybrid_attn.evals.report.runs import Run

LONGEST_LAYOUT = 8  # letters that are shown one by one


def name(kind: LayerType) -> str:
    """Such as "local, window 512, RoPE" or "global, NoPE"."""
    seen = reach(kind)
    return f"{f'local, {seen}' if seen else 'global'}, {'NoPE' if kind.rope_theta is None else 'RoPE'}"


def names(kinds: Mapping[str, LayerType]) -> dict[str, str]:
    """The name of each letter; letters whose names would be the same keep the letter behind it."""
    called = {letter: name(kind) for letter, kind in kinds.items()}
    same = {x for x in called.values() if [*called.values()].count(x) > 1}
    return {letter: f"{x} ({letter})" if x in same else x for letter, x in called.items()}


def short(called: str) -> str:
    """The first word of a name: "local" or "global"; all of another."""
    first = called.partition(",")[0]
    return first if first in ("local", "global") else called


def layout(letters: str | None) -> str | None:
    """Letters of many layers by their period: "8×LLLG", "8×LLLG + LL"."""
    if letters is None or len(letters) <= LONGEST_LAYOUT:
        return letters
    for size in range(1, len(letters) // 2 + 1):
        times, rest = divmod(len(letters), size)
        period, tail = letters[:size], letters[times * size :]
        if letters == period * times + period[:rest]:
            return f"{times}×{period}" + (f" + {tail}" if tail else "")
    return letters if len(letters) <= 40 else f"{letters[:20]}…{letters[-10:]} ({len(letters)})"


def told(runs: Sequence[Run]) -> list[str]:
    """What the letters of the layouts are, once where runs agree."""
    meanings: dict[str, list[str]] = {}
    for run in runs:
        letters = run.provenance["model"].get("layers") or ""
        known = "; ".join(f"{letter} is {called}" for letter, called in run.kinds.items() if letter in letters)
        if known:
            meanings.setdefault(known, []).append(run.name)
    if len(meanings) == 1:
        return [f"Layers: {text}." for text in meanings]
    return [f"Layers of {', '.join(names)}: {text}." for text, names in meanings.items()]
