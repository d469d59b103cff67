"""The workdir says what a run is made with, and keeps what it was made with before."""

import json

import jax
from conftest import tiny

from hybrid_attn.train.workdir import about, write_config


def test_the_changes_are_those_of_each_stage_layer_type_and_source():
    c = tiny()
    stage = {"steps": 5, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}
    found = about(tiny({"stages": [stage, stage | {"steps": 7, "batch": 1, "seq_len": 8192}], "optim.b1": 0.5}))
    assert [line for line in found["changes"] if line.startswith(("stages", "optim"))] == [
        "optim.b1: 0.9 -> 0.5",
        "stages[0].batch: 1 -> 8",
        "stages[0].seq_len: 8192 -> 48",
        "stages[0].steps: 300 -> 5",
        "stages[1].steps: 300 -> 7",
    ]
    assert [line for line in found["changes"] if "kinds" in line] == [
        "model.kinds.G.qk_norm: rms -> none",
        "model.kinds.L.rope_theta: 10000.0 -> 100.0",
        "model.kinds.L.window: 512 -> 5",
    ]
    assert found["versions"]["jax"] == jax.__version__ and about(c)["revision"] == found["revision"] != ""


def test_files_of_earlier_steps_stay_under_the_step_that_they_ended_with(tmp_path):
    def written(name):
        return json.loads((tmp_path / name).read_text())

    first, second = tiny(), tiny({"optim.b1": 0.5})
    assert write_config(tmp_path, first, 0) == write_config(tmp_path, first, 4) == []
    assert write_config(tmp_path, second, 6) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "about.json", "about_until_6.json", "config.json", "config_until_6.json",
    ]  # fmt: skip
    assert written("config_until_6.json")["optim"]["b1"] == 0.9 and written("config.json")["optim"]["b1"] == 0.5
    assert set(written("about.json")["changes"]) - set(written("about_until_6.json")["changes"]) == {"optim.b1: 0.9 -> 0.5"}
    notes = write_config(tmp_path, first, 0)
    assert notes == [f"kept         the old {x}.json as {tmp_path}/{x}.json.old" for x in ("config", "about")]
