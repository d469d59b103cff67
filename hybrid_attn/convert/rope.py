"""Converts the RoPE of a config.json: `rope_parameters`, for all layers or by layer type, and the older `rope_theta` with
`rope_scaling`.
"""

import dataclasses
import math
from collections.abc import Mapping

from hybrid_attn.config import LayerType, Model, RopeScaling
from hybrid_attn.convert.fields import object_of
from hybrid_attn.convert.normal import NO_SCALING, layer_types_of, normal_form
from hybrid_attn.trees import check

LOCAL, FULL = "sliding_attention", "full_attention"  # how config.json calls its layers


def rope_of(c: dict, default_theta: float) -> tuple[float, RopeScaling]:
    """(theta, scaling) of a config.json with one RoPE for all layers."""
    params = object_of(c, "rope_scaling") or object_of(c, "rope_parameters")
    check(not {LOCAL, FULL} & set(params), f"config.json has rope_parameters by layer type; {c['model_type']} has one RoPE")
    if "original_max_position_embeddings" in c:
        params["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    return _theta_and_scaling(params, c.get("rope_theta", default_theta), c)


def rope_by_type(c: dict, local_theta: tuple[str | None, float], full_theta: float) -> dict:
    """(theta, scaling) by layer type. The older `rope_scaling` and `rope_theta` apply to the full layers only.

    ValueError for a `rope_scaling` with the key `type` instead of `rope_type`, which the library of these families ignores.
    """
    by_type, older = object_of(c, "rope_parameters"), object_of(c, "rope_scaling")
    older_type = older.get("type", "default")
    check(
        older_type == "default" or "rope_type" in older,
        f"config.json has rope_scaling with type={older_type!r}, which the library of {c['model_type']} ignores; "
        "rename the key to rope_type if the model was trained with it, or remove rope_scaling",
    )
    known = not by_type or {LOCAL, FULL} & set(by_type)
    check(known, f"config.json has rope_parameters without {LOCAL} and {FULL}; {c['model_type']} has one for each")
    key, theta = local_theta
    local, full = (object_of(by_type, name, "rope_parameters.") for name in (LOCAL, FULL))
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
        return theta, RopeScaling(name, float(params["factor"]), length, low, high, None, True)
    if name == "yarn":
        factor = float(params["factor"] if "factor" in params else c["max_position_embeddings"] / length)
        size = params.get("attention_factor")
        if size is None and params.get("mscale") and params.get("mscale_all_dim"):
            size = _yarn_size(factor, params["mscale"]) / _yarn_size(factor, params["mscale_all_dim"])
        slow, fast = float(params.get("beta_slow") or 1), float(params.get("beta_fast") or 32)
        size, truncate = size if size is None else float(size), params.get("truncate", True)
        return theta, RopeScaling(name, factor, length, slow, fast, size, truncate)
    raise ValueError(f"config.json has rope type {name!r}; known: default, linear, llama3, yarn")


def _yarn_size(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def rope_parameters(model: Model, layer_type: LayerType | None) -> dict:
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
    if s.type == "yarn" and not s.truncate:
        params["truncate"] = False
    if s.attention_factor is not None:
        params["attention_factor"] = s.attention_factor
    return params


def one_rope(model: Model) -> dict:
    """The RoPE of the first layer that has one, in both spellings."""
    rotating = [layer_type for layer_type in layer_types_of(model) if layer_type.rope_theta is not None]
    params = rope_parameters(model, rotating[0] if rotating else None)
    return {"rope_parameters": params} | _older(params)


def _older(params: dict) -> dict:
    """`rope_parameters` in the older spelling."""
    scaling = {key: value for key, value in params.items() if key != "rope_theta"}
    return {"rope_theta": params["rope_theta"], "rope_scaling": None if params["rope_type"] == "default" else scaling}


def rope_of_each(model: Model, older_local: str | None) -> dict:
    """The RoPE of the local and of the full layers, in both spellings; `older_local` is the older key of the local theta."""
    layer_types = {layer_type.window is None: layer_type for layer_type in layer_types_of(model)}
    local, full = (rope_parameters(model, layer_types.get(is_full)) for is_full in (False, True))
    older = _older(full) | ({older_local: local["rope_theta"]} if older_local else {})
    return {"rope_parameters": {LOCAL: local, FULL: full}} | older
