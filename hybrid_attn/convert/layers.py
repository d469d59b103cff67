"""Converts the layers of a config.json to layer types and back: which are local, and which have RoPE.

For each family, `<family>_layer_types` returns the layer type of every layer of a config.json with its defaults filled in, and
`<family>_layout` the fields of config.json for the layers of a model. The caller reads these fields again, and so finds what
the family cannot express.
"""

import dataclasses
import math
from collections.abc import Mapping

from hybrid_attn.config import LayerType, Model, RopeScaling, Temperature
from hybrid_attn.convert.fields import object_of, positive_int
from hybrid_attn.convert.normal import NO_SCALING, PLAIN, layer_types_of, normal_form
from hybrid_attn.convert.rope import FULL, LOCAL, one_rope, rope_by_type, rope_of, rope_of_each
from hybrid_attn.trees import check


def type_names(c: dict) -> list[str]:
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


def layer_type_fields(model: Model) -> dict:
    """`layer_types`, and the `sliding_window` of the first local layer; some implementations need one in any case."""
    windows = [layer_type.window for layer_type in layer_types_of(model)]
    names = [FULL if window is None else LOCAL for window in windows]
    return {"layer_types": names, "sliding_window": next((w for w in windows if w is not None), 4096)}


def layer_type_of(c: dict, name: str, rope: tuple[float, RopeScaling] | None, **changes) -> LayerType:
    """The layer type that config.json calls `name`; without `rope`, NoPE."""
    window, (theta, scaling) = c["sliding_window"] if name == LOCAL else None, rope or (None, NO_SCALING)
    return dataclasses.replace(PLAIN, window=window, rope_theta=theta, rope_scaling=scaling, **changes)


def _layer_types(c: dict, names: list[str], ropes: Mapping[str, tuple | None], **changes) -> list[LayerType]:
    """The layer type of every layer; `ropes` has the RoPE of each name."""
    return [layer_type_of(c, name, ropes[name], **changes) for name in names]


def cohere2_layer_types(c: dict) -> list[LayerType]:
    return _layer_types(c, type_names(c), {LOCAL: rope_of(c, 10_000.0), FULL: None})


def cohere2_layout(model: Model) -> dict:
    return layer_type_fields(model) | one_rope(model)


def cohere_layer_types(c: dict) -> list[LayerType]:
    norm = {"qk_norm": "layernorm", "qk_norm_scope": "head"} if c["use_qk_norm"] else {}
    return [layer_type_of(c, FULL, rope_of(c, 500_000.0), **norm)] * c["num_hidden_layers"]


def cohere_layout(model: Model) -> dict:
    return {"use_qk_norm": model.kinds[model.layers[0]].qk_norm != "none"} | one_rope(model)


def llama_layer_types(c: dict) -> list[LayerType]:
    return [layer_type_of(c, FULL, rope_of(c, 10_000.0))] * c["num_hidden_layers"]


def llama_layout(model: Model) -> dict:
    return one_rope(model)


def smollm3_layer_types(c: dict) -> list[LayerType]:
    rotates = c.get("no_rope_layers")  # 1 means that the layer has RoPE
    if not rotates:
        every = positive_int(c, "no_rope_layer_interval")
        rotates = [int((i + 1) % every != 0) for i in range(c["num_hidden_layers"])]
    local = c.get("use_sliding_window") and c.get("sliding_window")
    names = type_names({"layer_types": [FULL if r or not local else LOCAL for r in rotates]} | c)
    check(local or LOCAL not in names, f"config.json has layers of {LOCAL} and use_sliding_window=false")
    check(len(rotates) >= len(names), f"config.json has no_rope_layers for {len(rotates)} layers of {len(names)}")
    rope = rope_of(c, 2_000_000.0)
    return [layer_type_of(c, name, rope if r else None) for name, r in zip(names, rotates, strict=False)]


def smollm3_layout(model: Model) -> dict:
    fields = layer_type_fields(model)
    rotates = [int(layer_type.rope_theta is not None) for layer_type in layer_types_of(model)]
    return fields | {"no_rope_layers": rotates, "use_sliding_window": LOCAL in fields["layer_types"]} | one_rope(model)


def exaone4_layer_types(c: dict) -> list[LayerType]:
    """If there is a window, the full layers have no positions (NoPE); otherwise every layer has RoPE."""
    window, rope = c.get("sliding_window"), rope_of(c, 10_000.0)
    names = type_names(c if window else c | {"sliding_window_pattern": None})
    return _layer_types(c, names, {LOCAL: rope, FULL: None if window else rope}, qk_norm="rms")


def exaone4_layout(model: Model) -> dict:
    fields = layer_type_fields(model)
    if all(layer_type.window is None and layer_type.rope_theta is not None for layer_type in layer_types_of(model)):
        fields["sliding_window"] = None  # so that full layers have RoPE
    return fields | one_rope(model)


def olmo3_layer_types(c: dict) -> list[LayerType]:
    """Without `layer_types` every fourth layer is full: for this family the library ignores `sliding_window_pattern`."""
    ropes, names = rope_by_type(c, (None, 500_000.0), 500_000.0), type_names({**c, "sliding_window_pattern": 4})
    return _layer_types(c, names, ropes, qk_norm="rms", qk_norm_scope="projection")


def olmo3_layout(model: Model) -> dict:
    return layer_type_fields(model) | rope_of_each(model, None)


def gemma3_layer_types(c: dict) -> list[LayerType]:
    ropes = rope_by_type(c, ("rope_local_base_freq", 10_000.0), 1_000_000.0)
    scalar = float(c["query_pre_attn_scalar"])
    check(0 < scalar < math.inf, f"config.json has query_pre_attn_scalar={scalar}, which must be a number above 0")
    return _layer_types(c, type_names(c), ropes, qk_norm="rms_plus1", scale=scalar**-0.5)


def gemma3_layout(model: Model) -> dict:
    scale = model.kinds[model.layers[0]].scale
    scalar = round(model.head_dim if scale is None else scale**-2)
    return layer_type_fields(model) | rope_of_each(model, "rope_local_base_freq") | {"query_pre_attn_scalar": scalar}


def granite_layer_types(c: dict) -> list[LayerType]:
    """Each layer has its own base of RoPE; 0 is NoPE. Without `layer_types` every fourth is full, the first included."""
    number, (theta, scaling) = c["num_hidden_layers"], rope_of(c, 10_000.0)
    names = type_names({"layer_types": [LOCAL if i % 4 else FULL for i in range(number)]} | c)
    thetas = [float(x) for x in c.get("layer_rope_theta") or [theta] * number]
    check(len(thetas) == len(names), f"config.json has layer_rope_theta for {len(thetas)} layers of {len(names)}")
    fields = {"scale": float(c["attention_multiplier"]), "residual_scale": float(c["residual_multiplier"]), "sink": True}
    ropes = [(theta, scaling) if theta else None for theta in thetas]
    return [layer_type_of(c, name, rope, **fields) for name, rope in zip(names, ropes, strict=True)]


def granite_layout(model: Model) -> dict:
    layer_types = [normal_form(model, layer_type) for layer_type in layer_types_of(model)]
    more = {"layer_rope_theta": [layer_type.rope_theta or 0.0 for layer_type in layer_types]}
    more |= {"attention_multiplier": layer_types[0].scale, "residual_multiplier": layer_types[0].residual_scale}
    more |= {"embedding_multiplier": model.embed_scale, "logits_scaling": 1 / model.logit_scale}
    return layer_type_fields(model) | one_rope(model) | more


def granite_scales(c: dict) -> dict:
    return {"embed_scale": float(c["embedding_multiplier"]), "logit_scale": 1 / float(c["logits_scaling"])}


def ministral3_layer_types(c: dict) -> list[LayerType]:
    """All layers are alike, with a window or without. Queries grow with their position over the original length."""
    params = object_of(c, "rope_scaling") or object_of(c, "rope_parameters")
    scale, length = float(params["llama_4_scaling_beta"]), params["original_max_position_embeddings"]
    temperature = Temperature("position_steps", scale, length) if scale else PLAIN.temperature
    name = FULL if c.get("sliding_window") is None else LOCAL
    return [layer_type_of(c, name, rope_of(c, 1_000_000.0), temperature=temperature)] * c["num_hidden_layers"]


def ministral3_layout(model: Model) -> dict:
    """With YaRN the original length is that of YaRN, so a temperature of another length is found when this is read again."""
    layer_type, fields = model.kinds[model.layers[0]], one_rope(model)
    t = layer_type.temperature
    added = {"llama_4_scaling_beta": 0.0 if t.type == "none" else t.scale}
    for params in (fields["rope_parameters"], fields["rope_scaling"]):
        if params is not None:
            params |= {"original_max_position_embeddings": t.length} | params | added
    return fields | {"sliding_window": layer_type.window}
