"""Layers of a config.json as our kinds, and back: which are local, which rotate, and how their rotation is stretched.

For each family, `<family>_kinds` gives the kind of every layer of a config.json whose defaults are filled in, and
`<family>_layout` the fields that bring them back. What a family cannot say is found by its caller, who reads back what it
wrote.
"""

import dataclasses
import math
from collections.abc import Mapping

from hybrid_attn import config
from hybrid_attn.config import LayerType, Model, RopeScaling, Temperature, score_scale

LOCAL, FULL = "sliding_attention", "full_attention"  # how config.json calls its layers
MOST = {  # several times what the largest public models have; what follows from them must fit memory and int64
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "intermediate_size": 2**22,
    "num_hidden_layers": 1024,
    "num_attention_heads": 2**14,
    "num_key_value_heads": 2**14,
    "head_dim": 2**14,
}
NO_SCALING = RopeScaling("none", 1.0, 8192, 1.0, 32.0, None)
PLAIN = LayerType(
    mixer="attention",
    mlp="gated",
    window=None, chunk=None, rope_theta=None, rope_fraction=1.0, rope_scaling=NO_SCALING,
    qk_norm="none", qk_norm_scope="head_dim", qk_norm_after_rope=False, scale=None, softcap=None,
    temperature=Temperature("none", 0.1, 8192), sink=False, gate="none",
)  # fmt: skip


def essential(model: Model, kind: LayerType) -> LayerType:
    """`kind` with what its other fields make meaningless at its default, and ways to say one thing said in one way."""
    theta, scaling = kind.rope_theta, kind.rope_scaling
    if theta is None or scaling.type in ("none", "ntk"):
        dims = config.rotated_dims(model, kind)
        theta = theta and rounded(theta * (scaling.factor ** (dims / (dims - 2)) if scaling.type == "ntk" else 1.0))
        scaling = NO_SCALING
    elif scaling.type == "linear":
        scaling = dataclasses.replace(NO_SCALING, type="linear", factor=scaling.factor)
    elif scaling.type == "llama3":
        scaling = dataclasses.replace(scaling, attention_factor=None)
    normed = kind.qk_norm != "none"
    return dataclasses.replace(
        kind,
        rope_theta=theta,
        rope_scaling=scaling,
        rope_fraction=kind.rope_fraction if theta else 1.0,
        qk_norm_scope=kind.qk_norm_scope if normed else "head_dim",
        qk_norm_after_rope=kind.qk_norm_after_rope and normed and theta is not None,
        scale=rounded(score_scale(model, kind)),
        temperature=PLAIN.temperature if kind.temperature.type == "none" else kind.temperature,
    )


def rounded(x: float) -> float:
    """To nine digits, so that a number survives its square root and back."""
    return float(f"{x:.9g}")


def whole(c: Mapping, key: str) -> int:
    """The field `key` of a config.json; ValueError if it is not a count that some model may have."""
    most = MOST[key] if key in MOST else 2**31 - 1
    if type(c[key]) is not int or c[key] < 1:
        raise ValueError(f"config.json has {key}={c[key]!r}, which must be a whole number above 0")
    if c[key] > most:
        raise ValueError(f"config.json has {key}={c[key]}, which must be at most {most:,}")
    return c[key]


def _object(c: Mapping, key: str, where: str = "") -> dict:
    """The nested field `key` of a config.json, empty where it has none."""
    if not isinstance(c.get(key) or {}, Mapping):
        raise ValueError(f"config.json has {where}{key}={c[key]!r}, which must be an object")
    return dict(c.get(key) or {})


# --- Rotary positions: `rope_parameters`, flat or by type of layer, and the older `rope_theta` with `rope_scaling`.


def _rope(c: dict, default_theta: float) -> tuple[float, RopeScaling]:
    """(theta, scaling) of a config.json with one rotation for all layers."""
    params = _object(c, "rope_scaling") or _object(c, "rope_parameters")
    if {LOCAL, FULL} & set(params):
        raise ValueError(f"config.json has rope_parameters by type of layer; {c['model_type']} has one rotation")
    if "original_max_position_embeddings" in c:
        params["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    return _theta_and_scaling(params, c.get("rope_theta", default_theta), c)


def _rope_by_type(c: dict, local_theta: tuple[str | None, float], full_theta: float) -> dict:
    """(theta, scaling) by type of layer; the older `rope_scaling` and `rope_theta` are those of the full layers alone.

    ValueError for a `rope_scaling` that calls its rope_type `type`: the library of these families passes over that.
    """
    by_type, older = _object(c, "rope_parameters"), _object(c, "rope_scaling")
    if older.get("type", "default") != "default" and "rope_type" not in older:
        raise ValueError(
            f"config.json has rope_scaling with type={older['type']!r}, which the library of {c['model_type']} does not apply; "
            "call it rope_type if the model was trained with it, or take rope_scaling out"
        )
    if by_type and not {LOCAL, FULL} & set(by_type):
        raise ValueError(f"config.json has rope_parameters without {LOCAL} and {FULL}; {c['model_type']} has one for each")
    key, theta = local_theta
    local, full = (_object(by_type, kind, "rope_parameters.") for kind in (LOCAL, FULL))
    return {
        LOCAL: _theta_and_scaling(local, c.get(key, theta), c),
        FULL: _theta_and_scaling(full | older, c.get("rope_theta", full_theta), c),
    }


def _theta_and_scaling(params: Mapping, theta: float, c: Mapping) -> tuple[float, RopeScaling]:
    params = {key: value for key, value in params.items() if value is not None}
    theta, name = float(params.get("rope_theta", theta)), params.get("rope_type", params.get("type", "default"))
    if c.get("partial_rotary_factor", params.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json has a partial_rotary_factor; of these families, none is built with one")
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


def _rope_parameters(model: Model, kind: LayerType | None) -> dict:
    """The `rope_parameters` of a kind; of None, the plain ones of a model that rotates nothing."""
    if kind is None or kind.rope_theta is None:
        return {"rope_type": "default", "rope_theta": 10_000.0}
    kind, s = essential(model, kind), essential(model, kind).rope_scaling
    params = {"rope_type": "default" if s.type == "none" else s.type, "rope_theta": kind.rope_theta}
    if s.type != "none":
        params["factor"] = s.factor
    if s.type in ("llama3", "yarn"):
        low, high = {"llama3": ("low_freq_factor", "high_freq_factor"), "yarn": ("beta_slow", "beta_fast")}[s.type]
        params |= {"original_max_position_embeddings": s.original_len, low: s.low, high: s.high}
    if s.attention_factor is not None:
        params["attention_factor"] = s.attention_factor
    return params


def _one_rope(model: Model) -> dict:
    """Both spellings of the rotation of the first layer that rotates."""
    kinds = [model.kinds[letter] for letter in model.layers]
    params = _rope_parameters(model, next((kind for kind in kinds if kind.rope_theta is not None), None))
    return {"rope_parameters": params} | _older(params)


def _older(params: dict) -> dict:
    scaling = {key: value for key, value in params.items() if key != "rope_theta"}
    return {"rope_theta": params["rope_theta"], "rope_scaling": None if params["rope_type"] == "default" else scaling}


def _rope_of_each(model: Model, older_local: str | None) -> dict:
    kinds = {kind.window is None: kind for kind in (model.kinds[letter] for letter in model.layers)}
    local, full = (_rope_parameters(model, kinds.get(whole)) for whole in (False, True))
    older = _older(full) | ({older_local: local["rope_theta"]} if older_local else {})
    return {"rope_parameters": {LOCAL: local, FULL: full}} | older


# --- Layers: which are local, which rotate.


def _types(c: dict) -> list[str]:
    """`layer_types`, or what the older `sliding_window_pattern` means: every n-th layer is full; or a string LLLG."""
    layers, pattern = c["num_hidden_layers"], c.get("sliding_window_pattern")
    if "layer_types" in c:
        types = list(c["layer_types"])
    elif isinstance(pattern, str) and pattern:
        types = [LOCAL if pattern[i % len(pattern)] == "L" and i + 1 < layers else FULL for i in range(layers)]
    else:
        every = whole(c, "sliding_window_pattern") if pattern is not None else 1
        types = [LOCAL if (i + 1) % every else FULL for i in range(layers)]
    unknown = sorted(set(types) - {LOCAL, FULL})
    if unknown:
        raise ValueError(f"config.json has layer_types {', '.join(unknown)}; known: {LOCAL}, {FULL}")
    if LOCAL in types and c.get("sliding_window") is None:
        raise ValueError(f"config.json has layers of {LOCAL} and no sliding_window")
    return types


def _layer_types(model: Model) -> dict:
    """`layer_types` and the `sliding_window` of the first layer that has one; some implementations want one regardless."""
    windows = [model.kinds[letter].window for letter in model.layers]
    types = [FULL if window is None else LOCAL for window in windows]
    return {"layer_types": types, "sliding_window": next((w for w in windows if w is not None), 4096)}


def _kind(window: int | None, rope: tuple[float, RopeScaling] | None, **changes) -> LayerType:
    theta, scaling = rope or (None, NO_SCALING)
    return dataclasses.replace(PLAIN, window=window, rope_theta=theta, rope_scaling=scaling, **changes)


def _window(c: dict, kind: str) -> int | None:
    return c["sliding_window"] if kind == LOCAL else None


def cohere2_kinds(c: dict) -> list[LayerType]:
    rope = _rope(c, 10_000.0)
    return [_kind(_window(c, kind), rope if kind == LOCAL else None) for kind in _types(c)]


def cohere2_layout(model: Model) -> dict:
    return _layer_types(model) | _one_rope(model)


def cohere_kinds(c: dict) -> list[LayerType]:
    norm = {"qk_norm": "layernorm", "qk_norm_scope": "head"} if c["use_qk_norm"] else {}
    return [_kind(None, _rope(c, 500_000.0), **norm)] * c["num_hidden_layers"]


def cohere_layout(model: Model) -> dict:
    return {"use_qk_norm": model.kinds[model.pattern[0]].qk_norm != "none"} | _one_rope(model)


def llama_kinds(c: dict) -> list[LayerType]:
    return [_kind(None, _rope(c, 10_000.0))] * c["num_hidden_layers"]


def llama_layout(model: Model) -> dict:
    return _one_rope(model)


def smollm3_kinds(c: dict) -> list[LayerType]:
    rotates = c.get("no_rope_layers")  # 1 = it does rotate
    if not rotates:
        every = whole(c, "no_rope_layer_interval")
        rotates = [int((i + 1) % every != 0) for i in range(c["num_hidden_layers"])]
    local = c.get("use_sliding_window") and c.get("sliding_window")
    types = _types({"layer_types": [FULL if r or not local else LOCAL for r in rotates]} | c)
    if LOCAL in types and not local:
        raise ValueError(f"config.json has layers of {LOCAL} and use_sliding_window=false")
    if len(rotates) < len(types):
        raise ValueError(f"config.json has no_rope_layers for {len(rotates)} layers of {len(types)}")
    rope = _rope(c, 2_000_000.0)
    return [_kind(_window(c, kind), rope if r else None) for kind, r in zip(types, rotates, strict=False)]


def smollm3_layout(model: Model) -> dict:
    kinds = [model.kinds[letter] for letter in model.layers]
    types = _layer_types(model)
    rotates = [int(kind.rope_theta is not None) for kind in kinds]
    return types | {"no_rope_layers": rotates, "use_sliding_window": LOCAL in types["layer_types"]} | _one_rope(model)


def exaone4_kinds(c: dict) -> list[LayerType]:
    """With a window anywhere, the full layers have no positions; without one, every layer rotates."""
    window, rope = c.get("sliding_window"), _rope(c, 10_000.0)
    types = _types(c if window else c | {"sliding_window_pattern": None})
    return [_kind(_window(c, kind), rope if not window or kind == LOCAL else None, qk_norm="rms") for kind in types]


def exaone4_layout(model: Model) -> dict:
    kinds, types = [model.kinds[letter] for letter in model.layers], _layer_types(model)
    if all(kind.window is None and kind.rope_theta is not None for kind in kinds):
        types["sliding_window"] = None  # which says that full layers rotate
    return types | _one_rope(model)


def olmo3_kinds(c: dict) -> list[LayerType]:
    """Without `layer_types` every fourth layer is full: the library reads no `sliding_window_pattern` of this family."""
    ropes, types = _rope_by_type(c, (None, 500_000.0), 500_000.0), _types({**c, "sliding_window_pattern": 4})
    return [_kind(_window(c, kind), ropes[kind], qk_norm="rms", qk_norm_scope="projection") for kind in types]


def olmo3_layout(model: Model) -> dict:
    return _layer_types(model) | _rope_of_each(model, None)


def gemma3_kinds(c: dict) -> list[LayerType]:
    ropes = _rope_by_type(c, ("rope_local_base_freq", 10_000.0), 1_000_000.0)
    scalar = float(c["query_pre_attn_scalar"])
    if not 0 < scalar < math.inf:
        raise ValueError(f"config.json has query_pre_attn_scalar={scalar}, which must be a number above 0")
    scale = scalar**-0.5
    return [_kind(_window(c, kind), ropes[kind], qk_norm="rms_plus1", scale=scale) for kind in _types(c)]


def gemma3_layout(model: Model) -> dict:
    scale = model.kinds[model.pattern[0]].scale
    scalar = round(model.head_dim if scale is None else scale**-2)
    return _layer_types(model) | _rope_of_each(model, "rope_local_base_freq") | {"query_pre_attn_scalar": scalar}


def afmoe_kinds(c: dict) -> list[LayerType]:
    if c["num_dense_layers"] < c["num_hidden_layers"]:
        raise ValueError(
            f"config.json has num_dense_layers={c['num_dense_layers']} of {c['num_hidden_layers']} layers; "
            "experts are not built here, so of afmoe only dense models can be read"
        )
    rope = _rope(c, 10_000.0)
    types = _types(c if "layer_types" in c else c | {"sliding_window_pattern": whole(c, "global_attn_every_n_layers")})
    return [_kind(_window(c, t), rope if t == LOCAL else None, qk_norm="rms", gate="projection") for t in types]


def afmoe_layout(model: Model) -> dict:
    more = {"num_dense_layers": model.num_layers, "mup_enabled": model.embed_scale != 1.0}
    return _layer_types(model) | _one_rope(model) | more
