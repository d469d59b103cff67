"""The verdict of a report: what the models can read, up to which length, and which of them is better where."""

import math
from collections.abc import Sequence

from hybrid_attn.evals.report import comparison
from hybrid_attn.evals.report.runs import Run, measured
from hybrid_attn.evals.report.section import Reading
from hybrid_attn.evals.report.statistics import Z
from hybrid_attn.evals.report.tables import tokens
from hybrid_attn.evals.ruler.scores import relative_length

WIDE = 0.15  # half an interval of shares that is too wide to tell models or lengths apart
AIM = 0.10  # half an interval that a warning asks for
MOST_RUNS = 4  # whose sentences stand in a verdict


def sentences(runs: Sequence[Run]) -> list[str]:
    """What one run can read and what its context gains it; of further runs also how each compares with the first."""
    texts = []
    for run in runs[:MOST_RUNS]:
        reading, others = _of_run(run)
        texts += [ability(run, x) if x is reading else x for x in others if x is reading or len(runs) == 1 or not reading]
    texts += [comparison.sentence(runs[0].name, *x) for x in comparison.differences(runs[:MOST_RUNS]).items()]
    if len(runs) > MOST_RUNS:
        texts.append(f"The table below has the other {len(runs) - MOST_RUNS} runs too.")
    return texts


def _of_run(run: Run) -> tuple[Reading | None, list[Reading | str]]:
    """The first reading of the evaluations of a run, and it with their sentences."""
    verdicts = [x for evaluation in measured([run]) for x in evaluation.report().verdict(run)]
    first = next((x for x in verdicts if isinstance(x, Reading)), None)
    return first, [x for x in verdicts if x is first or isinstance(x, str)]


def warnings(runs: Sequence[Run]) -> list[str]:
    """Where there are too few samples to tell models or lengths apart."""
    texts, enough = [], math.ceil((Z / AIM) ** 2 / 4)
    for run in runs[:MOST_RUNS]:
        reading, _ = _of_run(run)
        widest = max(reading.by_length.values(), key=lambda share: share.half) if reading else None
        if widest and widest.half > WIDE:
            few = f"{run.name} has n = {widest.number:,} answers per length for {reading.questions}"
            spreads = f"± {100 * widest.half:.0f} points; n = {enough} gives ± {100 * AIM:.0f}"
            texts.append(f"Too few samples: {few}, which gives {spreads}. Set --samples higher.")
    return texts


def ability(run: Run, reading: Reading) -> str:
    """Up to which length a run answers at least 85% as well as at the shortest, and what it does at the next length."""
    shares, name = reading.by_length, f"{run.name} (trained at {tokens(run.trained)})"
    texts = {length: f"{share} of {reading.questions} right at {tokens(length)}" for length, share in shares.items()}
    first, *longer = shares
    if shares[first].low <= reading.chance:
        best = max(shares, key=lambda length: shares[length].share)
        others = f"; its best is {shares[best]} at {tokens(best)}" if best != first else ""
        return f"{name} has {texts[first]}, no more than a guess ({100 * reading.chance:.0f}%){others}."
    if not longer:
        return f"{name} has {texts[first]}; other lengths were not tested."
    good = relative_length({length: share.share for length, share in shares.items()}) or first
    after = next((length for length in longer if length > good), None)
    text = f"{name} reads up to {tokens(good)}: it has {texts[good]}"
    if after is None:
        return f"{text}, and {shares[first]} at {tokens(first)}; no longer text was tested."
    before, behind = shares[good], shares[after]
    if before.share - behind.share > math.hypot(before.share - before.low, behind.high - behind.share):
        return f"{text}; it falls to {behind} at {tokens(after)}."
    return f"{text}; at {tokens(after)} it has {behind}, too few answers to tell whether that is less."
