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
        abilities = [ability(run, reading)] if reading else []
        others = others if len(runs) == 1 or not reading else []
        texts += others + abilities if reading and reading.synthetic else abilities + others
    if len(runs) > 1:
        texts += [comparison.sentence(runs[0].name, *x) for x in comparison.differences(runs)[: MOST_RUNS - 1]]
    if len(runs) > MOST_RUNS:
        texts.append(f"The table below has the other {len(runs) - MOST_RUNS} runs too.")
    return texts


def _of_run(run: Run) -> tuple[Reading | None, list[str]]:
    """The first reading of the evaluations of a run, and their sentences."""
    verdicts = [x for evaluation in measured([run]) for x in evaluation.report().verdict(run)]
    readings = (x for x in verdicts if isinstance(x, Reading))
    return next(readings, None), [x for x in verdicts if isinstance(x, str)]


def warnings(runs: Sequence[Run]) -> list[str]:
    """Where there are too few samples to tell models or lengths apart."""
    texts, enough = [], math.ceil((Z / AIM) ** 2 / 4)
    for run in runs[:MOST_RUNS]:
        reading, _ = _of_run(run)
        widest = max(reading.by_length.values(), key=lambda share: share.half) if reading else None
        if widest and widest.half > WIDE:
            answers, give = ("answer", "gives") if widest.number == 1 else ("answers", "give")
            texts.append(
                f"Too few samples: {run.name} has {widest.number:,} {answers} per length for {reading.questions}, which "
                f"{give} ± {100 * widest.half:.0f} points; {enough} answers give ± {100 * AIM:.0f}. Set --samples higher."
            )
    return texts


def ability(run: Run, reading: Reading) -> str:
    """Up to which length a run answers at least 85% as well as at the shortest, and what it does at the next length."""
    shares, questions = reading.by_length, reading.questions
    lengths, name = list(shares), f"{run.name} (trained at {tokens(run.trained)})"
    first = shares[lengths[0]]
    if first.low <= reading.chance:
        guess = f"no more than a guess ({100 * reading.chance:.0f}%)" if reading.chance else "none above chance"
        best = max(shares, key=lambda length: shares[length].share)
        text = f"{name} has {first} of {questions} right at {tokens(lengths[0])}, {guess}"
        return f"{text}." if best == lengths[0] else f"{text}; its best is {shares[best]} at {tokens(best)}."
    good = relative_length({length: share.share for length, share in shares.items()}) or lengths[0]
    if len(lengths) == 1:
        return f"{name} has {shares[good]} of {questions} right at {tokens(good)}; other lengths were not tested."
    text = f"{name} reads up to {tokens(good)}: there it has {shares[good]} of {questions} right"
    if good == lengths[-1]:
        return f"{text}, and {first} at {tokens(lengths[0])}; no longer text was tested."
    after = lengths[lengths.index(good) + 1]
    before, behind = shares[good], shares[after]
    if before.share - behind.share > math.hypot(before.share - before.low, behind.high - behind.share):
        return f"{text}; it falls to {behind} at {tokens(after)}."
    return f"{text}; at {tokens(after)} it has {behind}, too few answers to tell whether that is less."
