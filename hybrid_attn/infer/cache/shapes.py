"""The shapes of a KV cache: what each layer holds, and how a cache is made, resized and repeated for more requests.

A layer type with a window or a chunk has a ring buffer: the token at position p is in slot p % R. A window of W tokens needs
W + T - 1 slots while chunks of T tokens are prefilled, and W slots while tokens are decoded one by one. Any other layer type
keeps every token: the token at position p is in slot p - evicted, where `evicted` counts the tokens that compression removed.
Numbers of slots are rounded up (`rounded_slots`), so that few programs are compiled.
A layer type with a short convolution of W tokens also keeps the last W - 1 inputs of the convolution.

Letters: B requests, S slots, R slots of a ring, K key/value heads, H head size, D model, U = W - 1.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.config_model import attention_heads
from hybrid_attn.kernels import AttentionOptions
from hybrid_attn.model.attention import visible_tokens
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import BATCH, spec_of

# Runs a jitted function: (function, static arguments, *arrays). The engine compiles first, to time the two apart.
Runner = Callable[..., Any]


class LayerCache(NamedTuple):
    """One layer's keys as they enter the scores, its values, and float32 scales of each slot where both are int8.

    `evicted_BK` [B, 1 or K] counts the tokens that compression removed; a ring has none.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_scales_BKS: jax.Array | None
    v_scales_BKS: jax.Array | None
    evicted_BK: jax.Array | None


class Cache(NamedTuple):
    """The cache of every layer, and how many tokens of each request it has read.

    `inputs` are the last U inputs [B, U, D] of each layer's short convolution, zeros before the request; None without one.
    """

    layers: tuple[LayerCache, ...]
    inputs: tuple[jax.Array | None, ...]
    lengths_B: jax.Array


class LayerSettings(NamedTuple):
    """What is static in one layer's attention to its cache.

    `cache/attend.py` explains `span`, and `Execution` explains `vector_products`.
    """

    attention: AttentionOptions
    chunk: int | None
    kernel: str
    span: int
    vector_products: bool

    @property
    def is_ring(self) -> bool:
        return self.attention.window is not None


def partition_specs(layer: LayerCache) -> LayerCache:
    """How the arrays of a layer are sharded."""
    if layer.evicted_BK is None:
        return LayerCache(P(BATCH, "tensor", None, None), P(BATCH, "tensor", None, None), None, None, None)
    heads = None if layer.evicted_BK.shape[1] == 1 else "tensor"
    slots, scales = P(BATCH, "tensor", AXIS, None), None if layer.k_scales_BKS is None else P(BATCH, "tensor", AXIS)
    return LayerCache(slots, slots, scales, scales, P(BATCH, heads))


def slot_numbers(span: int, local_S: jax.Array) -> jax.Array:
    """The number over all `context` shards of each of this shard's slots."""
    c, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    return local_S // span * (span * c) + i * span + local_S % span


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(number - 1, 0).bit_length()


def rounded_slots(number: int) -> int:
    """`number` rounded up to four binary digits: at most an eighth more."""
    step = max(power_of_two(number) // 16, 1)
    return -(-number // step) * step


def request_slots(tokens: int, chunk: int) -> int:
    """Slots of a request of at most `tokens` that is read `chunk` at a time, where every token is kept: whole chunks."""
    return chunk * rounded_slots(-(-tokens // chunk))


def ring_slots(visible: int, chunk: int, capacity: int) -> int:
    """Slots of a ring whose queries see `visible` tokens, read `chunk` at a time, for requests of at most `capacity` tokens."""
    return min(rounded_slots(visible + chunk - 1), capacity)


@functools.partial(jax.jit, static_argnums=range(6))
def empty(model: Model, batch_size: int, capacity: int, chunk: int, dtype: jnp.dtype, quantised: bool) -> Cache:
    """An empty cache for `batch_size` requests of at most `capacity` tokens, of which `chunk` are read at a time.

    `quantised`: layers that see all earlier tokens hold int8 numbers, and a float32 scale for each token and head.
    """

    def of_layer(letter: str) -> LayerCache:
        visible = visible_tokens(model.kinds[letter])
        slots = capacity if visible is None else ring_slots(visible, chunk, capacity)
        _, kv_heads = attention_heads(model, model.kinds[letter])
        is_int8, shape = quantised and visible is None, (batch_size, kv_heads, slots, model.head_dim)
        numbers = jax.ShapeDtypeStruct(shape, jnp.int8 if is_int8 else dtype)
        scales = jax.ShapeDtypeStruct(shape[:3], jnp.float32) if is_int8 else None
        evicted = jax.ShapeDtypeStruct((batch_size, 1), jnp.int32) if visible is None else None
        layer = LayerCache(numbers, numbers, scales, scales, evicted)
        return jax.tree.map(lambda x, spec: jnp.zeros(x.shape, x.dtype, out_sharding=spec), layer, partition_specs(layer))

    def inputs_of(letter: str) -> jax.Array | None:
        width = model.kinds[letter].short_conv
        shape = batch_size, (width or 1) - 1, model.d_model
        return None if width is None else jnp.zeros(shape, dtype, out_sharding=P(BATCH, None, None))

    layers, inputs = (tuple(map(make, model.layers)) for make in (of_layer, inputs_of))
    return Cache(layers, inputs, jnp.zeros((batch_size,), jnp.int32, out_sharding=P(BATCH)))


def resized(model: Model, cache: Cache, capacity: int, chunk: int, run: Runner) -> Cache:
    """The cache with rings for `chunk` tokens at a time. A ring that has its size already is not copied."""

    def resize(letter: str, layer: LayerCache) -> LayerCache:
        visible = visible_tokens(model.kinds[letter])
        if visible is None or (slots := ring_slots(visible, chunk, capacity)) == layer.k_BKSH.shape[2]:
            return layer
        k_BKSH, v_BKSH = run(_resized_rings, (slots,), (layer.k_BKSH, layer.v_BKSH), cache.lengths_B)
        return layer._replace(k_BKSH=k_BKSH, v_BKSH=v_BKSH)

    return cache._replace(layers=tuple(map(resize, model.layers, cache.layers)))


@functools.partial(jax.jit, static_argnums=0)
def _resized_rings(slots: int, kv_BKRH: tuple[jax.Array, jax.Array], lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rings of `slots` with the newest tokens of the old ones."""

    def shard(kv_BKRH, lengths_B):
        newest_B1, old_slots = lengths_B[:, None] - 1, kv_BKRH[0].shape[2]
        position_BR = newest_B1 - (newest_B1 - jnp.arange(slots)) % slots
        order = (position_BR % old_slots)[:, None, :, None]
        return tuple(jnp.take_along_axis(x_BKRH, order, axis=2) for x_BKRH in kv_BKRH)

    return jax.shard_map(shard, out_specs=tuple(map(spec_of, kv_BKRH)))(kv_BKRH, lengths_B)


@functools.partial(jax.jit, static_argnums=0)
def repeated(times: int, cache: Cache) -> Cache:
    """Every request `times` times, one after the other."""

    repeat = functools.partial(jnp.repeat, repeats=times, axis=0)
    return jax.tree.map(lambda x: jax.shard_map(repeat, out_specs=spec_of(x))(x), cache)


def num_bytes(cache: Cache) -> int:
    """Bytes of all keys, values and inputs of short convolutions over all devices; copies on several shards count once."""
    layers = tuple(layer._replace(evicted_BK=None) for layer in cache.layers)
    return sum(x.nbytes for x in jax.tree.leaves((layers, cache.inputs)))
