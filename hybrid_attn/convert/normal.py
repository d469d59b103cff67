"""The normal form of a layer type, in which those that compute the same function are equal."""

import dataclasses

from hybrid_attn import config, trees
from hybrid_attn.config import MLP, LayerType, Model, base, score_scale

PLAIN = trees.build(LayerType, trees.plain(base.kind()), "kind")  # full attention without options
NO_SCALING = PLAIN.rope_scaling


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
        scaling = dataclasses.replace(scaling, attention_factor=None, truncate=True)
    normed = layer_type.qk_norm != "none"
    return dataclasses.replace(
        layer_type,
        attention_experts=PLAIN.attention_experts if layer_type.mixer == "attention" else layer_type.attention_experts,
        share_kv=PLAIN.share_kv if layer_type.mixer == "attention" else layer_type.share_kv,
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
    """The feed-forward in a normal form: with its width, with one shared expert for all, and without losses of training."""
    mlp, width = layer_type.mlp, config.mlp_width(model, layer_type)
    limit = {"swiglu_limit": mlp.swiglu_limit, "swiglu_alpha": PLAIN.mlp.swiglu_alpha}
    if mlp.swiglu_limit is not None:
        limit["swiglu_alpha"] = mlp.swiglu_alpha
    if mlp.type != "moe":
        return dataclasses.replace(PLAIN.mlp, type=mlp.type, d_ff=width, **limit)
    shared = config.shared_width(model, layer_type)
    trained = {name: getattr(PLAIN.mlp, name) for name in ("balance_loss", "z_loss")}
    trained |= {"bias_rate": None if mlp.bias_rate is None else 0.0}
    return dataclasses.replace(mlp, d_ff=width, shared_experts=min(shared, 1), shared_d_ff=shared or None, **trained | limit)


def layer_types_of(model: Model) -> list[LayerType]:
    """The layer type of every layer."""
    return [model.kinds[letter] for letter in model.layers]


def rounded(x: float) -> float:
    """`x` with nine digits, which its square root and square do not change."""
    return float(f"{x:.9g}")
