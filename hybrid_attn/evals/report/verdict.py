"""The verdict of a report: what the models can read, up to which length, and which of them is better where."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import NamedTuple

from hybrid_attn.evals.report import contents, statistics
from hybrid_attn.evals.report.records import grouped, needle_totals
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
    """Shares of right answers by length, what the questions are, and what a guess would score."""

    questions: str
    by_length: dict[int, Share]
    chance: float


def sentences(runs: Sequence[Run]) -> list[str]:
    """What one run can read and what its context gains it; of further runs also how each compares with the first."""
    texts = []
    for run in runs[:MOST_RUNS]:
        of_run = readings(run)
        losses = loss_sentences(run) if len(runs) == 1 or not of_run else []
        abilities = [ability(run, of_run[0])] if of_run else []
        texts += losses + abilities if of_run and of_run[0].questions.startswith("recall") else abilities + losses
    if len(runs) > 1:
        first = runs[0].name
        texts += [against(first, name, differences) for name, differences in contents.differences(runs)[: MOST_RUNS - 1]]
    if len(runs) > MOST_RUNS:
        texts.append(f"The table below has the other {len(runs) - MOST_RUNS} runs too.")
    return texts


def warnings(runs: Sequence[Run]) -> list[str]:
    """Where there are too few samples to tell models or lengths apart."""
    texts, enough = [], math.ceil((Z / AIM) ** 2 / 4)
    for run in runs[:MOST_RUNS]:
        for reading in readings(run)[:1]:
            widest = max(reading.by_length.values(), key=lambda share: share.half)
            if widest.half > WIDE:
                answers, give = ("answer", "gives") if widest.number == 1 else ("answers", "give")
                texts.append(
                    f"Too few samples: {run.name} has {widest.number:,} {answers} per length for {reading.questions}, which "
                    f"{give} ± {100 * widest.half:.0f} points; {enough} answers give ± {100 * AIM:.0f}. Set --samples higher."
                )
    return texts


def readings(run: Run) -> list[Reading]:
    """What a run answered, the longest texts first: RULER, needles, recall."""
    return [*_ruler(run), *_needles(run), *_recall(run)]


def _ruler(run: Run) -> Iterator[Reading]:
    for belongs, name in ((contents.is_long, "RULER"), (contents.is_short, "short RULER")):
        if means := contents.ruler_means(run, belongs):
            intervals = contents.ruler_intervals(run, belongs)
            yield Reading(name, {length: Share(mean / 100, *intervals[length]) for length, mean in means.items()}, 0)


def _needles(run: Run) -> Iterator[Reading]:
    for needles, records in sorted(grouped(run.of("needle"), itemgetter("needles")).items())[:1]:
        questions = "single needles" if needles == 1 else f"{needles} needles at a time"
        yield Reading(questions, {length: _share(*total) for length, total in needle_totals(records).items()}, 0)


def _recall(run: Run) -> Iterator[Reading]:
    for records in list(grouped(run.of("recall"), itemgetter("source")).values())[:1]:
        task, ordered = records[0]["task"], sorted(records, key=itemgetter("length"))
        shares = {record["length"]: _share(*contents.independent_answers(record)) for record in ordered}
        yield Reading(f"recall ({task})", shares, contents.chance(task) or 0)


def _share(right: float, number: float) -> Share:
    return Share(right / number, *statistics.wilson(right, number), round(number))


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


def loss_sentences(run: Run) -> list[str]:
    """Loss at the length of training, beside a bigram model's; and what the context before a token gains."""
    totals = [r for r in run.of("position") if contents.is_total(r) and r["loss"] is not None]
    if not totals:
        return []
    source = totals[0]["source"]
    of_source = sorted((r for r in totals if r["source"] == source), key=itemgetter("length"))
    record = min(of_source, key=lambda r: abs(math.log(r["length"] / run.trained)))
    bits = record.get("bits_per_byte")
    scale, unit = (bits / record["loss"], "bits per byte") if bits and record["loss"] else (1.0, "nats per token")
    where = f"{tokens(record['length'])}{', its trained length' * (record['length'] == run.trained)}"
    text = f"{run.name} reads {source} at {_loss(record, scale)} {unit} in rows of {where}{_rows(record)}"
    bigrams = {r["bits_per_byte"] for r in run.of("bigram") if r["source"] == source}
    if bits and len(bigrams) == 1:
        bigram = bigrams.pop()
        text += f", {'below' if bits < bigram else 'no better than'} a bigram model's {bigram:.2f}"
    texts = [f"{text}."]
    if context := gain(run, record):
        texts.append(f"{context[0].upper()}{context[1:]}.")
    longest = of_source[-1]
    if longest["length"] > record["length"]:
        clear = longest["loss"] - record["loss"] > Z * math.hypot(*(r.get("stderr") or 0 for r in (longest, record)))
        higher = "higher" if clear else "not clearly higher"
        texts.append(f"In rows of {tokens(longest['length'])} the loss is {higher}: {_loss(longest, scale)} {unit}.")
    return texts


def gain(run: Run, total: dict) -> str | None:
    """How much less a token late in a row costs than one of the first."""
    buckets = [r for r in run.of("position") if "first" in r and contents.part(r) == "all" and r["loss"] is not None]
    buckets = [r for r in buckets if (r["source"], r["length"]) == (total["source"], total["length"])]
    if len(buckets) < 2:
        return None
    first, last = min(buckets, key=itemgetter("first")), max(buckets, key=itemgetter("first"))
    errors = [r.get("stderr") for r in (first, last)]
    less, half = first["loss"] - last["loss"], None if None in errors else Z * math.hypot(*errors)
    amount = f"{abs(less):.2f}{'' if half is None else f' ± {half:.2f}'} nats"
    if half is not None and abs(less) <= half:
        than = f"{amount} {'less' if less >= 0 else 'more'} than the first {first['end']:,}"
        return f"context makes no clear difference: tokens from position {tokens(last['first'])} on cost {than}"
    verb, than = ("gains", "less") if less >= 0 else ("costs", "more")
    late = f"a token from position {tokens(last['first'])} on costs that much {than} than the first {first['end']:,}"
    return f"context {verb} {amount}: {late}"


def _loss(record: dict, scale: float) -> str:
    error = record.get("stderr")
    return f"{scale * record['loss']:.2f}" + (f" ± {scale * Z * error:.2f}" if error is not None else "")


def _rows(record: dict) -> str:
    return f" (n = {len(record['by_row']):,} rows)" if "by_row" in record else ""


def against(first: str, name: str, differences: Sequence[Difference]) -> str:
    """Which of two runs is better where, by how much: of each task at its longest length, means of tasks before single ones."""
    if not differences:
        return f"{name} and {first} have no question and no row in common: they cannot be compared."
    groups = {verdict: [] for verdict in ("better", "worse", "unclear")}
    for difference in headlines(differences):
        groups[contents.verdict(difference)].append(_amount(difference))
    parts = [f"{verdict} on {' and '.join(groups[verdict][:2])}" for verdict in ("better", "worse") if groups[verdict]]
    if groups["unclear"] and (not parts or len(groups["unclear"]) < 3):
        parts.append(f"unclear on {' and '.join(groups['unclear'][:2])}")
    counts = Counter(map(contents.verdict, differences))
    totals = ", ".join(f"{counts[verdict]} {verdict}" for verdict in groups if counts[verdict])
    return f"{name} against {first}: {'; '.join(parts)}. Of {len(differences)} comparisons: {totals}."


def headlines(differences: Sequence[Difference]) -> list[Difference]:
    """Of each task, or of the mean of its family, the comparison at the longest length: the largest clear ones first."""
    means = [x for x in differences if x.task.startswith("RULER, mean")]
    of_family = {x.task for x in differences if means and not x.loss and x.task in contents.RULER_TASKS}
    longest: dict[str, Difference] = {}
    for x in differences:
        name = "RULER, mean" if x in means else x.task
        if x.task not in of_family and (name not in longest or longest[name].length < x.length):
            longest[name] = x
    return sorted(longest.values(), key=lambda x: (x.loss, x not in means, -abs(x.difference)))


def _amount(x: Difference) -> str:
    scale, unit, digits = (1, "nats", 3) if x.loss else (100, "points", 0)
    half = "" if x.low is None else f" ± {scale * max(x.difference - x.low, x.high - x.difference):.{digits}f}"
    pairs = f"n = {x.pairs:,}{' rows' * x.loss}{', too few' * (x.fewest < statistics.PAIRS)}"
    return f"{x.task} at {tokens(x.length)} ({signed(digits)(scale * x.difference)}{half} {unit}, {pairs})"
