"""Studies: statistics by hand, results that go on, pages, refusals, and the program with a trainer of a few lines."""

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import tool

from hybrid_attn.programs import parse
from hybrid_attn.studies import (
    POSITIVE,
    SHARE,
    Cell,
    Claim,
    Curves,
    Metric,
    Reach,
    Study,
    children,
    over_cells,
    over_metrics,
    page,
    plot,
    runs,
    study,
)
from hybrid_attn.studies import metrics as read_by
from hybrid_attn.studies.compare import compared
from hybrid_attn.studies.results import Results, current, read
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


TRAINER = """
import json, os, pathlib, signal, sys, time
flags = dict(x[2:].split("=", 1) for x in sys.argv[1:])
workdir, seed, steps = pathlib.Path(flags["workdir"]), int(flags["config.seed"]), int(flags["config.stages[0].steps"])
about = {"versions": {"python": "3", "jax": "1", "jaxlib": "1"}, "revision": "0123"}
(workdir / "about.json").write_text(json.dumps(about))
with (workdir / "starts").open("a") as file:
    cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
    file.write(cores + " " + os.environ.get("JAX_ENABLE_COMPILATION_CACHE", "") + "\\n")
if os.environ.get("FAIL") == flags["config.data.seed"]:
    sys.exit("no such token")
ends = []
signal.signal(signal.SIGTERM, lambda *_: ends.append(1))
while "WAIT" in os.environ and not ends:
    if not (workdir / "metrics.jsonl").exists():
        (workdir / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 1.0}) + "\\n")
    time.sleep(0.01)
if not ends:
    (workdir / "metrics.jsonl").write_text(json.dumps({"step": steps, "loss": 1.0 + seed}) + "\\n")
"""
WRITTEN = """
from hybrid_attn.studies import Cell, Claim, Curves, Study, logged, over_metrics
STUDY = Study("Title", "Question?", {"a": Cell("c.py"), "b": Cell("c.py", {"optim.lr": 0.5})}, {"loss": logged("loss")},
              Curves({"": over_metrics(("a", "b"), {"loss": "loss"})}, "", "loss", "linear"),
              changes={"stages[0].steps": 3}, seeds=2)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder of a study of two cells and two seeds, in an empty working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "c.py").write_text("from hybrid_attn.configs.base import get_config\n")
    (tmp_path / "s" / "study.py").write_text(WRITTEN)
    (tmp_path / "trainer.py").write_text(TRAINER)
    return Path("s")


def study_of(capsys, *words: str) -> tuple[int, str, str]:
    """The exit code of the program with the short trainer, and what it printed."""
    with tool("study") as module:
        module.TRAIN = Path("trainer.py").absolute()
        with pytest.raises(SystemExit) as caught:
            module.main(parse(["study.py", *words]))
            raise SystemExit(0)
    return (caught.value.code, *capsys.readouterr())


def lines_of(folder: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return [(line["cell"], line["seed"], line["metrics"]["loss"]) for line in lines]


def starts() -> list[str]:
    return sorted(str(path.parent.relative_to("runs/studies/s")).partition("-")[0] for path in Path().rglob("runs/**/starts"))


def test_a_study_trains_every_cell_and_seed_once(folder, capsys):
    code, out, _ = study_of(capsys, "s", "--only=b", "--seeds=1")
    assert code == 0 and starts() == ["b/0"] and lines_of(folder) == [("b", 0, 1.0)]
    code, out, _ = study_of(capsys, "s", "--processes=2")
    assert code == 0 and "runs: 4, not recorded yet: 3;" in out and "2.000" in out
    assert lines_of(folder) == [("a", 0, 1.0), ("a", 1, 2.0), ("b", 0, 1.0), ("b", 1, 2.0)]
    assert {path.read_text().count("\n") for path in Path().rglob("starts")} == {1}
    assert page.BEGIN in (folder / "README.md").read_text() and (folder / "plot.svg").read_text().startswith("<svg")


def test_studies_side_by_side_share_their_runs(folder, capsys):
    study_of(capsys, "s", "--seeds=1")
    shutil.copytree(folder, "t", ignore=shutil.ignore_patterns("results.jsonl"))
    (Path("t") / "study.py").write_text(WRITTEN.replace('"b"', '"c"').replace("0.5", "0.25"))
    code, out, _ = study_of(capsys, "t", "--seeds=1")
    assert code == 0 and lines_of(Path("t")) == [("a", 0, 1.0), ("c", 0, 1.0)]
    assert [path.name for path in Path("runs/studies/t").iterdir() if path.is_dir()] == ["c"]


def test_a_failed_run_loses_no_other_and_is_tried_again(folder, capsys, monkeypatch):
    monkeypatch.setenv("FAIL", "1")
    code, _, err = study_of(capsys, "s", "--processes=1")
    assert code == 1 and lines_of(folder) == [("a", 0, 1.0), ("b", 0, 1.0)]
    assert re.fullmatch(r"error: 2 runs failed: a seed 1: exit code 1; its output is in (\S+); b seed 1: .*\n", err)
    assert "no such token" in Path(re.search(r"is in (\S+);", err)[1]).read_text()
    monkeypatch.delenv("FAIL")
    assert study_of(capsys, "s")[0] == 0 and len(lines_of(folder)) == 4


def test_lines_of_another_config_are_reported_and_not_mixed_in(folder, capsys):
    study_of(capsys, "s")
    (folder / "study.py").write_text(WRITTEN.replace("0.5", "0.25"))
    code, out, _ = study_of(capsys, "s", "--only=a")
    assert code == 0 and "left out, because their config or metrics have changed: b seed 0, b seed 1\n" in out
    assert re.search(r"\| b +\| — ", out) and len(lines_of(folder)) == 4
    study_of(capsys, "s")
    assert len([path for path in Path("runs/studies/s/b").iterdir()]) == 4 and len(lines_of(folder)) == 4


def test_results_in_another_folder_are_compared_with_those_of_the_study(folder, capsys):
    study_of(capsys, "s")
    code, out, _ = study_of(capsys, "s", "--out=again")
    assert code == 0 and "runs: 4, not recorded yet: 4;" in out and out.endswith("2 of 2 numbers agree\n")
    assert len(lines_of(Path("again"))) == 4
    text = (Path("again") / "README.md").read_text()
    assert text.startswith(f"# Title\n\nQuestion?\n\n{page.BEGIN}\n") and "`python tools/study.py s --out=again`:" in text


def test_stopped_runs_get_one_signal_and_go_on_later(folder, capsys, monkeypatch):
    monkeypatch.setenv("WAIT", "1")
    chosen = study.load(folder)
    to_train, ended = runs.runs_of(chosen, folder, Path("runs/studies/s"), ["a", "b"], 1), []
    begun = [run.workdir / "metrics.jsonl" for run in to_train]
    children.train(to_train, Path("trainer.py"), 2, lambda: all(path.exists() for path in begun), ended.append)
    assert [x.exit_code for x in ended] == [0, 0] and not any(runs.is_complete(run) for run in to_train)
    monkeypatch.delenv("WAIT")
    assert study_of(capsys, "s", "--seeds=1")[0] == 0
    assert {path.read_text().count("\n") for path in Path().rglob("starts")} == {2}
    costs = [len((run.workdir / runs.COST).read_text().splitlines()) for run in to_train]
    assert costs == [4, 4] and len(lines_of(folder)) == 2 and all(runs.costs(run.workdir)[0] for run in to_train)


WAITS = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
"""
STUDY_TO_KILL = "import os, subprocess, sys; subprocess.Popen([*sys.argv[1:4], str(os.getpid()), *sys.argv[4:]]).wait()"


def child(cost: Path, *command: str) -> list[str]:
    """The command of a child process without the number of the study."""
    return [sys.executable, "-P", str(children.CHILD), str(cost), '{"started": 1.5, "machine": {"processor": "x"}}', *command]


def wait_for(condition) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_run_of_a_killed_study_is_stopped_and_its_cost_is_written(tmp_path):
    cost, begun = tmp_path / "cost.jsonl", tmp_path / "begun"
    command = child(cost, sys.executable, "-c", WAITS, str(begun))
    program = subprocess.Popen([sys.executable, "-c", STUDY_TO_KILL, *command])
    wait_for(begun.exists)
    assert runs.costs(tmp_path)[0] is None
    program.kill()
    program.wait()
    wait_for(lambda: cost.read_text().count("\n") == 2)
    start, end = (json.loads(line) for line in cost.read_text().splitlines())
    assert start["started"] == end["started"] == 1.5 and end["exit_code"] == 3 and 0 < end["cpu_seconds"] < 20


def test_a_command_that_a_signal_ends_has_the_exit_code_of_a_shell(tmp_path):
    command = child(tmp_path / "cost.jsonl", "sh", "-c", "kill -9 $$")
    command.insert(3, str(os.getpid()))
    assert subprocess.run(command).returncode == 128 + signal.SIGKILL
    assert json.loads((tmp_path / "cost.jsonl").read_text().splitlines()[1])["exit_code"] == -signal.SIGKILL


ENDED = {"cpu_seconds": 2.5, "seconds": 3.0, "exit_code": 0}


@pytest.mark.parametrize(
    ("lines", "seconds"),
    [
        ([ENDED, ENDED], 5.0),  # as older versions wrote them
        ([{"started": 1}, ENDED | {"started": 1, "exit_code": 1}, {"started": 2}, ENDED | {"started": 2}], 5.0),
        ([{"started": 1}, {"started": 2}, ENDED | {"started": 2}], None),
        ([ENDED | {"exit_code": 2}], None),  # the process that completed the run has written nothing
        ([], None),
    ],
)  # fmt: skip
def test_the_cost_of_a_run_is_known_if_all_of_its_processes_wrote_it(lines, seconds, tmp_path):
    (tmp_path / "cost.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert runs.costs(tmp_path)[0] == seconds


def test_a_metric_that_raises_fails_its_run_alone(folder, capsys):
    bad = '"bad": Metric(lambda run: 1 / (2 - logged("loss").read(run)))'
    text = WRITTEN.replace('logged("loss")}', f'logged("loss"), {bad}}}').replace("Study,", "Metric, Study,")
    (folder / "study.py").write_text(text)
    code, _, err = study_of(capsys, "s", "--only=a")
    assert code == 1 and lines_of(folder) == [("a", 0, 1.0)]
    assert err.startswith("error: 1 run failed: a seed 1: the metric 'bad': ZeroDivisionError: ") and err.count("\n") == 1


@pytest.mark.parametrize(("value", "said"), [(math.nan, "it is nan"), ("much", "TypeError: ")])
def test_a_metric_is_a_finite_number(value, said, tmp_path):
    run = read_by.Trained(tmp_path, 8, 1.0, 1.0, 1)
    with pytest.raises(ValueError, match=f"the metric 'x': {said}"):
        runs.read_metric("x", Metric(lambda _: value), run)


def test_runs_whose_cost_is_compared_have_one_core_and_no_compile_cache(folder, capsys):
    (folder / "study.py").write_text(WRITTEN.replace("seeds=2", "seeds=2, one_core=True"))
    code, _, _ = study_of(capsys, "s", "--only=a", "--seeds=1")
    (written,) = (path.read_text() for path in Path().rglob("runs/**/*-one-core/starts"))
    assert code == 0 and re.fullmatch(r"\d+ false\n", written)
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["machine"]["cores"] for line in lines] == [1]
    assert "on one core and without a compile cache" in (folder / "README.md").read_text()
    lines[0]["machine"]["processor"] = "another one"
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, _, err = study_of(capsys, "s")
    assert code == 2 and "has CPU seconds of another one, python 3, jax 1, jaxlib 1, and this is " in err


@pytest.mark.parametrize(("backend", "number"), [("gpu", 1), ("cpu", 3)])
def test_an_accelerator_has_one_run_at_a_time(backend, number, tmp_path, monkeypatch):
    (tmp_path / "jax.py").write_text(f"def default_backend():\n    return {backend!r}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(children.machine, "threads", lambda: 3)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    assert children.side_by_side(one_core=False) == number and children.side_by_side(one_core=True) == 3
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert children.side_by_side(one_core=False) == 3


def test_a_new_metric_is_read_from_the_workdirs_without_training(folder, capsys):
    study_of(capsys, "s")
    twice = '"twice": Metric(lambda run: 2 * logged("loss").read(run))'
    (folder / "study.py").write_text(
        WRITTEN.replace('logged("loss")}', f'logged("loss"), {twice}}}').replace("Study,", "Metric, Study,")
    )
    next(Path("runs").rglob(runs.COST)).unlink()
    code, out, _ = study_of(capsys, "s")
    assert code == 0 and "runs: 4, not recorded yet: 4;" in out and "twice 4.000" in out
    assert out.count("CPU s unknown (a process was killed before it wrote them)") == 1
    assert {path.read_text().count("\n") for path in Path().rglob("starts")} == {1}


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 8})
    assert children.shares(2) == [{2, 5, 8}, {3, 7}]
    assert children.shares(6) == [{2}, {3}, {5}, {7}, {8}, {2}]
    assert children.shares(2, one_core=True) == [{2}, {3}]


WRONG = {
    "no study": (["nothing"], None, "nothing has no study.py; name a folder of studies/"),
    "no folder": ([], None, "name the folder of a study"),
    "a cell": (["s", "--only=c"], None, "names the cell 'c', which is not one of 'a', 'b'"),
    "an error": (["s"], ("Study(", "Studi("), "s/study.py, line 3: NameError"),
    "no Study": (["s"], ("STUDY", "OTHER"), "has neither STUDY nor get_study()"),
    "a config": (["s"], ('Cell("c.py")', 'Cell("d.py")'), "the cell 'a' names d.py: no such file in s or"),
    "a key": (["s"], ("optim.lr", "optim.rate"), "unknown key config.optim.rate"),
    "a metric": (["s"], ("seeds=2", 'sorted_by="los"'), "names the metric 'los', which is not one of 'loss'; did you"),
    "a claim": (["s"], ("seeds=2", 'claims=[Claim("x", "a", "b", "loss", True)]'), "does not say what `learned` is"),
    "a cell of the plot": (["s"], ('over_metrics(("a", "b")', 'over_metrics(("a", "c")'), "the cell 'c', which is not one of"),
    "a metric of the plot": (["s"], ('{"loss": "loss"}', '{"loss": "los"}'), "names the metric 'los', which is not one of"),
    "a scale": (["s"], ('"linear"', '"linea"'), "has the scale 'linea', which is not one of 'share', 'linear', 'log'; did you"),
    "no line": (["s"], ('over_metrics(("a", "b"), {"loss": "loss"})', "{}"), "the plot of 'Title' needs a line in every panel"),
    "a name": (["s"], ('"a": ', '"a b": '), "the cell 'a b' becomes a folder"),
}  # fmt: skip


@pytest.mark.parametrize(("words", "change", "said"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_one_line(words, change, said, folder, capsys):
    if change:
        (folder / "study.py").write_text(WRITTEN.replace(*change))
    code, _, err = study_of(capsys, *words)
    assert code == 2 and said in err and err.count("\n") == 1


def test_a_line_that_is_no_result_is_refused(folder, capsys):
    (folder / "results.jsonl").write_text('{"cell": "a"}\n')
    code, _, err = study_of(capsys, "s")
    assert code == 2 and "s/results.jsonl, line 1 is no result of a study: it lacks seed, config" in err


REAL = """
from hybrid_attn.studies import SHARE, Cell, Curves, Study, evaluated, logged, over_metrics
SMALL = {"model.pattern": "LG", "model.num_layers": 2, "model.d_model": 16, "model.head_dim": 8, "model.d_ff": 16}
SMALL |= {"data.sources.text.task": "recall", "stages[0].seq_len": 64, "stages[0].steps": 2, "train.checkpoint_every": 1}
SMALL |= {"train.sinks": (), "evals.names": ("recall",), "evals.lengths": (1.0,), "evals.tokens": 256}
METRICS = {"recall": evaluated("recall", "accuracy", {"length": 64}, bounds=SHARE), "loss": logged("loss")}
STUDY = Study("Tiny", "Does it run?", {"tiny": Cell("c.py")}, METRICS,
              Curves({"": over_metrics(["tiny"], {64: "recall"})}, "tokens", "right"), changes=SMALL, seeds=2)
"""


def test_two_seeds_of_a_tiny_model_are_trained_evaluated_and_shown(folder, monkeypatch):
    root = Path(__file__).parents[1]
    (folder / "study.py").write_text(REAL)
    env = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, root / "tools/study.py", "s"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [line["seed"] for line in lines] == [0, 1] and lines[0]["config"] != lines[1]["config"]
    losses, shares = ([line["metrics"][name] for line in lines] for name in ("loss", "recall"))
    assert losses[0] != losses[1] and 0 < losses[0] < 10 and all(0 <= x <= 1 for x in shares)
    for line in lines:
        assert line["tokens"] == 2 * 64 and line["flops"] > 0 and 0 < line["cpu_seconds"] < 1000
    assert "| tiny" in (folder / "README.md").read_text() and "| tiny" in done.stdout


STUDIES = sorted((Path(__file__).parents[1] / "studies").glob("*/study.py"))


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.parent.name)
def test_a_study_of_the_repository_builds_and_its_recorded_lines_are_of_its_configs(path, monkeypatch):
    monkeypatch.chdir(path.parents[2])
    folder = path.parent.relative_to(Path.cwd())
    chosen, lines = study.load(folder), read(folder)
    seeds = max([chosen.seeds, *(line["seed"] + 1 for line in lines)])
    hashes = {(x.cell, x.seed): x.hash for x in runs.runs_of(chosen, folder, Path("runs"), list(chosen.cells), seeds)}
    counted, others = current(chosen, lines, hashes)
    assert not others and len(set(hashes.values())) == len(hashes)
    if lines:
        assert (folder / page.PLOT).exists()
        assert page.table(counted) in (folder / chosen.page).read_text()


ROW = """
from studies.layouts import config
from hybrid_attn.configs import base
def get_config():
    c = config.get_config()
    {}
    return c
"""
BROKEN = {
    "c.stages[0].seq_len = 128": "mine.py trains on sequences of 128 tokens, and at most 64 are allowed",
    "c.stages[0].seq_len = 60": "mine.py changes what all rows share (the baseline's -> its own): stages[-1].seq_len: 64 -> 60",
    "c.evals.tokens = 1024": "evals.tokens: 65536 -> 1024",
    "c.init_from.path = 'runs/other'": "init_from.path: None -> runs/other",
    "c.data.sources.probe.pairs = 2": "data.sources.probe.pairs: 4 -> 2",
    "c.data.sources['text'] = base.source()": "mine.py reads documents in data.sources.text; give each source a task",
    "c.stages[0].mixture.probe = 0.0": "mine.py has no source probe in its last stage, whose sources are evaluated",
}


@pytest.fixture
def records(tmp_path, monkeypatch):
    """A copy of the folder of records."""
    monkeypatch.chdir(Path(__file__).parents[1])
    shutil.copytree("studies/records", tmp_path / "records", ignore=shutil.ignore_patterns("results.jsonl"))
    return tmp_path / "records"


def test_a_record_may_not_have_longer_sequences_or_more_information(records):
    (records / "mine.py").write_text(ROW.format("c.optim.lr = 0.01"))
    assert "mine" in study.load(records).cells
    for line, said in BROKEN.items():
        (records / "mine.py").write_text(ROW.format(line))
        with pytest.raises(ValueError, match=re.escape(said)) as caught:
            study.load(records)
        assert "\n" not in str(caught.value)
    (records / "mine.py").rename(records / "rnope_swa.py")
    with pytest.raises(ValueError, match=r"rnope_swa\.py has the name of the baseline"):
        study.load(records)


def test_a_record_is_compared_with_the_best_row_that_learned_in_all_seeds(records):
    for name in ("guess", "half", "short", "mine"):
        (records / f"{name}.py").write_text(ROW.format("c.optim.lr = 0.01"))
    chosen, merit = study.load(records), "recall per CPU-minute"
    values = {
        "rnope_swa": [0.4, 0.41, 0.42],
        "guess": [9, 9, 9],
        "half": [2, 2.1, 2.2],
        "short": [3, 3],
        "mine": [0.8, 0.83, 0.86],
    }
    right = {"guess": [0.1] * 3, "half": [1, 1, 0.5]}
    lines = [
        {"cell": cell, "seed": seed, "metrics": {"recall at 1,024": right.get(cell, [1] * 3)[seed], merit: x}}
        for cell, by_seed in values.items()
        for seed, x in enumerate(by_seed)
    ]
    said = page.verdicts(Results(chosen, lines))
    assert len(said) == 1 and re.match(r"shown \(p = 0\.00\d+, n = 3 seeds\): mine beats rnope_swa\. recall per CPU", said[0])
