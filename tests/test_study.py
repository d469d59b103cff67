"""Studies: results that go on, refusals, and the program with a trainer of a few lines."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import tool

from hybrid_attn.programs import parse
from hybrid_attn.studies import children, page, runs, study

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
    if "STOP_EVALUATION" not in os.environ:
        evaluated = workdir / "evals" / str(steps)
        evaluated.mkdir(parents=True, exist_ok=True)
        (evaluated / "report.html").touch()
"""
WRITTEN = """
from hybrid_attn.studies import Cell, Claim, Curves, Study, logged, over_cells, over_metrics
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


def test_a_run_that_is_stopped_in_its_evaluation_is_not_recorded_before_it_has_gone_on(folder, capsys, monkeypatch):
    monkeypatch.setenv("STOP_EVALUATION", "1")
    code, out, _ = study_of(capsys, "s", "--seeds=1")
    assert code == 1 and "a seed 0: ended before step 3 was evaluated" in out and not (folder / "results.jsonl").exists()
    monkeypatch.delenv("STOP_EVALUATION")
    assert study_of(capsys, "s", "--seeds=1")[0] == 0 and len(lines_of(folder)) == 2


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


def test_a_metric_that_raises_fails_its_run_alone(folder, capsys):
    bad = '"bad": Metric(lambda run: 1 / (2 - logged("loss").read(run)))'
    text = WRITTEN.replace('logged("loss")}', f'logged("loss"), {bad}}}').replace("Study,", "Metric, Study,")
    (folder / "study.py").write_text(text)
    code, _, err = study_of(capsys, "s", "--only=a")
    assert code == 1 and lines_of(folder) == [("a", 0, 1.0)]
    assert err.startswith("error: 1 run failed: a seed 1: the metric 'bad': ZeroDivisionError: ") and err.count("\n") == 1


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
    "equal lines": (["s"], ('over_metrics(("a", "b"), {"loss": "loss"})', 'over_cells({x: {1: "a"} for x in "pq"}, "loss")'),
                    "has the panel '', in which two lines show the same"),
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
from hybrid_attn.studies import SHARE, Cell, Curves, Study, evaluated, logged, over_cells, over_metrics
SMALL = {"model.pattern": "LG", "model.num_layers": 2, "model.d_model": 16, "model.head_dim": 8, "model.d_ff": 16}
SMALL |= {"data.sources.text.task": "recall", "stages[0].seq_len": 64, "stages[0].steps": 2, "train.checkpoint_every": 1}
SMALL |= {"train.sinks": (), "evals.names": ("recall",), "evals.lengths": (1.0,), "evals.tokens": 256}
METRICS = {"recall": evaluated("recall", "accuracy", {"length": 64}, bounds=SHARE), "loss": logged("loss")}
STUDY = Study("Tiny", "Does it run?", {"tiny": Cell("c.py")}, METRICS,
              Curves({"": over_metrics(["tiny"], {64: "recall"})}, "tokens", "right"), changes=SMALL, seeds=2)
"""


@pytest.mark.slow  # the trainer itself, twice
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
