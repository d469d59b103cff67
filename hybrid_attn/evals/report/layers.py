"""What layers are called in a report: by what they see and how positions enter, not by the letters of a config."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from hybrid_attn.config import LayerType, reach
from hybrid_attn.config_model import convolution
from hybrid_attn.evals.report.runs import Run

LONGEST_LAYOUT = 8  # letters that are shown one by one


def names(layer_types: Mapping[str, LayerType]) -> dict[str, str]:
    """Of each letter, such as "local, window 512, RoPE"; letters whose names would be the same keep the letter behind it."""
    by_letter = {}
    for letter, layer_type in layer_types.items():
        span = f"local, {limit}" if (limit := reach(layer_type)) else "global"
        positions = "NoPE" if layer_type.rope_theta is None else "RoPE"
        by_letter[letter] = f"{span}, {positions}{convolution(layer_type)}"
    counts = Counter(by_letter.values())
    return {letter: f"{x} ({letter})" if counts[x] > 1 else x for letter, x in by_letter.items()}


def short(name: str) -> str:
    """The first word of a name: "local" or "global"; all of another."""
    first = name.partition(",")[0]
    return first if first in ("local", "global") else name


def layout(letters: str | None) -> str | None:
    """Letters of many layers by the part that repeats: "8×LLLG", "8×LLLG + LL", "GG + 8×LLLG"."""
    if letters is None or len(letters) <= LONGEST_LAYOUT:
        return letters
    sizes, number = range(1, len(letters) // 2 + 1), len(letters)
    repeats = [match for size in sizes for match in re.finditer(rf"(?=((.{{{size}}})\2+))", letters)]
    best = max(repeats, key=lambda x: (len(x[1]), -len(x[2]), x.start() == 0, x.start()), default=None)
    if best is None or 2 * (number - len(best[1]) + len(best[2])) > number:  # abbreviating would save little
        return letters if number <= 40 else f"{letters[:20]}…{letters[-10:]} ({number})"
    repeated = f"{len(best[1]) // len(best[2])}×{best[2]}"
    return " + ".join(filter(None, (letters[: best.start()], repeated, letters[best.start() + len(best[1]) :])))


def meanings(runs: Sequence[Run]) -> list[str]:
    """What the letters of the layouts are, once where runs agree."""
    by_text: dict[str, list[str]] = {}
    for run in runs:
        letters = run.provenance["model"].get("layers") or ""
        text = "; ".join(f"{letter} is {name}" for letter, name in run.layer_types.items() if letter in letters)
        if text:
            by_text.setdefault(text, []).append(run.name)
    return [f"Layers{' of ' + ', '.join(names) if len(by_text) > 1 else ''}: {text}." for text, names in by_text.items()]
