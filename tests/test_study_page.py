"""Studies: statistics by hand, verdicts, tables, pages, comparisons, and metrics that are read from files."""

import dataclasses
import json
import math
import re

import pytest

from hybrid_attn.studies import (
    POSITIVE,
    SHARE,
    Cell,
    Claim,
    Curves,
    Metric,
    Reach,
    Study,
    over_cells,
    over_metrics,
    page,
    plot,
    runs,
)
from hybrid_attn.studies import metrics as read_by
from hybrid_attn.studies.compare import compared
from hybrid_attn.studies.results import Results
from hybrid_attn.studies.statistics import mean_of, ordered, paired, verdict

STUDY = Study(
    title="Two cells",
    question="Which is better?",
    cells={"one": Cell("one.py"), "two": Cell("one.py", {"optim.lr": 1e-3})},
    metrics={
        "right": Metric(lambda run: None, bounds=SHARE),
        "steps": Metric(lambda run: None, "{:,.0f}", POSITIVE, higher_is_better=False),
    },
    plot=Curves({"": over_metrics(("one", "two"), {64: "right", 128: "right"})}, "tokens", "right answers"),
    learned=("right", 0.5),
)


def results(study: Study = STUDY, **values) -> Results:
    """The results of cells, each a list of (right, steps) by seed."""
    machine = {"processor": "a processor", "cores": 2, "memory_gib": 23.4}
    about = {"revision": "0123456789abcdef", "versions": {"python": "3.11", "jax": "1", "jaxlib": "2"}, "machine": machine}
    lines = [
        {"cell": cell, "seed": seed, "config": "x", "metrics": {"right": right, "steps": steps}, **about}
        | {"cpu_seconds": 10.0 + seed, "flops": 2e9, "tokens": 64}
        for cell, by_seed in values.items()
        for seed, (right, steps) in enumerate(by_seed)
    ]
    return Results(study, lines)


def test_means_have_the_interval_of_student_and_none_without_a_spread():
    mean = mean_of([1.0, 2.0, 4.0])
    half = 4.302652729911275 * math.sqrt(7 / 3) / math.sqrt(3)  # t of two degrees of freedom; the variance is 7/3
    assert mean.mean == pytest.approx(7 / 3) and mean.high - mean.mean == pytest.approx(half) == mean.mean - mean.low
    assert mean_of([0.9, 1.0, 1.0], SHARE).high == 1
    for values in ([0.7], [0.7, 0.7, 0.7]):
        alike = mean_of(values)
        assert alike.mean == pytest.approx(0.7) and math.isnan(alike.low) and alike.show("{:.2f}") == "0.70"
    assert mean_of([]).show("{}") == "—"


def test_a_paired_test_is_that_of_the_differences():
    test = paired([0.9, 0.8, 1.0], [0.5, 0.5, 0.4])  # differences 0.4, 0.3, 0.6: t = 0.4333 / (0.15275 / sqrt(3)) = 4.9135
    assert test.difference.mean == pytest.approx(13 / 30)
    assert test.p == pytest.approx(1 - 4.913538 / math.sqrt(4.913538**2 + 2), rel=1e-5)  # of two degrees of freedom
    assert math.isnan(paired([0.9, 0.8], [0.5, 0.4]).p)


def test_the_interval_of_a_difference_of_shares_ends_at_1():
    one, two = [1.0, 1.0, 0.5], [0.0, 0.1, 0.0]
    assert paired(one, two, SHARE).difference.high == 1 and paired(two, one, SHARE).difference.low == -1
    assert paired(one, two, POSITIVE).difference.high > 1


CLAIM = Claim("One is better.", "one", "two", "right")
CLOSE = {"one": [(0.90, 9), (0.91, 9), (0.92, 9)], "two": [(0.10, 9), (0.12, 9), (0.11, 9)]}


@pytest.mark.parametrize(
    ("values", "claim", "starts"),
    [
        (CLOSE, CLAIM, "shown (p = 5.2e-05, n = 3 seeds): One is better."),
        (CLOSE, dataclasses.replace(CLAIM, better="two", worse="one"), "the opposite is shown (p = 5.2e-05, n = 3 seeds)"),
        ({"one": [(1, 5), (1, 3)], "two": [(1, 7), (1, 4)]}, dataclasses.replace(CLAIM, metric="steps"), "not shown (p = 0.2,"),
        ({"one": [(0.9, 1)] * 3, "two": [(0.8, 1)] * 3}, CLAIM, "not tested (n = 3 seeds, all with the same difference)"),
        ({"one": [(0.9, 1)] * 3, "two": [(0.8, 1)]}, CLAIM, "not tested (n = 1 seed): One is better."),
        (CLOSE, dataclasses.replace(CLAIM, of_learned=True), "not tested (n = 0 seeds in which both learned)"),
        (CLOSE, Reach("One keeps it.", "one", "right", 0.905),
         "holds in 2 of 3 seeds that learned the task (a count, no test; right: 0.900, 0.910, 0.920): One keeps it."),
        (CLOSE, Reach("Two keeps it.", "two", "right", 0.9),
         "not counted (3 seeds, of which none learned the task; right: 0.100, 0.120, 0.110): Two keeps it."),
        ({"one": [(1, 3), (0.1, 9)]}, Reach("In time.", "one", "steps", 4),
         "holds in 1 of 1 seed that learned the task (a count, no test; steps: 3; 9 in 1 seed that did not learn it): In"),
        ({"one": [(1, None), (1, 3)]}, Reach("In time.", "one", "steps", 4),
         "holds in 1 of 2 seeds that learned the task (a count, no test; steps: none, 3): In time."),
    ],
)  # fmt: skip
def test_a_verdict_says_p_and_n(values, claim, starts):
    assert verdict(results(**values), claim).startswith(starts)


def test_the_table_counts_what_learned_and_what_is_missing():
    rows = page.table(results(one=[(0.9, 100), (0.4, None), (0.8, 300)])).splitlines()
    assert [x.strip() for x in rows[2].split("|")[1:-1]] == [
        "one",
        "0.700 (0.043 to 1.000)",
        "200 (0 to 1,471), 2 of 3",
        "2 of 3",
        "11",
        "2e+09",
    ]
    assert set(rows[3].split("|")[2].strip()) == {"—"}


def test_the_table_shows_the_metrics_that_the_study_names():
    of_steps = dataclasses.replace(STUDY, table=("steps",))
    header, _, row, _ = page.table(results(of_steps, **CLOSE)).splitlines()
    assert "steps" in header and "right" not in header and row.split("|")[2].strip() == "9"
    with pytest.raises(ValueError, match="names the metric 'share', which"):
        dataclasses.replace(STUDY, table=("share",))


def test_the_best_of_those_that_learned_comes_first():
    best_first = dataclasses.replace(STUDY, sorted_by="steps")
    learned, quick = [(0.9, 300), (0.8, 310)], [(0.9, 10), (0.4, 10)]
    for values, order in (
        ({"one": learned, "two": [(0.7, 200), (0.7, 210)]}, ["two", "one"]),
        ({"one": quick, "two": learned}, ["two", "one"]),
        ({"one": [(0.9, None)], "two": quick}, ["two", "one"]),
    ):
        assert ordered(results(best_first, **values)) == order
        assert page.table(results(best_first, **values)).splitlines()[2].startswith(f"| {order[0]}")


def test_a_page_says_of_how_many_seeds_it_is_and_whose_cost_is_not_known():
    one = results(one=[(0.9, 100)])
    assert page.made_with(one).startswith("One seed. CPU seconds are those of one run, its start and its evaluation included.")
    two = results(one=[(0.9, 100)] * 2, two=[(0.9, 100)] * 3)
    assert page.made_with(two).startswith("Means of 2 to 3 seeds, with intervals")
    one.lines[0]["cpu_seconds"] = None
    assert [x.strip() for x in page.table(one).splitlines()[2].split("|")[-3:-1]] == ["—", "2e+09"]


def test_a_page_keeps_its_prose_and_gets_new_results(tmp_path):
    path, new = tmp_path / "README.md", results(**CLOSE)
    bare = page.page(path, new, "plot.svg", "python tools/study.py x", False)
    assert bare.startswith(f"# Two cells\n\nWhich is better?\n\n{page.BEGIN}\n") and bare.endswith(f"{page.END}\n")
    path.write_text(page.page(path, new, "plot.svg", "python tools/study.py x", True))
    assert path.read_text().startswith("# Two cells\n\nWhich is better?\n\n## Design\n")
    path.write_text(path.read_text().replace("## Design\n", "## Design\n\nBy hand.\n"))
    again = page.page(path, results(one=[(0.25, 1)]), "plot.svg", "python tools/study.py x", True)
    assert "By hand." in again and "0.250" in again and "0.910" not in again and again.count(page.END) == 1
    path.write_text("no marker")
    with pytest.raises(ValueError, match=r"needs the lines .* once each"):
        page.page(path, new, "plot.svg", "x", True)


def test_equal_results_draw_the_same_picture(tmp_path):
    drawn = plot.svg(results(**CLOSE), "two")
    assert drawn == plot.svg(results(**CLOSE), "two") != plot.svg(results(**(CLOSE | {"one": CLOSE["two"]})), "two")
    assert drawn.startswith("<svg") and 'xmlns="http://www.w3.org/2000/svg"' in drawn
    assert over_cells({"NoPE": {16: "one", 32: "two"}}, "right") == {"NoPE": {16: ("one", "right"), 32: ("two", "right")}}


@pytest.mark.parametrize(
    ("here", "recorded", "right", "steps"),
    [
        ([(0.90, 3), (0.92, 4)], [(0.90, 3), (0.92, 4)], "yes", "yes"),
        ([(0.93, 3)] * 3, [(0.90, 3), (0.91, 3), (0.92, 3)], "yes", "yes"),  # recorded: 0.885 to 0.935
        ([(0.80, 4), (0.94, 4), (1.0, 4)], [(0.90, 3), (0.91, 3), (0.92, 3)], "yes", "no"),
        ([(0.94, 3), (0.95, 3), (0.93, 3)], [(0.90, 3), (0.91, 3), (0.92, 3)], "no", "yes"),
        ([(0.99996, 3)] * 2, [(1.0, 3), (1.0, None)], "yes", "no"),
        ([(0.5, 3)], [(0.5, 3), (0.9, 9)], "yes", "yes"),
    ],
)  # fmt: skip
def test_a_comparison_says_which_means_lie_in_the_recorded_interval(here, recorded, right, steps):
    said = compared(results(one=here), results(one=recorded))
    assert re.search(rf"right .*{right} *\|\n.*steps .*{steps} *\|\n", said)
    assert said.endswith(f"{[right, steps].count('yes')} of 2 numbers agree")


def test_metrics_are_read_from_the_files_of_a_run(tmp_path):
    run = read_by.Trained(tmp_path, 8, 1.0, 1.0, 1)
    logs = [{"step": 2, "loss": 0.01}, {"step": 4, "loss": 0.2}, {"step": 6, "loss": 0.04}, {"step": 8, "loss": 0.03}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in logs))
    assert read_by.stays_below("loss", 0.05).read(run) == 6 and read_by.stays_below("loss", 0.02).read(run) is None
    assert read_by.logged("loss").read(run) == 0.03
    lines = [{"eval": "recall", "step": step, "length": n, "accuracy": n / 1000} for step in (4, 8) for n in (64, 128)]
    (tmp_path / "evals.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_by.evaluated("recall", "accuracy", {"length": 128}).read(run) == 0.128
    for where, field, said in (
        ({}, "accuracy", "has 2 lines"),
        ({"length": 9}, "accuracy", "has 0 lines"),
        ({"length": 64}, "share", "no 'share'"),
    ):
        with pytest.raises(ValueError, match=said):
            read_by.evaluated("recall", field, where).read(run)


@pytest.mark.parametrize(("value", "said"), [(math.nan, "it is nan"), ("much", "TypeError: ")])
def test_a_metric_is_a_finite_number(value, said, tmp_path):
    run = read_by.Trained(tmp_path, 8, 1.0, 1.0, 1)
    with pytest.raises(ValueError, match=f"the metric 'x': {said}"):
        runs.read_metric("x", Metric(lambda _: value), run)
