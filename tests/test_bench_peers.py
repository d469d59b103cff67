"""The part `peers` of the benchmark: processes of contenders, their records in one table, and what is left out."""

import json
import sys
from pathlib import Path

import pytest

from hybrid_attn import config, config_file
from hybrid_attn.bench import maxtext, peers, training
from hybrid_attn.bench.peers import Request

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
    return Ready(run, None, 7)
"""


def record(contender: str, seconds: float, **more) -> dict:
    sizes = {"work": "step", "tokens": 64, "batch": 2, "parameters": 1000, "memory": 2**30, "first": 8.0}
    about = {"versions": {"jax": "1.2"}, "processes": 1, "samples": [seconds], "recomputes": False}
    return sizes | about | {"contender": contender, "seconds": seconds} | more


RECORDS = [
    record("ours", 2.0),
    record("transformers", 5.0, recomputes=True, memory=3 * 2**30, first=4.0),
    record("MaxText", 0) | {"missing": "not installed"},
    record("ours", 4.0),
    record("MaxText", 8.0, versions={"maxtext": "0.3"}),
    record("ours", 0.25, work="decode", batch=2),
]


@pytest.fixture
def bench_config():
    return config.build(config_file.load(str(ROOT / "configs/bench.py")))


def sampled(tmp_path, limit: int, mebibytes: int = 1, fails: str = "") -> dict:
    (tmp_path / "of_test.py").write_text(CONTENDER)
    functions = [["site", "addsitedir", [str(tmp_path)]], ["of_test", "make", [mebibytes, fails]]]
    return peers.sample(Request(sys.executable, functions), 3, limit)


def test_a_process_calls_its_contender_and_returns_times_results_and_its_peak_memory(tmp_path):
    x = sampled(tmp_path, 500 * MIB, mebibytes=50)
    assert (x["results"], x["parameters"], x["recomputes"]) == ([1, 2, 3], 7, False)
    assert x["started"] < x["began"] < x["ended"] and all(seconds >= 0.2 for seconds in x["seconds"])
    assert len(x["seconds"]) == 3 and 150 * MIB < x["memory"] < 250 * MIB
    assert x["versions"] == {"python": ".".join(map(str, sys.version_info[:3]))}  # it loaded no library


def test_a_process_that_needs_too_much_memory_or_fails_says_so_in_a_line(tmp_path):
    assert sampled(tmp_path, 100 * MIB, mebibytes=300) == {"missing": "needs more than 0.0977 GiB"}
    assert sampled(tmp_path, 100 * MIB, fails="no such layer") == {"missing": "ended with 1: RuntimeError: no such layer"}
    assert sampled(tmp_path, 100 * MIB, fails="RESOURCE_EXHAUSTED") == {"missing": "needs more than 0.0977 GiB"}


def test_a_contender_that_does_not_fit_takes_its_next_request_and_one_that_fails_is_not_started_again(monkeypatch):
    calls = []

    def sample(request, number, limit):
        calls.append((request.python, number))
        return {"large": {"missing": "needs more than 3 GiB"}, "broken": {"missing": "ended with 1: x"}}.get(
            request.python, {"started": 0, "ended": 1}
        )

    monkeypatch.setattr(peers, "sample", sample)
    run = peers.Run(None, [], 2, 9.0, {"steps": 4}, "cpu", "float32")
    requests = {"a": [Request("large", []), Request("small", [], True)], "b": [Request("broken", [])]}
    samples = peers.race("x", requests, run, 3)
    assert [name for name, _ in calls] == ["large", "small", "broken", "small"] and {number for _, number in calls} == {5}
    assert len(samples["a"]) == 2 and samples["b"] == [{"missing": "ended with 1: x"}]


@pytest.mark.parametrize(("calls", "seconds"), [(3, 2.5), (1, 9.0)])
def test_the_first_step_is_timed_only_where_it_is_the_only_one(calls, seconds):
    sample = {"parameters": 7, "versions": {}, "recomputes": False, "started": 100.0, "began": 103.0, "ended": 112.0}
    samples = [sample | {"memory": memory, "seconds": [9.0, 2.0, 3.0][:calls], "results": [1.0] * calls} for memory in (5, 6)]
    record = peers.summary("step", samples)
    assert (record["seconds"], record["first"], record["memory"], record["processes"]) == (seconds, 12.0, 6, 2)


def test_the_first_token_comes_after_the_start_and_the_prefill():
    sample = {
        "parameters": 7,
        "versions": {},
        "recomputes": False,
        "memory": None,
        "started": 100.0,
        "began": 103.0,
        "ended": 112.0,
    }
    results = [[4.0, 0.5, [1, 2], None], [1.0, 0.25, [1, 2], None]]
    record = peers.summary("decode", [sample | {"seconds": [6.0, 2.0], "results": results}])
    assert (record["first"], record["seconds"]) == (7.0, 0.25) and "memory" not in record


def test_each_row_stands_beside_ours_of_the_same_run():
    lines = [line for line in peers.table(RECORDS).splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert rows[0][1:] == ["ours", "64", "1,000", "64", "1.00", "1.00", "1.00", "8", "1.00"]
    assert rows[1][1:] == ["transformers, recomputing", "64", "1,000", "25.6", "2.50", "3.00", "3.00", "4", "0.50"]
    assert rows[2][1:] == ["MaxText", "64", *["—"] * 7]
    assert [row[5] for row in rows[3:]] == ["1.00", "2.00", "1.00"] and rows[5][4] == "4"  # a token of a quarter of a second
    text = peers.table(RECORDS)
    assert "— step, MaxText, 64 tokens: not installed" in text and "MaxText: maxtext 0.3" in text and maxtext.DIFFERENT in text
    assert maxtext.DIFFERENT not in peers.table(RECORDS[:3])


def test_figures_are_ratios_to_ours_of_the_same_run():
    made = {name: x.value for name, x in peers.figures(RECORDS).items()}
    of_torch = {f"{what} of a step, transformers, recomputing / ours, 64 tokens" for what in ("time", "memory", "start")}
    of_maxtext = {f"{what} of a step, MaxText / ours, 64 tokens" for what in ("time", "memory", "start")}
    assert made.keys() == of_torch | of_maxtext
    assert made["time of a step, transformers, recomputing / ours, 64 tokens"] == 2.5
    assert made["time of a step, MaxText / ours, 64 tokens"] == 2.0


def test_contenders_with_other_numbers_of_parameters_are_refused():
    peers.check_parameters([*RECORDS, record("transformers", 1, parameters=1001)])
    with pytest.raises(ValueError, match="MaxText has 1,002 parameters, and ours 1,000"):
        peers.check_parameters([*RECORDS, record("MaxText", 1, parameters=1002)])


def test_maxtext_gets_the_sizes_of_the_model_and_other_layouts_are_named(bench_config):
    c = training.at_length(bench_config, 2048, 2)
    assert maxtext.no_such_model(c.model) == ""
    arguments = dict(x.split("=") for x in maxtext.of_steps(c, "out", False))
    names = ("base_num_query_heads", "base_num_kv_heads", "head_dim", "base_emb_dim", "base_mlp_dim", "sliding_window_size")
    assert [arguments[name] for name in names] == ["4", "2", "64", "256", "768", "1024"]
    names = ("base_num_decoder_layers", "max_target_length", "steps", "remat_policy")
    assert [arguments[name] for name in names] == ["8", "2048", "3", "none"]
    assert "max_prefill_predict_length=2016" in maxtext.of_answers(c, "out", 2016)
    values = config.to_dict(bench_config)
    for changes in (
        {"pattern": "LLG", "num_layers": 6},
        {"pattern": "LLLG", "num_layers": 6},
        {"pattern": "L", "num_layers": 4},
    ):
        changed = config.build(values | {"model": values["model"] | changes})
        assert f"no layout {changed.model.layers} of such layers" in maxtext.no_such_model(changed.model)


def test_maxtext_is_left_out_where_the_scores_of_a_layer_do_not_fit(bench_config):
    c, scores = training.at_length(bench_config, 32_768, 0), 4 * 4 * 32_768**2
    assert maxtext.too_large(c, scores) == ""
    assert maxtext.too_large(c, scores - 1) == "the scores of one layer take 16 GiB, and --memory_gib is 16"


def test_the_fields_of_maxtext_have_no_target_for_the_last_token():
    batch = maxtext.batch_of([[5, 6, 7], [8, 9, 3]])
    assert batch["targets"][:, :-1].tolist() == [[6, 7], [9, 3]] and batch["targets_segmentation"].tolist() == [[1, 1, 0]] * 2
    assert batch["inputs_position"].tolist() == [[0, 1, 2]] * 2 and batch["inputs_segmentation"].all()


def test_requests_can_be_written_and_recompute_where_they_are_told_to(bench_config):
    options = dict(peers.OPTIONS) | {"steps": 1, "recompute": "transformers", "maxtext_python": "python"}
    run = peers.Run(bench_config, [64], 1, 9.0, options, "cpu", "float32")
    requests = peers.steps(run, training.at_length(bench_config, 64, 1), "out", [])
    assert {name: [x.recomputes for x in of_name] for name, of_name in requests.items()} == {
        "ours": [False], "transformers": [True], "MaxText": [False, True],
    }  # fmt: skip
    assert Path(requests["MaxText"][0].python).is_absolute() and json.dumps(requests)
    prompts = {
        x[0].functions[-1][1]: x[0].functions[-1][2]
        for x in peers.decoding(run, training.at_length(bench_config, 64, 1), "out", []).values()
    }
    assert len(prompts["make_answers"][1]) == 32
