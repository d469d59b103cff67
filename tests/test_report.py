"""The report says what the files say: statistics against hand counts, tables and text."""

import numpy as np
import pytest
from evaluated import LENGTHS, TRAINED, answer, everything, run_of, two

from hybrid_attn import config
from hybrid_attn.evals.needle import share_found
from hybrid_attn.evals.report import (
    attention,
    comparison,
    harness,
    losses,
    needle,
    recall,
    render,
    ruler,
    sections,
    statistics,
)
from hybrid_attn.evals.report.tables import Table


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return two(tmp_path_factory.mktemp("runs"))


def test_wilson_intervals_are_those_of_the_textbook():
    assert statistics.wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    assert statistics.wilson(0, 10) == pytest.approx((0, 0.2775328), abs=1e-6)
    assert statistics.wilson(10, 10) == pytest.approx((1 - 0.2775328, 1), abs=1e-6)
    with pytest.raises(ValueError, match="there are 0"):
        statistics.wilson(0, 0)


def test_the_interval_of_paired_differences_is_students():
    differences = np.random.default_rng(0).normal(0.1, 0.2, 12)
    mean, low, high = statistics.mean_within(differences, statistics.OF_SCORES)
    half = 2.200985 * differences.std(ddof=1) / np.sqrt(12)  # of a table, for 11 degrees of freedom
    assert (mean, low, high) == pytest.approx((differences.mean(), mean - half, mean + half), rel=1e-6)
    assert statistics.mean_within(np.array([0.0, 1.0]), statistics.OF_SCORES) == (0.5, -1, 1)  # no score differs by more
    assert statistics.mean_within(np.array([0.0, 1.0]), statistics.UNBOUNDED)[2] > 5


def test_the_interval_of_a_mean_has_a_width_where_every_answer_is_wrong_or_right():
    def interval(*cells):
        return statistics.mean_share([statistics.share(*cell) for cell in cells])[1:3]

    assert interval((8, 10)) == pytest.approx(statistics.wilson(8, 10))
    high = 0.2775328 / np.sqrt(13)
    assert interval(*[(0, 10)] * 13) == pytest.approx((0, high), abs=1e-6)
    assert interval(*[(10, 10)] * 13) == pytest.approx((1 - high, 1), abs=1e-6)
    (low, high), cells = interval((2, 8), (9, 10)), [statistics.wilson(2, 8), statistics.wilson(9, 10)]
    assert low == pytest.approx(0.575 - np.hypot(0.25 - cells[0][0], 0.9 - cells[1][0]) / 2)
    assert high == pytest.approx(0.575 + np.hypot(cells[0][1] - 0.25, cells[1][1] - 0.9) / 2)
    wrong = [{"eval": "ruler", "task": x, "length": 4096, "samples": 5, "nulls": 0, "score": 0.0} for x in ("vt", "cwe")]
    (share,) = ruler.mean_shares(wrong).values()
    assert (share.low, share.high) == pytest.approx((0, statistics.wilson(0, 5)[1] / np.sqrt(2)), abs=1e-8)


def test_two_runs_are_compared_on_the_questions_that_both_were_asked():
    a = run_of("a", [answer("vt", 4096, i, 0.5) for i in range(20)])
    better = [answer("vt", 4096, i, 0.75 if i % 2 else 0.5) for i in range(10)]
    other = [answer("vt", 4096, i, 0.0, wanted="8") for i in range(10, 20)]
    (found,) = comparison.compare(a, run_of("b", [*better, *other]), {"mean": {"vt"}})
    assert (found.task, found.pairs, found.a, found.b) == ("vt", 10, 0.5, 0.625)
    assert found.difference == 0.125 and 0 < found.low < 0.125 < found.high < 0.25
    assert found.verdict == "better"
    (same,) = comparison.compare(a, a, {"mean": {"vt"}})
    assert (same.pairs, same.difference) == (20, 0) and same.verdict == "unclear"


def test_two_runs_are_compared_question_by_question():
    first, even, odd = (
        run_of(name, [answer("vt", 4096, i, float(right(i))) for i in range(20)])
        for name, right in (("first", lambda i: i < 10), ("even", lambda i: i % 2 == 0), ("odd", lambda i: i % 2))
    )
    for a, b, variance in ((first, even, 0.5), (even, odd, 1)):
        (found,) = comparison.compare(a, b, {"mean": {"vt"}})
        assert (found.pairs, found.difference) == (20, 0)
        assert (-found.low, found.high) == pytest.approx([2.093 * np.sqrt(variance / 19)] * 2, rel=1e-3)


def test_the_mean_of_a_family_gives_each_task_the_same_weight_and_leaves_others_out():
    tasks = {"vt": (2, 1.0), "cwe": (8, 0.0), "needle": (5, 1.0)}
    a = run_of("a", [answer(task, 4096, i, 0.0) for task, (n, _) in tasks.items() for i in range(n)])
    b = run_of("b", [answer(task, 4096, i, score) for task, (n, score) in tasks.items() for i in range(n)])
    mean, *rest = comparison.compare(a, b, {"mean": {"vt", "cwe"}})
    assert (mean.task, mean.pairs, mean.difference) == ("mean of 2 tasks", 10, 0.5)
    assert [(x.task, x.in_mean) for x in rest] == [("cwe", True), ("needle", False), ("vt", True)]
    pairs = {"first": {"vt", "needle"}, "second": {"vt", "cwe"}}
    assert [x.task for x in comparison.compare(a, b, pairs)[:2]] == ["first of 2 tasks", "second of 2 tasks"]


def test_prompts_that_differ_before_their_ends_are_other_questions():
    a = run_of("a", [answer("vt", 4096, i, 0.0) for i in range(9)])
    b = run_of("b", [x | {"score": 1.0, "prompt_hash": "f" * 64} if x["index"] > 5 else x for x in a.answers])
    (found,) = comparison.compare(a, b, {"mean": {"vt"}})
    assert (found.pairs, found.difference) == (6, 0.0)
    (task,) = render.wrong_answers([a, b])
    assert (task.name, task.missed) == ("vt", "a 9 of 9, b 6 of 9")
    assert [len(example["answers"]) for example in task.examples] == [2] * 6 + [1] * 2


def test_few_questions_say_nothing_of_two_runs():
    tasks = ("vt", "cwe", "fwe")
    a, b = (run_of(name, [answer(x, 4096, i, s) for x in tasks for i in range(9)]) for name, s in (("a", 0.0), ("b", 1.0)))
    mean, *several = comparison.compare(a, b, {"mean": {*tasks}})
    assert (mean.pairs, mean.high, mean.fewest) == (27, 1, 9) and len(several) == 3
    assert [x.verdict for x in (mean, *several)] == ["unclear"] * 4
    a, b = (run._replace(answers=(*run.answers, *(x | {"index": 9} for x in run.answers[::9]))) for run in (a, b))
    assert [x.verdict for x in comparison.compare(a, b, {"mean": {*tasks}})] == ["better"] * 4


def test_two_runs_are_compared_on_the_sequences_that_both_have_read():
    rng, shares = np.random.default_rng(0), np.linspace(0.2, 0.8, 40)
    recall = {"eval": "recall", "source": "mine", "task": "recall of 4 pairs", "length": 64, "answers": 99, "accuracy": 0.5}
    loss = {"eval": "position", "source": "text", "length": 64, "tokens": 99, "loss": 2.0}
    lower = shares - 0.1 + 0.02 * rng.normal(size=40)
    a, b, c = (
        run_of(name, [], [recall | {"source": name, "by_row": list(x)}, loss | {"by_row": list(x)}])
        for name, x in (("a", shares), ("b", lower), ("c", shares[:39]))
    )
    for run in (a, b, c):
        run.provenance.update(tokenizer="bytes", heldout={"text": "same"})
    found = comparison.compare_sequences(a, b)
    assert [(x.task, x.pairs, x.loss) for x in found] == [("recall: b", 40, False), ("loss of text", 40, True)]
    for x in found:  # sequences differ more from one another than the two runs do on any of them
        assert x.difference == pytest.approx(np.mean(lower - shares)) and -0.11 < x.low < -0.1 + 0.01 < 0.01 + x.high < 0
    assert [x.verdict for x in found] == ["worse", "better"]
    assert comparison.compare_sequences(a, c) == []
    b.provenance["heldout"] = {"text": "other"}
    assert [x.task for x in comparison.compare_sequences(a, b)] == ["recall: b"]
    (section,) = (x for x in sections.sections([a, b]) if x.name == "comparison")
    assert "sequences that both have read" in section.paragraphs[0] and len(section.pictures) == 1


def rows_of(table: Table) -> list[dict]:
    return [dict(zip([column.name for column in table.columns], row, strict=True)) for row in table.rows]


def test_the_table_in_rulers_form_leaves_short_lengths_out(runs):
    hybrid, rope = rows_of(ruler.averages(runs, "RULER"))
    assert [*hybrid][:5] == ["Models", "Claimed Length", "Effective Length", "4K", "8K"]
    assert (hybrid["4K"], hybrid["8K"], hybrid["Avg."], hybrid["Effective Length"]) == (100, 75, 87.5, "4K")
    assert hybrid["wAvg. (inc)"] == pytest.approx(250 / 3) and hybrid["wAvg. (dec)"] == pytest.approx(275 / 3)
    assert rope["Effective Length"] == "4K" and rope["8K"] == 25 and rope["85% of base"] == "4K"
    assert hybrid["Tasks"] == rope["Tasks"] == "2 of 13"
    short = rows_of(ruler.averages(runs, "short RULER"))
    assert [row["Effective Length"] for row in short] == [">2K"] * 2 and "4K" not in short[0]
    assert [row["85% of base"] for row in short] == [">2K"] * 2
    nothing = {"eval": "ruler", "task": "vt", "length": 4096, "samples": 8, "nulls": 0, "score": 0.0}
    (row,) = rows_of(ruler.averages([run_of("nothing", [], [nothing])], "RULER"))
    assert (row["Effective Length"], row["85% of base"]) == ("<4K", "<4K")


def test_unequal_runs_are_not_averaged_silently():
    one = {"eval": "ruler", "length": 4096, "samples": 8, "score": 50.0, "nulls": 0}
    few = run_of("few", [], [one | {"task": "vt"}, one | {"task": "cwe", "samples": 9}])
    longer = one | {"task": "vt", "length": 8192, "score": 80.0}
    long = run_of("long", [], [one | {"task": "vt"}, one | {"task": "cwe", "score": 90.0}, longer])
    (section,) = (x for x in sections.sections([few, long]) if x.name == "ruler")
    text = " ".join(section.paragraphs)
    assert "few, RULER: cells have 8 to 9 samples" in text
    assert "few: means are over 2 of 13 tasks, without niah_single_1, " in text and "long: means are over 1 of 13" in text
    assert text.count("The runs have different lengths or tasks") == 1
    rows = rows_of(section.tables[0])
    assert [(row["4K"], row["8K"], row["Avg."], row["Tasks"]) for row in rows] == [
        (50.0, None, 50.0, "2 of 13"),
        (50.0, 80.0, 65.0, "1 of 13"),
    ]
    cells = {(row["run"], row["task"], row["length"]): row["score"] for row in rows_of(section.tables[1])}
    assert (cells["long", "cwe", 4096], cells["long", "vt", 8192]) == (90.0, 80.0)


def test_the_needles_of_a_question_are_one_answer_to_an_interval():
    cell = {"eval": "needle", "length": 4096, "needles": 4, "answers": 20, "right": 14}
    run = run_of("run", [], [cell | {"depth": depth} for depth in (0, 50)])
    rows = rows_of(needle.table([run]))
    low, high = statistics.wilson(3.5, 5)
    assert [(row["questions"], row["right"], row["95% from"], row["to"]) for row in rows] == [(5, 0.7, low, high)] * 2
    (section,) = (x for x in sections.sections([run]) if x.name == "needle")
    *_, curve = section.pictures
    (interval,) = curve.figure.axes[0].collections[0].get_segments()
    assert interval[:, 1] == pytest.approx(statistics.wilson(7, 10))
    assert "Questions per cell: 5." in section.paragraphs[0]
    (row,) = rows_of(sections.sections([run])[0].tables[0])
    assert row["needles"] == 0.7


def test_every_needle_counts_the_same_in_what_is_found_of_cells_of_unlike_size():
    sizes = ((0, 1, 10, 9), (0, 4, 8, 2), (50, 4, 40, 5))
    cells = [
        {"eval": "needle", "length": 4096} | dict(zip(("depth", "needles", "answers", "right"), x, strict=True)) for x in sizes
    ]
    assert share_found(cells) == pytest.approx(16 / 58) and share_found([]) is None
    overview, section, _ = sections.sections([run_of("run", [], cells)])
    (row,) = rows_of(overview.tables[0])
    assert row["needles"] == share_found(cells)
    one, four, _ = section.pictures
    assert "single needles: 90.0% found" in one.caption and "4 needles at a time: 14.6% found" in four.caption
    assert [cell["right"] for cell in rows_of(section.tables[0])] == [9 / 10, 2 / 8, 5 / 40]


def test_values_of_the_harness_stand_with_the_length_that_prompts_were_cut_to():
    one = {"eval": "harness", "task": "copy", "metric": "acc", "value": 0.5}
    run = run_of("run", [], [one | {"length": length} for length in LENGTHS])
    assert [(row["task"], row["length"], row["value"]) for row in rows_of(harness.table([run]))] == [
        ("copy", length, 0.5) for length in LENGTHS
    ]


def test_every_field_of_a_record_of_the_harness_is_shown(runs):
    record, (row, _) = runs[0].of("harness")[0], rows_of(harness.table(runs))
    half = statistics.Z * record["stderr"]
    interval = {"± stderr": record["stderr"], "95% from": 0.5 - half, "to": 0.5 + half}
    known = {"run": runs[0].name} | interval | {x: record[x] for x in record if x not in ("eval", "stderr")}
    assert row == known and (row["truncated"], row["windowed"]) == (3, 2)


def test_answers_of_a_sequence_that_are_right_or_wrong_together_are_one():
    rng = np.random.default_rng(0)
    apart = rng.random((200, 10)) < 0.3  # ten answers a sequence, each by itself; then all ten as the first
    for answers, number in ((apart, 2000), (apart[:, :1].repeat(10, 1), 200)):
        record = {"accuracy": answers.mean(), "answers": 2000, "by_row": list(answers.mean(1))}
        assert recall.independent_answers(record)[1] == pytest.approx(number, rel=0.15)
    for by_row in ([1.0, 1.0, 1.0], [0.5]):
        record = {"accuracy": by_row[0], "answers": 30, "by_row": by_row}
        assert recall.independent_answers(record) == (by_row[0] * len(by_row), len(by_row))


def test_paragraphs_on_recall_are_of_the_tasks_that_were_measured():
    one = {"eval": "recall", "length": 64, "answers": 8, "accuracy": 0.5}
    sources = {"copy": "copy", "my own": "tracking of 2 pairs", "again": "tracking of 1 pairs"}
    run = run_of("run", [], [one | {"source": source, "task": task, "by_row": [0.5]} for source, task in sources.items()])
    (section,) = (x for x in sections.sections([run]) if x.name == "recall")
    (text,) = section.paragraphs
    assert "copy: letters, then the same letters." in text and text.count("tracking: chains of assignments") == 1
    assert "noise, then keys" not in text and "my own" not in text
    assert set(recall.TASKS) == set(config.TASKS)


def test_the_line_of_training_is_explained_where_it_is_drawn():
    cell = {"eval": "needle", "depth": 0, "needles": 1, "answers": 8, "right": 4}
    for lengths, beyond in (((2048, TRAINED), False), ((2048, 2 * TRAINED), True), ((2 * TRAINED,), True)):
        run = run_of("run", [], [cell | {"length": length} for length in lengths])
        (section,) = (x for x in sections.sections([run]) if x.name == "needle")
        picture = section.pictures[0]
        white = [line for line in picture.figure.axes[0].lines if line.get_color() == "white"]
        assert ("Right of the dashed line" in picture.note, len(white)) == (beyond, beyond)


def test_what_was_not_measured_stands_with_its_reason_and_which_prompts_were_rulers():
    absent = [["ruler", "cwe", 4096, "does not fit"], *(["recall", "mqar", length, "is short"] for length in (8, 1024))]
    one = {"eval": "ruler", "task": "vt", "length": 4096, "samples": 8, "score": 50.0, "nulls": 0}
    own, other = run_of("own", [], [one]), run_of("other", [], [one])
    own.provenance["settings"] = {"absent": absent, "compat": True, "seed": 42}
    *_, section, table, provenance = sections.sections([own, other])
    assert [[*row.values()] for row in rows_of(table.tables[0])] == [
        ["own", "ruler", "cwe", "4K", "does not fit"],
        ["own", "recall", "mqar", "8, 1K", "is short"],
    ]
    text = " ".join(section.paragraphs)
    assert "own: the prompts are RULER's own" in text and "others are not: their scores cannot be compared" in text
    known = [row["of the run"] for row in rows_of(provenance.tables[0])]
    assert "settings.compat" in known and "settings.absent" not in known
    assert "RULER's own" not in " ".join(text for x in sections.sections([other]) for text in x.paragraphs)


def test_losses_of_other_documents_and_other_tokens_are_not_compared_silently():
    one = {"eval": "position", "length": TRAINED, "tokens": 99, "loss": 1.0}
    both = [one | {"source": source} for source in ("books", "code")]
    a, b, c = (run_of(name, [], records) for name, records in (("a", both), ("b", both), ("c", both[:1])))
    for run, code in ((a, "x"), (b, "y"), (c, "z")):
        run.provenance.update(tokenizer="bytes", heldout={"books": "same", "code": code})

    def paragraphs(*runs):
        return next(" ".join(section.paragraphs) for section in sections.sections(runs) if section.name == "loss")

    assert "code: the runs read different held-out documents" in paragraphs(a, b) and "books: the runs" not in paragraphs(a, b)
    assert "held-out" not in paragraphs(a, c) + paragraphs(a) and "tokenizers" not in paragraphs(a, b)
    c.provenance["tokenizer"] = "json"
    assert "different tokenizers" in paragraphs(a, c) and "different tokenizers" not in paragraphs(c)


def test_attention_is_shown_of_a_segment_and_of_one_of_its_tokens(runs):
    table = attention.table(runs)
    (row,) = (row for row in rows_of(table) if row["layer type"] == "G")
    of_one = {"begin": 0.25 / 10, "needle": 0.25 / 20, "context": 0.25 / 4050, "question": 0.25 / 16}
    assert {name: row[f"{name} per token"] for name in of_one} == pytest.approx(of_one)
    assert (row["needle lift"], row["token 0"], row["reach"]) == (9, pytest.approx(0.2), "yes")
    assert {"0.0125", "6.17e-05"} <= {text for cells in table.cells() for _, text, _ in cells}
    (section,) = (x for x in sections.sections(runs) if x.name == "attention")
    assert "Per token: a segment's share over its tokens" in section.paragraphs[0]


def test_sequences_that_no_document_fills_are_named():
    def buckets(source, length, *edges):
        names = {"eval": "position", "source": source, "length": length, "tokens": 9, "loss": 1.0}
        parts = [{}, {"part": "recall"}]
        return [names | {"first": a, "end": b} | x for x in parts for a, b in zip(edges[:-1], edges[1:], strict=True)] + [names]

    short = [*buckets("notes", 512, 0, 16, 64), *buckets("notes", 1024, 0, 16, 64), *buckets("notes", 4096, 0, 16, 2048)]
    filled = [*buckets("books", 1024, 0, 16, 1024), *buckets("notes", 48, 0, 16, 48)]
    (section,) = (x for x in sections.sections([run_of("a", [], short + filled)]) if x.name == "loss")
    more = "set --tokens higher to read more."
    assert section.paragraphs[1:] == [
        f"a, notes: in sequences of {lengths} no document that was read is longer than {end} tokens; {more}"
        for lengths, end in (("512, 1K", "64"), ("4K", "2,048"))
    ]
    (section,) = (x for x in sections.sections([run_of("b", [], filled)]) if x.name == "loss")
    assert len(section.paragraphs) == 1


def test_sources_are_told_apart():
    probe = [record for record in everything(1.0)[0] if record["eval"] == "attention_mass"]
    books = [r | {"source": "books", "begin": 0.5, "edges": [10, 20, 30, 40], "weights": [0.01, None, 0.0]} for r in probe]
    keys = {"eval": "key_tokens", "length": 4096, "short": 1024, "key_tokens": 1, "tokens": 9, "perplexity": 2.0}
    lost = {"eval": "position", "length": TRAINED, "tokens": 99, "source": "code", "loss": 1.0}
    run = run_of("run", [], [*probe, *books, *(keys | {"source": x, "loss": i} for i, x in enumerate(("code", "books"))), lost])
    shares = {(row["source"], row["layer type"]): (row["heads"], row["begin"]) for row in rows_of(attention.table([run]))}
    assert shares == {(x, kind): (3, begin) for x, begin in (("probe", 0.25), ("books", 0.5)) for kind in "LG"}
    found = {section.name: section for section in sections.sections([run])}
    drawn = {picture.name: picture for picture in found["attention"].pictures}
    assert len(drawn) == 8 and drawn["attention_0_books_4096"].caption.startswith("run, books, 4K: ")
    axes = drawn["attention_0_books_4096_weights"].figure.axes[0]
    assert [x.get_text() for x in axes.get_xticklabels()] == ["20", "30", "40"]
    rows = [(row["source"], row["near context"], row["loss (nats)"]) for row in rows_of(losses.key_tokens([run])[0].tables[0])]
    assert rows == [("code", 1024, 0), ("books", 1024, 1)]
    (row,) = rows_of(found["overview"].tables[0])
    assert (row["loss"], row["of source"]) == (1.0, "code")


def test_wrong_answers_are_shown_of_every_length_with_what_each_run_gave(runs):
    _, task = render.wrong_answers(runs)
    assert (task.name, task.missed) == ("vt", "hybrid <3:1> 2 of 24, rope 6 of 24")
    first = task.examples[0]
    assert [example["length"] for example in task.examples] == [8192] * 6
    assert first["answers"] == [("hybrid <3:1>", "7", 1.0), ("rope", "7", 0.0)] and first["wanted"] == ["7"]
    late = {2048: 0, 4096: 5, 8192: 15}
    many = run_of("many", [answer("vt", length, i, float(i < late[length])) for length in LENGTHS for i in range(20)])
    (task,) = render.wrong_answers([many])
    assert [(example["length"], example["index"]) for example in task.examples] == [
        *((2048, 0), (2048, 1), (2048, 2), (4096, 5), (4096, 6), (4096, 7), (8192, 15), (8192, 16))
    ]
