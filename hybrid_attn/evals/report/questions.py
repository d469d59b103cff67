"""Sections of the evaluations that ask questions: RULER, needles, recall."""

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter

from hybrid_attn.evals.report import contents, descriptions, heatmaps, pictures, statistics
from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.records import grouped, needle_totals
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.report.tables import Column, Table, tokens
from hybrid_attn.evals.ruler.scores import RELATIVE, THRESHOLD
from hybrid_attn.evals.ruler.tasks import NAMES

WILSON = "Intervals of 95% (Wilson)"
Belongs = Callable[[int], bool]


def change(shares: Mapping[int, float]) -> str:
    """How the share of right answers changes from the shortest to the longest length."""
    percents = {tokens(length): f"{100 * shares[length]:.0f}%" for length in sorted(shares)}
    first, last = tokens(min(shares)), tokens(max(shares))
    if len(shares) == 1:
        return f"{percents[first]} at {first}"
    if percents[first] == percents[last]:
        steady = len({*percents.values()}) == 1
        return f"{percents[first]} at {'all lengths' if steady else f'{first} and {last}'}"
    verb = "falls" if shares[max(shares)] < shares[min(shares)] else "rises"
    return f"{verb} from {percents[first]} at {first} to {percents[last]} at {last}"


def _changes(curves: Sequence[pictures.Curve], top: float = 1) -> str:
    """The change of each run; of the first three where there are many."""
    shares = [(x.name, {n: score / top for n, score in zip(x.lengths, x.scores, strict=True)}) for x in curves[:3]]
    more = f"; and {len(curves) - 3} more runs" if len(curves) > 3 else ""
    return "; ".join(f"{name} {change(of_run)}" for name, of_run in shares) + more + "."


def ruler(runs: Sequence[Run]) -> list[Section]:
    parts = ((contents.is_long, "ruler", "RULER"), (contents.is_short, "short_ruler", "Short RULER"))
    return [_ruler(runs, *part) for part in parts if any(_ruler_records(run, part[0]) for run in runs)]


def _ruler_records(run: Run, belongs: Belongs) -> list[dict]:
    return [record for record in run.of("ruler") if belongs(record["length"])]


def _ruler(runs: Sequence[Run], belongs: Belongs, name: str, title: str) -> Section:
    tasks = dict.fromkeys(r["task"] for run in runs for r in _ruler_records(run, belongs))
    described = [[task, descriptions.RULER.get(task)] for task in tasks]
    tables = [
        contents.ruler(runs, belongs, name, f"{title}, in RULER's form"),
        contents.ruler_tasks(runs, belongs, f"{name}_by_task", f"{title}, each task"),
    ]
    folded = [
        Table(f"{name}_tasks", "What each task asks", [Column("task"), Column("asks for")], described),
        contents.ruler_cells(runs, belongs, f"{name}_cells", f"{title}, each cell: samples, interval, empty answers"),
    ]
    return Section(name, title, _ruler_paragraphs(runs, belongs), _ruler_pictures(runs, belongs, name), tables, folded, "ruler")


def _ruler_pictures(runs: Sequence[Run], belongs: Belongs, name: str) -> list[Picture]:
    """The mean by length and a map of tasks by length; of one length, all tasks and their mean as points."""
    means = [pictures.mean_curve(run, i, belongs) for i, run in enumerate(runs) if contents.ruler_means(run, belongs)]
    panel, tasks = {"mean of the tasks": means} if means else {}, _task_curves(runs, belongs)
    caption = f"Right answers: {_changes(means, 100) if means else 'no task at all lengths.'}"
    lengths = {r["length"] for run in runs for r in _ruler_records(run, belongs)}
    if len(lengths) == 1:
        figure, note = pictures.points(panel | tasks, "score", 100), f"{WILSON}; the mean's combines those of its tasks."
        return [Picture(name, caption, figure, note, f"{name}_cells")]
    scores = [({(r["task"], r["length"]): r["score"] for r in _ruler_records(run, belongs)}, run) for run in runs]
    task_map = heatmaps.task_map([(run.name, of_run, run.trained) for of_run, run in scores if of_run], list(tasks))
    beyond = " Right of the dashed line: beyond the length of training."
    note = "Scores by task and length; intervals are in the table of cells."
    note += beyond * any(max(lengths) > run.trained for run in runs)
    drawn = [Picture(f"{name}_tasks", _extremes(runs, belongs), task_map, note, f"{name}_by_task")]
    if means:
        figure = pictures.curves(panel, [run.trained for run in runs], "score", 100, THRESHOLD)
        drawn.insert(0, Picture(name, caption, figure, f"Mean of the tasks by length. {WILSON} of the tasks, combined.", name))
    return drawn


def _extremes(runs: Sequence[Run], belongs: Belongs) -> str:
    """The tasks that the first run does best and worst at its longest length."""
    run = next(run for run in runs if _ruler_records(run, belongs))
    longest = max(r["length"] for r in _ruler_records(run, belongs))
    scores = {r["task"]: r["score"] for r in run.of("ruler") if r["length"] == longest}
    best, worst = max(scores, key=scores.get), min(scores, key=scores.get)
    if scores[best] == scores[worst]:
        text = f"{scores[best]:.0f}% of {'every task' if len(scores) > 1 else best}"
    else:
        text = f"best at {best} ({scores[best]:.0f}%), worst at {worst} ({scores[worst]:.0f}%)"
    return f"{run.name} at {tokens(longest)}: {text}."


def _task_curves(runs: Sequence[Run], belongs: Belongs) -> dict[str, list[pictures.Curve]]:
    curves: dict[str, list[pictures.Curve]] = {}
    for number, run in enumerate(runs):
        for task, records in grouped(_ruler_records(run, belongs), itemgetter("task")).items():
            cells = {r["length"]: (r["score"] / 100 * r["samples"], r["samples"]) for r in records}
            curves.setdefault(task, []).append(pictures.wilson_curve(run.name, number, cells, 100))
    return curves


def _ruler_paragraphs(runs: Sequence[Run], belongs: Belongs) -> list[str]:
    """What the averages are over, and where that differs."""
    paragraphs = [
        f"A length is effective if the scores at it and at all shorter lengths are {THRESHOLD} or more (in bold). A > marks an "
        f'effective length that is the longest one tested. The column "{RELATIVE:.0%} of base" asks for {RELATIVE:.0%} of the '
        "score at the shortest length instead. Averages are over the lengths in a line of the table; wAvg. has weights that "
        "grow (inc) or fall (dec) with the length. A guess scores 0."
    ]
    if belongs is contents.is_short:
        paragraphs.append("Lengths under 4,096 are easier than those of RULER, and its averages leave them out.")
    lengths, families, without = set(), set(), {}
    for run in runs:
        if not (records := _ruler_records(run, belongs)):
            continue
        tasks = contents.ruler_tasks_of(run, belongs)
        lengths.add(tuple(contents.lengths_of(records)))
        families.add(tuple(tasks))
        if missing := [task for task in NAMES if task not in tasks]:
            without.setdefault(f"over {contents.of_all(tasks)} tasks, without {', '.join(missing)}", []).append(run.name)
        sizes = {r["samples"] for r in records}
        if len(sizes) > 1:
            paragraphs.append(f"{run.name}: cells have {min(sizes):,} to {max(sizes):,} samples.")
        if run.compat:
            paragraphs.append(f"{run.name}: the prompts are RULER's own, as its scripts draw them.")
    paragraphs += [f"{', '.join(names)}: means are {x}, which have no score at some length." for x, names in without.items()]
    if len(lengths) > 1:
        paragraphs.append("The runs have different lengths: compare single lengths, not averages.")
    if len(families) > 1:
        paragraphs.append("The runs have different tasks: compare single tasks, not averages.")
    if len({run.compat for run in runs}) > 1:
        paragraphs.append("Some prompts are RULER's own and others are not: their scores cannot be compared.")
    return paragraphs


def needle(runs: Sequence[Run]) -> list[Section]:
    maps, panels, trained = [], {}, [run.trained for run in runs]
    for number, run in enumerate(runs):
        for needles, records in sorted(grouped(run.of("needle"), itemgetter("needles")).items()):
            kind = "one needle" if needles == 1 else f"{needles} needles"
            maps.append(_heat_map(run, records, kind, f"needle_{number}_{needles}"))
            panels.setdefault(kind, []).append(pictures.wilson_curve(run.name, number, needle_totals(records)))
    first = next(iter(panels))
    figure, caption = pictures.shares(panels, trained, "found"), f"Found, {first}: {_changes(panels[first])}"
    overall = Picture("needle", caption, figure, f"All depths together. {WILSON}.", "needle_cells")
    records = [record for run in runs for record in run.of("needle")]
    sizes = {contents.needle_questions(record)[1] for record in records}
    few = f" Fewer than {statistics.FEWEST} are noise." if min(sizes) < statistics.FEWEST else ""
    span = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    paragraphs = [
        "A sentence, the needle, is hidden at some depth of a text, and the prompt ends with a question about it. Questions "
        f"per cell: {span}.{few} An answer is right if it contains the value of the needle; an answer about several needles "
        "is right in part for each of them. A guess finds none."
    ]
    if any(r["length"] > run.trained for run in runs for r in run.of("needle")):
        paragraphs.append("The white dashed line marks the length of training: texts to its right are longer.")
    return [Section("needle", "Needle", paragraphs, [*maps, overall], [], [contents.needle(runs)], "needle")]


def _heat_map(run: Run, records: Sequence[dict], kind: str, name: str) -> Picture:
    shares = {(r["length"], r["depth"]): contents.needles_found([r]) for r in records}
    lengths, depths = contents.lengths_of(records), sorted({r["depth"] for r in records})
    perfect = [x for x in lengths if all(share == 1 for (length, _), share in shares.items() if length <= x)]
    up_to = f", all of them up to {tokens(perfect[-1])}" if perfect and len(perfect) < len(lengths) else ""
    caption = f"{run.name}, {kind}: {contents.needles_found(records):.1%} found overall{up_to}."
    figure = heatmaps.heat_map(lengths, depths, shares, run.trained)
    return Picture(name, caption, figure, "Share found by length and depth.", "needle_cells")


def recall(runs: Sequence[Run]) -> list[Section]:
    panels: dict[str, list[pictures.Curve]] = {}
    guesses: dict[str, float] = {}
    for number, run in enumerate(runs):
        for source, records in grouped(run.of("recall"), itemgetter("source")).items():
            cells = {r["length"]: contents.independent_answers(r) for r in records}
            panels.setdefault(source, []).append(pictures.wilson_curve(run.name, number, cells))
            if (guess := contents.chance(records[0]["task"])) is not None:
                guesses[source] = guess
    first = next(iter(panels))
    figure = pictures.shares(panels, [run.trained for run in runs], "accuracy", guesses)
    note = f"{WILSON} for as many answers as are independent. Chance: the score of a guess among what the row names."
    drawn = [Picture("recall", f"{first}: {_changes(panels[first])}", figure, note, "recall")]
    tasks = {r["task"].split()[0] for run in runs for r in run.of("recall") if r["task"].split()}
    meanings = "".join(f" {name}: {text}." for name, text in descriptions.TASKS.items() if name in tasks)
    text = f"Synthetic rows, in which each question is about something that the row has named before.{meanings}"
    return [Section("recall", "Recall", [text], drawn, [contents.recall(runs)], [], "recall")]
