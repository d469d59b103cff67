"""RULER's scores: which of the answers wanted stand in what a model has generated, whatever else stands there."""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from hybrid_attn.evals.ruler.tasks import NAMES, QA, SHORT

THRESHOLD = 85.6  # percent: Llama-2-7B-chat at 4,096 tokens
RELATIVE = 0.85  # of the score at the shortest length, NoLiMa's rule


def postprocess(prediction: str) -> str:
    """Control characters become line breaks; nothing blank at the ends."""
    return re.sub(r"[\x00-\x1f]", "\n", prediction.strip()).strip()


def string_match_all(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Percent of each sample's answers that its prediction contains in any case, then the mean, to two digits."""
    return _mean([_share(prediction, wanted) for prediction, wanted in zip(predictions, answers, strict=True)])


def string_match_part(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Percent of the samples whose prediction contains one of its answers in any case, to two digits."""
    return _mean([_any(prediction, wanted) for prediction, wanted in zip(predictions, answers, strict=True)])


def score(task: str, prediction: str, answers: Sequence[str]) -> float:
    """Of one sample, 0 to 100, with `postprocess` applied."""
    return 100 * (_any if task in QA else _share)(postprocess(prediction), answers)


def by_task(records: Iterable[Mapping]) -> dict[str, dict[int, dict]]:
    """`{task: {length: {"score", "samples", "nulls"}}}` of records with `task`, `length`, `score` and `prediction`.

    The score is the mean to two digits, as RULER has it, and nulls are predictions with nothing in them.
    """
    cells = defaultdict(list)
    for record in records:
        cells[record["task"], record["length"]].append((record["score"], not postprocess(record["prediction"])))
    found = defaultdict(dict)
    for task, length in sorted(cells, key=lambda cell: (NAMES.index(cell[0]), cell[1])):
        scores, nulls = zip(*cells[task, length], strict=True)
        mean = round(sum(scores) / len(scores), 2)
        found[task][length] = {"score": mean, "samples": len(scores), "nulls": sum(nulls)}
    return dict(found)


def by_length(tasks: Mapping[str, Mapping[int, Mapping]]) -> dict[int, dict]:
    """`{length: {"score", "tasks"}}` in order: the mean over the tasks asked at that length, which all weigh the same."""
    lengths = sorted({length for cells in tasks.values() for length in cells})
    scores = {length: [cells[length]["score"] for cells in tasks.values() if length in cells] for length in lengths}
    return {length: {"score": sum(x) / len(x), "tasks": len(x)} for length, x in scores.items()}


def averages(scores: Mapping[int, float]) -> dict[str, float]:
    """Over lengths: the mean, and means with weights 1, 2, … and …, 2, 1, shortest first."""
    ordered = [scores[length] for length in sorted(scores)]
    rising = range(1, len(ordered) + 1)
    weighted = [sum(i * x for i, x in zip(weights, ordered, strict=True)) / sum(rising) for weights in (rising, rising[::-1])]
    return {"average": sum(ordered) / len(ordered), "rising": weighted[0], "falling": weighted[1]}


def effective_length(scores: Mapping[int, float], threshold: float = THRESHOLD) -> int | None:
    """The largest length such that it and all shorter ones score at least `threshold`, or None."""
    found = None
    for length in sorted(scores):
        if scores[length] < threshold:
            break
        found = length
    return found


def relative_length(scores: Mapping[int, float]) -> int | None:
    """`effective_length` by 0.85 of the score at the shortest length: for models that are far below RULER's threshold.

    None where the shortest length scores nothing.
    """
    base = scores[min(scores)]
    return effective_length(scores, RELATIVE * base) if base > 0 else None


def parts(tasks: Mapping[str, Mapping[int, Mapping]]) -> dict[str, dict[str, dict[int, Mapping]]]:
    """The scores of RULER's lengths under "RULER" and of those below 4,096 tokens under "short RULER", where there are any."""
    split = {"RULER": range(SHORT, 2**62), "short RULER": range(SHORT)}
    found = {}
    for name, lengths in split.items():
        kept = {task: {n: cell for n, cell in cells.items() if n in lengths} for task, cells in tasks.items()}
        kept = {task: cells for task, cells in kept.items() if cells}
        if kept:
            found[name] = kept
    return found


def table(models: Mapping[str, tuple[int, Mapping[str, Mapping[int, Mapping]]]]) -> list[list[str]]:
    """RULER's table, header first, of `{model: (claimed length, by_task(…))}`, for one of its `parts`.

    Scores at or above the threshold are underlined, as there; a mean over fewer than the thirteen tasks names their number.
    """
    means = {model: by_length(tasks) for model, (_, tasks) in models.items()}
    lengths = sorted({length for cells in means.values() for length in cells})
    head = ["Models", "Claimed Length", "Effective Length", *map(short, lengths), "Avg.", "wAvg. (inc)", "wAvg. (dec)"]
    rows = [head]
    for model, (claimed, _) in models.items():
        cells = means[model]
        scores = {length: cell["score"] for length, cell in cells.items()}
        shown = [_cell(cells[length]) if length in cells else "-" for length in lengths]
        whole = averages(scores).values() if len(scores) == len(lengths) else ()
        rows.append([model, short(claimed), effective(scores), *shown, *([f"{x:.1f}" for x in whole] or ["-"] * 3)])
    return rows


def summary(tasks: Mapping[str, Mapping[int, Mapping]], length: int) -> list[list[str]]:
    """The rows of RULER's summary.csv for one length; absent tasks are absent."""
    cells = {task: found[length] for task, found in tasks.items() if length in found}
    nulls = [f"{cell['nulls']}/{cell['samples']}" for cell in cells.values()]
    return [["Tasks", *cells], ["Score", *(f"{cell['score']:g}" for cell in cells.values())], ["Nulls", *nulls]]


def effective(scores: Mapping[int, float]) -> str:
    """The effective length as RULER writes it: `<4K` and `>128K` where it lies outside what was asked."""
    found = effective_length(scores)
    if found is None:
        return f"<{short(min(scores))}"
    return f">{short(found)}" if found == max(scores) else short(found)


def short(length: int) -> str:
    """4K for 4,096 tokens, 1M for 1,048,576."""
    for size, letter in ((2**20, "M"), (2**10, "K")):
        if length % size == 0:
            return f"{length // size}{letter}"
    return f"{length:,}"


def _cell(cell: Mapping) -> str:
    text = f"{cell['score']:.1f}" + (f" ({cell['tasks']} tasks)" if cell["tasks"] < len(NAMES) else "")
    return f"<ins>{text}</ins>" if cell["score"] >= THRESHOLD else text


def _share(prediction: str, wanted: Sequence[str]) -> float:
    return sum(answer.lower() in prediction.lower() for answer in wanted) / len(wanted)


def _any(prediction: str, wanted: Sequence[str]) -> float:
    return float(any(answer.lower() in prediction.lower() for answer in wanted))


def _mean(shares: Sequence[float]) -> float:
    return round(100 * sum(shares) / len(shares), 2)
