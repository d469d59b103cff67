"""Attention of one layer: project, normalise, rotate, attend, project.

Letters: B batch, T tokens, D model, N query heads, K key/value heads, H head size, R rotated pairs of a head.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import LayerType, Model, RopeScaling, rotated_dims, score_scale
from hybrid_attn.config_model import attention_heads
from hybrid_attn.kernels import AttentionOptions
from hybrid_attn.model.params import Norm, biased, linear, vector
from hybrid_attn.parallel.mesh import spec_of

QUERIES, KEYS = "queries", "keys"  # what an `Attention` has the weights of
Angles = tuple[jax.Array, float] | None
# (q_BTNH, k_BTKH, v_BTKH, sinks_N or None) -> o_BTNH, and a state that the mixer passes on.
Attend = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], tuple[jax.Array, Any]]


class Attention(nnx.Module):
    """Self-attention of one layer type inside `model`; with some of the `parts` only, a part of an attention expert."""

    def __init__(self, model: Model, layer_type: LayerType, *, rngs: nnx.Rngs, parts: tuple[str, ...] = (QUERIES, KEYS)):
        self.model, self.layer_type = model, layer_type
        D, N, K, H = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
        std, axes = model.init_std, ("embed", "heads", "head_dim")
        if QUERIES in parts:
            self.q = linear(rngs, (D, N, H), axes, std)
        if KEYS in parts:
            self.k = linear(rngs, (D, K, H), axes, std)
            self.v = linear(rngs, (D, K, H), axes, std)
        if KEYS in parts and layer_type.qk_norm != "none":
            self.k_norm = _head_norm(model, layer_type, K)
        if KEYS in parts and layer_type.attention_bias:
            self.k_bias, self.v_bias = (vector((K, H), ("heads", "head_dim"), 0.0) for _ in range(2))
        if QUERIES not in parts:
            return
        self.o = linear(rngs, (N, H, D), ("heads", "head_dim", "embed"), std, fan_in=2)
        if layer_type.qk_norm != "none":
            self.q_norm = _head_norm(model, layer_type, N)
        if layer_type.temperature.type == "learned":
            self.temperature = vector((N,), ("heads",), layer_type.temperature.scale)
        if layer_type.attention_bias:
            self.q_bias, self.o_bias = vector((N, H), ("heads", "head_dim"), 0.0), vector((D,), ("norm",), 0.0)
        if layer_type.sink:
            self.sink = vector((N,), ("heads",), 0.0)
        if layer_type.gate == "projection":
            self.gate = linear(rngs, (D, N, H), axes, std)
        elif layer_type.gate == "head":
            self.gate = linear(rngs, (D, N), ("embed", "heads"), std)

    def __call__(self, x_BTD: jax.Array, pos_BT: jax.Array, seg_BT: jax.Array, attend: Attend) -> tuple[jax.Array, dict, Any]:
        """The output [B, T, D], an empty aux, and what else `attend` returns."""
        angles = self.angles(pos_BT)
        q_BTNH = self.queries(x_BTD, pos_BT, angles)
        o_BTNH, state = attend(q_BTNH, *self.keys(x_BTD, angles), self.sinks)
        return self.output(x_BTD, o_BTNH), {}, state

    @property
    def sinks(self) -> jax.Array | None:
        """The logit of each query head that is no key's."""
        return self.sink[...] if self.layer_type.sink else None

    def angles(self, pos_BT: jax.Array) -> Angles:
        """How queries and keys are rotated, as `rope_angles` has it; None for no rotation."""
        layer_type = self.layer_type
        return None if layer_type.rope_theta is None else rope_angles(layer_type, rotated_dims(self.model, layer_type), pos_BT)

    def queries(self, x_BTD: jax.Array, pos_BT: jax.Array, angles: Angles) -> jax.Array:
        """Queries [B, T, N, H] as they enter the scores: normalised, rotated, at their temperature."""
        q_BTNH = self.norm_and_rotate(self._projected("q", x_BTD), "q_norm", angles)
        if self.layer_type.temperature.type != "none":
            q_BTNH = (q_BTNH * self.temperatures(pos_BT)).astype(q_BTNH.dtype)
        return q_BTNH

    def keys(self, x_BTD: jax.Array, angles: Angles) -> tuple[jax.Array, jax.Array]:
        """Keys [B, T, K, H] as they enter the scores, and values."""
        k_BTKH = self.norm_and_rotate(self._projected("k", x_BTD), "k_norm", angles)
        return k_BTKH, self._projected("v", x_BTD)

    def output(self, x_BTD: jax.Array, o_BTNH: jax.Array) -> jax.Array:
        """What the layer adds to the residual stream, from the weighted sums of values."""
        if self.layer_type.gate != "none":
            gate = jax.nn.sigmoid(self.gate(x_BTD))
            o_BTNH *= gate[..., None] if self.layer_type.gate == "head" else gate
        y_BTD = self.o(o_BTNH, spec_of(x_BTD))
        return biased(y_BTD, self.o_bias) if self.layer_type.attention_bias else y_BTD

    def _projected(self, name: str, x_BTD: jax.Array) -> jax.Array:
        """Queries, keys or values [B, T, N, H], by the weight `name` and its bias."""
        y_BTNH = getattr(self, name)(x_BTD, P(*spec_of(x_BTD)[:2], "tensor", None))
        return biased(y_BTNH, getattr(self, f"{name}_bias")) if self.layer_type.attention_bias else y_BTNH

    def norm_and_rotate(self, x_BTNH: jax.Array, norm: str, angles: Angles) -> jax.Array:
        """Queries or keys normalised by `q_norm` or `k_norm`, and rotated."""
        normed, after = self.layer_type.qk_norm != "none", self.layer_type.qk_norm_after_rope
        if normed and not after:
            x_BTNH = getattr(self, norm)(x_BTNH)
        if angles is not None:
            x_BTNH = rotate(x_BTNH, *angles, self.model.rope_layout)
        return getattr(self, norm)(x_BTNH) if normed and after else x_BTNH

    @staticmethod
    def sequence_flops(model: Model, layer_type: LayerType, length: int) -> int:
        """FLOPs of the scores and the weighted sums over one document of `length` tokens, forward."""
        return attention_flops(attention_heads(model, layer_type)[0], model.head_dim, attended_pairs(layer_type, length))

    def temperatures(self, pos_BT: jax.Array) -> jax.Array:
        """Factor on each query [B, T, N or 1, 1], float32, by n, the keys from its document's start to itself.

        log_length: log(a + n) / log(a) (SWAN, arXiv 2504.08719). steps: 1 + c log(floor(n / length) + 1) (Llama 4).
        position_steps: the same of n - 1, the query's position (Ministral 3).
        learned: s log n with s per head (SSMax, arXiv 2501.19399).
        """
        t, n_BT11 = self.layer_type.temperature, (pos_BT + 1).astype(jnp.float32)[..., None, None]
        if t.type == "log_length":
            return jnp.log(t.length + n_BT11) / math.log(t.length)
        if t.type in ("steps", "position_steps"):
            counted_BT11 = n_BT11 if t.type == "steps" else n_BT11 - 1
            return 1 + t.scale * jnp.log(jnp.floor(counted_BT11 / t.length) + 1)
        return self.temperature[...][:, None] * jnp.log(n_BT11)


def attention_options(model: Model, letter: str) -> AttentionOptions:
    """The mask and the scores of a layer type. A chunk is a segment of its document, whose tokens see all that came before."""
    layer_type = model.kinds[letter]
    return AttentionOptions(visible_tokens(layer_type), score_scale(model, layer_type), layer_type.softcap)


def visible_tokens(layer_type: LayerType) -> int | None:
    """The most tokens that a query sees, itself included; None for all earlier tokens."""
    return layer_type.chunk if layer_type.window is None else layer_type.window


def attended_pairs(layer_type: LayerType, length: int) -> int:
    """Pairs of a query and a key that it sees, in one document of `length` tokens."""
    if layer_type.chunk is not None:
        chunks, remainder = divmod(length, layer_type.chunk)
        return chunks * _triangle(layer_type.chunk) + _triangle(remainder)
    window = length if layer_type.window is None else min(layer_type.window, length)
    return _triangle(window) + (length - window) * window


def attention_flops(num_heads: int, head_dim: int, pairs: int) -> int:
    """FLOPs forward of the scores and the weighted sums of a layer, over `pairs` of a query and a key."""
    return 4 * num_heads * head_dim * pairs


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def _head_norm(model: Model, layer_type: LayerType, heads: int) -> Norm:
    """The norm of queries or keys [B, T, heads, H], by `layer_type.qk_norm_scope`."""
    if layer_type.qk_norm_scope == "head_dim":
        return Norm(layer_type.qk_norm, (model.head_dim,), ("head_dim",), model.norm_eps)
    dims = 2 if layer_type.qk_norm_scope == "projection" else 1
    return Norm(layer_type.qk_norm, (heads, model.head_dim), ("heads", "head_dim"), model.norm_eps, dims=dims)


def rope_frequencies(theta: float, dims: int, scaling: RopeScaling) -> tuple[np.ndarray, float]:
    """Radians per token of each rotated pair [dims / 2], float64, and the factor on cos and sin.

    RoPE (arXiv 2104.09864): theta^(-2i/dims). linear: / factor (arXiv 2306.15595). ntk: theta factor^(d/(d-2)). llama3: by
    wavelength against original_len / high and / low. yarn (arXiv 2309.00071): a ramp over the turns in original_len.
    """
    factor, length = scaling.factor, scaling.original_len
    if scaling.type == "ntk":
        theta *= factor ** (dims / (dims - 2))
    freq = theta ** (-np.arange(0, dims, 2) / dims)
    if scaling.type == "linear":
        return freq / factor, 1.0
    if scaling.type == "llama3":
        turns = length * freq / (2 * math.pi)
        keep = np.clip((turns - scaling.low) / (scaling.high - scaling.low), 0, 1)
        return freq * (keep + (1 - keep) / factor), 1.0
    if scaling.type == "yarn":
        first, last = (
            dims * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta)) for turns in (scaling.high, scaling.low)
        )
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        last += 0.001 * (first == last)  # where the ends cross the ramp falls, as it does in the code of the paper
        stretch = np.clip((np.arange(dims // 2) - first) / (last - first), 0, 1)
        size = 0.1 * math.log(factor) + 1 if scaling.attention_factor is None else scaling.attention_factor
        return freq * (1 - stretch + stretch / factor), size
    return freq, 1.0


def rope_angles(layer_type: LayerType, dims: int, pos_BT: jax.Array) -> tuple[jax.Array, float]:
    """Angles [B, T, dims / 2] in float32, and the factor on their cosines and sines."""
    freq_R, size = rope_frequencies(layer_type.rope_theta, dims, layer_type.rope_scaling)
    return pos_BT[..., None].astype(jnp.float32) * freq_R.astype(np.float32), size


def rotate(x_BTNH: jax.Array, angles_BTR: jax.Array, size: float, layout: str) -> jax.Array:
    """The first 2R dimensions of each head turned pair by pair, in float32; pairs are (2i, 2i+1) or (i, i + R)."""
    R = angles_BTR.shape[-1]
    pairs, unrotated = x_BTNH[..., : 2 * R].astype(jnp.float32), x_BTNH[..., 2 * R :]
    cos, sin = size * jnp.cos(angles_BTR)[:, :, None], size * jnp.sin(angles_BTR)[:, :, None]
    a, b = (pairs[..., ::2], pairs[..., 1::2]) if layout == "interleaved" else (pairs[..., :R], pairs[..., R:])
    rotated = (a * cos - b * sin, b * cos + a * sin)
    if layout == "interleaved" and R > 1:  # of a single pair the layouts are the same, and a reshape would lose the sharding
        rotated = jnp.stack(rotated, -1).reshape(pairs.shape)
    else:
        rotated = jnp.concatenate(rotated, -1)
    return jnp.concatenate([rotated.astype(x_BTNH.dtype), unrotated], -1)
