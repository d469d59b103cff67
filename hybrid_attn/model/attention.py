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
from hybrid_attn.model.norm import Norm
from hybrid_attn.parallel.mesh import gathered, spec_of

# (q_BTNH, k_BTKH, v_BTKH, sinks_N or None, kind, scale) -> o_BTNH and anything that is to be kept of it.
Attend = Callable[..., tuple[jax.Array, Any]]


class Matrix(nnx.Param):
    """A parameter that is multiplied with activations, in their dtype. Any other parameter is used in float32 everywhere."""


def weight(rngs: nnx.Rngs, shape: tuple[int, ...], spec: P, std: float) -> Matrix:
    """A float32 parameter drawn from N(0, std^2)."""
    return Matrix(std * jax.random.normal(rngs.params(), shape, jnp.float32, out_sharding=spec))


class Attention(nnx.Module):
    """Self-attention of one kind of layer (`kind`) inside `model`."""

    def __init__(self, model: Model, kind: LayerType, *, rngs: nnx.Rngs):
        self.model, self.kind = model, kind
        D, N, K, H = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
        std, heads = model.init_std, P("fsdp", "tensor", None)
        self.q = weight(rngs, (D, N, H), heads, std)
        self.k = weight(rngs, (D, K, H), heads, std)
        self.v = weight(rngs, (D, K, H), heads, std)
        self.o = weight(rngs, (N, H, D), P("tensor", None, "fsdp"), std)
        if kind.qk_norm != "none":
            self.q_norm, self.k_norm = (_head_norm(model, kind, heads) for heads in (N, K))
        if kind.temperature.type == "learned":
            self.temperature = nnx.Param(jnp.full((N,), kind.temperature.scale, jnp.float32, out_sharding=P("tensor")))
        if kind.sink:
            self.sink = nnx.Param(jnp.zeros((N,), out_sharding=P("tensor")))
        if kind.gate != "none":
            gate_shape = (D, N, H) if kind.gate == "projection" else (D, N)
            self.gate = weight(rngs, gate_shape, P("fsdp", "tensor"), std)

    def __call__(self, x_BTD: jax.Array, pos_BT: jax.Array, attend: Attend) -> tuple[jax.Array, Any]:
        """[B, T, D] of the same, and what `attend` keeps."""
        dtype, kind = x_BTD.dtype, self.kind
        spec = spec_of(x_BTD)
        heads = P(*spec[:2], "tensor", None)
        w_q, w_k, w_v, w_o = (gathered(w[...].astype(dtype)) for w in (self.q, self.k, self.v, self.o))
        q_BTNH = jnp.einsum("BTD,DNH->BTNH", x_BTD, w_q, out_sharding=heads)
        k_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, w_k, out_sharding=heads)
        v_BTKH = jnp.einsum("BTD,DKH->BTKH", x_BTD, w_v, out_sharding=heads)
        q_BTNH, k_BTKH = self.place(q_BTNH, k_BTKH, pos_BT)
        scale = score_scale(self.model, kind)
        o_BTNH, kept = attend(q_BTNH, k_BTKH, v_BTKH, self.sink[...] if kind.sink else None, kind, scale)
        if kind.gate == "head":
            o_BTNH *= jax.nn.sigmoid(jnp.einsum("BTD,DN->BTN", x_BTD, gathered(self.gate[...].astype(dtype))))[..., None]
        elif kind.gate == "projection":
            o_BTNH *= jax.nn.sigmoid(jnp.einsum("BTD,DNH->BTNH", x_BTD, gathered(self.gate[...].astype(dtype))))
        # einsum would contract H before N, for which compilers copy both.
        return jax.lax.dot_general(o_BTNH, w_o, (((2, 3), (0, 1)), ((), ())), out_sharding=spec), kept

    def place(self, q_BTNH, k_BTKH, pos_BT) -> tuple[jax.Array, jax.Array]:
        """Queries and keys as they enter the scores: normalised, rotated, and queries at their temperature."""
        kind = self.kind
        if kind.qk_norm != "none" and not kind.qk_norm_after_rope:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if kind.rope_theta is not None:
            angles_BTR, size = rope_angles(kind, rotated_dims(self.model, kind), pos_BT)
            q_BTNH, k_BTKH = (rotate(x, angles_BTR, size, self.model.rope_layout) for x in (q_BTNH, k_BTKH))
        if kind.qk_norm != "none" and kind.qk_norm_after_rope:
            q_BTNH, k_BTKH = self.q_norm(q_BTNH), self.k_norm(k_BTKH)
        if kind.temperature.type != "none":
            q_BTNH = (q_BTNH * self.temperatures(pos_BT)).astype(q_BTNH.dtype)
        return q_BTNH, k_BTKH

    def temperatures(self, pos_BT: jax.Array) -> jax.Array:
        """Factor on each query [B, T, N or 1, 1], float32, by n, the keys from its document's start to itself.

        log_length: log(a + n) / log(a) (SWAN, arXiv 2504.08719). steps: 1 + c log(floor(n / length) + 1) (Llama 4).
        learned: s log n with s per head (SSMax, arXiv 2501.19399).
        """
        t, n_BT11 = self.kind.temperature, (pos_BT + 1).astype(jnp.float32)[..., None, None]
        if t.type == "log_length":
            return jnp.log(t.length + n_BT11) / math.log(t.length)
        if t.type == "steps":
            return 1 + t.scale * jnp.log(jnp.floor(n_BT11 / t.length) + 1)
        return self.temperature[...][:, None] * jnp.log(n_BT11)


def _head_norm(model: Model, kind: LayerType, heads: int) -> Norm:
    """The norm of queries or keys [B, T, heads, H], by `kind.qk_norm_scope`."""
    if kind.qk_norm_scope == "head_dim":
        return Norm(kind.qk_norm, (model.head_dim,), model.norm_eps, P(None))
    dims = 2 if kind.qk_norm_scope == "projection" else 1
    return Norm(kind.qk_norm, (heads, model.head_dim), model.norm_eps, P("tensor", None), dims=dims)


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
        first, last = max(math.floor(first), 0), min(math.ceil(last), dims - 1)
        last += 0.001 * (first == last)  # where the ends cross the ramp falls, as it does in the code of the paper
        stretch = np.clip((np.arange(dims // 2) - first) / (last - first), 0, 1)
        size = 0.1 * math.log(factor) + 1 if scaling.attention_factor is None else scaling.attention_factor
        return freq * (1 - stretch + stretch / factor), size
    return freq, 1.0


def rope_angles(kind: LayerType, dims: int, pos_BT: jax.Array) -> tuple[jax.Array, float]:
    """Angles [B, T, dims / 2] in float32, and the factor on their cosines and sines."""
    freq_R, size = rope_frequencies(kind.rope_theta, dims, kind.rope_scaling)
    return pos_BT[..., None].astype(jnp.float32) * freq_R.astype(np.float32), size


def rotate(x_BTNH: jax.Array, angles_BTR: jax.Array, size: float, layout: str) -> jax.Array:
    """The first 2R dimensions of each head turned pair by pair, in float32; pairs are (2i, 2i+1) or (i, i + R)."""
    R = angles_BTR.shape[-1]
    turn, rest = x_BTNH[..., : 2 * R].astype(jnp.float32), x_BTNH[..., 2 * R :]
    cos, sin = size * jnp.cos(angles_BTR)[:, :, None], size * jnp.sin(angles_BTR)[:, :, None]
    a, b = (turn[..., ::2], turn[..., 1::2]) if layout == "interleaved" else (turn[..., :R], turn[..., R:])
    turned = (a * cos - b * sin, b * cos + a * sin)
    if layout == "interleaved" and R > 1:  # of a single pair the layouts are the same, and a reshape would lose the sharding
        turned = jnp.stack(turned, -1).reshape(turn.shape)
    else:
        turned = jnp.concatenate(turned, -1)
    return jnp.concatenate([turned.astype(x_BTNH.dtype), rest], -1)
