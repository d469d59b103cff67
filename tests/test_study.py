"""Studies: statistics by hand, results that go on, pages, refusals, and the program with a trainer of a few lines."""

import dataclasses
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tool

from hybrid_attn.programs import parse
from hybrid_attn.studies import (
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
from hybrid_attn.studies.statistics import mean_of, paired, verdict

STUDY = Study(
    title="Two cells",
    question="Which is better?",
    cells={"one": Cell("one.py"), "two": Cell("one.py", {"optim.lr": 1e-3})},
    metrics={
        "right": Metric(lambda run: None, bounds=SHARE),
        "steps": Metric(lambda run: None, "{:,.0f}", higher_is_better=False),
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


CLAIM = Claim("One is better.", "one", "two", "right")
CLOSE = {"one": [(0.90, 9), (0.91, 9), (0.92, 9)], "two": [(0.10, 9), (0.12, 9), (0.11, 9)]}


@pytest.mark.parametrize(
    ("values", "claim", "starts"),
    [
        (CLOSE, CLAIM, "shown (p = 5.2e-05, n = 3 seeds): One is better."),
        (CLOSE, dataclasses.replace(CLAIM, better="two", worse="one"), "the opposite is shown (p = 5.2e-05, n = 3 seeds)"),
        ({"one": [(1, 5), (1, 3)], "two": [(1, 7), (1, 4)]}, dataclasses.replace(CLAIM, metric="steps"), "not shown (p = 0.2,"),
        ({"one": [(0.9, 1)] * 3, "two": [(0.8, 1)] * 3}, CLAIM, "not tested (n = 3 seeds, all with the same difference)"),
        ({"one": [(0.9, 1)] * 3, "two": [(0.8, 1)]}, CLAIM, "not tested (n = 1 seeds)"),
        (CLOSE, dataclasses.replace(CLAIM, of_learned=True), "not tested (n = 0 seeds in which both learned)"),
        (CLOSE, Reach("One keeps it.", "one", "right", 0.9), "holds (n = 3 of 3 seeds, those that learned; right: 0.900, 0.91"),
        (CLOSE, Reach("One keeps it.", "one", "right", 0.905), "holds in 2 of 3 seeds"),
        (CLOSE, Reach("Two keeps it.", "two", "right", 0.9), "not tested (n = 0 of 3 seeds"),
        ({"one": [(1, None), (1, 3)]}, Reach("In time.", "one", "steps", 4), "holds in 1 of 2 seeds (n = 2 of 2"),
    ],
)  # fmt: skip
def test_a_verdict_says_p_and_n(values, claim, starts):
    assert verdict(results(**values), claim).startswith(starts)


def test_the_table_counts_what_learned_and_what_is_missing():
    rows = page.table(results(one=[(0.9, 100), (0.4, None), (0.8, 300)])).splitlines()
    assert [x.strip() for x in rows[2].split("|")[1:-1]] == [
        "one",
        "0.700 (0.043 to 1.000)",
        "200 (-1,071 to 1,471), 2 of 3",
        "2 of 3",
        "11",
        "2e+09",
    ]
    assert set(rows[3].split("|")[2].strip()) == {"—"}
    best_first = dataclasses.replace(STUDY, sorted_by="right")
    assert page.table(results(best_first, **CLOSE)).splitlines()[2].startswith("| one")
    assert page.table(results(best_first, one=CLOSE["two"], two=CLOSE["one"])).splitlines()[2].startswith("| two")


def test_a_page_keeps_its_prose_and_gets_new_results(tmp_path):
    path, new = tmp_path / "README.md", results(**CLOSE)
    path.write_text(page.page(path, new, "plot.svg", "python tools/study.py x"))
    assert path.read_text().startswith("# Two cells\n\nWhich is better?\n\n## Design\n")
    path.write_text(path.read_text().replace("## Design\n", "## Design\n\nBy hand.\n"))
    again = page.page(path, results(one=[(0.25, 1)]), "plot.svg", "python tools/study.py x")
    assert "By hand." in again and "0.250" in again and "0.910" not in again and again.count(page.END) == 1
    path.write_text("no marker")
    with pytest.raises(ValueError, match=r"needs the lines .* once each"):
        page.page(path, new, "plot.svg", "x")


def test_equal_results_draw_the_same_picture(tmp_path):
    drawn = plot.svg(results(**CLOSE), "two")
    assert drawn == plot.svg(results(**CLOSE), "two") != plot.svg(results(**(CLOSE | {"one": CLOSE["two"]})), "two")
    assert drawn.startswith("<svg") and 'xmlns="http://www.w3.org/2000/svg"' in drawn
    assert over_cells({"NoPE": {16: "one", 32: "two"}}, "right") == {"NoPE": {16: ("one", "right"), 32: ("two", "right")}}


def test_a_comparison_says_which_numbers_agree():
    said = compared(results(one=[(0.9, 3), (0.92, 3)]), results(one=[(0.91, 9), (0.93, 9)]))
    assert re.search(r"right.*yes", said) and re.search(r"steps.*no", said) and said.endswith("1 of 2 numbers agree")


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
    file.write(",".join(map(str, sorted(os.sched_getaffinity(0)))) + "\\n")
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
    assert code == 0 and "4 runs; 3 are not recorded yet" in out and "2.000" in out
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
    assert code == 0 and "4 are not recorded yet" in out and out.endswith("2 of 2 numbers agree\n")
    assert len(lines_of(Path("again"))) == 4 and (Path("again") / "README.md").exists()


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
    assert costs == [2, 2] and len(lines_of(folder)) == 2


def test_a_new_metric_is_read_from_the_workdirs_without_training(folder, capsys):
    study_of(capsys, "s")
    twice = '"twice": Metric(lambda run: 2 * logged("loss").read(run))'
    (folder / "study.py").write_text(
        WRITTEN.replace('logged("loss")}', f'logged("loss"), {twice}}}').replace("Study,", "Metric, Study,")
    )
    code, out, _ = study_of(capsys, "s")
    assert code == 0 and "4 runs; 4 are not recorded yet" in out and "twice 4.000" in out
    assert {path.read_text().count("\n") for path in Path().rglob("starts")} == {1}


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 8})
    assert children.shares(2) == [{2, 5, 8}, {3, 7}]
    assert children.shares(6) == [{2}, {3}, {5}, {7}, {8}, {2}]


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


def test_a_record_may_not_train_on_longer_sequences(tmp_path, monkeypatch):
    monkeypatch.chdir(Path(__file__).parents[1])
    shutil.copytree("studies/records", tmp_path / "records")
    lines = ["from configs import recall", "def get_config():", "    c = recall.get_config()", "    c.stages[0].seq_len = {}"]
    text = "\n".join([*lines, "    return c", ""])
    (tmp_path / "records" / "mine.py").write_text(text.format(64))
    assert "mine" in study.load(tmp_path / "records").cells
    (tmp_path / "records" / "mine.py").write_text(text.format(128))
    with pytest.raises(ValueError, match="mine.py trains on sequences of 128 tokens, and at most 64 are allowed"):
        study.load(tmp_path / "records")
