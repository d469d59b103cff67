"""The verdict of a report: what the models can read, up to which length, and which of them is better where."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from hybrid_attn.evals.report import contents, statistics
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.statistics import Difference, Z
from hybrid_attn.evals.report.tables import signed, tokens
from hybrid_attn.evals.ruler.scores import relative_length

WIDE = 0.15  # half an interval of shares that is too wide to tell models or lengths apart
AIM = 0.10  # half an interval that a warning asks for
MOST_RUNS = 4  # whose sentences stand in a verdict


class Share(NamedTuple):
    """A share of right answers, its interval of 95%, and the number of answers."""

    share: float
    low: float
    high: float
    number: int

    @property
    def half(self) -> float:
        """The longer side of the interval."""
        return max(self.share - self.low, self.high - self.share)

    def __str__(self) -> str:
        return f"{100 * self.share:.0f}% ± {100 * self.half:.0f} (n = {self.number:,})"


class Reading(NamedTuple):
    """Shares of right answers by length, of what was asked, and what a guess would score."""

    asked: str
    by_length: dict[int, Share]
    chance: float


def sentences(runs: Sequence[Run]) -> list[str]:
    """What one run can read and what its context gains it; of several also how each compares with the first."""
    found = []
    for run in runs[:MOST_RUNS]:
        several, told = readings(run), loss_sentences(run) if len(runs) == 1 or not readings(run) else []
        said = [ability(run, several[0])] if several else []
        found += told + said if several and several[0].asked.startswith("recall") else said + told
    if len(runs) > 1:
        first = runs[0].name
        found += [against(first, name, differences) for name, differences in contents.differences(runs)[: MOST_RUNS - 1]]
    if len(runs) > MOST_RUNS:
        found.append(f"The other {len(runs) - MOST_RUNS} runs stand in the table.")
    return found


def warnings(runs: Sequence[Run]) -> list[str]:
    """Where there are too few samples to tell."""
    found = []
    for run in runs[:MOST_RUNS]:
        for reading in readings(run)[:1]:
            widest = max(reading.by_length.values(), key=lambda share: share.half)
            if widest.half > WIDE:
                enough = math.ceil((Z / AIM) ** 2 / 4)
                answers, leave = ("answer", "leaves") if widest.number == 1 else ("answers", "leave")
                found.append(
                    f"Too few samples to tell: {run.name} has {widest.number:,} {answers} of {reading.asked} at a length, "
                    f"which {leave} ± {100 * widest.half:.0f} points; {enough} leave ± {100 * AIM:.0f}. Ask more: --samples."
                )
    return found


def readings(run: Run) -> list[Reading]:
    """What was asked of a run, the longest texts first: RULER, needles, recall."""
    found = []
    for belongs, name in ((contents.is_long, "RULER"), (contents.is_short, "short RULER")):
        means = contents.ruler_means(run, belongs) if any(belongs(r["length"]) for r in run.of("ruler")) else {}
        if means:
            intervals = contents.ruler_intervals(run, belongs)
            found.append(Reading(name, {x: Share(mean / 100, *intervals[x]) for x, mean in means.items()}, 0))
    least = min((r["needles"] for r in run.of("needle")), default=0)
    cells: dict[int, list[tuple[float, int]]] = {}
    for r in run.of("needle"):
        if r["needles"] == least:
            cells.setdefault(r["length"], []).append(contents.needle_questions(r))
    if cells:
        asked = "single needles" if least == 1 else f"{least} needles at a time"
        shares = {length: _share(*map(sum, zip(*x, strict=True))) for length, x in sorted(cells.items())}
        found.append(Reading(asked, shares, 0))
    recalled = run.of("recall")
    if recalled:
        of_first = sorted((r for r in recalled if r["source"] == recalled[0]["source"]), key=lambda r: r["length"])
        shares = {r["length"]: _share(*contents.independent_answers(r)) for r in of_first}
        found.append(Reading(f"recall ({recalled[0]['task']})", shares, contents.chance(recalled[0]["task"]) or 0))
    return found


def _share(right: float, number: float) -> Share:
    return Share(right / number, *statistics.wilson(right, number), round(number))


def ability(run: Run, reading: Reading) -> str:
    """Up to which length a run answers at least 85% as well as at the shortest, and what it does behind it."""
    lengths, trained = list(reading.by_length), f"{run.name} (trained at {tokens(run.trained)})"
    first = reading.by_length[lengths[0]]
    if first.low <= reading.chance:
        guess = f"no more than a guess ({100 * reading.chance:.0f}%)" if reading.chance else "none above chance"
        best = max(reading.by_length, key=lambda length: reading.by_length[length].share)
        told = f"{trained} has {first} of {reading.asked} right at {tokens(lengths[0])}, {guess}"
        return f"{told}." if best == lengths[0] else f"{told}; its best is {reading.by_length[best]} at {tokens(best)}."
    good = relative_length({length: share.share for length, share in reading.by_length.items()}) or lengths[0]
    at_good = reading.by_length[good]
    if len(lengths) == 1:
        return f"{trained} has {at_good} of {reading.asked} right at {tokens(good)}; one length does not show where it falls."
    told = f"{trained} reads up to {tokens(good)}: there it has {at_good} of {reading.asked} right"
    if good == lengths[-1]:
        return f"{told}, at the longest length asked, and {first} at {tokens(lengths[0])}."
    behind = lengths[lengths.index(good) + 1]
    there = reading.by_length[behind]
    gap = math.hypot(at_good.share - at_good.low, there.high - there.share)
    if at_good.share - there.share > gap:
        return f"{told}; it falls to {there} at {tokens(behind)}."
    return f"{told}; whether {there} at {tokens(behind)} is less, so few answers leave unclear."


def loss_sentences(run: Run) -> list[str]:
    """Loss at the length of training, beside a bigram model's; and what the context before a token gains."""
    totals = [r for r in run.of("position") if contents.is_total(r) and r["loss"] is not None]
    if not totals:
        return []
    source = totals[0]["source"]
    of_source = sorted((r for r in totals if r["source"] == source), key=lambda r: r["length"])
    record = min(of_source, key=lambda r: abs(math.log(r["length"] / run.trained)))
    bits = record.get("bits_per_byte")
    scale, unit = (bits / record["loss"], "bits per byte") if bits and record["loss"] else (1.0, "nats per token")
    where = f"{tokens(record['length'])}{', its trained length' * (record['length'] == run.trained)}"
    told = f"{run.name} reads {source} at {_loss(record, scale)} {unit} in rows of {where}{_rows(record)}"
    bigrams = {r["bits_per_byte"] for r in run.of("bigram") if r["source"] == source}
    if bits and len(bigrams) == 1:
        bigram = bigrams.pop()
        told += f", {'below' if bits < bigram else 'no better than'} a bigram model's {bigram:.2f}"
    found = [f"{told}."]
    if gained := gain(run, record):
        found.append(f"{gained[0].upper()}{gained[1:]}.")
    longest = of_source[-1]
    if longest["length"] > record["length"]:
        clear = longest["loss"] - record["loss"] > Z * math.hypot(*(r.get("stderr") or 0 for r in (longest, record)))
        higher = "higher" if clear else "not clearly higher"
        found.append(f"In rows of {tokens(longest['length'])} the loss is {higher}: {_loss(longest, scale)} {unit}.")
    return found


def gain(run: Run, total: dict) -> str | None:
    """What a token late in a row costs less than one of the first."""
    of_row = [r for r in run.of("position") if "first" in r and contents.part(r) == "all" and r["loss"] is not None]
    of_row = [r for r in of_row if (r["source"], r["length"]) == (total["source"], total["length"])]
    if len(of_row) < 2:
        return None
    first, last = min(of_row, key=lambda r: r["first"]), max(of_row, key=lambda r: r["first"])
    spread = [r.get("stderr") for r in (first, last)]
    less, half = first["loss"] - last["loss"], None if None in spread else Z * math.hypot(*spread)
    amount = f"{abs(less):.2f}{'' if half is None else f' ± {half:.2f}'} nats"
    if half is not None and abs(less) <= half:
        than = f"{amount} {'less' if less >= 0 else 'more'} than the first {first['end']:,}"
        return f"context makes no clear difference: tokens from position {tokens(last['first'])} on cost {than}"
    verb = "gains" if less >= 0 else "costs"
    return f"context {verb} {amount}: a token from {tokens(last['first'])} on against the first {first['end']:,}"


def _loss(record: dict, scale: float) -> str:
    spread = record.get("stderr")
    return f"{scale * record['loss']:.2f}" + (f" ± {scale * Z * spread:.2f}" if spread is not None else "")


def _rows(record: dict) -> str:
    return f" (n = {len(record['by_row']):,} rows)" if "by_row" in record else ""


def against(first: str, name: str, found: Sequence[Difference]) -> str:
    """Which of two runs is better where, by how much: of each task at its longest length, means of tasks before single ones."""
    if not found:
        return f"{name} and {first} share no question and no row: they cannot be compared."
    shown = headlines(found)
    by_verdict = {"better": [], "worse": [], "unclear": []}
    for difference in shown:
        by_verdict[contents.verdict(difference)].append(_amount(difference))
    parts = [f"{verdict} on {' and '.join(x[:2])}" for verdict, x in by_verdict.items() if x and verdict != "unclear"]
    if by_verdict["unclear"] and (not parts or len(by_verdict["unclear"]) < 3):
        parts.append(f"unclear on {' and '.join(by_verdict['unclear'][:2])}")
    counts = {verdict: sum(contents.verdict(x) == verdict for x in found) for verdict in by_verdict}
    told = ", ".join(f"{number} {verdict}" for verdict, number in counts.items() if number)
    return f"{name} against {first}: {'; '.join(parts)}. Of {len(found)} comparisons: {told}."


def headlines(found: Sequence[Difference]) -> list[Difference]:
    """Of each task, or of the mean of its family, the comparison at the longest length: the largest clear ones first."""
    means = [x for x in found if x.task.startswith("RULER, mean")]
    of_family = {x.task for x in found if means and not x.loss and x.task in contents.RULER_TASKS}
    longest: dict[str, Difference] = {}
    for x in found:
        name = "RULER, mean" if x in means else x.task
        if x.task not in of_family and (name not in longest or longest[name].length < x.length):
            longest[name] = x
    return sorted(longest.values(), key=lambda x: (x.loss, x not in means, -abs(x.difference)))


def _amount(x: Difference) -> str:
    scale, unit = (1, "nats") if x.loss else (100, "points")
    digits = 3 if x.loss else 0
    half = "" if x.low is None else f" ± {scale * max(x.difference - x.low, x.high - x.difference):.{digits}f}"
    pairs = f"n = {x.pairs:,}{' rows' * x.loss}{', too few' * (x.fewest < statistics.PAIRS)}"
    return f"{x.task} at {tokens(x.length)} ({signed(digits)(scale * x.difference)}{half} {unit}, {pairs})"
