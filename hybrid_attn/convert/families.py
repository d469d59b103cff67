"""The table of model families. Each entry converts config.json and tensor names to the fields of `Model` and back.

`model_of` reads a config.json, `config_json` writes one and refuses what the family cannot express, and `tensors` names the
arrays. `defaults` has the values that the implementation of a family uses for fields that its config.json lacks.
"""

import dataclasses
import string
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hybrid_attn import config, trees
from hybrid_attn.config import LayerType, Model
from hybrid_attn.convert import experts, layers, mxfp4
from hybrid_attn.convert.fields import positive_int
from hybrid_attn.convert.normal import layer_types_of, normal_form, rounded
from hybrid_attn.convert.tensors import LAYER, Tensor
from hybrid_attn.convert.tensors import tensors as tensors_of
from hybrid_attn.trees import check

USUAL_LETTERS = {(True, True): "L", (True, False): "W", (False, False): "G", (False, True): "R"}  # window, rope
NULLABLE = ("sliding_window", "final_logit_softcapping", "num_key_value_heads")  # null is a value here, not the default
MAX_MESSAGE = 600  # characters of an error, which may quote a value of any size
ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh"}
FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "d_model",
    "intermediate_size": "d_ff",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "head_dim": "head_dim",
    "initializer_range": "init_std",
    "tie_word_embeddings": "tie_embeddings",
}
UNSCALED = {  # which config.json has no fields for
    "unembed_init_std": None, "mup_base_width": None, "mup_base_depth": None, "depth_init": False,
}  # fmt: skip
# Path of a parameter in a layer -> tensor name after `model.layers.N.`
HEAD_NORMS = {"attention/q_norm/weight": "self_attn.q_norm.weight", "attention/k_norm/weight": "self_attn.k_norm.weight"}
SINKS = {"attention/sink": "self_attn.sinks"}
ATTENTION_BIASES = {f"attention/{name}_bias": f"self_attn.{name}_proj.bias" for name in ("q", "k", "v", "o")}
PRE = {"attention_norm/weight": "input_layernorm.weight", "mlp_norm/weight": "post_attention_layernorm.weight"}
POST = {
    "attention_post_norm/weight": "post_attention_layernorm.weight",
    "mlp_post_norm/weight": "post_feedforward_layernorm.weight",
}


class Family(NamedTuple):
    """One family. `layer_types` returns the layer type of every layer of a config.json; `layout` is its inverse."""

    architecture: str
    fixed: dict  # Model fields that every model of the family has
    fields: dict  # config.json field -> Model field, besides FIELDS
    defaults: dict
    required: dict  # config.json fields of which only this value is supported
    layer_types: Callable[[dict], list[LayerType]]
    layout: Callable[[Model], dict]
    layer: dict  # path of a parameter in a layer -> tensor name or `Location`, besides LAYER
    flat: tuple[str, ...] = ()  # parameters whose tensor has one axis in the family
    scales: Callable[[dict], dict] = lambda c: {}  # Model fields that are computed from config.json
    experts: dict = {}  # the same of layers with experts, besides `layer`; empty if the family has none
    ignored: tuple[str, ...] = ()  # how tensors begin that its library ignores
    heads_divide_width: bool = False  # its library requires that num_attention_heads divides hidden_size


def family_of(model_type: str | None) -> Family:
    """The entry of `model_type`; ValueError if there is none."""
    problem = trees.not_among(model_type, sorted(FAMILIES))
    check(not problem, f"model_type={model_type!r} of config.json {problem}")
    return FAMILIES[model_type]


def model_of(config_json: Mapping) -> Model:
    """The model that a config.json describes; ValueError if the family or one of its features is not supported."""
    try:
        return _model_of(config_json)
    except KeyError as cause:
        raise ValueError(f"config.json lacks {cause} in the description of its layers or their RoPE") from cause
    except (TypeError, AttributeError, ArithmeticError) as cause:
        raise ValueError(f"config.json describes its layers with a value of the wrong type or size: {cause}") from cause
    except ValueError as cause:
        if len(str(cause)) <= MAX_MESSAGE:
            raise
        raise ValueError(f"{str(cause)[:MAX_MESSAGE]} ...") from None


def _model_of(config_json: Mapping) -> Model:
    family = family_of(config_json.get("model_type"))
    fields = {key: value for key, value in config_json.items() if value is not None or key in NULLABLE}
    c = {**family.defaults, **fields}
    if "quantization_config" in fields:
        method = fields["quantization_config"].get("quant_method")
        problem = f"config.json has a quantization_config of quant_method={method!r}; only {mxfp4.METHOD} and plain floats"
        check(method == mxfp4.METHOD, f"{problem} are supported: use the unquantized model")
    if "moe_intermediate_size" in c:  # a family whose layers all have experts has no width of dense ones
        c.setdefault("intermediate_size", c["moe_intermediate_size"])
    missing = [key for key in FIELDS if key not in c and key not in ("head_dim", "num_key_value_heads")]
    check(not missing, f"config.json lacks {', '.join(missing)}")
    if c.get("num_key_value_heads") is None:
        c["num_key_value_heads"] = c["num_attention_heads"]
    for key in ("num_attention_heads", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        positive_int(c, key)
    c.setdefault("head_dim", c["hidden_size"] // c["num_attention_heads"])
    for key in ("num_key_value_heads", "head_dim"):
        positive_int(c, key)
    for key, supported in family.required.items():
        if c.get(key, supported) != supported:
            raise ValueError(f"config.json has {key}={c[key]!r}; for {c['model_type']}, only {key}={supported!r} is supported")
    values = {ours: c[key] for key, ours in (FIELDS | family.fields).items()} | family.fixed | family.scales(c)
    problem = trees.not_among(values["activation"], list(ACTIVATIONS))
    check(not problem, f"the activation {values['activation']!r} of config.json {problem}")
    values["activation"] = ACTIVATIONS[values["activation"]]
    plain = {"adapter": config.to_dict(config.NO_ADAPTER), "low_rank": config.to_dict(config.DENSE)}
    return config.build_model(UNSCALED | plain | values | _layout(family.layer_types(c), c["num_hidden_layers"]))


def config_json(model: Model, model_type: str, max_len: int) -> dict:
    """The config.json of `model` for texts up to `max_len` tokens; ValueError with a line for each field that differs there."""
    family, model = family_of(model_type), trained(model)
    names = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    values = {theirs: getattr(model, ours) for theirs, ours in (FIELDS | family.fields).items()}
    values |= {key: names[value] for key, value in values.items() if (FIELDS | family.fields)[key] == "activation"}
    if "head_dim" not in family.defaults and model.head_dim * model.num_heads == model.d_model:
        values.pop("head_dim")  # families that derive it have no such field
    out = {"architectures": [family.architecture], "model_type": model_type, "max_position_embeddings": max_len}
    out |= values | family.required | family.layout(model)
    lines = differences(model, model_of(out))
    if family.heads_divide_width and model.d_model % model.num_heads:
        heads = f"model.num_heads={model.num_heads}"
        lines.append(f"  model.d_model: {model.d_model} must be a multiple of {heads}, or transformers cannot open it")
    check(not lines, f"{model_type} cannot express this model (ours -> what it would be there):\n" + "\n".join(lines))
    return out


def trained(model: Model) -> Model:
    """The model of the same function that says nothing of how it was initialised and trained."""
    return dataclasses.replace(model, logit_scale=config.output_scale(model), **UNSCALED)


def expressing(model: Model) -> str:
    """The first family that can express `model`; ValueError with the nearest family and the fields that it cannot express."""
    causes = {}
    for model_type in FAMILIES:
        try:
            config_json(model, model_type, 1)
            return model_type
        except ValueError as cause:
            causes[model_type] = str(cause)
    nearest = min(causes.values(), key=lambda text: text.count("\n") or MAX_MESSAGE)
    raise ValueError(f"no family expresses this model ({', '.join(FAMILIES)}); the nearest:\n{nearest}")


def differences(ours: Model, theirs: Model) -> list[str]:
    """Lines `model.field: ours -> theirs` where two models compute different functions, whatever their letters are."""
    a, b = _normal_form(ours), _normal_form(theirs)
    if not (_rotates(ours) and _rotates(theirs)):
        del a["rope_layout"], b["rope_layout"]
    a["kinds"], b["kinds"] = {}, {}
    for letter, one, other in zip(ours.layers, a.pop("layers"), b.pop("layers"), strict=False):
        if one != other or letter not in a["kinds"]:
            a["kinds"][letter], b["kinds"][letter] = one, other
    return trees.differences(a, b, "  model.")


def tensors(model: Model, model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """The tensors of the files of a family, for parameters with these paths and shapes, parameter by parameter."""
    family = family_of(model_type)
    dense = LAYER | family.layer
    locations = {"gated": dense} | ({"moe": dense | family.experts} if family.experts else {})
    return tensors_of(model, locations, family.flat, shapes)


def _layout(layer_types: list[LayerType], num_layers: int) -> dict:
    """The `prefix` and the `pattern` that repeat to these layer types, and the `kinds` of their letters.

    The pattern is the shortest, without a prefix where it repeats twice or more often. Else the prefix is that which makes both
    together shortest; but there is none where both are more than half of the layers.
    """
    number = len(layer_types)
    check(number == num_layers, f"config.json has layer types for {number} layers and num_hidden_layers={num_layers}")
    letter_of: dict[LayerType, str] = {}
    for layer_type in layer_types:
        if layer_type not in letter_of:
            usual = USUAL_LETTERS[layer_type.window is not None, layer_type.rope_theta is not None]
            letter_of[layer_type] = next(x for x in usual + string.ascii_uppercase if x not in letter_of.values())
    letters = "".join(letter_of[layer_type] for layer_type in layer_types)
    kinds = {letter: config.to_dict(layer_type) for layer_type, letter in letter_of.items()}
    periods = config.shortest_periods(letters)
    length = min(range(number), key=lambda n: n + periods[number - n])
    if 2 * periods[number] <= number or 2 * (length + periods[number - length]) > number:
        length = 0
    return {"prefix": letters[:length], "pattern": letters[length : length + periods[number - length]], "kinds": kinds}


def _normal_form(model: Model) -> dict:
    """The fields of a model, and the normal form of the layer type of each layer in place of prefix, pattern and `d_ff`."""
    values = {
        name: value for name, value in vars(model).items() if name not in ("prefix", "pattern", "kinds", "d_ff", "adapter")
    }
    normal_forms = [config.to_dict(normal_form(model, x)) for x in layer_types_of(model)]
    scales = {name: rounded(getattr(model, name)) for name in ("embed_scale", "logit_scale")}
    return values | scales | {"layers": normal_forms}


def _rotates(model: Model) -> bool:
    return any(layer_type.rope_theta is not None for layer_type in layer_types_of(model))


COHERE = {"block": "parallel", "norm": "layernorm", "rope_layout": "interleaved", "embed_scale": 1.0, "logit_softcap": None}
LLAMA = {"norm": "rms", "rope_layout": "half", "embed_scale": 1.0, "logit_scale": 1.0, "logit_softcap": None}
COHERE_FIELDS = {"layer_norm_eps": "norm_eps", "hidden_act": "activation", "logit_scale": "logit_scale"}
LLAMA_FIELDS = {"rms_norm_eps": "norm_eps", "hidden_act": "activation"}
COMMON = {"hidden_act": "silu", "initializer_range": 0.02}
COHERE_DEFAULTS = COMMON | {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True}
NO_BIAS = {"attention_bias": False}
GRANITE = {"norm": "rms", "rope_layout": "half", "block": "pre", "logit_softcap": None}
GRANITE_DEFAULTS = COMMON | {
    "embedding_multiplier": 1.0, "logits_scaling": 1.0, "residual_multiplier": 1.0, "attention_multiplier": 1.0,
    "sliding_window": 128,
}  # fmt: skip
GPT_OSS_ROPE = {
    "rope_type": "yarn", "factor": 32.0, "beta_fast": 32.0, "beta_slow": 1.0, "truncate": False,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
MINISTRAL_ROPE = {
    "rope_type": "yarn", "rope_theta": 1e6, "factor": 16.0, "original_max_position_embeddings": 16384, "beta_fast": 32.0,
    "beta_slow": 1.0, "mscale_all_dim": 1.0, "mscale": 1.0, "llama_4_scaling_beta": 0.1,
}  # fmt: skip

FAMILIES = {
    "cohere2": Family(
        "Cohere2ForCausalLM", COHERE, COHERE_FIELDS, COHERE_DEFAULTS | {"sliding_window_pattern": 4, "sliding_window": 4096},
        NO_BIAS, layers.cohere2_layer_types, layers.cohere2_layout, {"norm/weight": "input_layernorm.weight"},
    ),
    "cohere": Family(
        "CohereForCausalLM", COHERE, COHERE_FIELDS, COHERE_DEFAULTS | {"use_qk_norm": False},
        NO_BIAS, layers.cohere_layer_types, layers.cohere_layout, {"norm/weight": "input_layernorm.weight"} | HEAD_NORMS,
    ),
    "cohere2_moe": Family(
        "Cohere2MoeForCausalLM", {k: x for k, x in COHERE.items() if k != "norm"},
        {"hidden_act": "activation", "logit_scale": "logit_scale"},
        COHERE_DEFAULTS | {"sliding_window_pattern": 4, "sliding_window": 4096, "head_dim": 128, "num_experts": 8,
                           "num_experts_per_tok": 2, "num_shared_experts": 0, "shared_expert_combination_strategy": "average",
                           "expert_selection_fn": "softmax", "prefix_dense_sliding_window_pattern": 1, "norm_topk_prob": True},
        NO_BIAS, experts.cohere2_moe_layer_types, experts.cohere2_moe_layout, {"norm/weight": "input_layernorm.weight"},
        scales=experts.cohere2_moe_norm, experts=experts.EACH,
    ),
    "llama": Family(
        "LlamaForCausalLM", LLAMA | {"block": "pre"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        NO_BIAS | {"mlp_bias": False}, layers.llama_layer_types, layers.llama_layout, PRE, heads_divide_width=True,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM", LLAMA | {"block": "pre"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "no_rope_layer_interval": 4, "num_key_value_heads": 4},
        NO_BIAS | {"mlp_bias": False}, layers.smollm3_layer_types, layers.smollm3_layout, PRE,
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM", LLAMA | {"block": "post"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window_pattern": 4, "sliding_window": 4096,
                  "num_key_value_heads": 32},
        {}, layers.exaone4_layer_types, layers.exaone4_layout, POST | HEAD_NORMS,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM", LLAMA | {"block": "post"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window": 4096},
        NO_BIAS, layers.olmo3_layer_types, layers.olmo3_layout, POST | HEAD_NORMS,
        flat=tuple(HEAD_NORMS),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {"block": "sandwich", "norm": "rms_plus1", "rope_layout": "half", "logit_scale": 1.0},
        {"rms_norm_eps": "norm_eps", "hidden_activation": "activation", "final_logit_softcapping": "logit_softcap"},
        {"initializer_range": 0.02, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "head_dim": 256,
         "num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window_pattern": 6, "sliding_window": 4096,
         "query_pre_attn_scalar": 256, "final_logit_softcapping": None},
        NO_BIAS | {"attn_logit_softcapping": None, "use_bidirectional_attention": False},
        layers.gemma3_layer_types, layers.gemma3_layout,
        {"attention_norm/weight": "input_layernorm.weight", "mlp_norm/weight": "pre_feedforward_layernorm.weight"}
        | POST | HEAD_NORMS,
        scales=lambda c: {"embed_scale": float(c["hidden_size"]) ** 0.5}, heads_divide_width=True,
    ),
    "granite_swa": Family(
        "GraniteSWAForCausalLM", GRANITE, LLAMA_FIELDS, GRANITE_DEFAULTS | {"rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        NO_BIAS | {"mlp_bias": False}, layers.granite_layer_types, layers.granite_layout, PRE | SINKS,
        scales=layers.granite_scales,
    ),
    "granitemoe_swa": Family(
        "GraniteMoeSWAForCausalLM", GRANITE, LLAMA_FIELDS,
        GRANITE_DEFAULTS | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "num_local_experts": 8,
                            "num_experts_per_tok": 2, "shared_intermediate_size": 0},
        NO_BIAS, experts.granitemoe_layer_types, experts.granitemoe_layout, PRE | SINKS,
        scales=layers.granite_scales, experts=experts.GRANITE,
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM", LLAMA | {"block": "pre"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "num_key_value_heads": 8, "head_dim": 128,
                  "sliding_window": None, "rope_parameters": MINISTRAL_ROPE},
        {}, layers.ministral3_layer_types, layers.ministral3_layout, PRE,
    ),
    "gpt_oss": Family(
        "GptOssForCausalLM", LLAMA | {"block": "pre"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "head_dim": 64, "num_key_value_heads": 8,
                  "sliding_window": 128, "num_local_experts": 128, "num_experts_per_tok": 4, "swiglu_limit": 7.0,
                  "swiglu_alpha": 1.702, "rope_parameters": GPT_OSS_ROPE},
        {"attention_bias": True}, experts.gpt_oss_layer_types, experts.gpt_oss_layout, PRE | SINKS | ATTENTION_BIASES,
        flat=tuple(x for x in ATTENTION_BIASES if x != "attention/o_bias"), experts=experts.GPT_OSS,
    ),
    "afmoe": Family(
        "AfmoeForCausalLM", LLAMA | {"block": "sandwich"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "head_dim": 128, "num_dense_layers": 1,
                  "global_attn_every_n_layers": 4, "sliding_window": 1024, "moe_intermediate_size": 1408, "num_experts": 64,
                  "num_experts_per_tok": 6, "num_shared_experts": 2, "route_scale": 1.0},
        NO_BIAS, experts.afmoe_layer_types, experts.afmoe_layout,
        {"attention_norm/weight": "input_layernorm.weight", "attention_post_norm/weight": "post_attention_layernorm.weight",
         "mlp_norm/weight": "pre_mlp_layernorm.weight", "mlp_post_norm/weight": "post_mlp_layernorm.weight",
         "attention/gate": "self_attn.gate_proj.weight"} | HEAD_NORMS,
        scales=lambda c: {"embed_scale": float(c["hidden_size"]) ** 0.5 if c.get("mup_enabled") else 1.0},
        experts=experts.AFMOE,
    ),
    "exaone_moe": Family(
        "ExaoneMoeForCausalLM", LLAMA | {"block": "pre"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window_pattern": 4, "sliding_window": 4096,
                  "num_key_value_heads": 32, "first_k_dense_replace": 1, "moe_intermediate_size": 1024, "num_experts": 64,
                  "num_experts_per_tok": 8, "num_shared_experts": 1, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
        {"n_group": 1, "topk_group": 1}, experts.exaone_moe_layer_types, experts.exaone_moe_layout, PRE | HEAD_NORMS,
        experts=experts.EXAONE, ignored=("mtp.",),
    ),
    "kolibri1": Family(
        "Kolibri1ForCausalLM", LLAMA | {"block": "sandwich"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False, "sliding_window": 513, "head_dim": 128,
                  "moe_intermediate_size": 512, "num_experts": 384, "num_experts_per_tok": 6, "norm_topk_prob": False,
                  "shared_expert_intermediate_size": 512},
        {}, experts.kolibri_layer_types, experts.kolibri_layout,
        {"attention_norm/weight": "input_layernorm.weight", "attention_post_norm/weight": "post_attn_norm.weight",
         "mlp_norm/weight": "post_attention_layernorm.weight", "mlp_post_norm/weight": "post_ffn_norm.weight"} | HEAD_NORMS,
        experts=experts.KOLIBRI,
    ),
}  # fmt: skip
