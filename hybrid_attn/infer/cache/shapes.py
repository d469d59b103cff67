"""The cache of a whole model: how large each layer's is, made, resized, repeated for more rows.

A layer that sees W tokens back needs W + T - 1 slots while chunks of T tokens are read, and W to go on token by token. Sizes
are powers of two, so that few programs are compiled.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import LayerType, Model
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import BATCH, spec_of

# How a jitted function is run, with its static arguments apart; whoever measures hands on another way.
Run = Callable[..., Any]


class Layer(NamedTuple):
    """Keys as they enter the scores, values, and where they are int8 the float32 size of one step of each slot.

    `dropped` [B, 1 or K] is how many tokens before a slot's own are gone; a ring has none.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_step_BKS: jax.Array | None
    v_step_BKS: jax.Array | None
    dropped_BK: jax.Array | None


class Cache(NamedTuple):
    """What B rows have read: each layer's keys and values, and how many tokens."""

    layers: tuple[Layer, ...]
    lengths_B: jax.Array


class Static(NamedTuple):
    """What is known while tracing. `bounded`: the layer is a ring; `span`: slots that one shard takes in its turn."""

    bounded: bool
    window: int | None
    chunk: int | None
    scale: float
    softcap: float | None
    kernel: str
    span: int


def reach(kind: LayerType) -> int | None:
    """How many tokens a query of this kind sees at most, itself among them; None for the whole prefix."""
    return kind.chunk if kind.window is None else kind.window


def specs(layer: Layer) -> Layer:
    """Where the arrays of a layer lie."""
    if layer.dropped_BK is None:
        return Layer(P(BATCH, "tensor", None, None), P(BATCH, "tensor", None, None), None, None, None)
    heads = None if layer.dropped_BK.shape[1] == 1 else "tensor"
    slots, steps = P(BATCH, "tensor", AXIS, None), None if layer.k_step_BKS is None else P(BATCH, "tensor", AXIS)
    return Layer(slots, slots, steps, steps, P(BATCH, heads))


def slot_numbers(static: Static, local_S: jax.Array) -> jax.Array:
    """The slots' numbers over all shards, by their place on this one."""
    c, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    return local_S // static.span * (static.span * c) + i * static.span + local_S % static.span


def empty_layer(kind: LayerType, rows: int, slots: int, heads: int, size: int, dtype: jnp.dtype, quantised: bool) -> Layer:
    """A layer of `kind` that holds nothing yet, on the mesh in force; `quantised` applies to layers of the whole prefix."""
    bounded = reach(kind) is not None
    quantised = quantised and not bounded
    shape = (rows, heads, slots, size)
    kept = jax.ShapeDtypeStruct(shape, jnp.int8 if quantised else dtype)
    step = jax.ShapeDtypeStruct(shape[:3], jnp.float32) if quantised else None
    layer = Layer(kept, kept, step, step, None if bounded else jax.ShapeDtypeStruct((rows, 1), jnp.int32))
    return jax.tree.map(lambda x, spec: jnp.zeros(x.shape, x.dtype, out_sharding=spec), layer, specs(layer))


def call(function: Callable, statics: tuple, *args: Any) -> Any:
    return function(*statics, *args)


def power_of_two(number: int) -> int:
    """The least that is not below `number`."""
    return 1 << max(number - 1, 0).bit_length()


def ring_slots(sees: int, new: int, capacity: int) -> int:
    """Slots of a layer that sees so many tokens back, when `new` come at a time and rows never pass `capacity`."""
    return min(power_of_two(sees + new - 1), capacity)


@functools.partial(jax.jit, static_argnums=range(6))
def empty(model: Model, rows: int, capacity: int, new: int, dtype: jnp.dtype, quantised: bool) -> Cache:
    """A cache of `rows` rows that have read nothing, for at most `capacity` tokens each, `new` at a time.

    `quantised`: layers that see the whole prefix keep int8 numbers and a float32 scale for each token and head.
    """
    layers = []
    for letter in model.layers:
        kind = model.kinds[letter]
        sees = reach(kind)
        slots = capacity if sees is None else ring_slots(sees, new, capacity)
        layers.append(empty_layer(kind, rows, slots, model.num_kv_heads, model.head_dim, dtype, quantised))
    return Cache(tuple(layers), jnp.zeros((rows,), jnp.int32, out_sharding=P(BATCH)))


def resized(model: Model, cache: Cache, capacity: int, new: int, run: Run = call) -> Cache:
    """The same with rings for `new` tokens at a time; what has its size already is not copied. `run` runs what is compiled."""

    def resize(layer: Layer, sees: int | None) -> Layer:
        if sees is None or (slots := ring_slots(sees, new, capacity)) == layer.k_BKSH.shape[2]:
            return layer
        k_BKSH, v_BKSH = run(_turned, (slots,), (layer.k_BKSH, layer.v_BKSH), cache.lengths_B)
        return layer._replace(k_BKSH=k_BKSH, v_BKSH=v_BKSH)

    layers = (resize(layer, reach(model.kinds[letter])) for letter, layer in zip(model.layers, cache.layers, strict=True))
    return cache._replace(layers=tuple(layers))


@functools.partial(jax.jit, static_argnums=0)
def _turned(slots: int, both_BKRH: tuple[jax.Array, jax.Array], lengths_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rings of `slots`, with the newest tokens of the old ones."""

    def shard(both_BKRH, lengths_B):
        newest_B1 = lengths_B[:, None] - 1
        position_BR = newest_B1 - (newest_B1 - jnp.arange(slots)) % slots
        return tuple(
            jnp.take_along_axis(x_BKRH, (position_BR % x_BKRH.shape[2])[:, None, :, None], axis=2) for x_BKRH in both_BKRH
        )

    specs = tuple(map(spec_of, both_BKRH))
    return jax.shard_map(shard, in_specs=(specs, P(BATCH)), out_specs=specs)(both_BKRH, lengths_B)


@functools.partial(jax.jit, static_argnums=0)
def repeated(times: int, cache: Cache) -> Cache:
    """Every row `times` times, one after the other."""

    def repeat(x):
        spec = spec_of(x)
        return jax.shard_map(lambda x: jnp.repeat(x, times, axis=0), in_specs=spec, out_specs=spec)(x)

    return jax.tree.map(repeat, cache)


def num_bytes(cache: Cache) -> int:
    """Of all keys and values, over all devices; what a ring has on each `context` shard is counted once."""
    return sum(x.nbytes for layer in cache.layers for x in jax.tree.leaves(layer._replace(dropped_BK=None)))
