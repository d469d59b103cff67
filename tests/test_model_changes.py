"""A resumed run refuses other arrays, and another function of the same parameters unless its stage names the field."""

import re

import optax
import pytest
from conftest import tiny

from hybrid_attn import config
from hybrid_attn.train.optim import OPTIMISERS
from hybrid_attn.train.resume import check_arrays, check_function

FUNCTION = {
    "model.kinds.L.rope_theta": 500.0,
    "model.kinds.L.window": 7,
    "model.kinds.L.rope_scaling.type": "linear",
    "model.kinds.G.softcap": 30.0,
    "model.kinds.G.temperature.type": "log_length",
    "model.norm": "rms",
    "model.norm_eps": 1e-3,
    "model.activation": "gelu",
    "model.logit_scale": 0.5,
    "model.mup_base_width": 16,
}
STAGE = {"steps": 5, "seq_len": 48, "batch": 8, "microbatches": 1, "mixture": {}}


@pytest.fixture
def saved():
    return config.to_dict(tiny())


@pytest.mark.parametrize(
    "changes, keys",
    [
        ({"model.d_ff": 56, "model.kinds.L.window": 7}, ["model.d_ff"]),
        ({"model.num_heads": 8, "model.num_kv_heads": 8, "model.head_dim": 4}, ["head_dim", "num_heads", "num_kv_heads"]),
        ({"model.pattern": "GL"}, ["model.pattern"]),
        ({"model.kinds.G.qk_norm": "rms"}, ["model.kinds.G.qk_norm"]),
        ({"model.block": "sandwich"}, ["model.block"]),
        ({"optim.optimiser": "sgd"}, ["optim.optimiser"]),
    ],
    ids=str,
)
def test_a_change_of_the_arrays_is_refused_by_field_and_value(saved, changes, keys, one_device, monkeypatch):
    monkeypatch.setitem(OPTIMISERS, "sgd", lambda optim, specs, rate: optax.sgd(optim.lr))
    with pytest.raises(ValueError, match="^the checkpoint of step 3 is of another model or optimiser .*\n") as refused:
        check_arrays(saved, tiny(changes), 3, "the checkpoint of step 3")
    lines = str(refused.value).splitlines()[1:-1]
    assert len(lines) == len(keys) and all(key in line for key, line in zip(keys, lines, strict=True)), lines
    assert all(line.endswith(f"-> {changes[line.split(':')[0].strip()]!r}") for line in lines)


@pytest.mark.parametrize("key", FUNCTION)
def test_a_change_of_the_function_needs_the_stage_to_name_the_field(saved, key, one_device):
    c = tiny({key: FUNCTION[key]})
    check_arrays(saved, c, 3, "it")
    with pytest.raises(ValueError, match=f"(?s)step 3 .*\n  {key}: .* -> {FUNCTION[key]!r}\n.*stages.1..model_changes={key}$"):
        check_function(saved, tiny({key: FUNCTION[key], "stages": [STAGE | {"steps": 3, "model_changes": (key,)}, STAGE]}), 3)
    (line,) = check_function(saved, tiny({key: FUNCTION[key], "stages": [STAGE | {"model_changes": (key,)}]}), 3)
    assert re.fullmatch(rf"model +{key}: .* -> {FUNCTION[key]!r}, as stages\[0\].model_changes says", line)


def test_a_layer_type_of_the_pattern_that_has_no_layer_yet_is_no_other_model(one_device):
    short = {"model.pattern": "LLG", "model.num_layers": 2}
    with pytest.raises(ValueError, match="model or optimiser .*\n  model.d_ff: 48 -> 56\nuse"):
        check_arrays(config.to_dict(tiny(short)), tiny(short | {"model.d_ff": 56, "model.norm_eps": 1e-3}), 3, "it")


def test_of_another_pattern_only_fields_of_layer_types_in_both_have_to_be_named(one_device):
    saved = config.to_dict(tiny({"model.num_layers": 1}))
    values = config.to_dict(tiny({"model.num_layers": 1}))
    values["model"] |= {"pattern": "LX", "kinds": {"L": saved["model"]["kinds"]["L"], "X": saved["model"]["kinds"]["G"]}}
    with pytest.raises(ValueError, match=r"\n  model.pattern: 'LG' -> 'LX'\nuse .*model_changes=model.pattern$"):
        check_function(saved, config.build(values), 3)


def test_all_changed_fields_have_to_be_named(saved):
    changes = {key: FUNCTION[key] for key in ("model.norm_eps", "model.kinds.L.window")}
    c = tiny(changes | {"stages": [STAGE | {"model_changes": ("model.norm_eps",)}]})
    with pytest.raises(
        ValueError, match=r"(?s)\n  model.kinds.L.window: 5 -> 7\nuse.*changes=model.norm_eps,model.kinds.L.window$"
    ):
        check_function(saved, c, 0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.init_std": 0.5, "model.depth_init": True, "model.low_rank.init": "he"},
        {"model.kinds.X": tiny().model.kinds["L"]},
        {"optim.b1": 0.5, "seed": 3, "train.log_every": 7},
    ],
    ids=["initial", "type_without_layers", "others"],
)
def test_what_the_trained_parameters_do_not_depend_on_may_change(saved, changes, one_device):
    if "model.kinds.X" in changes:
        values = config.to_dict(tiny())
        values["model"]["kinds"]["X"] = values["model"]["kinds"]["L"]
        c = config.build(values)
    else:
        c = tiny(changes)
    check_arrays(saved, c, 3, "it")
    assert check_function(saved, c, 3) == []


def test_the_model_of_another_version_is_refused_with_all_that_differs(saved):
    saved["model"]["gone"] = saved["model"].pop("norm_eps")
    with pytest.raises(ValueError, match="\n  model.gone: 1e-05 -> None\n  model.norm_eps: None -> 1e-05\n"):
        check_arrays(saved, tiny(), 3, "it")


def test_a_stage_that_names_no_field_of_the_model_is_a_wrong_config():
    with pytest.raises(
        ValueError, match="stages.0..model_changes names 'model.kinds.L.rope_teta', .* 'model.kinds.L.rope_theta'"
    ):
        tiny({"stages": [STAGE | {"model_changes": ("model.kinds.L.rope_teta",)}]})
