"""RULER in a report: averages in RULER's form, the mean of the tasks by length, and a map of the tasks."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from hybrid_attn.evals.records import grouped, lengths_of
from hybrid_attn.evals.report import escape, pictures, statistics
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Picture, Reading, Section
from hybrid_attn.evals.report.tables import LENGTH, RUN, TASK, Column, Table, comma_separated, interval, of_records, tokens
from hybrid_attn.evals.ruler import scores
from hybrid_attn.evals.ruler.scores import RELATIVE, THRESHOLD, complete_tasks, means
from hybrid_attn.evals.ruler.tasks import NAMES, SHORT

DESCRIPTIONS = {
    "niah_single_1": "one number, hidden in a few sentences that repeat",
    "niah_single_2": "one number, hidden in prose",
    "niah_single_3": "one UUID, hidden in prose",
    "niah_multikey_1": "the number of one of 4 keys, hidden in prose",
    "niah_multikey_2": "the number of one key, among nothing but other keys and their numbers",
    "niah_multikey_3": "the UUID of one UUID, among nothing but others",
    "niah_multivalue": "all 4 numbers of one key, hidden in prose",
    "niah_multiquery": "the numbers of 4 keys, hidden in prose",
    "vt": "all variables that hold one value, through chains of assignments",
    "cwe": "the words of a list that occur most often",
    "fwe": "the most frequent of made-up words",
    "qa_1": "a question of SQuAD, its paragraph among others",
    "qa_2": "a question of HotpotQA, its two paragraphs among others",
}
SCORE = Column("score", ",.1f")
MARKED = SCORE._replace(is_bold=lambda value: value >= THRESHOLD)
CELLS = [
    *(TASK, LENGTH, Column("samples", ","), SCORE),
    *(*interval(lambda r: [100 * x for x in statistics.wilson(*_right(r))], 1), Column("nulls", ",")),
]


def parts(run: Run) -> list[Run]:
    """The run with its records at RULER's lengths, from 4,096 tokens on, and with those at shorter ones, which are easier."""
    records = [[r for r in run.of("ruler") if (r["length"] < SHORT) == is_short] for is_short in (False, True)]
    return [run._replace(records=tuple(part)) for part in records]


def mean_shares(records: Sequence[Mapping]) -> dict[int, statistics.Share]:
    """`means` as shares; their intervals follow from those of the tasks."""
    tasks, shares = complete_tasks(records), {}
    for length, mean in means(records).items():
        cells = [_right(r) for r in records if r["length"] == length and r["task"] in tasks]
        shares[length] = statistics.Share(mean / 100, *statistics.mean_interval(cells), sum(number for _, number in cells))
    return shares


def _right(record: Mapping) -> tuple[float, int]:
    """How many questions are right, and how many there are."""
    return record["score"] / 100 * record["samples"], record["samples"]


def effective(scores: Mapping[int, float], find: Callable = scores.effective_length) -> str:
    """The length that `find` gives as RULER writes it: `<4K` and `>128K` where it lies outside the lengths."""
    length = find(scores)
    if length is None:
        return f"<{tokens(min(scores))}"
    return f">{tokens(length)}" if length == max(scores) else tokens(length)


def averages(runs: Sequence[Run], name: str, title: str) -> Table:
    """RULER's table: claimed and effective length, the mean of the tasks at each length, and the averages over lengths."""
    by_run = [(run, by_length) for run in runs if (by_length := means(run.records))]
    across = sorted({length for _, by_length in by_run for length in by_length})
    columns = [
        *(Column("Models"), Column("Claimed Length", tokens), Column("Effective Length")),
        *(MARKED._replace(name=tokens(length)) for length in across),
        *(SCORE._replace(name=name) for name in ("Avg.", "wAvg. (inc)", "wAvg. (dec)")),
        *(Column(f"{RELATIVE:.0%} of base"), Column("Tasks")),
    ]
    rows = []
    for run, x in by_run:
        row = [run.name, run.trained, effective(x), *map(x.get, across), *scores.averages(x).values()]
        tasks = f"{len(complete_tasks(run.records))} of {len(NAMES)}"
        rows.append([*row, effective(x, scores.relative_length), tasks])
    return Table(name, title, columns, rows)


def by_task(runs: Sequence[Run], name: str, title: str) -> Table:
    """Scores by run and task down, length across."""
    across, rows = lengths_of(r for run in runs for r in run.records), []
    for task, of_task in grouped(records_of(runs, "ruler"), lambda x: x[1]["task"]).items():
        for run, of_run in grouped(of_task, lambda x: x[0].name).items():
            by_length = {r["length"]: r["score"] for _, r in of_run}
            rows.append([task, run, *map(by_length.get, across)])
    return Table(name, title, [TASK, RUN, *(MARKED._replace(name=tokens(length)) for length in across)], rows)


def sections(runs: Sequence[Run]) -> list[Section]:
    long, short = zip(*map(parts, runs), strict=True)
    of_parts = (long, "ruler", "RULER"), (short, "short_ruler", "Short RULER")
    return [_section(*part) for part in of_parts if any(run.records for run in part[0])]


def _section(runs: Sequence[Run], name: str, title: str) -> Section:
    described = [[task, DESCRIPTIONS.get(task)] for task in dict.fromkeys(r["task"] for run in runs for r in run.records)]
    cells = f"{title}, each cell: samples, interval, empty answers"
    tables = [
        averages(runs, name, f"{title}, in RULER's form"),
        by_task(runs, f"{name}_by_task", f"{title}, each task"),
        Table(f"{name}_tasks", "What each task asks", [TASK, Column("asks for")], described, is_folded=True),
        of_records(f"{name}_cells", cells, records_of(runs, "ruler"), CELLS)._replace(is_folded=True),
    ]
    return Section(name, title, _paragraphs(runs), _pictures(runs, name), tables, "ruler")


def _pictures(runs: Sequence[Run], name: str) -> list[Picture]:
    """The mean by length and a map of tasks by length; of one length, all tasks and their mean as points."""
    curves = [pictures.Curve(run.name, i, x) for i, run in enumerate(runs) if (x := mean_shares(run.records))]
    panel = {"mean of the tasks": curves} if curves else {}
    caption = f"Right answers: {pictures.changes(curves) if curves else 'no task at all lengths.'}"
    of_tasks = grouped(((i, run, r) for i, run in enumerate(runs) for r in run.records), lambda x: x[2]["task"])
    longest = max(lengths := lengths_of(r for run in runs for r in run.records))
    if len(lengths) == 1:
        for task, records in of_tasks.items():
            panel[task] = [pictures.Curve(run.name, i, {longest: statistics.share(*_right(r))}) for i, run, r in records]
        figure, note = pictures.points(panel, "score", 100, {}), f"{pictures.WILSON}; the mean's combines those of its tasks."
        return [Picture(name, caption, figure, note, f"{name}_cells")]
    images = []
    if curves:
        enough = dict.fromkeys(panel, (f"enough ({THRESHOLD:g})", THRESHOLD, pictures.DOTTED))
        figure = pictures.curves(panel, [run.trained for run in runs], "score", 100, enough)
        note = f"Mean of the tasks by length. {pictures.WILSON} of the tasks, combined."
        images.append(Picture(name, caption, figure, note, name))
    maps = [(run.name, {(r["task"], r["length"]): r["score"] for r in run.records}, run.trained) for run in runs if run.records]
    note = "Scores by task and length; intervals are in the table of cells."
    note += " Right of the dashed line: beyond the length of training." * any(longest > run.trained for run in runs)
    task_map = pictures.task_map(maps, list(of_tasks))
    return [*images, Picture(f"{name}_tasks", _extremes(runs), task_map, note, f"{name}_by_task")]


def _extremes(runs: Sequence[Run]) -> str:
    """The tasks that the first run does best and worst at its longest length."""
    run = next(run for run in runs if run.records)
    longest = lengths_of(run.records)[-1]
    of_tasks = {r["task"]: r["score"] for r in run.records if r["length"] == longest}
    best, worst = max(of_tasks, key=of_tasks.get), min(of_tasks, key=of_tasks.get)
    text = f"best at {best} ({of_tasks[best]:.0f}%), worst at {worst} ({of_tasks[worst]:.0f}%)"
    if of_tasks[best] == of_tasks[worst]:
        text = f"{of_tasks[best]:.0f}% of {'every task' if len(of_tasks) > 1 else best}"
    return f"{run.name} at {tokens(longest)}: {text}."


def _paragraphs(runs: Sequence[Run]) -> list[str]:
    """What the averages are over, and where that differs."""
    paragraphs = [
        f"A length is effective if the scores at it and at all shorter lengths are {THRESHOLD} or more (in bold). A > marks an "
        f'effective length that is the longest one tested. The column "{RELATIVE:.0%} of base" asks for {RELATIVE:.0%} of the '
        "score at the shortest length instead. Averages are over the lengths in a line of the table; wAvg. has weights that "
        "grow (inc) or fall (dec) with the length. A guess scores 0."
    ]
    measured = [run for run in runs if run.records]
    if min(r["length"] for run in measured for r in run.records) < SHORT:
        paragraphs.append("Lengths under 4,096 are easier than those of RULER, and its averages leave them out.")
    for run in measured:
        sizes = {r["samples"] for r in run.records}
        if len(sizes) > 1:
            paragraphs.append(f"{run.name}: cells have {min(sizes):,} to {max(sizes):,} samples.")
        if run.compat:
            paragraphs.append(f"{run.name}: the prompts are RULER's own, as its scripts draw them.")
    families = grouped(measured, lambda run: tuple(complete_tasks(run.records)))
    for tasks, of_runs in families.items():
        if missing := [task for task in NAMES if task not in tasks]:
            over = f"{len(tasks)} of {len(NAMES)} tasks, without {', '.join(missing)}"
            names = ", ".join(run.name for run in of_runs)
            paragraphs.append(f"{names}: means are over {over}, which have no score at some length.")
    if len({tuple(lengths_of(run.records)) for run in measured}) > 1:
        paragraphs.append("The runs have different lengths: compare single lengths, not averages.")
    if len(families) > 1:
        paragraphs.append("The runs have different tasks: compare single tasks, not averages.")
    if len({run.compat for run in runs}) > 1:
        paragraphs.append("Some prompts are RULER's own and others are not: their scores cannot be compared.")
    return paragraphs


def readings(run: Run) -> list[Reading]:
    """Those at RULER's lengths first."""
    long, short = (mean_shares(part.records) for part in parts(run))
    return [Reading(name, shares) for name, shares in (("RULER", long), ("short RULER", short)) if shares]


def _of_table(name: str) -> Callable[[Run, Mapping], float | str | None]:
    """For the overview: the value of a run in a column of the table in RULER's form."""
    return lambda run, _: next((x[name] for x in averages([parts(run)[0]], "ruler", "RULER").objects()), None)


def files(run: Run) -> dict[str, str]:
    """summary.csv and submission.csv of each length, in the form that RULER's evaluate.py gives them."""
    texts = {}
    for length, records in sorted(grouped(run.of("ruler"), itemgetter("length")).items()):
        tasks = [r["task"] for r in records]
        summary = [
            range(len(records) + 1),
            ["Tasks", *tasks],
            ["Score", *(round(r["score"], 2) for r in records)],
            ["Nulls", *(f"{r['nulls']}/{r['samples']}" for r in records)],
        ]
        answers = [x for task in tasks for x in run.answers if (x["task"], x["length"]) == (task, length)]
        predictions = [[x["task"], x["index"], scores.postprocess(x["given"])] for x in answers]
        for name, lines in (("summary", summary), ("submission", [["Task", "ID", "Prediction"], *predictions])):
            texts[f"ruler/{escape.file_name(run.name)}/{length}/{name}.csv"] = comma_separated(lines)
    return texts


COLUMNS = [
    Column("RULER Avg.", ",.1f", _of_table("Avg."), meaning="RULER's mean over tasks and lengths"),
    Column("of tasks", value=_of_table("Tasks")),
    Column("effective", value=_of_table("Effective Length")),
]
REPORT = EvaluationReport(sections, COLUMNS, readings, files, mean="RULER, mean")
