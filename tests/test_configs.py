"""The configs of published models have their published numbers, and those of the paper are its variants."""

import importlib

import pytest

from configs import hybrid_8k, recall
from hybrid_attn import config, trees
from hybrid_attn.convert import families
from hybrid_attn.model import flops

R7B = {
    "model_type": "cohere2", "vocab_size": 256000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rope_theta": 50000.0, "rope_scaling": None,
    "sliding_window": 4096, "sliding_window_pattern": 4, "layer_switch": 4, "logit_scale": 0.25, "layer_norm_eps": 1e-5,
    "order_of_interleaved_layers": "local_attn_first", "position_embedding_type": "rope_gptj", "rotary_pct": 1.0,
    "use_parallel_block": True, "use_embedding_sharing": True, "use_gated_activation": True, "attention_bias": False,
    "hidden_act": "silu", "initializer_range": 0.02, "max_position_embeddings": 8192, "cache_implementation": "hybrid",
}  # fmt: skip
COMMAND_A = R7B | {"hidden_size": 12288, "intermediate_size": 36864, "num_hidden_layers": 64, "num_attention_heads": 96}
LAYER_TYPES = [*["sliding_attention"] * 3, "full_attention"] * 9
AYA = R7B | {"hidden_size": 2048, "intermediate_size": 11008, "num_attention_heads": 16, "num_key_value_heads": 4}
AYA |= {"vocab_size": 262144, "num_hidden_layers": 36, "logit_scale": 1.0, "layer_types": LAYER_TYPES}
AYA.pop("sliding_window_pattern")


def model_of(name: str, *args) -> config.Model:
    return config.build(importlib.import_module(f"configs.{name}").get_config(*args)).model


@pytest.mark.parametrize(
    ("name", "billions", "published"),
    [("command_r7b", 8.028, R7B), ("command_a", 111.058, COMMAND_A), ("tiny_aya", 3.349, AYA)],
)
def test_published_models_have_their_parameters_and_are_what_their_config_json_says(name, billions, published):
    model = model_of(f"models.{name}")
    assert round(flops.parameters(model) / 1e9, 3) == billions
    assert families.model_of(published) == model  # so that a run with this config goes on from imported weights


@pytest.mark.parametrize("size", hybrid_8k.SIZES)
@pytest.mark.parametrize(
    ("name", "layers", "parameters_of_norms"),
    [("rope", "RRRR", False), ("qk_norm", "RRRR", True), ("nope", "GGGG", False), ("rnope", "RGRG", False),
     ("rnope_swa", "LLLG", False)],
)  # fmt: skip
def test_variants_of_the_paper_differ_in_nothing_but_their_layers(name, layers, parameters_of_norms, size):
    model, hybrid = model_of(f"paper.{name}", size), model_of("hybrid_8k", size)
    assert model.layers == layers * (model.num_layers // 4) and set(model.kinds) == set(layers)
    kinds = [model.kinds[letter] for letter in layers]
    assert [kind.window for kind in kinds] == [hybrid.kinds["L"].window if letter == "L" else None for letter in layers]
    assert [kind.rope_theta for kind in kinds] == [None if letter == "G" else 10_000.0 for letter in layers]
    assert {kind.qk_norm for kind in kinds} == {"layernorm" if parameters_of_norms else "none"}
    lines = families.differences(model, hybrid)
    assert all(line.startswith("  model.kinds.") for line in lines)


@pytest.mark.parametrize(
    ("layout", "layers"),
    [("rnope_swa", "LLLG"), ("rnope_swa_1to1", "LGLG"), ("rnope", "RGRG"), ("swa_rope", "LLLR"), ("swa_rope_1to1", "LRLR"),
     ("rope", "RRRR"), ("nope", "GGGG"), ("swa", "LLLL")],
)  # fmt: skip
def test_layouts_of_the_recall_probe_differ_in_nothing_but_their_layers(layout, layers):
    c, default = (config.build(recall.get_config(*argument)) for argument in ((layout,), ()))
    assert len(recall.LAYOUTS) == 8 and c.model.layers == layers and set(c.model.kinds) == set(layers)
    for letter, kind in c.model.kinds.items():
        assert kind.window == (16 if letter == "L" else None)
        assert kind.rope_theta == (None if letter == "G" else 10_000.0)
    lines = trees.differences(config.to_dict(default), config.to_dict(c))
    assert all(line.startswith(("model.kinds.", "model.pattern: ")) for line in lines)
    assert flops.parameters(c.model) == flops.parameters(default.model)
