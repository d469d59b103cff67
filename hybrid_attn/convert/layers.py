"""Converts the layers of a config.json to layer types and back: windows, RoPE and its scaling.

For each family, `<family>_layer_types` returns the layer type of every layer of a config.json with its defaults filled in, and
`<family>_layout` the fields of config.json for the layers of a model. The caller reads these fields again, and so finds what
the family cannot express.
"""

import dataclasses
import math
from collections.abc import Mapping

from hybrid_attn import config
from hybrid_attn.config import MLP, LayerType, Model, RopeScaling, Temperature, score_scale
from hybrid_attn.trees import check

LOCAL, FULL = "sliding_attention", "full_attention"  # how config.json calls its layers
LARGEST = {  # several times the sizes of the largest public models; products of them must fit int64
    "vocab_size": 2**26, "hidden_size": 2**20, "intermediate_size": 2**22, "num_hidden_layers": 1024,
    "num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14,
}  # fmt: skip
NO_SCALING = RopeScaling("none", 1.0, 8192, 1.0, 32.0, None)
PLAIN = LayerType(
    mixer="attention", attention_experts=4, share_kv=None,
    mlp=MLP("gated", None, 8, 2, "softmax", True, 1.0, 0, "sum", False, 0.01, 0.001, None),
    window=None, chunk=None, rope_theta=None, rope_fraction=1.0, rope_scaling=NO_SCALING,
    qk_norm="none", qk_norm_scope="head_dim", qk_norm_after_rope=False, scale=None, softcap=None,
    temperature=Temperature("none", 0.1, 8192), sink=False, gate="none",
)  # fmt: skip


def normal_form(model: Model, layer_type: LayerType) -> LayerType:
    """`layer_type` in a normal form: fields without effect have their default, and equivalent fields one spelling."""
    theta, scaling = layer_type.rope_theta, layer_type.rope_scaling
    if theta is None or scaling.type in ("none", "ntk"):
        dims = config.rotated_dims(model, layer_type)
        theta = theta and rounded(theta * (scaling.factor ** (dims / (dims - 2)) if scaling.type == "ntk" else 1.0))
        scaling = NO_SCALING
    elif scaling.type == "linear":
        scaling = dataclasses.replace(NO_SCALING, type="linear", factor=scaling.factor)
    elif scaling.type == "llama3":
        scaling = dataclasses.replace(scaling, attention_factor=None)
    normed = layer_type.qk_norm != "none"
    return dataclasses.replace(
        layer_type,
        attention_experts=PLAIN.attention_experts if layer_type.mixer == "attention" else layer_type.attention_experts,
        rope_theta=theta,
        rope_scaling=scaling,
        rope_fraction=layer_type.rope_fraction if theta else 1.0,
        qk_norm_scope=layer_type.qk_norm_scope if normed else "head_dim",
        qk_norm_after_rope=layer_type.qk_norm_after_rope and normed and theta is not None,
        scale=rounded(score_scale(model, layer_type)),
        temperature=PLAIN.temperature if layer_type.temperature.type == "none" else layer_type.temperature,
        mlp=_normal_mlp(model, layer_type),
    )


def _normal_mlp(model: Model, layer_type: LayerType) -> MLP:
    """The feed-forward in a normal form; that of a gated one has no fields but its width."""
    mlp = layer_type.mlp if layer_type.mlp.type == "moe" else dataclasses.replace(PLAIN.mlp, type=layer_type.mlp.type)
    width = config.mlp_width(model, layer_type)
    return dataclasses.replace(mlp, d_ff=None if width == model.d_ff else width)


def layer_types_of(model: Model) -> list[LayerType]:
    """The layer type of every layer."""
    return [model.kinds[letter] for letter in model.layers]


def rounded(x: float) -> float:
    """`x` with nine digits, which its square root and square do not change."""
    return float(f"{x:.9g}")


def positive_int(c: Mapping, key: str) -> int:
    """The field `key` of a config.json; ValueError if it is not a positive integer of a plausible size."""
    limit = LARGEST[key] if key in LARGEST else 2**31 - 1
    positive = type(c[key]) is int and c[key] >= 1
    check(positive, f"config.json has {key}={c[key]!r}, which must be a whole number above 0")
    check(c[key] <= limit, f"config.json has {key}={c[key]}, which must be at most {limit:,}")
    return c[key]


def _object(c: Mapping, key: str, where: str = "") -> dict:
    """The nested field `key` of a config.json, empty where it has none."""
    if not isinstance(c.get(key) or {}, Mapping):
        raise ValueError(f"config.json has {where}{key}={c[key]!r}, which must be an object")
    return dict(c.get(key) or {})


# --- RoPE: `rope_parameters`, for all layers or by layer type, and the older `rope_theta` with `rope_scaling`.


def _rope(c: dict, default_theta: float) -> tuple[float, RopeScaling]:
    """(theta, scaling) of a config.json with one RoPE for all layers."""
    params = _object(c, "rope_scaling") or _object(c, "rope_parameters")
    check(not {LOCAL, FULL} & set(params), f"config.json has rope_parameters by layer type; {c['model_type']} has one RoPE")
    if "original_max_position_embeddings" in c:
        params["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    return _theta_and_scaling(params, c.get("rope_theta", default_theta), c)


def _rope_by_type(c: dict, local_theta: tuple[str | None, float], full_theta: float) -> dict:
    """(theta, scaling) by layer type. The older `rope_scaling` and `rope_theta` apply to the full layers only.

    ValueError for a `rope_scaling` with the key `type` instead of `rope_type`, which the library of these families ignores.
    """
    by_type, older = _object(c, "rope_parameters"), _object(c, "rope_scaling")
    older_type = older.get("type", "default")
    check(
        older_type == "default" or "rope_type" in older,
        f"config.json has rope_scaling with type={older_type!r}, which the library of {c['model_type']} ignores; "
        "rename the key to rope_type if the model was trained with it, or remove rope_scaling",
    )
    known = not by_type or {LOCAL, FULL} & set(by_type)
    check(known, f"config.json has rope_parameters without {LOCAL} and {FULL}; {c['model_type']} has one for each")
    key, theta = local_theta
    local, full = (_object(by_type, name, "rope_parameters.") for name in (LOCAL, FULL))
    return {
        LOCAL: _theta_and_scaling(local, c.get(key, theta), c),
        FULL: _theta_and_scaling(full | older, c.get("rope_theta", full_theta), c),
    }


def _theta_and_scaling(params: Mapping, theta: float, c: Mapping) -> tuple[float, RopeScaling]:
    params = {key: value for key, value in params.items() if value is not None}
    theta, name = float(params.get("rope_theta", theta)), params.get("rope_type", params.get("type", "default"))
    if c.get("partial_rotary_factor", params.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json has a partial_rotary_factor; which is not supported")
    length = params.get("original_max_position_embeddings", c.get("max_position_embeddings"))
    if name in ("llama3", "yarn") and length is None:
        raise ValueError(f"config.json lacks original_max_position_embeddings, which rope type {name!r} needs")
    if name == "default":
        return theta, NO_SCALING
    if name == "linear":
        return theta, dataclasses.replace(NO_SCALING, type=name, factor=float(params["factor"]))
    if name == "llama3":
        low, high = float(params["low_freq_factor"]), float(params["high_freq_factor"])
        return theta, RopeScaling(name, float(params["factor"]), length, low, high, None)
    if name == "yarn" and params.get("truncate", True):
        factor = float(params["factor"] if "factor" in params else c["max_position_embeddings"] / length)
        size = params.get("attention_factor")
        if size is None and params.get("mscale") and params.get("mscale_all_dim"):
            size = _yarn_size(factor, params["mscale"]) / _yarn_size(factor, params["mscale_all_dim"])
        slow, fast = float(params.get("beta_slow") or 1), float(params.get("beta_fast") or 32)
        return theta, RopeScaling(name, factor, length, slow, fast, size if size is None else float(size))
    raise ValueError(f"config.json has rope type {name!r}; known: default, linear, llama3, yarn (truncated)")


def _yarn_size(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def _rope_parameters(model: Model, layer_type: LayerType | None) -> dict:
    """The `rope_parameters` of a layer type; for None, the default ones of a model without RoPE."""
    if layer_type is None or layer_type.rope_theta is None:
        return {"rope_type": "default", "rope_theta": 10_000.0}
    layer_type = normal_form(model, layer_type)
    s = layer_type.rope_scaling
    params = {"rope_type": "default" if s.type == "none" else s.type, "rope_theta": layer_type.rope_theta}
    if s.type != "none":
        params["factor"] = s.factor
    if s.type in ("llama3", "yarn"):
        low, high = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}[s.type]
        params |= {"original_max_position_embeddings": s.original_len, low: s.low, high: s.high}
    if s.attention_factor is not None:
        params["attention_factor"] = s.attention_factor
    return params


def _one_rope(model: Model) -> dict:
    """The RoPE of the first layer that has one, in both spellings."""
    rotating = [layer_type for layer_type in layer_types_of(model) if layer_type.rope_theta is not None]
    params = _rope_parameters(model, rotating[0] if rotating else None)
    return {"rope_parameters": params} | _older(params)


def _older(params: dict) -> dict:
    """`rope_parameters` in the older spelling."""
    scaling = {key: value for key, value in params.items() if key != "rope_theta"}
    return {"rope_theta": params["rope_theta"], "rope_scaling": None if params["rope_type"] == "default" else scaling}


def _rope_of_each(model: Model, older_local: str | None) -> dict:
    """The RoPE of the local and of the full layers, in both spellings; `older_local` is the older key of the local theta."""
    layer_types = {layer_type.window is None: layer_type for layer_type in layer_types_of(model)}
    local, full = (_rope_parameters(model, layer_types.get(is_full)) for is_full in (False, True))
    older = _older(full) | ({older_local: local["rope_theta"]} if older_local else {})
    return {"rope_parameters": {LOCAL: local, FULL: full}} | older


# --- Layers: which are local, and which have RoPE.


def _type_names(c: dict) -> list[str]:
    """`layer_types`, or their equivalent of the older `sliding_window_pattern`: n (every n-th layer is full) or LLLG."""
    num_layers, pattern = c["num_hidden_layers"], c.get("sliding_window_pattern")
    if "layer_types" in c:
        names = list(c["layer_types"])
    elif isinstance(pattern, str) and pattern:
        names = [LOCAL if pattern[i % len(pattern)] == "L" and i + 1 < num_layers else FULL for i in range(num_layers)]
    else:
        every = positive_int(c, "sliding_window_pattern") if pattern is not None else 1
        names = [LOCAL if (i + 1) % every else FULL for i in range(num_layers)]
    unknown = sorted(set(names) - {LOCAL, FULL})
    check(not unknown, f"config.json has layer_types {', '.join(unknown)}; known: {LOCAL}, {FULL}")
    if LOCAL in names and c.get("sliding_window") is None:
        raise ValueError(f"config.json has layers of {LOCAL} and no sliding_window")
    return names


def _layer_type_fields(model: Model) -> dict:
    """`layer_types`, and the `sliding_window` of the first local layer; some implementations need one in any case."""
    windows = [layer_type.window for layer_type in layer_types_of(model)]
    names = [FULL if window is None else LOCAL for window in windows]
    return {"layer_types": names, "sliding_window": next((w for w in windows if w is not None), 4096)}


def _layer_type(c: dict, name: str, rope: tuple[float, RopeScaling] | None, **changes) -> LayerType:
    """The layer type that config.json calls `name`; without `rope`, NoPE."""
    window, (theta, scaling) = c["sliding_window"] if name == LOCAL else None, rope or (None, NO_SCALING)
    return dataclasses.replace(PLAIN, window=window, rope_theta=theta, rope_scaling=scaling, **changes)


def _layer_types(c: dict, names: list[str], ropes: Mapping[str, tuple | None], **changes) -> list[LayerType]:
    """The layer type of every layer; `ropes` has the RoPE of each name."""
    return [_layer_type(c, name, ropes[name], **changes) for name in names]


def cohere2_layer_types(c: dict) -> list[LayerType]:
    return _layer_types(c, _type_names(c), {LOCAL: _rope(c, 10_000.0), FULL: None})


def cohere2_layout(model: Model) -> dict:
    return _layer_type_fields(model) | _one_rope(model)


def cohere_layer_types(c: dict) -> list[LayerType]:
    norm = {"qk_norm": "layernorm", "qk_norm_scope": "head"} if c["use_qk_norm"] else {}
    return [_layer_type(c, FULL, _rope(c, 500_000.0), **norm)] * c["num_hidden_layers"]


def cohere_layout(model: Model) -> dict:
    return {"use_qk_norm": model.kinds[model.layers[0]].qk_norm != "none"} | _one_rope(model)


def llama_layer_types(c: dict) -> list[LayerType]:
    return [_layer_type(c, FULL, _rope(c, 10_000.0))] * c["num_hidden_layers"]


def llama_layout(model: Model) -> dict:
    return _one_rope(model)


def smollm3_layer_types(c: dict) -> list[LayerType]:
    rotates = c.get("no_rope_layers")  # 1 means that the layer has RoPE
    if not rotates:
        every = positive_int(c, "no_rope_layer_interval")
        rotates = [int((i + 1) % every != 0) for i in range(c["num_hidden_layers"])]
    local = c.get("use_sliding_window") and c.get("sliding_window")
    names = _type_names({"layer_types": [FULL if r or not local else LOCAL for r in rotates]} | c)
    check(local or LOCAL not in names, f"config.json has layers of {LOCAL} and use_sliding_window=false")
    check(len(rotates) >= len(names), f"config.json has no_rope_layers for {len(rotates)} layers of {len(names)}")
    rope = _rope(c, 2_000_000.0)
    return [_layer_type(c, name, rope if r else None) for name, r in zip(names, rotates, strict=False)]


def smollm3_layout(model: Model) -> dict:
    fields = _layer_type_fields(model)
    rotates = [int(layer_type.rope_theta is not None) for layer_type in layer_types_of(model)]
    return fields | {"no_rope_layers": rotates, "use_sliding_window": LOCAL in fields["layer_types"]} | _one_rope(model)


def exaone4_layer_types(c: dict) -> list[LayerType]:
    """If there is a window, the full layers have no positions (NoPE); otherwise every layer has RoPE."""
    window, rope = c.get("sliding_window"), _rope(c, 10_000.0)
    names = _type_names(c if window else c | {"sliding_window_pattern": None})
    return _layer_types(c, names, {LOCAL: rope, FULL: None if window else rope}, qk_norm="rms")


def exaone4_layout(model: Model) -> dict:
    fields = _layer_type_fields(model)
    if all(layer_type.window is None and layer_type.rope_theta is not None for layer_type in layer_types_of(model)):
        fields["sliding_window"] = None  # so that full layers have RoPE
    return fields | _one_rope(model)


def olmo3_layer_types(c: dict) -> list[LayerType]:
    """Without `layer_types` every fourth layer is full: for this family the library ignores `sliding_window_pattern`."""
    ropes, names = _rope_by_type(c, (None, 500_000.0), 500_000.0), _type_names({**c, "sliding_window_pattern": 4})
    return _layer_types(c, names, ropes, qk_norm="rms", qk_norm_scope="projection")


def olmo3_layout(model: Model) -> dict:
    return _layer_type_fields(model) | _rope_of_each(model, None)


def gemma3_layer_types(c: dict) -> list[LayerType]:
    ropes = _rope_by_type(c, ("rope_local_base_freq", 10_000.0), 1_000_000.0)
    scalar = float(c["query_pre_attn_scalar"])
    check(0 < scalar < math.inf, f"config.json has query_pre_attn_scalar={scalar}, which must be a number above 0")
    return _layer_types(c, _type_names(c), ropes, qk_norm="rms_plus1", scale=scalar**-0.5)


def gemma3_layout(model: Model) -> dict:
    scale = model.kinds[model.layers[0]].scale
    scalar = round(model.head_dim if scale is None else scale**-2)
    return _layer_type_fields(model) | _rope_of_each(model, "rope_local_base_freq") | {"query_pre_attn_scalar": scalar}


def afmoe_layer_types(c: dict) -> list[LayerType]:
    dense, layers = c["num_dense_layers"], c["num_hidden_layers"]
    cure = "mixture-of-experts layers are not supported, so only dense models of afmoe can be read"
    check(dense >= layers, f"config.json has num_dense_layers={dense} of {layers} layers; {cure}")
    rope = _rope(c, 10_000.0)
    if "layer_types" not in c:
        c = c | {"sliding_window_pattern": positive_int(c, "global_attn_every_n_layers")}
    return _layer_types(c, _type_names(c), {LOCAL: rope, FULL: None}, qk_norm="rms", gate="projection")


def afmoe_layout(model: Model) -> dict:
    more = {"num_dense_layers": model.num_layers, "mup_enabled": model.embed_scale != 1.0}
    return _layer_type_fields(model) | _one_rope(model) | more
