"""Families of public models as values of our fields: for each, its config.json and its tensor names, both ways.

`model_of` reads a config.json, `config_json` writes one and refuses what the family cannot say, `tensors` names the arrays.
Where a config.json is silent, `defaults` holds what the family's own implementation takes.
"""

import dataclasses
import math
import string
from collections.abc import Callable, Mapping
from typing import NamedTuple

from hybrid_attn import config
from hybrid_attn.config import LayerKind, Model, RopeScaling, Temperature

LOCAL, FULL = "sliding_attention", "full_attention"  # how config.json calls its layers
NO_SCALING = RopeScaling("none", 1.0, 8192, 1.0, 32.0, None)
PLAIN = LayerKind(
    window=None, chunk=None, rope_theta=None, rope_fraction=1.0, rope_scaling=NO_SCALING,
    qk_norm="none", qk_norm_scope="head_dim", qk_norm_after_rope=False, scale=None, softcap=None,
    temperature=Temperature("none", 0.1, 8192), sink=False, gate="none",
)  # fmt: skip
USUAL_LETTERS = {(True, True): "L", (True, False): "W", (False, False): "G", (False, True): "R"}  # window, rope
NULLABLE = ("sliding_window", "final_logit_softcapping")  # of which null does not mean the default
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
LAYER = {  # path below a layer of ours -> name below `model.layers.N.`
    "attention/q": "self_attn.q_proj.weight",
    "attention/k": "self_attn.k_proj.weight",
    "attention/v": "self_attn.v_proj.weight",
    "attention/o": "self_attn.o_proj.weight",
    "mlp/gate": "mlp.gate_proj.weight",
    "mlp/up": "mlp.up_proj.weight",
    "mlp/down": "mlp.down_proj.weight",
}
HEAD_NORMS = {"attention/q_norm/weight": "self_attn.q_norm.weight", "attention/k_norm/weight": "self_attn.k_norm.weight"}
PRE = {"attention_norm/weight": "input_layernorm.weight", "mlp_norm/weight": "post_attention_layernorm.weight"}
POST = {
    "attention_post_norm/weight": "post_attention_layernorm.weight",
    "mlp_post_norm/weight": "post_feedforward_layernorm.weight",
}
TOP = {"embed": "model.embed_tokens.weight", "final_norm/weight": "model.norm.weight", "unembed": "lm_head.weight"}
# Their matrices are [out, in], ours [in, out], with heads as axes of their own; this many leading axes of ours are `in`.
INPUT_AXES = {name: 1 for name in ("attention/q", "attention/k", "attention/v", "attention/gate", "mlp/gate", "mlp/up")}
INPUT_AXES |= {"attention/o": 2, "mlp/down": 1}


class Family(NamedTuple):
    """One family. `kinds` gives the kind of every layer of a config.json; `layout` the fields that bring it back."""

    architecture: str
    fixed: dict  # Model fields that every model of the family has
    fields: dict  # config.json field -> Model field, besides FIELDS
    defaults: dict
    required: dict  # config.json fields of which we compute only this value
    kinds: Callable[[dict], list[LayerKind]]
    layout: Callable[[Model], dict]
    layer: dict  # path of a layer's leaf -> tensor name, besides LAYER
    flat: tuple[str, ...] = ()  # leaves of which their tensor has one axis
    scales: Callable[[dict], dict] = lambda c: {}  # Model fields that follow from several of config.json


class Tensor(NamedTuple):
    """One array of a safetensors file: a leaf of ours, or one period of it. `shape` is theirs; see `ours` and `theirs`."""

    name: str
    path: str
    period: int | None
    shape: tuple[int, ...]
    transposed: bool

    def ours(self, x, shape: tuple[int, ...]):
        """Their array in our axes; `shape` is ours, without the axis of periods."""
        return (x.T if self.transposed else x).reshape(shape)

    def theirs(self, x):
        """Our array (one period of it) in their axes."""
        return x.reshape(self.shape[::-1]).T if self.transposed else x.reshape(self.shape)


def family_of(model_type: str | None) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(f"config.json has model_type={model_type!r}; known families: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]


def model_of(config_json: Mapping) -> Model:
    """The model that a config.json describes; ValueError where the family, or one of its features, is not ours."""
    family = family_of(config_json.get("model_type"))
    said = {key: value for key, value in config_json.items() if value is not None or key in NULLABLE}
    c = {**family.defaults, **said}
    missing = [key for key in FIELDS if key not in c and key not in ("head_dim", "num_key_value_heads")]
    if missing:
        raise ValueError(f"config.json lacks {', '.join(missing)}")
    for key in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if not isinstance(c[key], int) or c[key] < 1:
            raise ValueError(f"config.json has {key}={c[key]!r}, which must be a whole number above 0")
    c.setdefault("num_key_value_heads", c["num_attention_heads"])
    c.setdefault("head_dim", c["hidden_size"] // c["num_attention_heads"])
    for key, wanted in family.required.items():
        if c.get(key, wanted) != wanted:
            raise ValueError(f"config.json has {key}={c[key]!r}; of {c['model_type']}, only {key}={wanted!r} is built here")
    values = {ours: c[key] for key, ours in (FIELDS | family.fields).items()} | family.fixed | family.scales(c)
    if values["activation"] not in ACTIVATIONS:
        raise ValueError(f"config.json has activation {values['activation']!r}; known: {', '.join(ACTIVATIONS)}")
    values["activation"] = ACTIVATIONS[values["activation"]]
    try:
        pattern, kinds = _pattern(family.kinds(c), c["num_hidden_layers"])
    except KeyError as cause:
        raise ValueError(f"config.json lacks {cause} where it describes its layers or their rotation") from cause
    return config.build_model(values | {"pattern": pattern, "kinds": kinds})


def config_json(model: Model, model_type: str, max_len: int) -> dict:
    """The config.json of `model` as `model_type`, for texts up to `max_len` tokens.

    ValueError with a line for each field that would not come back the same.
    """
    family = family_of(model_type)
    back = {ours: theirs for theirs, ours in ACTIVATIONS.items()}
    values = {theirs: getattr(model, ours) for theirs, ours in (FIELDS | family.fields).items()}
    values |= {key: back[value] for key, value in values.items() if (FIELDS | family.fields)[key] == "activation"}
    if "head_dim" not in family.defaults and model.head_dim * model.num_heads == model.d_model:
        values.pop("head_dim")  # families that derive it do not know the field
    out = {"architectures": [family.architecture], "model_type": model_type, "max_position_embeddings": max_len}
    out |= values | family.required | family.layout(model)
    lines = differences(model, model_of(out))
    if lines:
        raise ValueError(f"{model_type} cannot express this model (ours -> what it would be there):\n" + "\n".join(lines))
    return out


def expressing(model: Model) -> str:
    """The first family that expresses `model`; ValueError with the nearest one and what stands in its way."""
    causes = {}
    for model_type in FAMILIES:
        try:
            config_json(model, model_type, 1)
            return model_type
        except ValueError as cause:
            causes[model_type] = str(cause)
    nearest = min(causes.values(), key=lambda text: text.count("\n"))
    raise ValueError(f"no family expresses this model ({', '.join(FAMILIES)}); the nearest:\n{nearest}")


def differences(ours: Model, theirs: Model) -> list[str]:
    """Lines `model.field: ours -> theirs` where the two compute different functions; letters of the pattern do not count."""
    a, b = _essence(ours), _essence(theirs)
    if not (_rotates(ours) and _rotates(theirs)):
        del a["rope_layout"], b["rope_layout"]
    kinds = {"kinds": {}}, {"kinds": {}}
    for letter, mine, other in zip(ours.layers, a.pop("layers"), b.pop("layers"), strict=False):
        if mine != other or letter not in kinds[0]["kinds"]:
            kinds[0]["kinds"][letter], kinds[1]["kinds"][letter] = mine, other
    return config.differences(a | kinds[0], b | kinds[1], "  model.")


def tensors(model: Model, model_type: str, shapes: Mapping[str, tuple[int, ...]]) -> list[Tensor]:
    """Every tensor of the family's files, for leaves of these paths and shapes, leaf by leaf."""
    family, found = family_of(model_type), []
    names = LAYER | family.layer
    for path, shape in shapes.items():
        if path in TOP:
            found.append(Tensor(TOP[path], path, None, tuple(shape), False))
            continue
        part, slot, leaf = path.split("/", 2)
        if leaf not in names:
            raise ValueError(f"{model_type} has no tensor for {path}")
        first, step = int(slot[1:]), len(model.pattern)
        stacked = part == "periods"
        inner = tuple(shape[1:]) if stacked else tuple(shape)
        axes = INPUT_AXES.get(leaf)
        theirs = (math.prod(inner[axes:]), math.prod(inner[:axes])) if axes else inner
        theirs = (math.prod(inner),) if leaf in family.flat else theirs
        for period in range(model.num_periods) if stacked else (model.num_periods,):
            name = f"model.layers.{period * step + first}.{names[leaf]}"
            found.append(Tensor(name, path, period if stacked else None, theirs, bool(axes)))
    return found


def _pattern(kinds: list[LayerKind], num_layers: int) -> tuple[str, dict]:
    """The shortest pattern that repeats to these kinds, and what its letters mean."""
    if len(kinds) != num_layers:
        raise ValueError(f"config.json names the types of {len(kinds)} layers and has num_hidden_layers={num_layers}")
    names: dict[LayerKind, str] = {}
    for kind in kinds:
        if kind not in names:
            usual = USUAL_LETTERS[kind.window is not None, kind.rope_theta is not None]
            names[kind] = next(x for x in usual + string.ascii_uppercase if x not in names.values())
    letters = "".join(names[kind] for kind in kinds)
    period = next(n for n in range(1, num_layers + 1) if letters == (letters[:n] * num_layers)[:num_layers])
    return letters[:period], {letter: config.to_dict(kind) for kind, letter in names.items()}


def _essence(model: Model) -> dict:
    """The fields of a model, without those that its other fields make meaningless."""
    values = {field.name: getattr(model, field.name) for field in dataclasses.fields(Model)}
    kinds = [model.kinds[letter] for letter in model.layers]
    values["embed_scale"] = _rounded(model.embed_scale)
    del values["pattern"], values["kinds"]
    return values | {"layers": [config.to_dict(_essential(model, kind)) for kind in kinds]}


def _rotates(model: Model) -> bool:
    return any(model.kinds[letter].rope_theta is not None for letter in model.layers)


def _essential(model: Model, kind: LayerKind) -> LayerKind:
    theta, scaling = kind.rope_theta, kind.rope_scaling
    if theta is None or scaling.type in ("none", "ntk"):
        dims = config.rotated_dims(model, kind)
        theta = theta and _rounded(theta * (scaling.factor ** (dims / (dims - 2)) if scaling.type == "ntk" else 1.0))
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
        scale=_rounded(model.head_dim**-0.5 if kind.scale is None else kind.scale),
        temperature=PLAIN.temperature if kind.temperature.type == "none" else kind.temperature,
    )


def _rounded(x: float) -> float:
    return float(f"{x:.9g}")


# --- Rotary positions: `rope_parameters`, flat or by type of layer, and the older `rope_theta` with `rope_scaling`.


def _rope(c: dict, default_theta: float) -> tuple[float, RopeScaling]:
    """(theta, scaling) of a config.json with one rotation for all layers."""
    params = dict(c.get("rope_scaling") or c.get("rope_parameters") or {})
    if {LOCAL, FULL} & set(params):
        raise ValueError(f"config.json has rope_parameters by type of layer; {c['model_type']} has one rotation")
    if "original_max_position_embeddings" in c:
        params["original_max_position_embeddings"] = c["original_max_position_embeddings"]
    return _theta_and_scaling(params, c.get("rope_theta", default_theta), c)


def _rope_by_type(c: dict, local_theta: tuple[str | None, float], full_theta: float) -> dict:
    """(theta, scaling) by type of layer; the older `rope_scaling` and `rope_theta` are those of the full layers alone."""
    by_type = c.get("rope_parameters") or {}
    if by_type and not {LOCAL, FULL} & set(by_type):
        raise ValueError(f"config.json has rope_parameters without {LOCAL} and {FULL}; {c['model_type']} has one for each")
    key, theta = local_theta
    return {
        LOCAL: _theta_and_scaling(by_type.get(LOCAL) or {}, c.get(key, theta), c),
        FULL: _theta_and_scaling(
            {**(by_type.get(FULL) or {}), **(c.get("rope_scaling") or {})}, c.get("rope_theta", full_theta), c
        ),
    }


def _theta_and_scaling(params: Mapping, theta: float, c: Mapping) -> tuple[float, RopeScaling]:
    params = {key: value for key, value in params.items() if value is not None}
    theta, name = float(params.get("rope_theta", theta)), params.get("rope_type", params.get("type", "default"))
    if c.get("partial_rotary_factor", params.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("config.json has a partial_rotary_factor; of these families, none is built with one")
    length = params.get("original_max_position_embeddings", c.get("max_position_embeddings"))
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


def _rope_parameters(model: Model, kind: LayerKind | None) -> dict:
    """The `rope_parameters` of a kind; of None, the plain ones of a model that rotates nothing."""
    if kind is None or kind.rope_theta is None:
        return {"rope_type": "default", "rope_theta": 10_000.0}
    kind, s = _essential(model, kind), _essential(model, kind).rope_scaling
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
    elif isinstance(pattern, str):
        types = [LOCAL if pattern[i % len(pattern)] == "L" and i + 1 < layers else FULL for i in range(layers)]
    else:
        types = [LOCAL if pattern and (i + 1) % pattern else FULL for i in range(layers)]
    unknown = sorted(set(types) - {LOCAL, FULL})
    if unknown:
        raise ValueError(f"config.json has layer_types {', '.join(unknown)}; known: {LOCAL}, {FULL}")
    if LOCAL in types and c.get("sliding_window") is None:
        raise ValueError(f"config.json has layers of {LOCAL} and no sliding_window")
    return types


def _layer_types(model: Model) -> dict:
    """`layer_types` and the `sliding_window` of the first layer that has one."""
    windows = [model.kinds[letter].window for letter in model.layers]
    types = [FULL if window is None else LOCAL for window in windows]
    return {"layer_types": types, "sliding_window": next((w for w in windows if w is not None), None)}


def _kind(window: int | None, rope: tuple[float, RopeScaling] | None, **changes) -> LayerKind:
    theta, scaling = rope or (None, NO_SCALING)
    return dataclasses.replace(PLAIN, window=window, rope_theta=theta, rope_scaling=scaling, **changes)


def _window(c: dict, kind: str) -> int | None:
    return c["sliding_window"] if kind == LOCAL else None


def _cohere2(c: dict) -> list[LayerKind]:
    rope = _rope(c, 10_000.0)
    return [_kind(_window(c, kind), rope if kind == LOCAL else None) for kind in _types(c)]


def _cohere(c: dict) -> list[LayerKind]:
    norm = {"qk_norm": "layernorm", "qk_norm_scope": "head"} if c["use_qk_norm"] else {}
    return [_kind(None, _rope(c, 500_000.0), **norm)] * c["num_hidden_layers"]


def _llama(c: dict) -> list[LayerKind]:
    return [_kind(None, _rope(c, 10_000.0))] * c["num_hidden_layers"]


def _smollm3(c: dict) -> list[LayerKind]:
    layers, every = c["num_hidden_layers"], c["no_rope_layer_interval"]
    rotates = c.get("no_rope_layers") or [int((i + 1) % every != 0) for i in range(layers)]  # 1 = it does rotate
    local = c.get("use_sliding_window") and c.get("sliding_window")
    types = _types({"layer_types": [FULL if r or not local else LOCAL for r in rotates]} | c)
    if LOCAL in types and not local:
        raise ValueError(f"config.json has layers of {LOCAL} and use_sliding_window=false")
    if len(rotates) < len(types):
        raise ValueError(f"config.json has no_rope_layers for {len(rotates)} layers of {len(types)}")
    rope = _rope(c, 2_000_000.0)
    return [_kind(_window(c, kind), rope if r else None) for kind, r in zip(types, rotates, strict=False)]


def _smollm3_layout(model: Model) -> dict:
    kinds = [model.kinds[letter] for letter in model.layers]
    types = _layer_types(model)
    rotates = [int(kind.rope_theta is not None) for kind in kinds]
    return types | {"no_rope_layers": rotates, "use_sliding_window": types["sliding_window"] is not None} | _one_rope(model)


def _exaone4(c: dict) -> list[LayerKind]:
    """With a window anywhere, the full layers have no positions; without one, every layer rotates."""
    window, rope = c.get("sliding_window"), _rope(c, 10_000.0)
    types = _types(c if window else c | {"sliding_window_pattern": None})
    return [_kind(_window(c, kind), rope if not window or kind == LOCAL else None, qk_norm="rms") for kind in types]


def _exaone4_layout(model: Model) -> dict:
    types = _layer_types(model)
    if any(model.kinds[letter].rope_theta is None for letter in model.layers):
        types["sliding_window"] = types["sliding_window"] or 4096  # no layer has it; it says that full ones do not rotate
    return types | _one_rope(model)


def _olmo3(c: dict) -> list[LayerKind]:
    ropes = _rope_by_type(c, (None, 500_000.0), 500_000.0)
    return [_kind(_window(c, kind), ropes[kind], qk_norm="rms", qk_norm_scope="projection") for kind in _types(c)]


def _gemma3(c: dict) -> list[LayerKind]:
    ropes = _rope_by_type(c, ("rope_local_base_freq", 10_000.0), 1_000_000.0)
    scale = float(c["query_pre_attn_scalar"]) ** -0.5
    return [_kind(_window(c, kind), ropes[kind], qk_norm="rms_plus1", scale=scale) for kind in _types(c)]


def _gemma3_layout(model: Model) -> dict:
    scale = model.kinds[model.pattern[0]].scale
    scalar = round(model.head_dim if scale is None else scale**-2)
    return _layer_types(model) | _rope_of_each(model, "rope_local_base_freq") | {"query_pre_attn_scalar": scalar}


def _afmoe(c: dict) -> list[LayerKind]:
    if c["num_dense_layers"] < c["num_hidden_layers"]:
        raise ValueError(
            f"config.json has num_dense_layers={c['num_dense_layers']} of {c['num_hidden_layers']} layers; "
            "experts are not built here, so of afmoe only dense models can be read"
        )
    rope, every = _rope(c, 10_000.0), c["global_attn_every_n_layers"]
    types = _types({"sliding_window_pattern": every} | c)
    return [_kind(_window(c, t), rope if t == LOCAL else None, qk_norm="rms", gate="projection") for t in types]


def _afmoe_layout(model: Model) -> dict:
    more = {"num_dense_layers": model.num_layers, "mup_enabled": model.embed_scale != 1.0}
    return _layer_types(model) | _one_rope(model) | more


COHERE = {"block": "parallel", "norm": "layernorm", "rope_layout": "interleaved", "embed_scale": 1.0, "logit_softcap": None}
LLAMA = {"norm": "rms", "rope_layout": "half", "embed_scale": 1.0, "logit_scale": 1.0, "logit_softcap": None}
COHERE_FIELDS = {"layer_norm_eps": "norm_eps", "hidden_act": "activation", "logit_scale": "logit_scale"}
LLAMA_FIELDS = {"rms_norm_eps": "norm_eps", "hidden_act": "activation"}
COMMON = {"hidden_act": "silu", "initializer_range": 0.02}
COHERE_DEFAULTS = COMMON | {"layer_norm_eps": 1e-5, "logit_scale": 0.0625, "tie_word_embeddings": True}
NO_BIAS = {"attention_bias": False}

FAMILIES = {
    "cohere2": Family(
        "Cohere2ForCausalLM", COHERE, COHERE_FIELDS, COHERE_DEFAULTS | {"sliding_window_pattern": 4, "sliding_window": 4096},
        NO_BIAS, _cohere2, lambda model: _layer_types(model) | _one_rope(model), {"norm/weight": "input_layernorm.weight"},
    ),
    "cohere": Family(
        "CohereForCausalLM", COHERE, COHERE_FIELDS, COHERE_DEFAULTS | {"use_qk_norm": False},
        NO_BIAS, _cohere,
        lambda model: {"use_qk_norm": model.kinds[model.pattern[0]].qk_norm != "none"} | _one_rope(model),
        {"norm/weight": "input_layernorm.weight"} | HEAD_NORMS,
    ),
    "llama": Family(
        "LlamaForCausalLM", LLAMA | {"block": "pre"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
        NO_BIAS | {"mlp_bias": False}, _llama, _one_rope, PRE,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM", LLAMA | {"block": "pre"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-6, "tie_word_embeddings": True, "no_rope_layer_interval": 4, "num_key_value_heads": 4},
        NO_BIAS | {"mlp_bias": False}, _smollm3, _smollm3_layout, PRE,
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM", LLAMA | {"block": "post"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window_pattern": 4, "sliding_window": 4096,
                  "num_key_value_heads": 32},
        {}, _exaone4, _exaone4_layout, POST | HEAD_NORMS,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM", LLAMA | {"block": "post"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "sliding_window_pattern": 4, "sliding_window": 4096},
        NO_BIAS, _olmo3, lambda model: _layer_types(model) | _rope_of_each(model, None), POST | HEAD_NORMS,
        flat=tuple(HEAD_NORMS),
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        {"block": "sandwich", "norm": "rms_plus1", "rope_layout": "half", "logit_scale": 1.0},
        {"rms_norm_eps": "norm_eps", "hidden_activation": "activation", "final_logit_softcapping": "logit_softcap"},
        {"initializer_range": 0.02, "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-6, "head_dim": 256,
         "num_key_value_heads": 4, "tie_word_embeddings": True, "sliding_window_pattern": 6, "sliding_window": 4096,
         "query_pre_attn_scalar": 256, "final_logit_softcapping": None},
        NO_BIAS | {"attn_logit_softcapping": None, "use_bidirectional_attention": False}, _gemma3, _gemma3_layout,
        {"attention_norm/weight": "input_layernorm.weight", "mlp_norm/weight": "pre_feedforward_layernorm.weight"}
        | POST | HEAD_NORMS,
        scales=lambda c: {"embed_scale": float(c["hidden_size"]) ** 0.5},
    ),
    "afmoe": Family(
        "AfmoeForCausalLM", LLAMA | {"block": "sandwich"}, LLAMA_FIELDS,
        COMMON | {"rms_norm_eps": 1e-5, "tie_word_embeddings": False, "head_dim": 128, "num_dense_layers": 1,
                  "global_attn_every_n_layers": 4, "sliding_window": 1024},
        NO_BIAS, _afmoe, _afmoe_layout,
        {"attention_norm/weight": "input_layernorm.weight", "attention_post_norm/weight": "post_attention_layernorm.weight",
         "mlp_norm/weight": "pre_mlp_layernorm.weight", "mlp_post_norm/weight": "post_mlp_layernorm.weight",
         "attention/gate": "self_attn.gate_proj.weight"} | HEAD_NORMS,
        scales=lambda c: {"embed_scale": float(c["hidden_size"]) ** 0.5 if c.get("mup_enabled") else 1.0},
    ),
}  # fmt: skip
