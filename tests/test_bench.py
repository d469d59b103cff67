"""The benchmarks print their tables and write their numbers; the numbers themselves are not tested."""

import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import pytest
from absl.testing import flagsaver

from hybrid_attn import config
from hybrid_attn.bench import measurement
from hybrid_attn.programs import parse

ROOT = Path(__file__).parents[1]


def run(name: str, *args) -> subprocess.CompletedProcess:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, ROOT / "tools" / f"{name}.py", *args], capture_output=True, text=True, env=environment, timeout=300
    )


def rows(text: str, first: str) -> list[list[str]]:
    """Cells of the rows of tables that begin with `first`."""
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    return [row for row in table if row[0] == first]


@pytest.mark.slow
def test_attention_is_timed_at_every_length_and_its_growth_fitted(tmp_path):
    sizes = ["--lengths=64,128", "--window=16", "--head_dim=8", "--repeats=2", "--contenders=ours,jax.nn"]
    done = run("bench_attention", *sizes, f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    out = json.loads((tmp_path / "out.json").read_text())
    expected = [(kind, S, name) for kind in ("local", "global") for S in (64, 128) for name in ("ours", "jax.nn")]
    assert [(r["kind"], r["tokens"], r["contender"]) for r in out["records"]] == expected
    assert all(len(r["calls"]) == 2 and r["seconds"] == min(r["calls"]) > 0 and "memory" in r for r in out["records"])
    pairs = {r["kind"]: r["flops"] / (3 * 4 * 4 * 8) for r in out["records"] if r["tokens"] == 64}
    assert pairs == {"local": sum(min(t + 1, 16) for t in range(64)), "global": 64 * 65 / 2}
    assert len(out["exponents"]) == 4 and out["peak"] > 0
    assert len(rows(done.stdout, "local")) == len(rows(done.stdout, "global")) == 4 + 2


@pytest.mark.slow
def test_steps_with_statistics_are_timed_beside_others_have_their_losses_and_their_cost_is_printed(tmp_path):
    sizes = {"num_layers": 4, "d_model": 16, "head_dim": 8, "d_ff": 24, "kinds.L.window": 8}
    changes = [f"--config.model.{key}={value}" for key, value in sizes.items()]
    done = run("bench_train", "--part=statistics", "--lengths=32", "--repeats=2", *changes, f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    plain, measured = json.loads((tmp_path / "out.json").read_text())["records"]["statistics"]
    assert len(plain["losses"]) == 2 and plain["losses"] == measured["losses"]
    cost = (measured["seconds"] / plain["seconds"] - 1) / 10
    assert f"32 tokens: statistics at every 10 steps cost {cost:.2%} of a step, " in done.stdout


@pytest.mark.slow
def test_training_is_timed_beside_full_attention(tmp_path):
    sizes = {"pattern": "L", "num_layers": 1, "d_model": 16, "head_dim": 8, "d_ff": 24, "kinds.L.window": 8}
    changes = [f"--config.model.{key}={value}" for key, value in sizes.items()]
    done = run("bench_train", "--part=layouts", "--lengths=32", "--repeats=2", *changes, f"--json={tmp_path / 'out.json'}")
    assert done.returncode == 0, done.stderr
    hybrid, full = json.loads((tmp_path / "out.json").read_text())["records"]["layouts"]
    assert (hybrid["layers"], full["layers"]) == ("L", "R")
    assert full["computed_flops"] == full["needed_flops"] > hybrid["needed_flops"] == hybrid["computed_flops"]
    assert all(len(r["calls"]) == 2 and r["losses"][0] > r["losses"][1] > 0 for r in (hybrid, full))
    assert [row[2] for row in rows(done.stdout, "ours") + rows(done.stdout, "full attention")] == ["32", "32"]


@pytest.mark.slow
def test_answers_are_timed_and_their_caches_counted(tmp_path):
    sizes = {"pattern": "LG", "num_layers": 2, "d_model": 16, "head_dim": 8, "d_ff": 24, "kinds.L.window": 8}
    changes = [f"--config.model.{key}={value}" for key, value in sizes.items()]
    options = ["--repeats=2", "--new=4", "--chunk=16", "--lengths=64,128", f"--json={tmp_path / 'out.json'}"]
    done = run("bench_infer", "--part=growth", *options, *changes)
    assert done.returncode == 0, done.stderr
    records = json.loads((tmp_path / "out.json").read_text())["records"]["growth"]
    assert [(r["layers"], r["tokens"]) for r in records] == [("LG", 64), ("RR", 64), ("LG", 128), ("RR", 128)]
    assert all(len(r["calls"]) == 2 and r["token"] == min(r["calls"]) > 0 for r in records)
    assert "times as fast" in done.stdout

    long = [change.replace("--config", "--long_config") for change in changes]
    done = run("bench_infer", "--part=long", *options, *long)
    assert done.returncode == 0, done.stderr
    short, twice = json.loads((tmp_path / "out.json").read_text())["records"]["long"]
    assert (short["cache"], twice["cache"]) == (2 * 8 * 4 * (128 + 8), 2 * 8 * 4 * (256 + 8))  # of one head of 8


@pytest.mark.parametrize(
    ("tool", "flag", "message"),
    [
        ("bench_infer", "--lengths=2Q", "--lengths has '2Q'"),
        ("bench_attention", "--lengths=2Q", "--lengths has '2Q'"),
        ("bench_train", "--config.model.d_ff=0", "model.d_ff=0"),
    ],
)
def test_a_wrong_flag_is_an_error_of_one_line(tool, flag, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [tool, flag])
    with conftest.tool(tool) as module, flagsaver.flagsaver(), pytest.raises(SystemExit) as ended:
        module.main(parse(sys.argv))
    out, error = capsys.readouterr()
    assert error.startswith("error: ") and message in error and len(error.splitlines()) == 1
    assert (ended.value.code, out) == (2, "")


@pytest.mark.skipif(not measurement.can_watch(), reason="the memory of a process is watched on Linux with glibc")
def test_a_contender_that_exceeds_the_memory_limit_is_left_out_and_the_others_are_measured():
    tasks = {"small": measurement.Task("one", allocate, (10,)), "large": measurement.Task("one", allocate, (200,))}
    with measurement.Processes(limit=100 * 2**20) as processes:
        measured = processes.race("memory", tasks, 2)
    assert measured["small"].missing is None and measured["small"].results == [10.0, 10.0]
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


def allocate(mebibytes: int) -> measurement.Ready:
    return measurement.Ready(lambda: len(b"x" * (mebibytes * 2**20)) / 2**20, None)


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
