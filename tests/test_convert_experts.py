"""Families with experts: what their config.json says, and files whose experts are not those that it describes."""

import dataclasses
import shutil

import numpy as np
import pytest
from converted import GOLDEN, assert_same, edit, edit_tensors, read, with_layer_type

from hybrid_attn.convert import families, hf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.pop("model.layers.2.mlp.experts.3.up_proj.weight"),
         "1 tensors of experts in DIR are not those of its config.json, the first (file -> config.json) "
         "model.layers.2.mlp.experts.3.up_proj.weight: missing -> [20, 24]"),
        (lambda x: x.update({f"model.layers.1.mlp.experts.{i}.down_proj.weight": np.ones((24, 19)) for i in range(5)}),
         "5 tensors of experts in DIR are not those of its config.json, the first (file -> config.json) "
         "model.layers.1.mlp.experts.0.down_proj.weight: [24, 19] -> [24, 20]"),
    ],
)  # fmt: skip
def test_experts_that_are_missing_or_misshapen_are_one_line(change, message, tmp_path, one_device):
    directory = shutil.copytree(GOLDEN["cohere2_moe"], tmp_path / "model")
    edit_tensors(directory, change)
    with pytest.raises(ValueError) as error:
        read(directory)
    assert str(error.value) == message.replace("DIR", str(directory)) + "; correct config.json, or download the model again"


@pytest.mark.parametrize("case, number", [("cohere2_moe", 4 * (3 + 1)), ("kolibri1", 5 * (3 + 2)), ("granitemoe_swa", 5 * 3)])
def test_another_number_of_experts_is_one_line(case, number, tmp_path, one_device):
    """For each layer, the three matrices of the sixth expert, or the tensors of all, the router, and its bias."""
    directory = shutil.copytree(GOLDEN[case], tmp_path / "model")
    edit(directory, num_experts=6, num_local_experts=6)
    with pytest.raises(ValueError, match=f"^{number} tensors of experts in .* are not those of its config.json") as error:
        read(directory)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("cohere2_moe", {"num_experts_per_tok": 6}, "mlp.top_k=6 is above mlp.experts=5"),
        ("cohere2_moe", {"num_experts": 0}, "num_experts=0, which must be a whole number above 0"),
        ("cohere2_moe", {"expert_selection_fn": "tanh"}, "router='tanh' is not one of 'softmax', 'sigmoid'"),
        ("cohere2_moe", {"mlp_layer_types": ["dense"]}, "mlp_layer_types for 1 layers of 5"),
        ("cohere2_moe", {"mlp_layer_types": ["dense", "thin"] + ["sparse"] * 3}, "mlp_layer_types thin; known: dense, sparse"),
        ("exaone_moe", {"n_group": 2}, "n_group=2; for exaone_moe, only n_group=1 is supported"),
        ("exaone_moe", {"mlp_layer_types": ["dense"] * 5}, "mlp_layer_types for 5 layers of 4"),
        ("kolibri1", {"sliding_window": None}, "no sliding_window, and kolibri1 does not run without"),
        ("kolibri1", {"moe_intermediate_size": -1}, "moe_intermediate_size=-1, which must be a whole number above 0"),
        ("granitemoe_swa", {"num_local_experts": "4"}, "num_local_experts='4', which must be a whole number above 0"),
        ("granitemoe_swa", {"layer_rope_theta": [0, 100.0]}, "layer_rope_theta for 2 layers of 5"),
    ],
)
def test_a_mixture_that_cannot_be_is_refused_with_its_fields(case, fields, message):
    with pytest.raises(ValueError, match=message):
        families.model_of(hf.read_config(GOLDEN[case]) | fields)


def test_losses_of_the_router_do_not_count_and_its_other_fields_do():
    model = families.model_of(hf.read_config(GOLDEN["granitemoe_swa"]))
    for letter, kind in model.kinds.items():
        other = with_layer_type(model, letter, mlp=dataclasses.replace(kind.mlp, balance_loss=0.5, z_loss=0.0))
        assert families.differences(model, other) == []
    letter, kind = next(iter(model.kinds.items()))
    for name, value, shown in (("renormalise", False, "True -> False"), ("route_scale", 2.5, "1.0 -> 2.5")):
        other = with_layer_type(model, letter, mlp=dataclasses.replace(kind.mlp, **{name: value}))
        assert families.differences(model, other) == [f"  model.kinds.{letter}.mlp.{name}: {shown}"]
        with pytest.raises(ValueError, match=f"granitemoe_swa cannot express(.|\n)*mlp.{name}: "):
            families.config_json(other, "granitemoe_swa", 64)


def test_shared_experts_side_by_side_are_one_that_is_as_wide():
    model = families.model_of(hf.read_config(GOLDEN["cohere2_moe"]))
    letter = model.layers[-1]
    mlp = dataclasses.replace(model.kinds[letter].mlp, shared_experts=1, shared_d_ff=40)
    changed = dataclasses.replace(model, kinds=type(model.kinds)(
        {x: dataclasses.replace(kind, mlp=mlp) if kind.mlp.type == "moe" else kind for x, kind in model.kinds.items()}
    ))  # fmt: skip
    assert families.differences(model, changed) == []
    assert families.config_json(changed, "cohere2_moe", 64)["num_shared_experts"] == 2


def test_a_family_without_dense_layers_has_no_width_of_them_and_two_names_for_the_number_of_experts():
    described = hf.read_config(GOLDEN["kolibri1"])
    other = {key: x for key, x in described.items() if key not in ("intermediate_size", "num_experts")}
    other["num_local_experts"] = described["num_experts"]
    assert families.differences(families.model_of(described), families.model_of(other)) == []


def test_biases_of_routers_are_of_the_function_and_their_rate_is_not():
    model = families.model_of(hf.read_config(GOLDEN["kolibri1"]))
    letter, kind = next(iter(model.kinds.items()))
    fixed = with_layer_type(model, letter, mlp=dataclasses.replace(kind.mlp, bias_rate=0.0))
    assert families.differences(model, fixed) == []
    for change, shown in (({}, "bias_on: logit -> score"), ({"bias_rate": None}, "bias_rate: 0.0 -> None")):
        other = with_layer_type(model, letter, mlp=dataclasses.replace(kind.mlp, bias_on="score", **change))
        assert f"  model.kinds.{letter}.mlp.{shown}" in families.differences(model, other)


def test_layers_that_predict_further_tokens_are_not_read(tmp_path, one_device):
    directory = shutil.copytree(GOLDEN["exaone_moe"], tmp_path / "model")
    edit_tensors(directory, lambda x: x.update({"mtp.layers.0.mlp.gate.weight": np.ones((5, 24), np.float32)}))
    assert_same(read(directory)[1], read(GOLDEN["exaone_moe"])[1])
