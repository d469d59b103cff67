"""Converts the layers of families with experts, as `layers` does those of others."""

import dataclasses

from hybrid_attn.config import MLP, LayerType, Model, mlp_width, shared_width
from hybrid_attn.convert.fields import positive_int
from hybrid_attn.convert.layers import (
    exaone4_layer_types,
    exaone4_layout,
    granite_layer_types,
    granite_layout,
    layer_type_fields,
    layer_type_of,
    type_names,
)
from hybrid_attn.convert.normal import PLAIN, layer_types_of
from hybrid_attn.convert.rope import FULL, LOCAL, one_rope, rope_of
from hybrid_attn.convert.tensors import EXPERT, Location
from hybrid_attn.trees import check

DENSE, SPARSE = "dense", "sparse"
# Where the parameters of a mixture are stored. Of most families each expert has its own tensors.
SHARED = {f"mlp/shared/{name}": f"mlp.shared_experts.{name}_proj.weight" for name in ("gate", "up", "down")}
EACH = {f"mlp/{name}": f"mlp.experts.{EXPERT}.{name}_proj.weight" for name in ("gate", "up", "down")}
EACH |= SHARED | {"mlp/router": "mlp.gate.weight"}
GRANITE = {
    "mlp/router": "block_sparse_moe.router.weight",
    "mlp/gate": Location("block_sparse_moe.experts.gate_up_proj", 0, 2),
    "mlp/up": Location("block_sparse_moe.experts.gate_up_proj", 1, 2),
    "mlp/down": "block_sparse_moe.experts.down_proj",
    "mlp/shared/gate": Location("shared_mlp.input_linear.weight", 0, 2),
    "mlp/shared/up": Location("shared_mlp.input_linear.weight", 1, 2),
    "mlp/shared/down": "shared_mlp.output_linear.weight",
}
AFMOE = EACH | {"mlp/router": "mlp.router.gate.weight", "mlp/bias": "mlp.expert_bias"}
EXAONE = EACH | {"mlp/bias": "mlp.e_score_correction_bias"}
KOLIBRI = EACH | {"mlp/bias": "moe.router.expert_bias"}
GPT_OSS = {  # matrices are [in, out]; gate and up have every second output
    "mlp/router": "mlp.router.weight",
    "mlp/router_bias": "mlp.router.bias",
    "mlp/down": Location("mlp.experts.down_proj", as_ours=True),
    "mlp/down_bias": "mlp.experts.down_proj_bias",
}
GPT_OSS |= {f"mlp/{x}": Location("mlp.experts.gate_up_proj", i, 2, True, True) for i, x in enumerate(("gate", "up"))}
GPT_OSS |= {f"mlp/{x}_bias": Location("mlp.experts.gate_up_proj_bias", i, 2, True) for i, x in enumerate(("gate", "up"))}
BIASED = {"router": "sigmoid", "bias_rate": 0.001}  # of DeepSeek-V3; a config.json does not say how its biases were trained


def mixture(c: dict, width: str, experts: str, **fields) -> MLP:
    """The mixture of a config.json; `width` and `experts` are its fields for the width and the number of experts."""
    E, k = positive_int(c, experts), positive_int(c, "num_experts_per_tok")
    return dataclasses.replace(PLAIN.mlp, type="moe", d_ff=positive_int(c, width), experts=E, top_k=k, **fields)


def mlp_of(model: Model, type: str) -> LayerType | None:
    """The first layer type with a feed-forward of that type."""
    return next((layer_type for layer_type in layer_types_of(model) if layer_type.mlp.type == type), None)


def mlp_names(model: Model) -> list[str]:
    return [SPARSE if layer_type.mlp.type == "moe" else DENSE for layer_type in layer_types_of(model)]


def _check_mlp_names(names: list[str]) -> None:
    unknown = sorted({*names} - {DENSE, SPARSE})
    check(not unknown, f"config.json has mlp_layer_types {', '.join(unknown)}; known: {DENSE}, {SPARSE}")


def number_of_shared(model: Model, layer_type: LayerType) -> int:
    """How many experts of the width of the others have together that of the shared ones, rounded down."""
    return shared_width(model, layer_type) // mlp_width(model, layer_type)


def cohere2_moe_layer_types(c: dict) -> list[LayerType]:
    """Full layers have no positions, but for dense ones if these have no pattern of their own (a pattern of 1)."""
    number, dense = c["num_hidden_layers"], c.get("first_k_dense_replace", 0)
    patterns = [positive_int(c, "prefix_dense_sliding_window_pattern")] * dense
    patterns += [positive_int(c, "sliding_window_pattern")] * (number - dense)
    indices = [i if i < dense else i - dense for i in range(number)]
    default = [LOCAL if (i + 1) % every else FULL for i, every in zip(indices, patterns, strict=True)]
    names = type_names({"layer_types": default} | c)
    mlps = list(c.get("mlp_layer_types") or [DENSE] * dense + [SPARSE] * (number - dense))
    _check_mlp_names(mlps)
    check(len(mlps) == len(names), f"config.json has mlp_layer_types for {len(mlps)} layers of {len(names)}")
    rope, rotates = rope_of(c, 10_000.0), c["prefix_dense_sliding_window_pattern"] == 1
    width = c.get("prefix_dense_intermediate_size") or c["intermediate_size"]
    feed_forwards = {DENSE: dataclasses.replace(PLAIN.mlp, d_ff=width)}
    if SPARSE in mlps:
        feed_forwards[SPARSE] = _cohere2_mixture(c)
    return [
        layer_type_of(c, name, rope if name == LOCAL or (mlp == DENSE and rotates) else None, mlp=feed_forwards[mlp])
        for name, mlp in zip(names, mlps, strict=True)
    ]


def _cohere2_mixture(c: dict) -> MLP:
    """A softmax is of the logits of a token's experts alone, which is that of all, renormalised."""
    router, shared = c["expert_selection_fn"], c["num_shared_experts"]
    combine = c["shared_expert_combination_strategy"] if shared else PLAIN.mlp.shared_combine
    renormalise = router == "softmax" or c["norm_topk_prob"]
    fields = {"router": router, "renormalise": renormalise, "shared_experts": shared, "shared_combine": combine}
    return mixture(c, "intermediate_size", "num_experts", **fields)


def cohere2_moe_layout(model: Model) -> dict:
    sparse, dense = mlp_of(model, "moe"), mlp_of(model, "gated")
    fields = layer_type_fields(model) | one_rope(model) | {"mlp_layer_types": mlp_names(model)}
    if sparse is not None:
        mlp = sparse.mlp
        fields |= {
            "intermediate_size": mlp_width(model, sparse), "num_experts": mlp.experts, "num_experts_per_tok": mlp.top_k,
            "expert_selection_fn": mlp.router, "norm_topk_prob": mlp.renormalise,
            "num_shared_experts": number_of_shared(model, sparse), "shared_expert_combination_strategy": mlp.shared_combine,
        }  # fmt: skip
    if dense is not None:
        plain = [x for x in layer_types_of(model) if x.mlp.type == "gated" and x.window is None and x.rope_theta is None]
        fields |= {"prefix_dense_intermediate_size": mlp_width(model, dense)}
        fields |= {"prefix_dense_sliding_window_pattern": 4 if plain else 1}
    norm = {"rms": "rms_norm_eps"}.get(model.norm, "layer_norm_eps")
    return fields | {norm: model.norm_eps}


def cohere2_moe_norm(c: dict) -> dict:
    eps = c.get("rms_norm_eps")
    return {"norm": "layernorm", "norm_eps": c["layer_norm_eps"]} if eps is None else {"norm": "rms", "norm_eps": eps}


def granitemoe_layer_types(c: dict) -> list[LayerType]:
    """The shared experts have a width, not a number. A softmax is of the logits of a token's experts alone."""
    shared = c["shared_intermediate_size"]
    fields = {"shared_experts": 1, "shared_d_ff": shared} if shared else {}
    mlp = mixture(c, "intermediate_size", "num_local_experts", **fields)
    return [dataclasses.replace(layer_type, mlp=mlp) for layer_type in granite_layer_types(c)]


def granitemoe_layout(model: Model) -> dict:
    layer_type = mlp_of(model, "moe")
    if layer_type is None:
        return granite_layout(model)
    more = {"intermediate_size": mlp_width(model, layer_type), "shared_intermediate_size": shared_width(model, layer_type)}
    more |= {"num_local_experts": layer_type.mlp.experts, "num_experts_per_tok": layer_type.mlp.top_k}
    return granite_layout(model) | more


def _with_dense_first(c: dict, layer_types: list[LayerType], dense: list[bool], mlp: MLP | None) -> list[LayerType]:
    """`layer_types` with a mixture for their feed-forward, but for those that are dense."""
    check(len(dense) == len(layer_types), f"config.json has mlp_layer_types for {len(dense)} layers of {len(layer_types)}")
    return [x if plain else dataclasses.replace(x, mlp=mlp) for x, plain in zip(layer_types, dense, strict=True)]


def _fields_of_width(model: Model) -> dict:
    """`intermediate_size` is the width of dense layers, and `moe_intermediate_size` that of an expert."""
    widths = {"intermediate_size": mlp_of(model, "gated"), "moe_intermediate_size": mlp_of(model, "moe")}
    return {key: mlp_width(model, layer_type) for key, layer_type in widths.items() if layer_type is not None}


def _fields_of_experts(model: Model) -> dict:
    sparse = mlp_of(model, "moe")
    if sparse is None:
        return _fields_of_width(model)
    return _fields_of_width(model) | {"num_experts": sparse.mlp.experts, "num_experts_per_tok": sparse.mlp.top_k}


def afmoe_layer_types(c: dict) -> list[LayerType]:
    """Every mixture has shared experts. A mixture of none but dense layers may lack the fields of experts."""
    dense, number, rope = c["num_dense_layers"], c["num_hidden_layers"], rope_of(c, 10_000.0)
    if "layer_types" not in c:
        c = c | {"sliding_window_pattern": positive_int(c, "global_attn_every_n_layers")}
    ropes = {LOCAL: rope, FULL: None}
    layer_types = [layer_type_of(c, name, ropes[name], qk_norm="rms", gate="projection") for name in type_names(c)]
    fields = {"shared_experts": positive_int(c, "num_shared_experts"), "route_scale": float(c["route_scale"])}
    mlp = None if dense >= number else mixture(c, "moe_intermediate_size", "num_experts", **BIASED, **fields)
    return _with_dense_first(c, layer_types, [i < dense for i in range(number)], mlp)


def afmoe_layout(model: Model) -> dict:
    sparse, names = mlp_of(model, "moe"), mlp_names(model)
    fields = layer_type_fields(model) | one_rope(model) | _fields_of_experts(model)
    fields |= {"num_dense_layers": (names + [SPARSE]).index(SPARSE), "mup_enabled": model.embed_scale != 1.0}
    gates = {"route_scale": sparse.mlp.route_scale, "num_shared_experts": number_of_shared(model, sparse)} if sparse else {}
    return fields | gates


def exaone_moe_layer_types(c: dict) -> list[LayerType]:
    """Attention is that of EXAONE 4. Experts are not in groups, of which a token would choose some first."""
    number = c["num_hidden_layers"]
    names = c.get("mlp_layer_types") or [DENSE if i < c["first_k_dense_replace"] else SPARSE for i in range(number)]
    _check_mlp_names(names)
    fields = {"renormalise": c["norm_topk_prob"], "route_scale": float(c["routed_scaling_factor"])}
    fields |= {"shared_experts": positive_int(c, "num_shared_experts")}
    mlp = mixture(c, "moe_intermediate_size", "num_experts", **BIASED, **fields)
    return _with_dense_first(c, exaone4_layer_types(c), [name == DENSE for name in names], mlp)


def exaone_moe_layout(model: Model) -> dict:
    sparse, names = mlp_of(model, "moe"), mlp_names(model)
    fields = exaone4_layout(model) | _fields_of_experts(model) | {"mlp_layer_types": names}
    fields |= {"first_k_dense_replace": (names + [SPARSE]).index(SPARSE)}
    if sparse is None:
        return fields
    fields |= {"norm_topk_prob": sparse.mlp.renormalise, "routed_scaling_factor": sparse.mlp.route_scale}
    return fields | {"num_shared_experts": number_of_shared(model, sparse)}


def kolibri_layer_types(c: dict) -> list[LayerType]:
    """Attention is that of EXAONE 4; the bias of an expert is added to its logit. Every fifth layer is full by default."""
    check(
        c.get("sliding_window") is not None,
        "config.json has no sliding_window, and kolibri1 does not run without",
    )
    c = {"num_local_experts": c["num_experts"]} | c  # the library writes one and reads both
    default = [FULL if (i + 1) % 5 == 0 else LOCAL for i in range(c["num_hidden_layers"])]
    fields = {"shared_experts": 1, "shared_d_ff": positive_int(c, "shared_expert_intermediate_size"), "bias_on": "logit"}
    mlp = mixture(c, "moe_intermediate_size", "num_local_experts", **BIASED, renormalise=c["norm_topk_prob"], **fields)
    return [dataclasses.replace(layer_type, mlp=mlp) for layer_type in exaone4_layer_types({"layer_types": default} | c)]


def kolibri_layout(model: Model) -> dict:
    sparse = mlp_of(model, "moe")
    if sparse is None:
        return exaone4_layout(model)
    fields = exaone4_layout(model) | _fields_of_experts(model) | {"norm_topk_prob": sparse.mlp.renormalise}
    fields["num_local_experts"] = fields.pop("num_experts")
    return fields | {"shared_expert_intermediate_size": shared_width(model, sparse)}


def gpt_oss_layer_types(c: dict) -> list[LayerType]:
    """Every layer has RoPE, biases, sinks and experts; by default every second has a window, from the first."""
    number, rope = c["num_hidden_layers"], rope_of(c, 150_000.0)
    names = type_names({"layer_types": [FULL if i % 2 else LOCAL for i in range(number)]} | c)
    limits = {key: float(c[key]) for key in ("swiglu_limit", "swiglu_alpha")}
    mlp = mixture(c, "intermediate_size", "num_local_experts", biases=True, **limits)
    return [layer_type_of(c, name, rope, sink=True, attention_bias=True, mlp=mlp) for name in names]


def gpt_oss_layout(model: Model) -> dict:
    sparse, fields = mlp_of(model, "moe"), layer_type_fields(model) | one_rope(model)
    if sparse is None:
        return fields
    mlp = sparse.mlp
    limit = {} if mlp.swiglu_limit is None else {"swiglu_limit": mlp.swiglu_limit, "swiglu_alpha": mlp.swiglu_alpha}
    more = {"num_local_experts": mlp.experts, "num_experts_per_tok": mlp.top_k, "intermediate_size": mlp_width(model, sparse)}
    return fields | more | limit
