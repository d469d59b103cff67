"""What is built of a config: its round trip, its layers, its stages, and the names that older configs have."""

import copy
import dataclasses
import importlib
import json

import pytest
from conftest import tiny

from configs import base
from hybrid_attn import config, trees
from hybrid_attn.config import Mesh, Stage


def test_what_is_built_comes_back_from_its_dict_even_through_json():
    everything = {"chunk": 7, "rope_theta": 100.0, "rope_scaling.type": "yarn", "temperature.type": "steps", "sink": True}
    for c in (tiny({"data.sources.text.paths": ("a/*.txt",), "mesh.fsdp": 2}, C=everything), config.build(base.get_config())):
        values = config.to_dict(c)
        assert config.build(values) == c and config.build(json.loads(json.dumps(values))) == c
        assert config.to_dict(config.build(values)) == values
        assert hash(config.build(values).model) == hash(c.model)


def test_layers_begin_with_a_prefix_repeat_the_pattern_and_end_with_a_tail():
    model = tiny({"model.prefix": "GG", "model.pattern": "LLG", "model.num_layers": 9}).model
    assert (model.layers, model.num_periods, model.tail) == ("GGLLGLLGL", 2, "L")
    assert model.groups == [("prefix", "GG", 1), ("periods", "LLG", 2), ("tail", "L", 1)]
    model = tiny({"model.prefix": "GG", "model.pattern": "LLG", "model.num_layers": 2}).model
    assert (model.layers, model.num_periods, model.tail) == ("GG", 0, "")
    c = tiny({"model.prefix": "R", "train.remat": "R=none"}, R={"rope_theta": 100.0})
    assert config.remat(c.model, c.train) == {"R": "none", "L": "layer", "G": "layer"}
    model = tiny({"model.pattern": "LLG", "model.num_layers": 8}).model
    assert (model.layers, model.num_periods, model.tail) == ("LLGLLGLL", 2, "LL")
    model = tiny({"model.pattern": "LLG", "model.num_layers": 2}).model
    assert (model.layers, model.num_periods, model.tail) == ("LL", 0, "LL")


def test_a_step_belongs_to_its_stage():
    sizes = {"batch": 8, "microbatches": 1, "mixture": {}}
    c = tiny({"stages": [{"steps": 3, "seq_len": 48} | sizes, {"steps": 2, "seq_len": 96} | sizes]})
    assert c.total_steps == 5
    assert [c.stage_at(step) for step in range(5)] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)]
    with pytest.raises(ValueError, match="step 5 is beyond the last of 5 steps"):
        c.stage_at(5)


def test_the_config_of_a_stage_has_its_fields_and_the_groups_of_the_run():
    first = {"steps": 3, "seq_len": 48, "batch": 8, "microbatches": 2, "mixture": {}}
    stages = [first, first | {"steps": 2}, first | {"seq_len": 96, "mixture": {"text": 2.0}}]
    c = tiny({"stages": stages})
    a, b, last = c.each_stage
    assert (a.index, a.steps, a.seq_len, a.batch, a.microbatches, a.objective) == (0, 3, 48, 8, 2, "next_token")
    assert (a.mixture, last.mixture, last.seq_len) == ({"text": 1.0}, {"text": 2.0}, 96) and last == c.at(-1)
    assert (a.model, a.mesh, a.optim, a.train) == (c.model, c.mesh, c.optim, c.train) and a.pieces[0][:2] == (8, None)
    # One program for two stages that differ in their number of steps alone.
    assert a == b and hash(a) == hash(b) and a != last and (b.index, b.steps) == (1, 2)


def test_every_key_of_the_defaults_has_a_field_and_every_field_a_default():
    values = base.get_config()

    def check(wanted, value):
        fields = {field.name: field for field in dataclasses.fields(wanted)}
        assert set(value.keys()) == set(fields)
        assert all(field.default is dataclasses.MISSING for field in fields.values())

    check(config.Config, values)
    for name, wanted in (("model", config.Model), ("mesh", Mesh), ("data", config.Data), ("optim", config.Optim)):
        check(wanted, values[name])
    check(config.Train, values.train)
    check(config.Evals, values.evals)
    check(config.InitFrom, values.init_from)
    check(Stage, values.stages[0])
    check(config.Source, base.source())
    check(config.LayerType, base.kind())
    check(config.RopeScaling, base.kind().rope_scaling)
    check(config.Temperature, base.kind().temperature)
    check(config.MLP, base.kind().mlp)


def test_the_baseline_differs_from_the_hybrid_in_its_kinds_of_layers_alone():
    for size in importlib.import_module("configs.hybrid_8k").SIZES:
        hybrid, rope = (
            config.to_dict(config.build(importlib.import_module(f"configs.{name}").get_config(size)))
            for name in ("hybrid_8k", "rope_8k")
        )
        changed = {line.split(":")[0] for line in trees.differences(hybrid, rope)}
        assert changed == {"model.pattern", "model.kinds.G", "model.kinds.L", "model.kinds.R"}


def test_names_of_before_are_errors_that_give_todays_and_older_checkpoints_are_read():
    with pytest.raises(ValueError, match="train.balance; did you mean config.train.zigzag"):
        tiny({"train.balance": True})
    with pytest.raises(ValueError, match="train.context: G='exchange' is now called 'ulysses'"):
        tiny({"train.context": "G=exchange"})
    c = tiny({"train.context": "G=ulysses", "train.zigzag": False})
    values = config.to_dict(c)
    older = copy.deepcopy(values)
    older["train"] |= {"balance": older["train"].pop("zigzag"), "context": "G=exchange"}
    del older["optim"]["optimiser"], older["stages"][0]["objective"], older["stages"][0]["model_changes"]
    del older["model"]["kinds"]["G"]["mixer"], older["model"]["kinds"]["L"]["short_conv"]
    del older["model"]["kinds"]["L"]["mlp"], older["model"]["prefix"]
    older["model"]["kinds"]["G"]["mlp"] = "gated"
    assert config.upgraded(older) == values == config.upgraded(values)
    del (of_first_experts := copy.deepcopy(values))["model"]["kinds"]["G"]["mlp"]["bias_rate"]
    assert config.upgraded(of_first_experts) == values


def test_no_two_stages_have_one_name_and_a_number_is_the_name_of_a_stage_without_one():
    named = [dict(config.to_dict(tiny())["stages"][0], name=name) for name in ("warm-up", None, "cooldown")]
    c = tiny({"stages": named})
    assert c.stage_names == ["warm-up", "2", "cooldown"] and c.at(1).name == "2"
    for index, name in ((2, "warm-up"), (0, "2")):
        twice = [stage | ({"name": name} if i == index else {}) for i, stage in enumerate(named)]
        with pytest.raises(ValueError, match=rf"stages\[\d\] and stages\[\d\] are both called {name!r}; give one another name"):
            tiny({"stages": twice})
    with pytest.raises(ValueError, match="name='a b' must be at most 40 letters"):
        tiny({"stages": [named[0] | {"name": "a b"}]})
