"""The tables of a report, each from the records of all runs."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from hybrid_attn.config import HOPS
from hybrid_attn.data.synthetic import KEYS, VALUES
from hybrid_attn.evals.report import statistics
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.tables import Column, Table, count, fixed, signed, significant, tokens
from hybrid_attn.evals.ruler.scores import RELATIVE, THRESHOLD, averages, effective_length, relative_length
from hybrid_attn.evals.ruler.tasks import NAMES, SHORT

HASH = re.compile("[0-9a-f]{64}")  # of which a page shows the beginning; files hold all of it
TASK = re.compile(r"(\w+)(?: of (\d{1,4}) pairs)?")  # of synthetic rows
LONGEST_VALUE = 300  # characters of a value of run.json that the page shows
RETRIEVES = 0.1  # a head whose retrieval score is larger is a retrieval head
RULER_TASKS = frozenset(NAMES)
RUN, LENGTH = Column("run"), Column("length", tokens)
SEGMENTS = {"begin": "begin", "needle": "needle", "context": "context", "question": "qc"}  # of keys: heading and field
INTERVAL = (Column("95% from", fixed(3)), Column("to", fixed(3)))


def is_short(length: int) -> bool:
    return length < SHORT


def is_long(length: int) -> bool:
    return length >= SHORT


def lengths_of(records: Iterable[Mapping]) -> list[int]:
    """From the shortest to the longest."""
    return sorted({record["length"] for record in records})


def ruler_tasks_of(run: Run, belongs: Callable[[int], bool]) -> list[str]:
    """The tasks that a run's means are over: those with a score at each of its lengths, so that lengths compare."""
    lengths: dict[str, set[int]] = {}
    for record in run.of("ruler"):
        if belongs(record["length"]):
            lengths.setdefault(record["task"], set()).add(record["length"])
    all_lengths = set().union(*lengths.values())
    return [task for task in NAMES if lengths.get(task) == all_lengths]


def ruler_means(run: Run, belongs: Callable[[int], bool]) -> dict[int, float]:
    """The mean score of `ruler_tasks_of`, by length."""
    tasks = ruler_tasks_of(run, belongs)
    records = [record for record in run.of("ruler") if belongs(record["length"]) and record["task"] in tasks]
    return {
        length: float(np.mean([record["score"] for record in records if record["length"] == length]))
        for length in lengths_of(records)
    }


def ruler_intervals(run: Run, belongs: Callable[[int], bool]) -> dict[int, tuple[float, float, int]]:
    """By length the interval of `ruler_means` as shares, from those of its tasks, and the number of questions."""
    tasks, cells = ruler_tasks_of(run, belongs), {length: [] for length in ruler_means(run, belongs)}
    for r in run.of("ruler"):
        if r["length"] in cells and r["task"] in tasks:
            cells[r["length"]].append((r["score"] / 100 * r["samples"], r["samples"]))
    return {length: (*statistics.mean_interval(x), sum(n for _, n in x)) for length, x in cells.items()}


def of_all(tasks: Sequence[str]) -> str:
    """How many of RULER's tasks these are."""
    return f"{len(tasks)} of {len(NAMES)}"


def effective(scores: Mapping[int, float], find: Callable[[Mapping[int, float]], int | None] = effective_length) -> str:
    """The length that `find` gives as RULER writes it: `<4K` and `>128K` where it lies outside the lengths."""
    length = find(scores)
    if length is None:
        return f"<{tokens(min(scores))}"
    return f">{tokens(length)}" if length == max(scores) else tokens(length)


def ruler(runs: Sequence[Run], belongs: Callable[[int], bool], name: str, title: str) -> Table:
    """RULER's table: claimed and effective length, the mean of the tasks at each length, and the averages over lengths.

    How many tasks the means are over stands beside them.
    """
    means = {run.name: scores for run in runs if (scores := ruler_means(run, belongs))}
    across = sorted({length for scores in means.values() for length in scores})
    score = Column("", fixed(1), lambda value: value >= THRESHOLD)
    columns = [
        *(Column("Models"), Column("Claimed Length", tokens), Column("Effective Length")),
        *(score._replace(name=tokens(length)) for length in across),
        *(Column(x, fixed(1)) for x in ("Avg.", "wAvg. (inc)", "wAvg. (dec)")),
        *(Column(f"{RELATIVE:.0%} of base"), Column("Tasks")),
    ]
    rows = []
    for run in runs:
        if scores := means.get(run.name):
            row = [run.name, run.trained, effective(scores), *map(scores.get, across)]
            rows.append(
                [*row, *averages(scores).values(), effective(scores, relative_length), of_all(ruler_tasks_of(run, belongs))]
            )
    return Table(name, title, columns, rows)


def ruler_tasks(runs: Sequence[Run], belongs: Callable[[int], bool], name: str, title: str) -> Table:
    """Scores by run and task down, length across."""
    records = [(run.name, record) for run in runs for record in run.of("ruler") if belongs(record["length"])]
    across = lengths_of(record for _, record in records)
    lines: dict[tuple[str, str], dict[int, float]] = {}
    for run, record in records:
        lines.setdefault((record["task"], run), {})[record["length"]] = record["score"]
    score = Column("", fixed(1), lambda value: value >= THRESHOLD)
    columns = [Column("task"), RUN, *(score._replace(name=tokens(length)) for length in across)]
    tasks = list(dict.fromkeys(task for task, _ in lines))
    rows = [[*key, *map(lines[key].get, across)] for key in sorted(lines, key=lambda key: tasks.index(key[0]))]
    return Table(name, title, columns, rows)


def ruler_cells(runs: Sequence[Run], belongs: Callable[[int], bool], name: str, title: str) -> Table:
    """Every score of RULER with its samples, its interval and its empty answers."""
    columns = [
        *(RUN, Column("task"), LENGTH, Column("samples", count), Column("score", fixed(1))),
        *(Column("95% from", fixed(1)), Column("to", fixed(1)), Column("nulls", count)),
    ]
    rows = []
    for run in runs:
        for r in run.of("ruler"):
            if belongs(r["length"]):
                low, high = statistics.wilson(r["score"] / 100 * r["samples"], r["samples"])
                rows.append([run.name, r["task"], r["length"], r["samples"], r["score"], 100 * low, 100 * high, r["nulls"]])
    return Table(name, title, columns, rows)


def needle(runs: Sequence[Run]) -> Table:
    """The share of needles found in each cell; its interval is that of the questions, of which each is right in part."""
    columns = [
        *(RUN, Column("needles", count), LENGTH, Column("depth %", fixed(0)), Column("questions", count)),
        *(Column("right", fixed(3)), *INTERVAL),
    ]
    rows = [
        [
            *(run.name, r["needles"], r["length"], r["depth"], needle_questions(r)[1], needles_found([r])),
            *statistics.wilson(*needle_questions(r)),
        ]
        for run in runs
        for r in run.of("needle")
    ]
    return Table("needle_cells", "Needles found, by length and depth", columns, rows)


def needles_found(records: Sequence[Mapping]) -> float | None:
    """The share of the needles of some cells that are in the answers, if there are any: each counts the same."""
    return sum(r["right"] for r in records) / sum(r["answers"] for r in records) if records else None


def needle_questions(record: Mapping) -> tuple[float, int]:
    """How many of a cell's questions are right, those with some of their needles in part, and how many there are.

    Needles of one question are not found independently of one another.
    """
    return record["right"] / record["needles"], record["answers"] // record["needles"]


def recall(runs: Sequence[Run]) -> Table:
    """The share of right answers; its interval is that of as many as the rows show to be independent of one another."""
    columns = [
        *(RUN, Column("source"), Column("task"), LENGTH, Column("rows", count), Column("answers", count)),
        *(Column("accuracy", fixed(3)), *INTERVAL),
    ]
    rows = [
        [
            *(run.name, r["source"], r["task"], r["length"], len(r["by_row"]), r["answers"], r["accuracy"]),
            *statistics.wilson(*independent_answers(r)),
        ]
        for run in runs
        for r in run.of("recall")
    ]
    return Table("recall", "Synthetic recall: answers that are the likeliest token", columns, rows)


def independent_answers(record: Mapping) -> tuple[float, float]:
    """How many answers of rows are right, and how many there are, as far as they do not depend on others of their row.

    Their number is that whose share would spread as the rows' does (Korn and Graubard, Survey Methodology 24, 1998), between
    the number of rows and that of answers; where all rows are alike, that of rows.
    """
    share, rows = record["accuracy"], len(record["by_row"])
    spread = float(np.var(record["by_row"], ddof=1)) / rows if rows > 1 else 0.0
    number = min(max(share * (1 - share) / spread, rows), record["answers"]) if spread else rows
    return share * number, number


def chance(task: str) -> float | None:
    """What a guess scores in rows of a synthetic task, "recall of 4 pairs": among what the row names, or its letters."""
    match = TASK.fullmatch(task)
    name, pairs = match.groups() if match else (None, None)
    if name == "copy":
        return 1 / (len(KEYS) + len(VALUES))
    if not pairs or not int(pairs):
        return None
    return {"recall": 1 / int(pairs), "mqar": 1 / int(pairs), "tracking": 1 / (int(pairs) * (HOPS + 1))}.get(name)


def kind_name(run: Run, record: Mapping) -> str:
    """What the layer of a record is, or its letter where the run does not say."""
    return run.kinds.get(record["kind"], record["kind"])


def position(runs: Sequence[Run]) -> Table:
    columns = [
        *(RUN, Column("source"), LENGTH, Column("tokens scored"), Column("number", count)),
        *(Column("loss (nats)", fixed(3)), Column("bits per byte", fixed(3)), Column("chance (nats)", fixed(3))),
    ]
    rows = [
        [run.name, r["source"], r["length"], part(r), r["tokens"], r["loss"], r.get("bits_per_byte"), run.chance]
        for run in runs
        for r in run.of("position")
        if "first" not in r
    ]
    return Table("loss", "Held-out loss of whole rows", columns, rows)


def part(record: Mapping) -> str:
    """Which tokens a record of losses is about: all, repeated bigrams ("recall"), or the others ("rest")."""
    return record.get("part", "all")


def is_total(record: Mapping) -> bool:
    """Whether a record of losses is about every token of its rows."""
    return "first" not in record and part(record) == "all"


def positions(runs: Sequence[Run]) -> Table:
    columns = [
        *(RUN, Column("source"), LENGTH, Column("tokens scored"), Column("from", count), Column("to", count)),
        *(Column("number", count), Column("loss (nats)", fixed(3)), Column("bits per byte", fixed(3))),
    ]
    rows = [
        [run.name, r["source"], r["length"], part(r), r["first"], r["end"], r["tokens"], r["loss"], r.get("bits_per_byte")]
        for run in runs
        for r in run.of("position")
        if "first" in r
    ]
    return Table("loss_by_position", "Held-out loss by position in the document", columns, rows)


def ends(run: Run) -> dict[tuple[str, int], int]:
    """Where the last bucket of positions ends, by source and length of the rows."""
    last: dict[tuple[str, int], int] = {}
    for r in run.of("position"):
        if "end" in r:
            of_rows = r["source"], r["length"]
            last[of_rows] = max(last.get(of_rows, 0), r["end"])
    return last


def attention(runs: Sequence[Run]) -> Table:
    """Where the question's attention goes, by kind of layer: means over its heads.

    The share of a segment beside that of one of its tokens: other segments grow with the length, and take from the first.
    """
    means = {
        **{name: (field, fixed(4)) for name, field in SEGMENTS.items()},
        **{"entropy (bits)": ("entropy_bits", fixed(2)), "needle lift": ("needle_lift", fixed(2))},
        **{f"{name} per token": (f"{field}_per_token", significant(3)) for name, field in SEGMENTS.items()},
        "token 0": ("sink_rate", fixed(4)),
    }
    columns = [
        *(RUN, Column("source"), LENGTH, Column("kind"), Column("heads", count)),
        *(Column(name, show) for name, (_, show) in means.items()),
        *(Column("retrieval heads", count), Column("reach")),
    ]
    groups: dict[tuple, list[dict]] = {}
    for run in runs:
        for record in run.of("attention_mass"):
            key = run.name, record["source"], record["length"], kind_name(run, record)
            groups.setdefault(key, []).append(record)
    rows = [
        [
            *(*key, len(heads), *(mean_of(heads, field) for field, _ in means.values())),
            sum((head["retrieval"] or 0) > RETRIEVES for head in heads),
            "yes" if any(head["reach"] for head in heads) else "no",
        ]
        for key, heads in groups.items()
    ]
    return Table("attention", "Attention of the question's tokens, by kind of layer", columns, rows)


def mean_of(records: Sequence[Mapping], field: str) -> float | None:
    """Over the records that have a number there."""
    values = [record[field] for record in records if record.get(field) is not None]
    return float(np.mean(values)) if values else None


def key_tokens(runs: Sequence[Run]) -> Table:
    columns = [
        *(RUN, Column("source"), LENGTH, Column("near context", tokens), Column("key tokens", count)),
        *(Column("of tokens", count), Column("loss (nats)", fixed(3)), Column("perplexity", fixed(2))),
    ]
    fields = ("source", "length", "short", "key_tokens", "tokens", "loss", "perplexity")
    rows = [[run.name, *(r[field] for field in fields)] for run in runs for r in run.of("key_tokens")]
    return Table("key_tokens", "Tokens whose loss depends on the far context", columns, rows)


def harness(runs: Sequence[Run]) -> Table:
    """Values with what the records have beside them, and the interval of 95% that their documents leave."""
    records = [(run.name, record) for run in runs for record in run.of("harness")]
    beside = ("filter", "shots", "version", "documents", "requests", "truncated", "windowed")
    known = [field for field in beside if any(field in record for _, record in records)]
    columns = [
        *(RUN, Column("task"), LENGTH, Column("metric"), Column("value", fixed(4)), Column("± stderr", fixed(4))),
        *(Column("95% from", fixed(4)), Column("to", fixed(4)), *(Column(field) for field in known)),
    ]
    rows = []
    for name, record in records:
        fields = [record.get(field) for field in ("task", "length", "metric", "value", "stderr")]
        rows.append([name, *fields, *harness_interval(record), *map(record.get, known)])
    return Table("harness", "lm-evaluation-harness", columns, rows)


def harness_interval(record: Mapping) -> tuple[float | None, float | None]:
    """A normal interval from the standard error; Wilson's where that is 0, for a share of so many documents."""
    value, error, documents = record["value"], record.get("stderr"), record.get("documents")
    if value is None or error is None:
        return None, None
    if error:
        return value - statistics.Z * error, value + statistics.Z * error
    is_share = value in (0, 1) and isinstance(documents, int) and documents > 0
    return statistics.wilson(value * documents, documents) if is_share else (None, None)


def differences(runs: Sequence[Run]) -> list[tuple[str, list[statistics.Difference]]]:
    """Every further run against the first."""
    family = {record["task"] for run in runs for record in run.of("ruler")}
    first, *others = runs
    name = "RULER, mean of {} tasks"
    return [(run.name, statistics.compare(first, run, family, name) + statistics.compare_rows(first, run)) for run in others]


def comparison(first: str, found: Sequence[tuple[str, list[statistics.Difference]]]) -> Table:
    columns = [
        *(RUN, Column("task"), LENGTH, Column("pairs", count), Column(first, fixed(3)), Column("run's", fixed(3))),
        *(Column(name, signed(3)) for name in ("difference", "95% from", "to")),
        Column("verdict"),
    ]
    rows = [[name, *difference[:-2], verdict(difference)] for name, several in found for difference in several]
    title = f"Against {first} on the same questions and rows: scores between 0 and 1, losses in nats"
    return Table("comparison", title, columns, rows)


def verdict(difference: statistics.Difference) -> str:
    """Unclear without an interval, where it has 0 in it, and where a task has too few pairs to resample."""
    if difference.low is None or difference.fewest < statistics.PAIRS or difference.low <= 0 <= difference.high:
        return "unclear"
    return "better" if (difference.low > 0) != difference.loss else "worse"


def absent(runs: Sequence[Run]) -> Table:
    """What was not measured of each run, and why."""
    lengths: dict[tuple, list[int]] = {}
    for run in runs:
        for evaluation, part, length, reason in run.absent:
            lengths.setdefault((run.name, evaluation, part, reason), []).append(length)
    columns = [RUN, Column("evaluation"), Column("part"), Column("lengths"), Column("reason")]
    rows = [[*names, ", ".join(map(tokens, several)), reason] for (*names, reason), several in lengths.items()]
    return Table("absent", "Not measured, and in no average", columns, rows)


def provenance(runs: Sequence[Run]) -> Table:
    """What each run was, a column each."""
    flat = [{key: x for key, x in _leaves(run.provenance) if key != "settings.absent"} for run in runs]
    keys = list(dict.fromkeys(key for values in flat for key in values))
    columns = [Column("of the run"), *(Column(run.name) for run in runs)]
    return Table("provenance", "Where the numbers come from", columns, [[k, *(_plain(x.get(k)) for x in flat)] for k in keys])


def _leaves(values: Mapping, prefix: str = "", depth: int = 8) -> Iterable[tuple[str, object]]:
    for key, value in values.items():
        if isinstance(value, Mapping) and depth:
            yield from _leaves(value, f"{prefix}{key}.", depth - 1)
        else:
            yield f"{prefix}{key}", value


def _plain(value: object) -> str | int | float | None:
    if value is None:
        return None
    if isinstance(value, str) and HASH.fullmatch(value):
        return value[:12]
    text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        text = f"{value:,}"
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"
