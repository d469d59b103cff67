"""The part of a config that describes the model: layer types and their pattern. Others import it from `config`."""

import dataclasses
import os
from collections.abc import Mapping

from hybrid_attn import trees
from hybrid_attn.trees import Table, check, check_fields, one_of, within

LONGEST = 2**27  # tokens of a sequence: 134 million
MOST_LAYERS = 10_000


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """Scaling of the rotary frequencies beyond the length that they were trained at."""

    type: str = one_of("none", "linear", "ntk", "yarn", "llama3")
    factor: float = within(1, 10**6)
    original_len: int = within(1, LONGEST, aliases=("original_max_position_embeddings",))
    low: float = within(0, 10**6, above=True, aliases=("beta_slow", "low_freq_factor"))
    high: float = within(0, 10**6, above=True, aliases=("beta_fast", "high_freq_factor"))
    attention_factor: float | None = within(0, 10**6, above=True)
    truncate: bool

    def __post_init__(self):
        check_fields(self, "rope_scaling")
        ordered = self.type not in ("yarn", "llama3") or self.low < self.high
        check(ordered, f"rope_scaling.low={self.low} must be below rope_scaling.high={self.high}")


@dataclasses.dataclass(frozen=True)
class Temperature:
    """Growth of the attention scale with the position of the query."""

    type: str = one_of("none", "log_length", "steps", "position_steps", "learned")
    scale: float = within(0, 10**6)
    length: int = within(2, LONGEST)

    def __post_init__(self):
        check_fields(self, "temperature")


@dataclasses.dataclass(frozen=True)
class MLP:
    """The feed-forward of a layer type."""

    type: str
    d_ff: int | None = within(1, 2**24, aliases=("moe_intermediate_size", "expert_dim"))
    swiglu_limit: float | None = within(0, 10**6, above=True)
    swiglu_alpha: float = within(0, 10**6, above=True)
    experts: int = within(1, 2**16, aliases=("num_experts", "num_local_experts", "n_routed_experts"))
    top_k: int = within(1, 2**16, aliases=("num_experts_per_tok", "moe_top_k"))
    router: str = one_of("softmax", "sigmoid")
    renormalise: bool = trees.named("norm_topk_prob")
    route_scale: float = within(0, 10**6, above=True, aliases=("routed_scaling_factor",))
    biases: bool
    shared_experts: int = within(0, 2**10, aliases=("num_shared_experts", "n_shared_experts"))
    shared_d_ff: int | None = within(1, 2**24, aliases=("shared_expert_intermediate_size",))
    shared_combine: str = one_of("sum", "average")
    shared_gate: bool
    balance_loss: float = within(0, 10**6, aliases=("router_aux_loss_coef",))
    bias_rate: float | None = within(0, 1, aliases=("bias_update_speed", "router_bias_update_rate"))
    bias_on: str = one_of("score", "logit")
    z_loss: float = within(0, 10**6)
    domain_dim: int | None = within(1, 2**20)

    def __post_init__(self):
        check_fields(self, "mlp")
        check(
            self.bias_rate is not None or self.bias_on == "score",
            f"mlp.bias_on={self.bias_on!r} does nothing with mlp.bias_rate=None; use a rate, or 0 for fixed biases",
        )
        enough = self.top_k <= self.experts
        check(enough, f"mlp.top_k={self.top_k} is above mlp.experts={self.experts}; use at most {self.experts}")
        about_shared = [
            f"mlp.{name}={value!r}"
            for name in ("shared_d_ff", "shared_combine", "shared_gate")
            if (value := getattr(self, name)) not in (None, "sum", False)
        ]
        check(
            not about_shared or self.shared_experts > 0,
            f"{' and '.join(about_shared)} does nothing with mlp.shared_experts=0; use 1 or more",
        )


@dataclasses.dataclass(frozen=True)
class LayerType:
    """What one letter of the pattern means: its mixer and feed-forward, which keys a query sees, how positions enter."""

    mixer: str
    attention_experts: int = within(1, 2**10)
    share_kv: bool | None
    mlp: MLP
    window: int | None = within(1, 2**31 - 1, aliases=("sliding_window",))
    chunk: int | None = within(1, 2**31 - 1, aliases=("attention_chunk_size",))
    rope_theta: float | None = within(1, 10**18, above=True, aliases=("theta", "rope_base"))
    rope_fraction: float = within(0, 1, above=True, aliases=("partial_rotary_factor", "rotary_pct"))
    rope_scaling: RopeScaling
    short_conv: int | None = within(2, 256, aliases=("canon_kernel", "conv_kernel", "d_conv", "conv_L_cache"))
    qk_norm: str = one_of("none", "layernorm", "rms", "rms_plus1", "rms_weightless")
    qk_norm_scope: str = one_of("head_dim", "head", "projection")
    qk_norm_after_rope: bool
    scale: float | None = within(0, 10**6, above=True)
    softcap: float | None = within(0, 10**6, above=True, aliases=("attn_logit_softcapping",))
    temperature: Temperature
    sink: bool
    gate: str = one_of("none", "head", "projection")
    attention_bias: bool
    residual_scale: float = within(0, 10**6, above=True, aliases=("residual_multiplier",))

    def __post_init__(self):
        check_fields(self, "kind")
        check(self.window is None or self.chunk is None, "a layer type has a window or a chunk, not both")
        rotates, scaling = self.rope_theta is not None, self.rope_scaling.type
        check(rotates or scaling == "none", f"rope_scaling.type={scaling!r} scales nothing without a rope_theta")
        has_experts = self.mixer == "attention_experts"
        cure = "does nothing without mixer='attention_experts'; leave it at None"
        check(has_experts or self.share_kv is None, f"share_kv={self.share_kv} {cure}")
        possible = not self.qk_norm_after_rope or (rotates and self.qk_norm != "none")
        check(possible, "qk_norm_after_rope needs a qk_norm and a rope_theta")


@dataclasses.dataclass(frozen=True)
class Adapter:
    """Weights beside the matrices of a model; `type` is a name in `TRANSFORMS` of model/transforms, `targets` are patterns."""

    type: str | None
    targets: tuple[str, ...] = trees.named("target_modules")
    rank: int = within(1, 2**16, aliases=("lora_rank", "lora_r"))
    alpha: float = within(0, 10**6, above=True, aliases=("lora_alpha",))
    experts: int = within(1, 2**10)

    def __post_init__(self):
        check_fields(self, "adapter")
        check(bool(self.targets), "adapter.targets is empty; name the matrices that get an adapter, such as '*/attention/q'")


@dataclasses.dataclass(frozen=True)
class LowRank:
    """Matrices that are products of two factors; `targets` are patterns."""

    rank_fraction: float | None = within(0, 1, above=True)
    targets: tuple[str, ...]
    init: str = one_of("spectral", "spectral_ones", "he")

    def __post_init__(self):
        check_fields(self, "low_rank")
        check(bool(self.targets), "low_rank.targets is empty; name the matrices that are factorised, such as '*/attention/q'")


@dataclasses.dataclass(frozen=True)
class Model:
    vocab_size: int = within(1, 2**24)
    prefix: str
    pattern: str
    num_layers: int = within(1, MOST_LAYERS, aliases=("num_hidden_layers", "n_layer", "depth"))
    d_model: int = within(1, 2**20, aliases=("hidden_size", "hidden_dim", "width", "n_embd"))
    num_heads: int = within(1, 2**16, aliases=("num_attention_heads", "n_head"))
    num_kv_heads: int = within(1, 2**16, aliases=("num_key_value_heads",))
    head_dim: int = within(1, 2**16)
    d_ff: int = within(1, 2**24, aliases=("intermediate_size", "ffn_dim", "mlp_dim"))
    block: str = one_of("parallel", "pre", "post", "sandwich")
    norm: str = one_of("layernorm", "rms", "rms_plus1")
    norm_eps: float = within(0, 1, above=True, aliases=("rms_norm_eps", "layer_norm_eps"))
    activation: str = one_of("silu", "gelu", "gelu_tanh")
    rope_layout: str = one_of("interleaved", "half")
    tie_embeddings: bool = trees.named("tie_word_embeddings", "use_embedding_sharing")
    embed_scale: float = within(0, 10**6, above=True)
    logit_scale: float = within(0, 10**6, above=True)
    logit_softcap: float | None = within(0, 10**6, above=True, aliases=("final_logit_softcapping",))
    init_std: float = within(0, 100, above=True, aliases=("initializer_range",))
    unembed_init_std: float | None = within(0, 100)
    mup_base_width: int | None = within(1, 2**20)
    mup_base_depth: int | None = within(1, MOST_LAYERS)
    depth_init: bool
    adapter: Adapter
    low_rank: LowRank
    kinds: Table[str, LayerType]

    def __post_init__(self):
        check_fields(self, "model")
        for letter in self.kinds:
            ok = len(letter) == 1 and letter.isascii() and letter.isalpha()
            check(ok, f"model.kinds names a layer type {letter!r}; a name is one letter from A to Z or a to z")
        check(bool(self.pattern), "model.pattern is empty; write one letter for each layer of a period, as in 'LLLG'")
        check(len(self.pattern) <= MOST_LAYERS, f"model.pattern has {len(self.pattern):,} letters, and at most {MOST_LAYERS:,}")
        check(
            len(self.prefix) <= self.num_layers,
            f"model.prefix={self.prefix!r} has more layers than model.num_layers={self.num_layers:,}; use more layers",
        )
        for field, letters in (("prefix", self.prefix), ("pattern", self.pattern)):
            for letter in sorted(set(letters)):
                known = ", ".join(sorted(self.kinds))
                check(letter in self.kinds, f"model.{field}={letters!r} uses {letter!r}; model.kinds defines {known}")
                self._check_rotation(letter)
        check(
            self.num_heads % self.num_kv_heads == 0,
            f"model.num_heads={self.num_heads} is not a multiple of model.num_kv_heads={self.num_kv_heads}; "
            f"use {self.num_heads // self.num_kv_heads * self.num_kv_heads or self.num_kv_heads} heads",
        )

        check(
            self.unembed_init_std is None or not self.tie_embeddings,
            f"model.unembed_init_std={self.unembed_init_std} is of a model with its own table of the logits; "
            "set model.tie_embeddings=False",
        )
        self._check_depth()
        self._check_low_rank()

    def _check_depth(self) -> None:
        by_depth = {"mup_base_depth": self.mup_base_depth, "depth_init": self.depth_init}
        names = [f"model.{name}={value}" for name, value in by_depth.items() if value]
        check(
            not names or self.block in ("parallel", "pre"),
            f"{' and '.join(names)} make the matrices that end a branch smaller, and the norm after it in "
            f"model.block={self.block!r} undoes that; use the block 'pre' or 'parallel'",
        )
        check(len(names) < 2, f"{' and '.join(names)} both make branches smaller by depth; use one of them")

    def _check_low_rank(self) -> None:
        fraction, init, adapter = self.low_rank.rank_fraction, self.low_rank.init, self.adapter.type
        if fraction is not None:
            problem = f"model.adapter.type={adapter!r} stands beside matrices, and model.low_rank.rank_fraction={fraction} "
            check(adapter is None, f"{problem}has factors instead; use one of them")
            unread = f"model.depth_init=True makes initial values smaller, and model.low_rank.init={init!r} does not read them"
            check(not self.depth_init or init == "spectral", f"{unread}; use init='spectral'")

    def _check_rotation(self, letter: str) -> None:
        layer_type = self.kinds[letter]
        dims = rotated_dims(self, layer_type)
        check(
            layer_type.rope_theta is None or (dims >= 2 and dims % 2 == 0),
            f"model.kinds.{letter}: rope_fraction={layer_type.rope_fraction} of head_dim={self.head_dim} rotates {dims} "
            "dimensions; use an even number",
        )
        stretches = layer_type.rope_scaling.type != "ntk" or dims > 2
        check(stretches, f"model.kinds.{letter}: ntk stretches by the dimension {dims}, and needs more than 2")

    @property
    def layers(self) -> str:
        """The letter of each layer, in order: the prefix, then the pattern again and again."""
        return (self.prefix + self.pattern * -(-self.num_layers // len(self.pattern)))[: self.num_layers]

    @property
    def num_periods(self) -> int:
        """Complete repetitions of the pattern after the prefix; the remaining layers are the tail."""
        return (self.num_layers - len(self.prefix)) // len(self.pattern)

    @property
    def tail(self) -> str:
        return self.layers[len(self.prefix) + self.num_periods * len(self.pattern) :]

    @property
    def groups(self) -> list[tuple[str, str, int]]:
        """(name in the parameters, letters, repetitions) of the prefix, the periods and the tail; empty groups are left out."""
        groups = ("prefix", self.prefix, 1), ("periods", self.pattern, self.num_periods), ("tail", self.tail, 1)
        return [group for group in groups if group[1] and group[2]]


def reach(layer_type: LayerType) -> str | None:
    """The mask of a layer type as text; None for full causal attention."""
    if layer_type.window is not None:
        return f"window {layer_type.window:,}"
    return None if layer_type.chunk is None else f"chunks of {layer_type.chunk:,}"


def convolution(layer_type: LayerType) -> str:
    """The short convolution of a layer type as text that follows others; empty without one."""
    return "" if layer_type.short_conv is None else f", short convolution of {layer_type.short_conv}"


def rotated_dims(model: Model, layer_type: LayerType) -> int:
    """Dimensions of a head that are rotated; the others carry no position."""
    return round(model.head_dim * layer_type.rope_fraction)


def shares_kv(layer_type: LayerType) -> bool:
    """Whether attention experts share keys and values; by default where their KV cache grows with the sequence."""
    return reach(layer_type) is None if layer_type.share_kv is None else layer_type.share_kv


def attention_heads(model: Model, layer_type: LayerType) -> tuple[int, int]:
    """The query heads and the key/value heads of a layer, of all its attention experts."""
    experts = layer_type.attention_experts if layer_type.mixer == "attention_experts" else 1
    return experts * model.num_heads, model.num_kv_heads * (1 if shares_kv(layer_type) else experts)


def mlp_width(model: Model, layer_type: LayerType) -> int:
    """The width of the feed-forward of a layer type, or of one of its experts."""
    return model.d_ff if layer_type.mlp.d_ff is None else layer_type.mlp.d_ff


def shared_width(model: Model, layer_type: LayerType) -> int:
    """The width of all shared experts of a layer type together: side by side they are one that is as wide as all."""
    width = layer_type.mlp.shared_d_ff
    return layer_type.mlp.shared_experts * (mlp_width(model, layer_type) if width is None else width)


def score_scale(model: Model, layer_type: LayerType) -> float:
    """The factor on the products of queries and keys."""
    return model.head_dim**-0.5 if layer_type.scale is None else layer_type.scale


def output_scale(model: Model) -> float:
    """The factor on the products of final activations and table that are the logits, with that of µP."""
    return model.logit_scale * (model.mup_base_width / model.d_model if model.mup_base_width else 1.0)


def shortest_periods(letters: str) -> list[int]:
    """The length of the shortest pattern that repeats to the last n letters, for every n."""
    backward, borders = letters[::-1], [-1]  # the longest border of each prefix, as Knuth, Morris and Pratt find it
    for letter in backward:
        border = borders[-1]
        while border >= 0 and backward[border] != letter:
            border = borders[border]
        borders.append(border + 1)
    return [n - border for n, border in enumerate(borders)]


def longest_text(config_json: Mapping, path: os.PathLike) -> int | None:
    """max_position_embeddings of the config.json of a published model, or None; ValueError if it is no number of tokens."""
    length = config_json.get("max_position_embeddings")
    check(
        length is None or (type(length) is int and 2 <= length < 2**31),
        f"{path} has max_position_embeddings={length!r}; make it a number of tokens, from 2 to {2**31 - 1:,}, or take it out",
    )
    return length
