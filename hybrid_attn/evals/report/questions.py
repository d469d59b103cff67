"""Sections of what was asked: RULER, needles, recall."""

from collections.abc import Callable, Mapping, Sequence

from hybrid_attn.evals.report import contents, descriptions, heatmaps, pictures, statistics
from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.section import Section
from hybrid_attn.evals.report.tables import Column, Table, tokens
from hybrid_attn.evals.ruler.scores import RELATIVE, THRESHOLD
from hybrid_attn.evals.ruler.tasks import NAMES

WILSON = "Intervals of 95% (Wilson)"
Belongs = Callable[[int], bool]


def change(by_length: Mapping[int, float], digits: int = 0) -> str:
    """Shares of right answers from the shortest to the longest length, in words."""
    lengths = sorted(by_length)
    first, last = (f"{100 * by_length[length]:.{digits}f}%" for length in (lengths[0], lengths[-1]))
    if len(lengths) == 1:
        return f"{first} at {tokens(lengths[0])}"
    if first == last:
        middle = [f"{100 * by_length[length]:.{digits}f}%" for length in lengths]
        steady = all(x == first for x in middle)
        return f"{first} at {'all lengths' if steady else f'{tokens(lengths[0])} and {tokens(lengths[-1])}'}"
    verb = "falls" if by_length[lengths[-1]] < by_length[lengths[0]] else "rises"
    return f"{verb} from {first} at {tokens(lengths[0])} to {last} at {tokens(lengths[-1])}"


def _each(told: Mapping[str, str]) -> str:
    """What is said of each run; the first three where there are many."""
    more = f"; and {len(told) - 3} more runs" if len(told) > 3 else ""
    return "; ".join(f"{name} {text}" for name, text in list(told.items())[:3]) + more + "."


def ruler(runs: Sequence[Run]) -> list[Section]:
    found = []
    for belongs, name, title in ((contents.is_long, "ruler", "RULER"), (contents.is_short, "short_ruler", "Short RULER")):
        records = [r for run in runs for r in run.of("ruler") if belongs(r["length"])]
        if records:
            tables = [
                contents.ruler(runs, belongs, name, f"{title}, in RULER's form"),
                contents.ruler_tasks(runs, belongs, f"{name}_by_task", f"{title}, each task"),
            ]
            asked = list(dict.fromkeys(r["task"] for r in records))
            each = f"{title}, each cell: samples, interval, empty answers"
            cells = contents.ruler_cells(runs, belongs, f"{name}_cells", each)
            own = _ruler_pictures(runs, belongs, name, contents.lengths_of(records))
            folded = [_tasks_described(asked, f"{name}_tasks"), cells]
            found.append(Section(name, title, _ruler_words(runs, belongs), own, tables, folded, "ruler"))
    return found


def _tasks_described(tasks: Sequence[str], name: str) -> Table:
    rows = [[task, descriptions.RULER.get(task)] for task in tasks]
    return Table(name, "What each task asks", [Column("task"), Column("asks for")], rows)


def _ruler_pictures(runs: Sequence[Run], belongs: Belongs, name: str, lengths: Sequence[int]) -> list[Picture]:
    """The mean by length and a map of tasks by length; of one length, all tasks and their mean as points."""
    means = [(i, run) for i, run in enumerate(runs) if contents.ruler_means(run, belongs)]
    mean = [pictures.mean_curve(run, i, belongs) for i, run in means]
    shares = {
        curve.name: {length: score / 100 for length, score in zip(curve.lengths, curve.scores, strict=True)} for curve in mean
    }
    told = _each({run: change(by_length) for run, by_length in shares.items()}) if shares else "no task at all lengths."
    by_task = _task_curves(runs, belongs)
    if len(lengths) == 1:
        rows = ({"mean of the tasks": mean} if mean else {}) | by_task
        note = f"{WILSON}; the mean's combines those of its tasks."
        figure = pictures.points(rows, "score", 100)
        return [Picture(name, f"Right answers: {told}", figure, False, note, f"{name}_cells")]
    marks = [run.trained for run in runs]
    figure = pictures.curves({"mean of the tasks": mean}, marks, "score", 100, THRESHOLD) if mean else None
    note = f"Mean of the tasks by length. {WILSON} of the tasks, combined."
    found = [Picture(name, f"Right answers: {told}", figure, False, note, name)] if mean else []
    maps = []
    for run in runs:
        scores = {(r["task"], r["length"]): r["score"] for r in run.of("ruler") if belongs(r["length"])}
        maps += [(run.name, scores, run.trained)] if scores else []
    figure = heatmaps.task_map(maps, list(by_task))
    note = "Scores by task and length; intervals are in the table of cells."
    if any(length > run.trained for run in runs for length in lengths):
        note += " Right of the dashed line: beyond the length of training."
    found.append(Picture(f"{name}_tasks", _extremes(runs, belongs), figure, len(maps) > 2, note, f"{name}_by_task"))
    return found


def _extremes(runs: Sequence[Run], belongs: Belongs) -> str:
    """The tasks that the first run does best and worst at its longest length."""
    run = next(run for run in runs if any(belongs(r["length"]) for r in run.of("ruler")))
    longest = max(r["length"] for r in run.of("ruler") if belongs(r["length"]))
    scores = {r["task"]: r["score"] for r in run.of("ruler") if r["length"] == longest}
    best, worst = max(scores, key=scores.get), min(scores, key=scores.get)
    told = f"{run.name} at {tokens(longest)}: "
    if scores[best] == scores[worst]:
        return f"{told}{scores[best]:.0f}% of {'every task' if len(scores) > 1 else best}."
    return f"{told}best at {best} ({scores[best]:.0f}%), worst at {worst} ({scores[worst]:.0f}%)."


def _task_curves(runs: Sequence[Run], belongs: Belongs) -> dict[str, list[pictures.Curve]]:
    rows: dict[str, list[pictures.Curve]] = {}
    for number, run in enumerate(runs):
        tasks: dict[str, dict[int, tuple[float, int]]] = {}
        for r in run.of("ruler"):
            if belongs(r["length"]):
                tasks.setdefault(r["task"], {})[r["length"]] = (r["score"] / 100 * r["samples"], r["samples"])
        for task, cells in tasks.items():
            rows.setdefault(task, []).append(pictures.wilson_curve(run.name, number, cells, 100))
    return rows


def _ruler_words(runs: Sequence[Run], belongs: Belongs) -> list[str]:
    """What the averages are over, and where that differs."""
    words = [
        f"A length is effective if it and all shorter ones score {THRESHOLD} or more (in bold), and > stands before "
        f"the longest length asked; the last column wants {RELATIVE:.0%} of the score at the shortest length instead. Averages "
        "are over the lengths of a row, wAvg. with weights that grow (inc) or fall (dec) with the length. A guess scores 0."
    ]
    if belongs is contents.is_short:
        words.append("Lengths under 4,096 are easier than RULER and no part of its averages.")
    lengths, families, without = set(), set(), {}
    for run in runs:
        records = [r for r in run.of("ruler") if belongs(r["length"])]
        if not records:
            continue
        lengths.add(tuple(contents.lengths_of(records)))
        families.add(tuple(kept := contents.ruler_tasks_of(run, belongs)))
        if left := [task for task in NAMES if task not in kept]:
            without.setdefault(f"over {contents.of_all(kept)} tasks, without {', '.join(left)}", []).append(run.name)
        sizes = {r["samples"] for r in records}
        if len(sizes) > 1:
            words.append(f"{run.name}: cells have {min(sizes):,} to {max(sizes):,} samples.")
        if run.compat:
            words.append(f"{run.name}: the prompts are RULER's own, as its scripts draw them.")
    words += [f"{', '.join(names)}: means are {what}, which have no score at some length." for what, names in without.items()]
    for several, what in ((lengths, "lengths"), (families, "tasks")):
        if len(several) > 1:
            words.append(
                f"The runs have other {what}: compare their {'columns' if what == 'lengths' else 'tasks'}, not averages."
            )
    if len({run.compat for run in runs}) > 1:
        words.append("Some prompts are RULER's own and others are not: scores do not compare.")
    return words


def needle(runs: Sequence[Run]) -> list[Section]:
    drawn, curves, sizes = [], {}, set()
    for number, run in enumerate(runs):
        for needles in sorted({r["needles"] for r in run.of("needle")}):
            records = [r for r in run.of("needle") if r["needles"] == needles]
            kind = "one needle" if needles == 1 else f"{needles} needles"
            drawn.append(_heat_map(run, number, records, kind, f"needle_{number}_{needles}"))
            cells: dict[int, tuple[float, int]] = {}
            for r in records:
                right, questions = contents.needle_questions(r)
                before = cells.get(r["length"], (0.0, 0))
                cells[r["length"]] = before[0] + right, before[1] + questions
            curves.setdefault(kind, []).append(pictures.wilson_curve(run.name, number, cells))
            sizes |= {contents.needle_questions(r)[1] for r in records}
    drawn.append(_over_depths(curves, [run.trained for run in runs]))
    few = f" Fewer than {statistics.FEWEST} are noise." if min(sizes) < statistics.FEWEST else ""
    span = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    words = [
        f"A sentence hidden at a depth of a text of a length, and asked for at its end: questions a cell {span}.{few} An "
        "answer is right that contains the value; of several needles, each is a part of it. A guess finds none."
    ]
    if any(r["length"] > run.trained for run in runs for r in run.of("needle")):
        words.append("The white dashed line is the length of training: all to its right is longer.")
    return [Section("needle", "Needle", words, drawn, [], [contents.needle(runs)], "needle")]


def _over_depths(curves: Mapping[str, Sequence[pictures.Curve]], marks: Sequence[int]) -> Picture:
    """All depths together: a panel for each number of needles, or points where there is one length."""
    several = next(iter(curves.values()))
    told = _each({x.name: change(dict(zip(x.lengths, x.scores, strict=True))) for x in several})
    caption, note = f"Found, {next(iter(curves))}: {told}", f"All depths together. {WILSON}."
    if len({length for x in curves.values() for curve in x for length in curve.lengths}) == 1:
        return Picture("needle", caption, pictures.points(curves, "found", 1), False, note, "needle_cells")
    return Picture("needle", caption, pictures.curves(curves, marks, "found", 1, None), len(curves) > 2, note, "needle_cells")


def _heat_map(run: Run, number: int, records: Sequence[dict], kind: str, name: str) -> Picture:
    shares = {(r["length"], r["depth"]): contents.needles_found([r]) for r in records}
    depths = sorted({r["depth"] for r in records})
    figure = heatmaps.heat_map(contents.lengths_of(records), depths, shares, run.trained)
    perfect = [x for x in contents.lengths_of(records) if all(s == 1 for (length, _), s in shares.items() if length <= x)]
    told = f", all of them up to {tokens(perfect[-1])}" if perfect and len(perfect) < len(contents.lengths_of(records)) else ""
    caption = f"{run.name}, {kind}: {contents.needles_found(records):.1%} found overall{told}."
    return Picture(name, caption, figure, False, "Share found by length and depth.", "needle_cells")


def recall(runs: Sequence[Run]) -> list[Section]:
    panels: dict[str, list[pictures.Curve]] = {}
    guesses: dict[str, float] = {}
    for number, run in enumerate(runs):
        for source in dict.fromkeys(r["source"] for r in run.of("recall")):
            records = [r for r in run.of("recall") if r["source"] == source]
            cells = {r["length"]: contents.independent_answers(r) for r in records}
            panels.setdefault(source, []).append(pictures.wilson_curve(run.name, number, cells))
            if (guess := contents.chance(records[0]["task"])) is not None:
                guesses[source] = guess
    first, several = next(iter(panels.items()))
    told = _each({x.name: change(dict(zip(x.lengths, x.scores, strict=True))) for x in several})
    caption = f"{first}: {told}"
    note = f"{WILSON} for as many answers as are independent. Chance: a guess among what the row names."
    if len({length for x in panels.values() for curve in x for length in curve.lengths}) == 1:
        figure = pictures.points(panels, "accuracy", 1, guesses)
    else:
        figure = pictures.curves(panels, [run.trained for run in runs], "accuracy", 1, None, guesses)
    own = [Picture("recall", caption, figure, len(panels) > 2 and len(figure.axes) > 2, note, "recall")]
    tasks = {r["task"].split()[0] for run in runs for r in run.of("recall") if r["task"].split()}
    told = "".join(f" {name}: {words}." for name, words in descriptions.TASKS.items() if name in tasks)
    words = [f"Drawn rows that say what is asked for later; the row holds the right answers before each question.{told}"]
    return [Section("recall", "Recall", words, own, [contents.recall(runs)], [], "recall")]
