"""The part `peers` of the benchmark: contenders in processes of their own, checks of one model, records and their table."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hybrid_attn import config, config_file
from hybrid_attn.bench import alone, maxtext, maxtext_config, peers, training
from hybrid_attn.bench.alone import Calls, Request
from hybrid_attn.bench.part import Run
from hybrid_attn.model import flops

ROOT = Path(__file__).parents[1]
MIB = 2**20
CONTENDER = """
import time
from hybrid_attn.bench.contender import Ready

def make(mebibytes, fails):
    held = []
    def run():
        if fails:
            raise RuntimeError(fails)
        held.append(b"x" * (mebibytes * 2**20))
        time.sleep(0.2)  # longer than the parent waits between two looks
        return len(held)
    return Ready(run, None, 7, "dots")
"""


def record(contender: str, seconds: float, **more) -> dict:
    sizes = {"workload": "step", "remat": "none", "tokens": 64, "batch": 2, "parameters": 1000, "memory": 2**30, "first": 8.0}
    processes = [{"first": 8.0, "seconds": [seconds, seconds], "memory": 2**30}]
    about = {"versions": {"jax": "1.2"}, "processes": processes, "kernel": "dots", "losses": [6.5, 6.0]}
    return sizes | about | {"contender": contender, "seconds": seconds} | more


MISSING = {"workload": "step", "remat": "none", "tokens": 64, "contender": "MaxText", "missing": "not installed"}
RECORDS = [
    record("ours", 2.0),
    record("transformers", 5.0, memory=3 * 2**30, first=4.0, note="It has masks."),
    MISSING,
    record("ours", 4.0, remat="layer"),
    record("MaxText", 8.0, remat="layer", versions={"maxtext": "0.3"}, note="It has masks."),
    record("ours", 0.25, workload="decode", answer=[1, 2, 3]),
    record("MaxText", 0.5, workload="decode", answer=[1, 2, 4], versions={"maxtext": "0.3"}),
]


@pytest.fixture
def olmo3():
    return config.build(config_file.load(f"{ROOT}/configs/bench.py:olmo3"))


def run_of(c=None, lengths=(64,), repeats=1, **options) -> Run:
    return Run(c, list(lengths), repeats, 9.0, dict(peers.OPTIONS) | options, "cpu", "float32")


def sampled(tmp_path, limit: int, mebibytes: int = 1, fails: str = "", calls: Calls | None = None) -> dict:
    (tmp_path / "of_test.py").write_text(CONTENDER)
    functions = [["site", "addsitedir", [str(tmp_path)]], ["of_test", "make", [mebibytes, fails]]]
    return alone.run_alone(Request(sys.executable, functions), calls or Calls(3, 60), limit)


def test_a_process_calls_its_contender_and_returns_times_results_and_its_peak_memory(tmp_path):
    x = sampled(tmp_path, 500 * MIB, mebibytes=50)
    assert (x["results"], x["parameters"], x["kernel"]) == ([1, 2, 3], 7, "dots")
    assert x["started"] < x["began"] < x["ended"] and all(seconds >= 0.2 for seconds in x["seconds"])
    assert len(x["seconds"]) == 3 and 150 * MIB < x["memory"] < 250 * MIB
    assert x["versions"] == {"python": ".".join(map(str, sys.version_info[:3]))}  # it loaded no library


def test_a_process_makes_no_further_call_once_its_timed_ones_took_long_enough(tmp_path):
    assert sampled(tmp_path, 500 * MIB, calls=Calls(9, 0.1))["results"] == [1, 2]
    assert sampled(tmp_path, 500 * MIB, calls=Calls(0))["results"] == []


def test_a_process_that_needs_too_much_memory_or_fails_says_so_in_a_line(tmp_path):
    assert sampled(tmp_path, 100 * MIB, mebibytes=300) == {"missing": "needs more than 0.0977 GiB"}
    assert sampled(tmp_path, 100 * MIB, fails="no such layer") == {"missing": "ended with 1: RuntimeError: no such layer"}
    assert sampled(tmp_path, 100 * MIB, fails="RESOURCE_EXHAUSTED") == {"missing": "needs more than 0.0977 GiB"}


def measured(results: list, began: float = 103.0, **more) -> dict:
    """What a process returns, which was started at 100 and whose first call ended at 112."""
    about = {"parameters": 7, "kernel": "dots", "versions": {}, "started": 100.0, "began": began, "ended": 112.0, "memory": 5}
    return about | {"seconds": [9.0, 2.0, 3.0][: len(results)], "results": results} | more


def test_a_record_has_the_numbers_of_each_process_and_what_the_table_shows_of_them():
    record = peers.summary("step", [measured([6.5, 6.0, 5.5]), measured([6.5, 6.0], memory=6)])
    assert record == {
        "parameters": 7, "kernel": "dots", "versions": {}, "losses": [6.5, 6.0, 5.5],
        "memory": 6, "first": 12.0, "seconds": 2.0,
        "processes": [
            {"first": 12.0, "seconds": [2.0, 3.0], "memory": 5}, {"first": 12.0, "seconds": [2.0], "memory": 6},
        ],
    }  # fmt: skip


def test_the_first_token_comes_after_the_start_and_the_prefill_and_the_first_answer_is_not_timed():
    replies = [[4.0, 0.5, [1, 2], None], [1.0, 0.25, [1, 2], None], [1.0, 0.125, [1, 2], None]]
    record = peers.summary("decode", [measured(replies, memory=None)])
    assert (record["first"], record["seconds"], record["answer"]) == (7.0, 0.1875, [1, 2]) and "memory" not in record


def a_run(monkeypatch, run: Run, results: dict[str, dict]) -> tuple[list[dict], list]:
    """The records of steps whose contenders are fake and return these results, and (contender, calls) of their processes."""
    started = []

    def run_alone(request, calls, limit):
        started.append((request.python, calls.number))
        return results[request.python]

    monkeypatch.setattr(peers, "run_alone", run_alone)
    requests = {name: Request(name, []) for name in peers.CONTENDERS}
    monkeypatch.setitem(peers.WORKLOADS, "step", lambda *_: requests)
    reasons = dict.fromkeys(run.options["contenders"].split("+"), "")
    return peers.measured_cases(run, reasons, peers.Export("out", []), 2**40), started


def test_contenders_run_in_turn_at_every_length_and_remat_and_one_that_fails_is_not_started_again(monkeypatch, olmo3):
    own = measured([6.5, 6.0, 5.5], parameters=flops.parameters(olmo3.model))
    run = run_of(olmo3, (64, 128), 2, workload="step", contenders="ours+transformers", timed=2, remat="none+layer")
    records, started = a_run(monkeypatch, run, {"ours": own, "transformers": {"missing": "ended with 1: x"}})
    cases = [(S, remat) for S in (64, 128) for remat in ("none", "layer")]
    assert [(r["tokens"], r["remat"]) for r in records] == [case for case in cases for _ in range(2)]
    assert started == [("transformers", 0), *[("ours", 3), ("transformers", 3), ("ours", 3)] * 4]
    assert records[1]["missing"] == "ended with 1: x" and "seconds" not in records[1]
    assert records[0].keys() == {
        "workload", "contender", "layers", "tokens", "batch", "remat", "needed_flops", "computed_flops", "parameters", "kernel",
        "versions", "processes", "memory", "losses", "first", "seconds",
    }  # fmt: skip


def test_another_number_of_parameters_is_refused_before_anything_is_timed(monkeypatch, olmo3):
    run = run_of(olmo3, workload="step", contenders="ours+MaxText")
    with pytest.raises(ValueError, match="MaxText has 7 parameters, and ours 6,397,184: they are not one model"):
        a_run(monkeypatch, run, {"MaxText": measured([])})


def test_another_loss_or_first_token_is_refused_at_once(monkeypatch, olmo3):
    number = {"parameters": flops.parameters(olmo3.model)}
    run = run_of(olmo3, (64, 128), 2, workload="step", contenders="ours+transformers")
    results = {"ours": measured([6.5, 6.0], **number), "transformers": measured([6.502, 6.0], **number)}
    with pytest.raises(ValueError, match="first losses at 64 tokens differ: ours 6.50000, transformers 6.50200"):
        a_run(monkeypatch, run, results)
    answers = [measured([[1.0, 0.1, [token, 3], None]]) for token in (8, 9)]
    case = peers.Case("decode", training.at_length(olmo3, 64, 2))
    peers.check_result(case, "MaxText", answers[0], answers[0])
    with pytest.raises(ValueError, match="the first new tokens after 64 differ: ours 8, MaxText 9"):
        peers.check_result(case, "MaxText", answers[1], answers[0])


def test_each_row_stands_beside_ours_of_the_same_run_and_remat():
    lines = [line for line in peers.table(RECORDS).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0] == ["step", "ours", "dots", "64", "none", "2", "64", "1.00", "1.00", "1.00", "8", "1.00", "6.5000"]
    assert rows[1][5:12] == ["2", "25.6", "2.50", "3.00", "3.00", "4", "0.50"]
    assert rows[2][5:] == ["—"] * 8
    assert [row[4] for row in rows] == ["none", "none", "none", "layer", "layer", "—", "—"]
    assert [row[7] for row in rows[3:]] == ["1.00", "2.00", "1.00", "2.00"] and rows[5][6] == "4"
    assert [row[12] for row in rows[5:]] == ["3/3", "2/3"]
    text = peers.table(RECORDS)
    assert "— step, MaxText, 64 tokens: not installed" in text and "MaxText: maxtext 0.3" in text
    assert text.count("It has masks.") == 1
    apart = [RECORDS[0], RECORDS[4]]
    assert peers.cells(*peers.beside_ours(apart)[1])[7] == "—"  # ours does not recompute


def test_figures_are_ratios_to_ours_of_the_same_run_and_remat():
    figures = {name: x.value for name, x in peers.figures(RECORDS).items()}
    cases = ("step, transformers", "step, MaxText, recomputing", "decode, MaxText")
    assert figures.keys() == {f"{what} of a {case} / ours, 64 tokens" for what in ("time", "memory", "start") for case in cases}
    assert figures["time of a step, transformers / ours, 64 tokens"] == 2.5
    assert figures["time of a step, MaxText, recomputing / ours, 64 tokens"] == 2.0


def test_maxtext_gets_the_sizes_of_the_model_and_its_parameters_have_names_of_the_export(olmo3):
    c = training.at_length(olmo3, 2048, 2)
    maxtext_config.check_model(c.model)
    arguments = dict(x.split("=") for x in maxtext_config.of_steps(c, "out"))
    names = ("base_num_query_heads", "base_num_kv_heads", "head_dim", "base_emb_dim", "base_mlp_dim", "sliding_window_size")
    assert [arguments[name] for name in names] == ["4", "2", "64", "256", "768", "1024"]
    names = ("base_num_decoder_layers", "max_target_length", "steps", "remat_policy", "rope_max_timescale")
    assert [arguments[name] for name in names] == ["8", "2048", "3", "none", "10000.0"]
    assert "max_prefill_predict_length=2016" in maxtext_config.of_answers(c, "out", 2016)
    assert maxtext.tensor_name(("token_embedder", "embedding")) == "model.embed_tokens.weight"
    path = ("decoder", "layers_3", "attention", "query", "kernel")
    assert maxtext.tensor_name(path) == "model.layers.3.self_attn.q_proj.weight"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"block": "pre"}, "model.block: pre -> post"),
        ({"tie_embeddings": False, "logit_scale": 0.5}, "model.logit_scale: 0.5 -> 1.0)"),
        ({"kinds.L.window": None}, "model.kinds.L.window: None -> 4096"),
        ({"kinds.G.rope_theta": None}, "model.kinds.G.rope_theta: None -> 10000.0"),
        ({"kinds.L.qk_norm": "none"}, "model.kinds.L.qk_norm: none -> rms"),
        ({"kinds.G.short_conv": 4}, "model.kinds.G.short_conv: 4 -> None"),
        ({"kinds.G.sink": True, "kinds.L.gate": "head"}, "model.kinds.G.sink: True -> False; model.kinds.L.gate: head -> none"),
        ({"kinds.L.softcap": 50.0, "logit_softcap": 30.0}, "model.logit_softcap: 30.0 -> None"),
        ({"pattern": "LLG", "num_layers": 6}, "model.kinds.G.window: None -> 1024"),
        ({"kinds.L.mlp.type": "moe"}, "model.kinds.L.mlp.type: moe -> gated"),
        ({"adapter.type": "lora"}, "model.adapter.type: 'lora' -> None"),
        ({"low_rank.rank_fraction": 0.5}, "model.low_rank: LowRank(rank_fraction=0.5"),
        ({"activation": "gelu"}, "model.activation: gelu -> silu"),
    ],
    ids=str,
)
def test_a_model_that_maxtext_would_compute_otherwise_is_refused_in_one_line(changes, named):
    values = config_file.load(f"{ROOT}/configs/bench.py:olmo3")
    for key, value in changes.items():
        *groups, last = key.split(".")
        group = values["model"]
        for name in groups:
            group = group[name]
        group[last] = value
    with pytest.raises(ValueError, match="MaxText's block olmo3 cannot express this model") as refused:
        maxtext_config.check_model(config.build(values).model)
    assert named in str(refused.value) and len(str(refused.value).splitlines()) == 1


def test_maxtext_is_left_out_where_the_scores_of_a_layer_do_not_fit(olmo3):
    c, scores = training.at_length(olmo3, 32_768, 2), 4 * 4 * 32_768**2
    assert maxtext_config.too_large(c, scores) == ""
    assert maxtext_config.too_large(c, scores - 1) == "the scores of one layer take 16 GiB, and --memory_gib is 16"


@pytest.mark.parametrize("workload", peers.WORKLOADS)
def test_every_contender_gets_the_same_tokens(olmo3, workload):
    run = run_of(olmo3, maxtext_python="python", remat="layer")
    case = next(case for case in peers.cases(run) if case.workload == workload)
    requests = peers.WORKLOADS[workload](run, case.config, peers.Export("out", []))
    assert Path(requests["MaxText"].python).is_absolute() and json.dumps(requests)
    theirs = {name: requests[name].functions[-1][2] for name in ("transformers", "MaxText")}
    if workload == "decode":
        assert theirs["transformers"][1] == theirs["MaxText"][2] and len(theirs["MaxText"][2]) == 32
    else:
        assert theirs["transformers"][1] == theirs["MaxText"][2]["tokens"] and theirs["transformers"][-1] is True
        assert case.config.train.remat == "layer" and "remat_policy=full" in theirs["MaxText"][0]


def test_steps_that_other_libraries_do_not_take_are_refused(olmo3):
    c = training.at_length(olmo3, 64, 2)
    training.check_update(c)
    for changed, named in (
        (dataclasses.replace(c, optim=dataclasses.replace(c.optim, z_loss=1e-4)), "optim.z_loss: 0.0 -> 0.0001"),
        (dataclasses.replace(c, stages=(dataclasses.replace(c.stages[0], microbatches=2, batch=2),)), "microbatches: 1 -> 2;"),
    ):
        with pytest.raises(ValueError, match=re.escape(named)):
            training.check_update(changed)


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_part_writes_a_file_to_which_another_run_of_the_same_code_is_added(tmp_path):
    """Beside transformers where it is installed; tests/test_bench.py tests other parts alike."""
    sizes = {"num_layers": 4, "d_model": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "d_ff": 24}
    sizes |= {"kinds.L.window": 8}
    command = [sys.executable, "tools/bench.py", "--part=peers", "--config=configs/bench.py:olmo3", "--repeats=1", "--add"]
    command += [f"--config.model.{key}={value}" for key, value in sizes.items()] + [f"--json={tmp_path / 'peers.json'}"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}

    def run(*flags: str) -> subprocess.CompletedProcess:
        return subprocess.run([*command, *flags], cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)

    done = run("--lengths=32", "--options=workload=step,contenders=ours+transformers,timed=2")
    assert done.returncode == 0, done.stderr
    done = run("--lengths=64", "--options=workload=decode,contenders=ours,timed=3,new=4")
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "peers.json").read_text())
    step, theirs, decode = result["parts"]["peers"]["records"]
    assert result["command"].count(" --add ") == result["command"].count(" --json=peers.json") == 2
    assert [(r["options"]["timed"], r["repeats"], r["kernel"]) for r in (step, decode)] == [
        (2, 1, step["kernel"]), (3, 1, step["kernel"])
    ]  # fmt: skip
    assert step["revision"] == result["revision"] and len(step["processes"]) == 1 and len(decode["answer"]) == 4
    assert len(step["processes"][0]["seconds"]) == 2 and len(decode["processes"][0]["seconds"]) == 3
    assert "missing" in theirs or abs(theirs["losses"][0] - step["losses"][0]) < 1e-3
    assert theirs["contender"] == "transformers" and "| decode " in done.stdout
    other = run("--lengths=64", "--options=workload=decode,contenders=ours,new=4", "--config.model.norm_eps=1e-3")
    assert other.returncode == 2 and "its parts.peers.model differs" in other.stderr and "1/1" not in other.stderr
