"""The picture of several runs has a curve of each, and a run that cannot be drawn is an error that leaves the old picture."""

import json

import pytest
from absl.testing import flagsaver
from conftest import tool
from matplotlib.image import imread

from hybrid_attn.programs import parse


@pytest.fixture(scope="module")
def program():
    with tool("plot_runs") as module:
        yield module


def written(folder, name, *values, suffix=""):
    """The workdir of a run whose steps 10, 20, ... had these losses."""
    (folder / name).mkdir(parents=True)
    lines = [{"step": 10 * i, "loss": 9.0, "loss_mean": x, "tokens_seen": 80 * i, "mfu": None} for i, x in enumerate(values, 1)]
    content = "".join(f"{json.dumps(line)}\n" for line in [*lines, {"step": 99, "skipped": True}])
    (folder / name / "metrics.jsonl").write_bytes((content + suffix).encode("latin-1"))
    return f"--workdir={folder}/{name}"


def plotted(program, monkeypatch, *arguments):
    """The curves that the program draws."""
    drawn = []
    picture = program.picture
    monkeypatch.setattr(program, "picture", lambda curves: drawn.extend(curves) or picture(curves))
    with flagsaver.flagsaver():
        program.main(parse(["plot_runs.py", *arguments])[:1])
    return drawn


def test_each_run_is_a_curve_of_the_means_over_steps_or_tokens(program, tmp_path, monkeypatch):
    runs = [written(tmp_path, "one", 4.0, 2.0, 3.0, suffix='{"step": 40, "lo'), written(tmp_path, "two", 5.0)]
    drawn = plotted(program, monkeypatch, *runs, f"--out={tmp_path}/p.png", "--smooth=2", "--log_x")
    assert drawn == [("one", (10, 20, 30), (10, 20, 30), (4.0, 2.0, 3.0)), ("two", (10,), (10,), (5.0,))]
    assert imread(tmp_path / "p.png").shape == (675, 1200, 4)
    drawn = plotted(program, monkeypatch, *runs, f"--out={tmp_path}/p.png", "--x=tokens", "--label=a", "--label=b")
    assert [(curve.label, curve.x) for curve in drawn] == [("a", (80, 160, 240)), ("b", (80,))]


def test_only_points_of_finite_numbers_are_drawn(program, tmp_path, monkeypatch):
    odd = [
        {"step": 20},
        {"step": 30, "loss_mean": 10**400},
        {"step": 10**400, "loss_mean": 1.0},
        {"step": 50, "loss_mean": True},
    ]
    odd += [{"step": 60, "loss_mean": 3.0, "tokens_seen": x} for x in ("a", float("nan"), None)]
    suffix = "".join(f"{json.dumps(line)}\n" for line in odd)
    run = written(tmp_path, "run", 4.0, suffix=suffix)
    assert plotted(program, monkeypatch, run, f"--out={tmp_path}/p.png", "--x=tokens") == [("run", (10,), (80,), (4.0,))]
    assert plotted(program, monkeypatch, run, f"--out={tmp_path}/p.png")[0].y == (4.0, 3.0, 3.0, 3.0)


def test_a_smoothed_value_is_the_mean_over_so_many_steps_however_many_lines_they_have(program):
    assert program.smoothed([1, 2, 3, 10], [4.0, 2.0, 3.0, 7.0], 2).tolist() == [4.0, 3.0, 2.5, 7.0]
    assert program.smoothed([10, 20, 30], [4.0, 2.0, 3.0], 20).tolist() == [4.0, 3.0, 2.5]


@pytest.mark.parametrize(
    "suffix, arguments, message",
    [
        ("", ["--workdir=/nowhere"], "--workdir=/nowhere has no metrics.jsonl; name the workdir of a run"),
        ("", ["--value=los"], "has no 'los'; did you mean 'loss'? It has loss, loss_mean, step, tokens_seen"),
        ("", ["--value=mfu"], "has no 'mfu'; it has loss"),
        ("", ["--label=a", "--label=b"], "--label is given 2 times for 1 runs"),
        ("", ["--out=/tmp/p.jpg"], "must end in .png"),
        ("5\n", [], "line 3 must hold an object and holds a int"),
        ('{"step": true}\n', [], "line 3 is no step of a run"),
        ("\xff{\n", [], "line 3 is not JSON"),
        ("[" * 100_000 + "\n", [], "line 3 is nested too deeply to be read"),
        ('{"step": 1, "a": 1}\n', ["--value=a", "--x=tokens"], "has no line with both 'a' and 'tokens_seen'"),
        ('{"step": 1, "a": NaN}\n', ["--value=a"], "has no 'a'"),
    ],
)
def test_a_run_that_cannot_be_drawn_is_an_error_of_one_line_with_exit_code_2(
    program, tmp_path, capsys, suffix, arguments, message
):
    run = [] if arguments and arguments[0].startswith("--workdir") else [written(tmp_path, "run", 4.0, suffix=suffix)]
    (tmp_path / "p.png").write_text("an older picture")
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        program.main(parse(["plot_runs.py", *run, f"--out={tmp_path}/p.png", *arguments])[:1])
    error = capsys.readouterr().err
    assert (ended.value.code, len(error.splitlines())) == (2, 1) and message in error
    assert (tmp_path / "p.png").read_text() == "an older picture"
