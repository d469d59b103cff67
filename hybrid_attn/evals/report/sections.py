"""What a report says, in order: sections of words, pictures and tables."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from hybrid_attn.evals.report import attention, contents, pictures, statistics
from hybrid_attn.evals.report.canvas import Picture
from hybrid_attn.evals.report.runs import Run
from hybrid_attn.evals.report.tables import Column, Table, count, fixed, plain, tokens
from hybrid_attn.evals.ruler.scores import RELATIVE, THRESHOLD, averages
from hybrid_attn.evals.ruler.tasks import NAMES

PARTS = {"all": "all tokens", "recall": "tokens whose bigram was seen before", "rest": "the other tokens"}
OVERVIEW = {
    "RULER Avg.": "RULER's mean over tasks and lengths",
    "needles": "the share found at all lengths and depths, of those asked for alone and of several together",
    "recall": "the share of right answers at the longest length, in the first of the tasks",
    "loss": "of the held-out text of one source, in nats, at the length of training",
}


TASKS = {
    "recall": "pairs of letters in noise, then keys whose value is asked for",
    "mqar": "pairs, then each key once more among random words (zoology's multi-query associative recall)",
    "copy": "letters, then the same letters",
    "tracking": "chains of assignments in noise, then a value whose variables are asked for",
}


class Section(NamedTuple):
    """`folded` tables are closed until they are asked for."""

    name: str
    title: str
    words: Sequence[str]
    pictures: Sequence[Picture]
    tables: Sequence[Table]
    folded: Sequence[Table]


def sections(runs: Sequence[Run]) -> list[Section]:
    """Those that the runs have records for."""
    has = {record["eval"] for run in runs for record in run.records}
    parts: list[tuple[str, Callable[[Sequence[Run]], list[Section]]]] = [
        ("ruler", _ruler),
        ("needle", _needle),
        ("recall", _recall),
        ("position", _position),
        ("key_tokens", _key_tokens),
        ("attention_mass", _attention),
        ("harness", _harness),
    ]
    found = [section for name, make in parts if name in has for section in make(runs)]
    return [_overview(runs), *found, *_comparison(runs), *_absent(runs), _provenance(runs)]


def _overview(runs: Sequence[Run]) -> Section:
    """A line for each run with one number of each evaluation."""
    columns = [
        *(Column("run"), Column("layers"), Column("parameters", count), Column("trained at", tokens), Column("step", count)),
        *(Column("RULER Avg.", fixed(1)), Column("of tasks"), Column("effective"), Column("needles", fixed(3))),
        *(Column("recall", fixed(3)), Column("loss", fixed(3)), Column("of source")),
    ]
    rows = []
    for run in runs:
        model, means = run.provenance["model"], contents.ruler_means(run, contents.is_long)
        recalls = run.of("recall")
        losses = [r for r in run.of("position") if contents.is_total(r) and r["length"] == run.trained]
        rows.append(
            [
                *(run.name, model.get("layers"), model.get("parameters"), run.trained, run.provenance.get("step")),
                averages(means)["average"] if means else None,
                contents.of_all(contents.ruler_tasks_of(run, contents.is_long)) if means else None,
                contents.effective(means) if means else None,
                contents.needles_found(run.of("needle")),
                max(recalls, key=lambda r: r["length"])["accuracy"] if recalls else None,
                *((losses[0]["loss"], losses[0]["source"]) if losses else (None, None)),
            ]
        )
    kept = [i for i in range(len(columns)) if any(row[i] is not None for row in rows)]
    table = Table("overview", "The runs", [columns[i] for i in kept], [[row[i] for i in kept] for row in rows])
    told = [f"{column.name}: {OVERVIEW[column.name]}." for column in table.columns if column.name in OVERVIEW]
    return Section("overview", "At a glance", [" ".join(told)] if told else [], [], [table], [])


def _ruler(runs: Sequence[Run]) -> list[Section]:
    found = []
    for belongs, name, title in ((contents.is_long, "ruler", "RULER"), (contents.is_short, "short_ruler", "Short RULER")):
        means = [(i, run) for i, run in enumerate(runs) if contents.ruler_means(run, belongs)]
        if not means:
            continue
        marks = [run.trained for run in runs]
        mean = {"mean of the tasks": [pictures.mean_curve(run, i, belongs) for i, run in means]}
        figure = pictures.curves(mean, marks, "score", 100, THRESHOLD)
        panels = _task_curves(runs, belongs)
        by_task = pictures.curves(panels, marks, "score", 100, None)
        own = [
            Picture(name, "Mean of the tasks by length, with the tasks' Wilson intervals of 95% combined.", figure, False),
            Picture(f"{name}_tasks", "Each task by length, with Wilson intervals of 95%.", by_task, len(panels) > 2),
        ]
        tables = [
            contents.ruler(runs, belongs, name, f"{title}, in RULER's form"),
            contents.ruler_tasks(runs, belongs, f"{name}_by_task", f"{title}, each task"),
        ]
        cells = contents.ruler_cells(runs, belongs, f"{name}_cells", f"{title}, each cell: samples, interval, empty answers")
        found.append(Section(name, title, _ruler_words(runs, belongs), own, tables, [cells]))
    return found


def _task_curves(runs: Sequence[Run], belongs: Callable[[int], bool]) -> dict[str, list[pictures.Curve]]:
    panels: dict[str, list[pictures.Curve]] = {}
    for number, run in enumerate(runs):
        tasks: dict[str, dict[int, tuple[float, int]]] = {}
        for r in run.of("ruler"):
            if belongs(r["length"]):
                tasks.setdefault(r["task"], {})[r["length"]] = (r["score"] * r["samples"], r["samples"])
        for task, cells in tasks.items():
            shares = {length: (right / 100, samples) for length, (right, samples) in cells.items()}
            curve = pictures.wilson_curve(run.name, number, shares)
            percent = [[100 * x for x in band] for band in curve.bands]
            panels.setdefault(task, []).append(curve._replace(scores=[100 * x for x in curve.scores], bands=percent))
    return panels


def _ruler_words(runs: Sequence[Run], belongs: Callable[[int], bool]) -> list[str]:
    """What the averages are over, and where that differs."""
    words = [
        f"A length is effective if it and all shorter ones score {THRESHOLD} or more (underlined), and > stands before "
        f"the longest length asked; the last column wants {RELATIVE:.0%} of the score at the shortest length instead. Averages "
        "are over the lengths of a row, wAvg. with weights that grow (inc) or fall (dec) with the length."
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


def _needle(runs: Sequence[Run]) -> list[Section]:
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
    figure = pictures.curves(curves, [run.trained for run in runs], "found", 1, None)
    caption = "All depths together, with Wilson intervals of 95%."
    drawn.append(Picture("needle", caption, figure, len(curves) > 2))
    few = f" Fewer than {statistics.FEWEST} are noise." if min(sizes) < statistics.FEWEST else ""
    span = f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} to {max(sizes):,}"
    words = [
        f"A sentence hidden at a depth of a text of a length, and asked for at its end: questions a cell {span}.{few} An "
        "answer is right that contains the value; of several needles, each is a part of it."
    ]
    if any(r["length"] > run.trained for run in runs for r in run.of("needle")):
        words.append("The white dashed line is the length of training: all to its right is longer.")
    return [Section("needle", "Needle", words, drawn, [], [contents.needle(runs)])]


def _heat_map(run: Run, number: int, records: Sequence[dict], kind: str, name: str) -> Picture:
    shares = {(r["length"], r["depth"]): contents.needles_found([r]) for r in records}
    depths = sorted({r["depth"] for r in records})
    figure = pictures.heat_map(contents.lengths_of(records), depths, shares, run.trained)
    return Picture(name, f"{run.name}, {kind}: {contents.needles_found(records):.1%} found overall.", figure, False)


def _recall(runs: Sequence[Run]) -> list[Section]:
    panels: dict[str, list[pictures.Curve]] = {}
    for number, run in enumerate(runs):
        for source in dict.fromkeys(r["source"] for r in run.of("recall")):
            records = [r for r in run.of("recall") if r["source"] == source]
            cells = {r["length"]: contents.independent_answers(r) for r in records}
            panels.setdefault(source, []).append(pictures.wilson_curve(run.name, number, cells))
    figure = pictures.curves(panels, [run.trained for run in runs], "accuracy", 1, None)
    caption = "Right answers by length, with Wilson intervals of 95% for as many as are independent."
    own = [Picture("recall", caption, figure, len(panels) > 2)]
    tasks = {r["task"].split()[0] for run in runs for r in run.of("recall")}
    told = "".join(f" {name}: {words}." for name, words in TASKS.items() if name in tasks)
    words = [f"Drawn rows that say what is asked for later; the row holds the right answers before each question.{told}"]
    return [Section("recall", "Recall", words, own, [contents.recall(runs)], [])]


def _position(runs: Sequence[Run]) -> list[Section]:
    drawn, marks = [], [run.trained for run in runs]
    buckets = [(i, run.name, r) for i, run in enumerate(runs) for r in run.of("position") if "first" in r]
    for source in dict.fromkeys(r["source"] for *_, r in buckets):
        of_source = [(i, name, r) for i, name, r in buckets if r["source"] == source]
        for part in dict.fromkeys(contents.part(r) for *_, r in of_source):
            panels: dict[str, dict[tuple[str, int], list[dict]]] = {}
            for i, name, r in of_source:
                if contents.part(r) == part:
                    panels.setdefault(f"rows of {tokens(r['length'])}", {}).setdefault((name, i), []).append(r)
            lines = {title: [(*line, several) for line, several in x.items()] for title, x in panels.items()}
            figure = pictures.loss_by_position(lines, marks)
            which = PARTS.get(part, part)
            drawn.append(Picture(f"loss_{plain(source)}_{part}", f"{source}: {which}.", figure, len(panels) > 2))
    words = [
        "What a token costs by its position in the document: a model that reads its context pays less further on, and one "
        "that cannot go beyond its length of training pays more there."
    ]
    words += _unreached(runs) + _unlike(runs, "position")
    return [Section("loss", "Loss", words, drawn, [contents.position(runs)], [contents.positions(runs)])]


def _unreached(runs: Sequence[Run]) -> list[str]:
    """Which rows are longer than all that was read of documents in them."""
    short: dict[tuple[str, str, int], list[int]] = {}
    for run in runs:
        for (source, length), end in contents.ends(run).items():
            if end < length:
                short.setdefault((run.name, source, end), []).append(length)
    return [
        f"{name}, {source}: in rows of {', '.join(map(tokens, lengths))} no document that was read reaches beyond "
        f"{end:,} tokens; more --tokens read more documents."
        for (name, source, end), lengths in short.items()
    ]


def _unlike(runs: Sequence[Run], evaluation: str) -> list[str]:
    """What keeps the losses of an evaluation from being compared: other documents of the same name, or other tokens."""
    read: dict[str, set] = {}
    for run in runs:
        for source in {r["source"] for r in run.of(evaluation)}:
            read.setdefault(source, set()).add(run.provenance.get("heldout", {}).get(source))
    words = [
        f"{source}: the runs read other held-out documents of this name; their losses do not compare."
        for source in sorted(read)
        if len(read[source]) > 1
    ]
    if len({run.provenance.get("tokenizer") for run in runs if run.of(evaluation)}) > 1:
        words.append("The runs have other tokenizers: the loss of a token does not compare, bits per byte do.")
    return words


def _key_tokens(runs: Sequence[Run]) -> list[Section]:
    words = [
        "Tokens that the context farther away than the near one makes likely: the loss is over these alone. Each model says "
        "for itself which they are, so that losses of two models are not over the same tokens."
    ]
    words += _unlike(runs, "key_tokens")
    return [Section("key_tokens", "Key tokens", words, [], [contents.key_tokens(runs)], [])]


def _attention(runs: Sequence[Run]) -> list[Section]:
    prompts = sorted({r["prompts"] for run in runs for r in run.of("attention_mass")})
    words = [
        "Shares of the attention of the question's tokens, means over heads and over so many prompts: "
        f"{', '.join(map(str, prompts))}. The needle's lift is its share over the share of the tokens that it has; a retrieval "
        f"head (score over {contents.RETRIEVES}) looks at the token that it copies. Per token: a segment's share over its "
        "tokens; token 0 is the share of the very first. Crosses: layers whose window does not reach the needle. Single heads, "
        "and weights by position without the first 10 and the last 3% of the keys, are drawn at the longest length."
    ]
    return [Section("attention", "Attention", words, attention.drawn(runs), [contents.attention(runs)], [])]


def _harness(runs: Sequence[Run]) -> list[Section]:
    words = [
        "A truncated request lost the beginning of its prompt: its score says little about context. A windowed text was scored "
        "in several pieces."
    ]
    return [Section("harness", "Harness", words, [], [contents.harness(runs)], [])]


def _comparison(runs: Sequence[Run]) -> list[Section]:
    found = contents.differences(runs)
    first, drawn = runs[0].name, []
    for number, (name, several) in enumerate(found, 1):
        if several := [x for x in several if not x.loss]:
            caption = f"{name} less {first}; in bold and in the colour of the better run where it is clear."
            drawn.append(Picture(f"comparison_{number}", caption, pictures.differences(several, number), False))
    if not any(several for _, several in found):
        return []
    words = [
        "Only questions that both runs were asked count, word for word, and rows that both have read; the interval is a paired "
        f"bootstrap over them, with {statistics.RESAMPLES:,} resamples, and fewer than {statistics.PAIRS} pairs of a task "
        "leave it unclear. The mean of tasks gives each task the same weight, that of rows each row. Of losses, less is better."
    ]
    return [Section("comparison", "Comparison", words, drawn, [contents.comparison(first, found)], [])]


def _absent(runs: Sequence[Run]) -> list[Section]:
    table = contents.absent(runs)
    return [Section("absent", "Absent", [], [], [table], [])] if table.rows else []


def _provenance(runs: Sequence[Run]) -> Section:
    return Section("provenance", "Provenance", [], [], [contents.provenance(runs)], [])
