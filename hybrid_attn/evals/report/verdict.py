"""The verdict of a report: what the models can read, up to which length, and which of them is better where."""

import math
from collections import Counter
from collections.abc import Sequence

from hybrid_attn.evals.report.runs import Run, measured, records_of
from hybrid_attn.evals.report.section import Reading
from hybrid_attn.evals.report.statistics import PAIRS, Difference, Z, compare, compare_sequences
from hybrid_attn.evals.report.tables import signed, tokens
from hybrid_attn.evals.ruler.scores import relative_length

WIDE = 0.15  # half an interval of shares that is too wide to tell models or lengths apart
AIM = 0.10  # half an interval that a warning asks for
MOST_RUNS = 4  # whose sentences stand in a verdict
VERDICTS = ("better", "worse", "unclear")


def sentences(runs: Sequence[Run]) -> list[str]:
    """What one run can read and what its context gains it; of further runs also how each compares with the first."""
    texts = []
    for run in runs[:MOST_RUNS]:
        reading, others = _of_run(run)
        texts += [ability(run, x) if x is reading else x for x in others if x is reading or len(runs) == 1 or not reading]
    texts += [comparison(runs[0].name, *x) for x in differences(runs)[: MOST_RUNS - 1]]
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


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Difference]]]:
    """Every further run against the first."""
    averaged = [evaluation for evaluation in measured(runs) if evaluation.report().mean]
    families = {x.report().mean: {record["task"] for _, record in records_of(runs, x.name)} for x in averaged}
    first, *others = runs
    return [(x.name, compare(first, x, families) + compare_sequences(first, x)) for x in others]


def comparison(first: str, name: str, of_run: Sequence[Difference]) -> str:
    """Which of two runs is better where, by how much: of each task at its longest length, means of tasks before single ones."""
    if not of_run:
        return f"{name} and {first} have no question and no sequence in common: they cannot be compared."
    longest = {x.task: x for x in sorted(of_run, key=lambda x: x.length) if not x.in_mean}.values()
    headlines = sorted(longest, key=lambda x: (x.loss, x.fewest == x.pairs, -abs(x.difference)))  # means of tasks first
    amounts = {verdict: [_amount(x) for x in headlines if x.verdict == verdict] for verdict in VERDICTS}
    parts = [f"{verdict} on {' and '.join(amounts[verdict][:2])}" for verdict in VERDICTS if amounts[verdict]]
    counts = Counter(x.verdict for x in of_run)
    totals = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if counts[verdict])
    return f"{name} against {first}: {'; '.join(parts)}. Of {len(of_run)} comparisons: {totals}."


def _amount(x: Difference) -> str:
    scale, unit, digits = (1, "nats", 3) if x.loss else (100, "points", 0)
    half = "" if x.low is None else f" ± {scale * max(x.difference - x.low, x.high - x.difference):.{digits}f}"
    pairs = f"n = {x.pairs:,}{' sequences' * x.loss}{', too few' * (x.fewest < PAIRS)}"
    return f"{x.task} at {tokens(x.length)} ({signed(scale * x.difference, digits)}{half} {unit}, {pairs})"
