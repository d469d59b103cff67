"""Families: the logits of their own implementations, both directions of config.json, and errors."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from conftest import BLOCKED, on_mesh, random_params
from converted import GOLDEN, HYBRID, read, with_layer_type, write

from hybrid_attn import config
from hybrid_attn.convert import families, hf
from hybrid_attn.infer import loading
from hybrid_attn.model import apply, logits


@pytest.fixture
def exported(tmp_path, one_device):
    """A directory of HYBRID as cohere2."""
    return write(tmp_path / "exported", HYBRID, random_params(HYBRID))


# Another case has the same family: one layout or one number differs.
VARIANTS = "cohere2_moe_rms", "cohere2_older", "cohere_qk_norm", "exaone4_full", "llama_linear", "olmo3_older", "smollm3_window"


@pytest.mark.parametrize("case", [pytest.param(x, marks=[pytest.mark.slow] * (x in VARIANTS)) for x in GOLDEN])
def test_logits_are_those_of_the_familys_own_implementation(case, one_device):
    golden = np.load(GOLDEN[case] / "golden.npz")
    model, params = read(GOLDEN[case])
    mask = golden["mask"]
    positions = np.tile(np.arange(mask.shape[1], dtype=np.int32), (len(mask), 1))
    batch = on_mesh({"tokens": golden["tokens"], "positions": positions, "segments": mask})

    @jax.jit
    def run(params, tokens, positions, segments):
        x_BTD = apply(model, params, tokens, positions, segments, BLOCKED._replace(kernel="reference"))
        return logits(model, params, x_BTD)

    got = np.asarray(run(params, batch["tokens"], batch["positions"], batch["segments"]))
    assert np.abs(golden["logits"]).max() > 0.1
    np.testing.assert_allclose(got * mask[..., None], golden["logits"], atol=1e-4, rtol=0)


def test_both_spellings_of_a_config_give_the_same_model():
    new = hf.read_config(GOLDEN["cohere2"])
    old = {key: x for key, x in new.items() if key not in ("layer_types", "rope_parameters")}
    old |= {"sliding_window_pattern": 4, "rope_theta": 50.0, "rope_scaling": None}
    assert families.model_of(old) == families.model_of(new)
    assert families.model_of(new).layers == "LLLG"


def test_an_exported_config_has_both_spellings(exported):
    described = hf.read_config(exported)
    assert described["rope_theta"] == described["rope_parameters"]["rope_theta"] == 100.0
    older = {key: x for key, x in described.items() if key != "rope_parameters"}
    assert families.model_of(older) == families.model_of(described)
    assert families.differences(HYBRID, families.model_of(described)) == []


def test_letters_and_periods_do_not_count_when_models_are_compared():
    spelled = dataclasses.replace(HYBRID, pattern="XXYXX", kinds=config.Table(X=HYBRID.kinds["L"], Y=HYBRID.kinds["G"]))
    assert families.differences(spelled, HYBRID) == []
    other = dataclasses.replace(HYBRID, num_layers=4)
    assert families.differences(HYBRID, other) == ["  model.num_layers: 5 -> 4"]


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (with_layer_type(HYBRID, "G", qk_norm="rms"), "model.kinds.G.qk_norm: rms -> none"),
        (with_layer_type(HYBRID, "L", sink=True), "model.kinds.L.sink: True -> False"),
        (with_layer_type(HYBRID, "G", scale=1.0), r"model.kinds.G.scale: 1.0 -> 0.353553391"),
        (with_layer_type(HYBRID, "L", rope_fraction=0.5), "model.kinds.L.rope_fraction: 0.5 -> 1.0"),
        (dataclasses.replace(HYBRID, logit_softcap=3.0), "model.logit_softcap: 3.0 -> None"),
        (dataclasses.replace(HYBRID, rope_layout="half"), "model.rope_layout: half -> interleaved"),
        (dataclasses.replace(HYBRID, block="post"), "model.block: post -> parallel"),
    ],
)
def test_a_model_that_the_family_cannot_express_is_refused_with_the_field(model, field, tmp_path):
    with pytest.raises(ValueError, match=f"cohere2 cannot express this model.*\n  {field}"):
        families.config_json(model, "cohere2", 64)


def test_a_model_that_no_family_expresses_is_refused_with_the_nearest():
    with pytest.raises(ValueError, match="no family expresses this model(.|\n)*cohere2 cannot express.*\n  model.kinds.L.sink"):
        families.expressing(with_layer_type(HYBRID, "L", sink=True))
    assert families.expressing(HYBRID) == "cohere2"


@pytest.mark.parametrize("length", ["x", True, 0, -5, 1, 2**31, 1.5, []])
def test_a_config_file_whose_length_is_not_a_number_is_named(tmp_path, length):
    path = tmp_path / "companions" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"max_position_embeddings": length}))
    message = re.escape(f"config.json has max_position_embeddings={length!r}; make it a number of tokens, from 2 to")
    for call in (lambda: hf.describe(HYBRID, path.parent, 64), lambda: loading.trained_length(None, tmp_path, 0)):
        with pytest.raises(ValueError, match=message):
            call()


def test_an_ntk_stretch_is_written_as_the_theta_that_it_is():
    scaling = dataclasses.replace(HYBRID.kinds["L"].rope_scaling, type="ntk", factor=2.0)
    described = families.config_json(with_layer_type(HYBRID, "L", rope_scaling=scaling), "cohere2", 64)
    assert described["rope_parameters"]["rope_theta"] == pytest.approx(100.0 * 2 ** (8 / 6))


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("cohere2", {"model_type": "mamba"}, "model_type='mamba' of config.json is not one of 'afmoe', 'cohere', 'cohere2'"),
        ("cohere2", {"model_type": None}, "model_type=None of config.json is not one of"),
        ("cohere2", {"hidden_size": None, "vocab_size": None}, "config.json lacks vocab_size, hidden_size"),
        ("cohere2", {"hidden_size": "24"}, "hidden_size='24', which must be a whole number"),
        ("cohere2", {"layer_types": ["full_attention"] * 3}, "layer types for 3 layers and num_hidden_layers=4"),
        ("cohere2", {"layer_types": ["chunked_attention"] * 4}, "layer_types chunked_attention; known: sliding_attention"),
        ("cohere2", {"rope_parameters": {"full_attention": {}}}, "cohere2 has one RoPE"),
        ("cohere2", {"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'; known: default, linear"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "config.json lacks 'factor'"),
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0}}, "lacks 'high_freq_factor'"),
        ("llama_yarn", {"rope_parameters": {"rope_type": "yarn"}, "max_position_embeddings": None}, "lacks original_max"),
        ("cohere2", {"sliding_window": "5"}, "value of the wrong type"),
        (
            "cohere2",
            {"quantization_config": {"quant_method": "fp8"}},
            "quant_method='fp8'; only mxfp4 and plain floats are supported: use",
        ),
        ("gpt_oss", {"quantization_config": {}}, "quantization_config of quant_method=None; only mxfp4"),
        ("cohere2", {"model_type": []}, r"model_type=\[\] of config.json is not one of"),
        ("cohere2", {"hidden_act": []}, r"activation \[\] of config.json is not one of 'silu'"),
        ("cohere2", {"hidden_size": True}, "hidden_size=True, which must be a whole number"),
        ("cohere2", {"layer_types": None, "sliding_window_pattern": ""}, "sliding_window_pattern='', which must be"),
        ("cohere2", {"layer_types": None, "sliding_window_pattern": 2.5}, "sliding_window_pattern=2.5, which must be"),
        ("cohere2", {"rope_parameters": "abc"}, "rope_parameters='abc', which must be an object"),
        ("olmo3", {"rope_parameters": {"sliding_attention": "abc"}}, "rope_parameters.sliding_attention='abc', which must be"),
        ("gemma3_text", {"query_pre_attn_scalar": 0}, "query_pre_attn_scalar=0.0, which must be a number above 0"),
        ("smollm3", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "no_rope_layer_interval=0, which must be"),
        ("afmoe", {"layer_types": None, "global_attn_every_n_layers": ""}, "global_attn_every_n_layers='', which must be"),
        ("llama", {"rope_scaling": {"rope_type": "linear", "factor": 10**400}}, "value of the wrong type or size"),
        ("llama", {"intermediate_size": 20.5}, "intermediate_size=20.5, which must be a whole number"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000, which must be at most 1,024"),
        ("llama", {"num_hidden_layers": -1}, "num_hidden_layers=-1, which must be a whole number above 0"),
        ("llama", {"vocab_size": 10**30}, "vocab_size=10+, which must be at most 67,108,864"),
        ("llama", {"num_key_value_heads": 0}, "num_key_value_heads=0, which must be a whole number above 0"),
        ("llama", {"head_dim": "8"}, "head_dim='8', which must be a whole number above 0"),
        ("llama", {"rms_norm_eps": 10**400}, "must be a finite number"),
        ("llama", {"rms_norm_eps": [0] * 10**5}, r"^model.norm_eps=\[0, 0.{500,600}$"),
        (
            "olmo3",
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            "type='linear', which the library of olmo3 ignores",
        ),
        (
            "gemma3_text",
            {"rope_scaling": {"type": "yarn"}},
            "type='yarn', which the library of gemma3_text ignores; rename",
        ),
        ("cohere2", {"attention_bias": True}, "attention_bias=True; for cohere2, only attention_bias=False"),
        ("cohere2", {"hidden_act": "relu2"}, "activation 'relu2' of config.json is not one of 'silu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("olmo3", {"rope_parameters": {"rope_theta": 5.0}}, "olmo3 has one for each"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "only use_bidirectional_attention=False"),
        (
            "afmoe",
            {"num_dense_layers": 2, "num_shared_experts": 0},
            "num_shared_experts=0, which must be a whole number",
        ),
        ("smollm3", {"layer_types": ["sliding_attention"] * 4, "sliding_window": 5}, "use_sliding_window=false"),
    ],
)
def test_a_config_that_is_not_ours_is_refused_with_its_field(case, fields, message):
    values = {**hf.read_config(GOLDEN[case]), **fields}
    with pytest.raises(ValueError, match=message):
        families.model_of({key: x for key, x in values.items() if x is not None})


def test_layers_of_olmo3_follow_the_pattern_as_in_its_library():
    """It ignores `sliding_window_pattern`: every fourth layer is full."""
    values = {key: x for key, x in hf.read_config(GOLDEN["olmo3"]).items() if key != "layer_types"}
    assert families.model_of(values | {"sliding_window_pattern": 2}) == families.model_of(values)


def test_key_value_heads_that_are_null_are_as_many_as_heads():
    """Without the field smollm3 has four; with null its library uses all heads."""
    values = hf.read_config(GOLDEN["smollm3"])
    assert families.model_of(values | {"num_key_value_heads": None}).num_kv_heads == values["num_attention_heads"]


@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_heads_that_do_not_divide_the_width_are_not_exported_to_a_library_that_requires_it(model_type):
    model = families.model_of(hf.read_config(GOLDEN[model_type]))
    model = dataclasses.replace(model, d_model=model.num_heads * 7 + 1, num_kv_heads=model.num_heads)
    if model.embed_scale != 1.0:
        model = dataclasses.replace(model, embed_scale=model.d_model**0.5)
    message = f"model.d_model: {model.d_model} must be a multiple of model.num_heads={model.num_heads}, or transformers"
    with pytest.raises(ValueError, match=message):
        families.config_json(model, model_type, 64)
