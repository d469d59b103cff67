"""RULER in a report: averages in RULER's form, the mean of the tasks by length, and a map of the tasks."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from hybrid_attn.evals.records import grouped, lengths_of
from hybrid_attn.evals.report import escape, pictures, statistics
from hybrid_attn.evals.report.runs import Run, records_of
from hybrid_attn.evals.report.section import EvaluationReport, Picture, Reading, Section
from hybrid_attn.evals.report.tables import LENGTH, TASK, Column, Table, comma_separated, interval, of_records, tokens
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
CELLS = [
    *(TASK, LENGTH, Column("samples", ","), SCORE),
    *(*interval(lambda r: [100 * x for x in _share(r)[1:3]], 1), Column("nulls", ",")),
]
SCALE = pictures.Scale("length (tokens)", "", 0, 100, "{:.0f}".format, pictures.SCORES, "score")


def mean_shares(records: Sequence[Mapping]) -> dict[int, statistics.Share]:
    """`means` as shares; their intervals follow from those of the tasks."""
    tasks = complete_tasks(records)
    by_length = grouped((r for r in records if r["task"] in tasks), itemgetter("length"))
    return {length: statistics.mean_share([_share(r) for r in of_length]) for length, of_length in sorted(by_length.items())}


def parts(run: Run) -> dict[str, list[dict]]:
    """The records at RULER's lengths, from 4,096 tokens on, and those at shorter ones, which are easier."""
    names = {False: "RULER", True: "short RULER"}
    by_name = grouped(run.of("ruler"), lambda r: names[r["length"] < SHORT])
    return {name: by_name[name] for name in names.values() if name in by_name}


def _share(record: Mapping) -> statistics.Share:
    return statistics.share(record["score"] / 100 * record["samples"], record["samples"])


def effective(scores: Mapping[int, float], find: Callable = scores.effective_length) -> str:
    """The length that `find` gives as RULER writes it: `<4K` and `>128K` where it lies outside the lengths."""
    length = find(scores)
    if length is None:
        return f"<{tokens(min(scores))}"
    return f">{tokens(length)}" if length == max(scores) else tokens(length)


def averages(runs: Sequence[Run], part: str) -> Table:
    """RULER's table: claimed and effective length, the mean of the tasks at each length, and the averages over lengths."""
    records = {run.name: parts(run).get(part, []) for run in runs}
    by_run = [(run, by_length) for run in runs if (by_length := means(records[run.name]))]
    across = sorted({length for _, by_length in by_run for length in by_length})
    columns = [
        *(Column("Models"), Column("Claimed Length", tokens), Column("Effective Length")),
        *(SCORE._replace(name=tokens(length), bold_from=THRESHOLD) for length in across),
        *(SCORE._replace(name=name) for name in ("Avg.", "wAvg. (inc)", "wAvg. (dec)")),
        *(Column(f"{RELATIVE:.0%} of base"), Column("Tasks")),
    ]
    rows = []
    for run, x in by_run:
        row = [run.name, run.trained, effective(x), *map(x.get, across), *scores.averages(x).values()]
        tasks = f"{len(complete_tasks(records[run.name]))} of {len(NAMES)}"
        rows.append([*row, effective(x, scores.relative_length), tasks])
    return Table(part.lower().replace(" ", "_"), f"{part}, in RULER's form", columns, rows)


def sections(runs: Sequence[Run]) -> list[Section]:
    records = records_of(runs, "ruler")
    described = [[task, DESCRIPTIONS.get(task)] for task in dict.fromkeys(r["task"] for _, r in records)]
    tables = [
        *(table for part in ("RULER", "short RULER") if (table := averages(runs, part)).rows),
        of_records("ruler_cells", "Each task and length: samples, interval, empty answers", records, CELLS),
        Table("ruler_tasks", "What each task asks", [TASK, Column("asks for")], described, is_folded=True),
    ]
    return [Section("ruler", "RULER", _paragraphs(runs), _pictures(runs), tables, "ruler")]


def _pictures(runs: Sequence[Run]) -> list[Picture]:
    """The mean by length and a map of tasks by length; of one length, the mean and all tasks as points."""
    lengths, records = lengths_of(r for _, r in records_of(runs, "ruler")), [run.of("ruler") for run in runs]
    tasks = [*dict.fromkeys(r["task"] for of_run in records for r in of_run)]

    def of_tasks(run: Run) -> list[Reading]:
        return [*readings(run), *(Reading(r["task"], {r["length"]: _share(r)}) for r in run.of("ruler"))]

    note, find = " of the tasks; that of the mean combines them.", readings if len(lengths) > 1 else of_tasks
    images = [pictures.by_length("ruler", runs, find, note, "ruler_cells")] if any(map(find, runs)) else []
    if len(lengths) > 1:
        maps = {run.name: {(r["task"], r["length"]): r["score"] for r in x} for run, x in zip(runs, records, strict=True) if x}
        figure = pictures.heat_maps(maps, tasks, lengths, SCALE, {run.name: run.trained for run in runs})
        note = f"Scores by task and length.{pictures.BEYOND * any(lengths[-1] > run.trained for run in runs)}"
        images.append(Picture("ruler_map", _extremes(runs), figure, note, "ruler_cells"))
    return images


def _extremes(runs: Sequence[Run]) -> str:
    """The tasks that the first run does best and worst at its longest length."""
    run = next(run for run in runs if run.of("ruler"))
    longest = lengths_of(run.of("ruler"))[-1]
    ordered = sorted((r["score"], r["task"]) for r in run.of("ruler") if r["length"] == longest)
    (low, worst), (high, best) = ordered[0], ordered[-1]
    return f"{run.name} at {tokens(longest)}: best at {best} ({high:.0f}%), worst at {worst} ({low:.0f}%)."


def _paragraphs(runs: Sequence[Run]) -> list[str]:
    """What the averages are over, and where that differs."""
    paragraphs = [
        f"A length is effective if the scores at it and at all shorter lengths are {THRESHOLD} or more (in bold). A > marks an "
        f'effective length that is the longest one tested. The column "{RELATIVE:.0%} of base" asks for {RELATIVE:.0%} of the '
        "score at the shortest length instead. Averages are over the lengths in a line of the table; wAvg. has weights that "
        "grow (inc) or fall (dec) with the length. A guess scores 0."
    ]
    measured = [(run, name, records) for run in runs for name, records in parts(run).items()]
    if any(name != "RULER" for _, name, _ in measured):
        paragraphs.append("Lengths under 4,096 are easier than those of RULER, and its averages leave them out.")
    for run, name, records in measured:
        if len(sizes := {r["samples"] for r in records}) > 1:
            paragraphs.append(f"{run.name}, {name}: cells have {min(sizes):,} to {max(sizes):,} samples.")
    for tasks, of_runs in grouped(measured, lambda x: tuple(complete_tasks(x[2]))).items():
        if missing := [task for task in NAMES if task not in tasks]:
            over = f"{len(tasks)} of {len(NAMES)} tasks, without {', '.join(missing)}"
            names = ", ".join(dict.fromkeys(run.name for run, *_ in of_runs))
            paragraphs.append(f"{names}: means are over {over}, which have no score at some length.")
    for of_runs in grouped(measured, itemgetter(1)).values():
        if len({(*lengths_of(records), *complete_tasks(records)) for *_, records in of_runs}) > 1:
            paragraphs.append("The runs have different lengths or tasks: compare single ones, not averages.")
    if own := [run.name for run in runs if run.compat]:
        others = "others are not: their scores cannot be compared" if len(own) < len(runs) else "as its scripts draw them"
        paragraphs.append(f"{', '.join(own)}: the prompts are RULER's own, {others}.")
    return paragraphs


def readings(run: Run) -> list[Reading]:
    """Those at RULER's lengths first."""
    return [Reading(name, x) for name, records in parts(run).items() if (x := mean_shares(records))]


def _of_table(name: str) -> Callable[[Run, Mapping], float | str | None]:
    """For the overview: the value of a run in a column of the table in RULER's form."""
    return lambda run, _: next((x[name] for x in averages([run], "RULER").objects()), None)


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
