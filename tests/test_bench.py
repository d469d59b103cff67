"""The benchmarks print their tables and write their numbers; the numbers themselves are not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import psutil
import pytest
from absl.testing import flagsaver

from hybrid_attn import config
from hybrid_attn.bench import contender, measurement
from hybrid_attn.programs import parse

ROOT = Path(__file__).parents[1]


def run(name: str, *args) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", *args], capture_output=True, text=True, env=environment, timeout=300
    )


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the rows of tables that begin with `first`."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in table if row[0] == first]


def measured(path: Path, part: str, *args: str) -> tuple[dict, str]:
    """What a part wrote as JSON, and what it printed."""
    done = run("bench", f"--part={part}", "--repeats=2", f"--json={path}", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(path.read_text()), done.stdout


def changes(pattern: str) -> list[str]:
    sizes = {"pattern": pattern, "num_layers": len(pattern), "d_model": 16, "head_dim": 8, "d_ff": 24, "kinds.L.window": 8}
    return ["--config=configs/bench.py", *(f"--config.model.{key}={value}" for key, value in sizes.items())]


@pytest.mark.slow
def test_attention_is_timed_at_every_length_and_its_growth_fitted(tmp_path):
    options = "--options=window=16,head_dim=8,contenders=ours+jax.nn"
    result, printed = measured(tmp_path / "out.json", "attention", "--lengths=64,128", options)
    records = result["parts"]["attention"]["records"]
    expected = [(kind, S, name) for kind in ("local", "global") for S in (64, 128) for name in ("ours", "jax.nn")]
    assert [(r["kind"], r["tokens"], r["contender"]) for r in records] == expected
    assert all(len(r["calls"]) == 2 and r["seconds"] >= r["best"] == min(r["calls"]) > 0 for r in records)
    pairs = {r["kind"]: r["flops"] / (3 * 4 * 4 * 8) for r in records if r["tokens"] == 64}
    assert pairs == {"local": sum(min(t + 1, 16) for t in range(64)), "global": 64 * 65 / 2}
    assert len(rows(printed, "local")) == len(rows(printed, "global")) == 4 + 2
    ours, other = ([r["seconds"] for r in records if r["contender"] == name][-1] for name in ("ours", "jax.nn"))
    ratio = result["parts"]["attention"]["figures"]["jax.nn / ours, global, 128 tokens, 4/2 of 8, both"]
    assert ratio["unit"] == "times" and ratio["value"] == pytest.approx(other / ours, rel=1e-3)
    assert {"processor", "cores", "memory_gib", "platform"} == set(result["machine"]) and "jax" in result["versions"]
    assert 0 <= result["parts"]["attention"]["watch"]["others"] <= 1 and "other programs took" in printed


@pytest.mark.slow
def test_experts_are_timed_beside_ragged_dot_and_a_dense_feed_forward_with_the_same_flops(tmp_path):
    options = "--options=d_model=16,d_ff=24,experts=4+8,contenders=ours+ragged_dot+dense"
    result, printed = measured(tmp_path / "out.json", "experts", "--lengths=64", options)
    part = result["parts"]["experts"]
    pairs = [(r["contender"], r["experts"]) for r in part["records"]]
    assert pairs == [("ours", 4), ("ours", 8), ("ragged_dot", 4), ("ragged_dot", 8), ("dense", 1)]
    assert {r["flops"] for r in part["records"]} == {3 * 6 * 64 * 2 * 16 * 24}
    four, eight, *_ = (r["seconds"] for r in part["records"])
    growth = part["figures"]["time of 8 experts / 4, 64 tokens"]
    assert growth["value"] == pytest.approx(eight / four, rel=1e-3) and len(rows(printed, "ours")) == 2


@pytest.mark.slow
def test_steps_with_statistics_are_timed_beside_others_have_their_losses_and_their_cost_is_printed(tmp_path):
    result, printed = measured(tmp_path / "out.json", "statistics", "--lengths=32", *changes("LLLG"))
    plain, other = result["parts"]["statistics"]["records"]
    assert len(plain["losses"]) == 3 and plain["losses"] == other["losses"]
    cost = 100 * (other["seconds"] / plain["seconds"] - 1) / 10
    figures = result["parts"]["statistics"]["figures"]
    assert figures["cost of statistics at every 10 steps in time, 32 tokens"]["value"] == pytest.approx(cost, rel=1e-2)
    assert "cost of statistics at every 10 steps in CPU time, 32 tokens" in printed


@pytest.mark.slow
def test_training_is_timed_beside_full_attention(tmp_path):
    result, printed = measured(tmp_path / "out.json", "layouts", "--lengths=32", *changes("L"))
    hybrid, full = result["parts"]["layouts"]["records"]
    assert (hybrid["layers"], full["layers"]) == ("L", "R")
    assert full["computed_flops"] == full["needed_flops"] > hybrid["needed_flops"] == hybrid["computed_flops"]
    assert all(len(r["calls"]) == 2 and r["losses"][0] > r["losses"][-1] > 0 for r in (hybrid, full))
    assert [row[2] for row in rows(printed, "ours") + rows(printed, "full attention")] == ["32", "32"]


@pytest.mark.slow
def test_answers_are_timed_and_their_caches_counted(tmp_path):
    options = ["--options=chunk=16", "--lengths=64,128", *changes("LG")]
    result, printed = measured(tmp_path / "out.json", "growth", *options)
    records = result["parts"]["growth"]["records"]
    assert [(r["layers"], r["tokens"]) for r in records] == [("LG", 64), ("RR", 64), ("LG", 128), ("RR", 128)]
    assert all(len(r["calls"]) == 2 and r["best"] == min(r["calls"]) > 0 for r in records)
    assert "growth of ours / full attention" in printed

    result, _ = measured(tmp_path / "out.json", "long", "--options=chunk=16,new=4", *options[1:])
    short, twice = result["parts"]["long"]["records"]
    assert [r["formula"] for r in (short, twice)] == [2 * 2 * 8 * 4 * (S + 8) for S in (64, 128)]  # of two heads of 8
    assert all(r["formula"] < r["cache"] < 2 * r["formula"] for r in (short, twice))


@pytest.mark.slow
@pytest.mark.parametrize(("part", "options"), [("step", []), ("prefill", ["--options=chunk=16"])])
def test_a_library_that_is_not_installed_is_named_and_the_others_are_measured(tmp_path, part, options):
    hidden = "import sys; sys.modules['transformers'] = None; import runpy; sys.argv[0] = 'tools/bench.py'; "
    code = hidden + "runpy.run_path('tools/bench.py', run_name='__main__')"
    flags = [f"--part={part}", "--repeats=1", "--lengths=32", f"--json={tmp_path / 'out.json'}", *options, *changes("LG")]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, *flags]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    ours, other = json.loads((tmp_path / "out.json").read_text())["parts"][part]["records"]
    assert ours["seconds"] > 0 and "transformers" in other["missing"] and "seconds" not in other
    assert "— transformers, 32 tokens: " in done.stdout


@pytest.mark.slow
def test_a_run_is_started_again_and_again_until_its_next_step_and_left_with_no_process(tmp_path, corpus):
    sizes = [*changes("LG"), "--config.stages[0].seq_len=64", f"--config.data.sources.text.paths=('{corpus}',)"]
    result, _ = measured(tmp_path / "out.json", "start", "--options=what=run", *sizes)
    first, later = result["parts"]["start"]["records"]
    assert len(first["calls"]) == 1 and len(later["calls"]) == 2 and min(first["calls"] + later["calls"]) > 0
    assert set(result["parts"]["start"]["figures"]) == {"first step, first start", "first step, second start"}
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [command for command in commands if f"{ROOT}/launch/train.py --config=config.py --workdir=run" in command]


@pytest.mark.slow
def test_the_pieces_of_a_step_are_timed_and_have_all_of_its_flops(tmp_path):
    result, printed = measured(tmp_path / "out.json", "pieces", "--lengths=32", *changes("LG"))
    step, *pieces = result["parts"]["pieces"]["records"]
    assert sum(r["flops"] for r in pieces) == step["flops"] > 0
    assert {r["contender"] for r in pieces} >= {"attention backward, L", "attention forward, G", "loss", "optimiser"}
    assert "the step reaches" in printed and rows(printed, "rest")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--part=growth", "--lengths=2Q"], "--lengths has '2Q'"),
        (["--part=stride"], "--part has 'stride'; known: attention, experts, step, "),
        (["--part=layouts", "--config=configs/bench.py", "--config.model.d_ff=0"], "model.d_ff=0"),
        (["--part=attention", "--lengths=64", "--options=heads=3"], "heads=3, no multiple of kv_heads=2"),
        (["--part=experts", "--lengths=64", "--options=top_k=9"], "top_k=9, more than experts=8"),
        (["--part=attention", "--lengths=64", "--options=head=3"], "part attention names 'head'"),
        (["--part=step,growth", "--options=chunk=16"], "--options=chunk=16 belongs to one part"),
        (["--part=peers", "--lengths=64", "--options=timed=1"], "timed=1, and a median needs two steps or answers"),
        (["--part=peers", "--lengths=64", "--options=new=64"], "--lengths has 64 tokens, and 64 of them are the answer"),
        (["--part=peers", "--lengths=64", "--options=remat=attention"], "remat='attention'; use none, layer"),
        (
            ["--part=peers", "--lengths=64", "--options=contenders=MaxText"],
            "contenders=MaxText, and ratios are to ours; add ours",
        ),
        (["--part=peers", "--lengths=64", "--options=maxtext_python=none"], "maxtext_python=none, which is no file"),
        (["--part=decode", "--add"], "--add adds to the file of --json"),
        ([], "name one of --page and --part"),
        (["--part=step", "--compare=tests/golden_curves.json"], "tests/golden_curves.json is no result"),
    ],
)
def test_a_wrong_flag_is_an_error_of_one_line(flags, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(measurement.Processes, "call", lambda *_: "cpu")
    monkeypatch.setattr(sys, "argv", ["bench", *flags])
    with conftest.tool("bench") as module, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        module.main(parse(sys.argv))
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert (ended.value.code, out) == (2, "")


@pytest.mark.skipif(not measurement.can_watch(), reason="the memory of a process is watched on Linux with glibc")
def test_a_contender_that_exceeds_the_memory_limit_is_left_out_and_the_others_are_measured():
    tasks = {"small": measurement.Task("one", allocate, (10,)), "large": measurement.Task("one", allocate, (200,))}
    with measurement.Processes(limit=100 * 2**20) as processes:
        measured = processes.race("memory", tasks, 2)
    assert measured["small"].missing is None and measured["small"].results == [10.0, 10.0, 10.0]
    assert abs(measured["small"].memory - 10 * 2**20) < 2**20
    assert measured["large"].seconds == [] and "0.0977 GiB" in measured["large"].missing


@pytest.mark.parametrize(
    ("changes", "remat", "context"),
    [
        ({}, "layer", "gather"),
        ({"train.remat": "L=none"}, "none", "gather"),
        ({"train.remat": "G=none", "train.context": "G=ring"}, "layer", "gather"),
        ({"train.remat": "attention", "train.context": "L=ulysses"}, "attention", "ulysses"),
        ({"model.pattern": "L", "train.context": "halo"}, "layer", "gather"),  # a halo needs a window
    ],
)
def test_full_attention_trains_as_the_windowed_layer_type_does(changes, remat, context):
    full = measurement.full_attention(conftest.tiny(changes))
    assert full.model.layers == "R" * full.model.num_layers
    kind = full.model.kinds["R"]
    assert (kind.window, kind.chunk, kind.rope_theta) == (None, None, 100.0)
    assert config.remat(full.model, full.train)["R"] == remat
    assert config.context(full.model, full.train)["R"] == context


def allocate(mebibytes: int) -> contender.Ready:
    return contender.Ready(lambda: len(b"x" * (mebibytes * 2**20)) / 2**20, None)


@pytest.mark.slow
def test_preparing_and_reading_text_is_timed():
    pytest.importorskip("tokenizers")
    sizes = ["--megabytes=1", "--seconds=0.1", "--spans=100,9000000", "--documents=1000"]
    done = run("bench_data", *sizes)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == ["prepare"] * 2 + ["read"] * 2 + ["packed"] * 2 + ["plan", "memory", "open"]
    assert all("MB/s a core" in line for line in lines[:2]) and lines[2].endswith(" M tokens/s")
    assert lines[3].endswith("9,000,000 tokens: no document is as long")
    assert all("% padding" in line for line in lines[4:7]) and "1,000 documents of 1,000,000 tokens" in lines[8]
