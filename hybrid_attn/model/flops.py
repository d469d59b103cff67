"""What a config costs: parameters, FLOPs and cache bytes, exact for windows, chunks and causality.

A multiply and an add are two FLOPs. A training step is three forward passes; recomputation (remat) is not counted, so that
model FLOPs utilisation says what the model needed. Norms, rotations and softmax are not counted, nor is the embedding lookup.
"""

import math

import jax

from hybrid_attn.config import LayerType, Model
from hybrid_attn.model.transformer import init
from hybrid_attn.parallel.mesh import abstract_mesh

TRAIN = 3  # forward passes that a training step costs: one forward, and twice that backward


def parameters(model: Model) -> int:
    """Number of parameters, without making them."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(model)))


def shapes(model: Model):
    """The tree of parameter shapes and dtypes, on the mesh in force or else on one device."""
    mesh = jax.sharding.get_abstract_mesh()
    with jax.sharding.use_abstract_mesh(abstract_mesh() if mesh.empty else mesh):
        return jax.eval_shape(lambda: init(model, jax.random.key(0)))


def attended_pairs(kind: LayerType, length: int) -> int:
    """Pairs of a query and a key that it sees, in one document of `length` tokens."""
    if kind.chunk is not None:
        whole, rest = divmod(length, kind.chunk)
        return whole * _triangle(kind.chunk) + _triangle(rest)
    window = length if kind.window is None else min(kind.window, length)
    return _triangle(window) + (length - window) * window


def attention_flops(num_heads: int, head_dim: int, pairs: int) -> int:
    """FLOPs forward of the scores and the weighted sums of a layer, over `pairs` of a query and a key."""
    return 4 * num_heads * head_dim * pairs


def _triangle(n: int) -> int:
    return n * (n + 1) // 2


def forward_flops_per_token(model: Model, length: int) -> float:
    """FLOPs of a forward pass over one document of `length` tokens, by token."""
    D, N, K, H = model.d_model, model.num_heads, model.num_kv_heads, model.head_dim
    weights = model.vocab_size * D
    pairs = 0
    for letter in model.layers:
        kind = model.kinds[letter]
        gate = {"none": 0, "head": D * N, "projection": D * N * H}[kind.gate]
        weights += 2 * D * N * H + 2 * D * K * H + gate + 3 * D * model.d_ff
        pairs += attended_pairs(kind, length)
    return 2 * weights + attention_flops(N, H, pairs) / length


def train_flops_per_token(model: Model, length: int) -> float:
    """FLOPs of a training step by token."""
    return TRAIN * forward_flops_per_token(model, length)


def cache_bytes(model: Model, length: int, bytes_per_value: int = 2) -> int:
    """Bytes of keys and values that decoding needs after `length` tokens of one sequence."""
    kept = 0
    for letter in model.layers:
        kind = model.kinds[letter]
        kept += min(length, kind.window or kind.chunk or length)
    return 2 * kept * model.num_kv_heads * model.head_dim * bytes_per_value
