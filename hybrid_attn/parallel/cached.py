"""New tokens against what a layer keeps of the tokens before them: the cache of one layer, over devices too.

A bounded kind (a window or a chunk) keeps a ring: the token at position p stands in slot p % R. Any other keeps all slots:
the token at position p stands in slot p - dropped, of which compression leaves fewer than there were tokens. Where the mesh
has a `context` axis of c shards, a ring is on each of them, and slots go round: `span` of them to the first shard, `span` to
the next, ... A chunk of c x span new tokens, each shard with its part, then fills the same slots of every shard, so that all
hold as much; queries go to all shards and what they found is merged by the log-sum-exp, which costs the same at any length.

Letters: B rows, T new tokens, S slots, N query heads, K key/value heads, G = N/K, H head size.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn import kernels
from hybrid_attn.config import LayerType
from hybrid_attn.parallel.context import AXIS, merged
from hybrid_attn.parallel.mesh import BATCH, spec_of

QUANTISED_SLOTS = 4096  # slots of int8 whose numbers exist in the dtype of the queries at a time


class Layer(NamedTuple):
    """Keys as they enter the scores, values, and where they are int8 the float32 size of one step of each slot.

    `dropped` [B, 1 or K] is how many tokens before a slot's own are gone; a ring has none.
    """

    k_BKSH: jax.Array
    v_BKSH: jax.Array
    k_step_BKS: jax.Array | None
    v_step_BKS: jax.Array | None
    dropped_BK: jax.Array | None


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


def empty(kind: LayerType, rows: int, slots: int, heads: int, size: int, dtype: jnp.dtype, quantised: bool) -> Layer:
    """A layer of `kind` that holds nothing yet, on the mesh in force; `quantised` applies to layers of the whole prefix."""
    bounded = reach(kind) is not None
    quantised = quantised and not bounded
    shape = (rows, heads, slots, size)
    kept = jax.ShapeDtypeStruct(shape, jnp.int8 if quantised else dtype)
    step = jax.ShapeDtypeStruct(shape[:3], jnp.float32) if quantised else None
    layer = Layer(kept, kept, step, step, None if bounded else jax.ShapeDtypeStruct((rows, 1), jnp.int32))
    return jax.tree.map(lambda x, spec: jnp.zeros(x.shape, x.dtype, out_sharding=spec), layer, specs(layer))


def attend(
    q_BTNH, k_BTKH, v_BTKH, layer: Layer, lengths_B, counts_B, sinks_N=None,
    *, kind: LayerType, scale: float, kernel: str, span: int,
) -> tuple[jax.Array, Layer]:  # fmt: skip
    """o_BTNH of new tokens that see the cache and each other, and the layer with them in it.

    Row b had `lengths_B[b]` tokens; the first `counts_B[b]` of its T are new, the others padding, which gives zeros. The layer
    must have room for them. T is split over `context` as q is, or, then with T at most `span`, on every shard.
    """
    static = Static(reach(kind) is not None, reach(kind), kind.chunk, scale, kind.softcap, kernel, span)
    spec = spec_of(q_BTNH)
    split = spec[1] == AXIS
    places = specs(layer)

    def shard(q_BTNH, k_BTKH, v_BTKH, layer, lengths_B, counts_B, *sinks):
        c = jax.lax.axis_size(AXIS)
        if split and c > 1:
            k_BTKH, v_BTKH = (jax.lax.all_gather(x, AXIS, axis=1, tiled=True) for x in (k_BTKH, v_BTKH))
        layer = _written(static, layer, k_BTKH, v_BTKH, lengths_B, counts_B)
        found = (_in_ring if static.bounded else _in_slots)(static, split and c > 1, q_BTNH, layer, lengths_B, counts_B)
        o_BTNH, lse_BTN, seg_BT = found
        if sinks:
            o_BTNH, _ = kernels.with_sinks(o_BTNH, lse_BTN, seg_BT, sinks[0])
        return o_BTNH.astype(q_BTNH.dtype), layer

    sinks, sink_specs = ((), ()) if sinks_N is None else ((sinks_N,), (P("tensor"),))
    in_specs = (spec, spec, spec, places, P(BATCH), P(BATCH), *sink_specs)
    return jax.shard_map(shard, in_specs=in_specs, out_specs=(spec, places), check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, layer, lengths_B, counts_B, *sinks
    )


def _slot_numbers(static: Static, local_S: jax.Array) -> jax.Array:
    """The slots' numbers over all shards, by their place on this one."""
    c, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    return local_S // static.span * (static.span * c) + i * static.span + local_S % static.span


def _written(static: Static, layer: Layer, k_BTKH, v_BTKH, lengths_B, counts_B) -> Layer:
    """The layer with the new tokens in their slots; nothing is written for padding."""
    new = {"k_BKSH": k_BTKH.swapaxes(1, 2), "v_BKSH": v_BTKH.swapaxes(1, 2)}
    if layer.k_step_BKS is not None:
        new["k_BKSH"], new["k_step_BKS"] = quantised(new["k_BKSH"])
        new["v_BKSH"], new["v_step_BKS"] = quantised(new["v_BKSH"])
    first_BK = lengths_B[:, None] - (0 if static.bounded else layer.dropped_BK)
    groups = first_BK.shape[1]  # of heads whose slots begin together
    last = jnp.max(jnp.where(counts_B > 0, jnp.arange(1, len(counts_B) + 1), 0))

    # A loop, with bounds that are not known: other writes XLA merges with what reads them, and then copies the whole cache.
    def put(i, kept):
        b, g = i // groups, i % groups
        return {name: _put(static, x, new[name], b, g, first_BK[b, g], counts_B[b], groups) for name, x in kept.items()}

    return layer._replace(**jax.lax.fori_loop(0, last * groups, put, {name: getattr(layer, name) for name in new}))


def _put(static: Static, x_BKS, new_BKT, b, g, first, count, groups: int) -> jax.Array:
    """Slots with `count` new tokens of the g-th heads of row b from slot number `first` on.

    Only the part that they may lie in is touched.
    """
    (K, S), T = x_BKS.shape[1:3], new_BKT.shape[2]
    round_ = static.span * jax.lax.axis_size(AXIS)
    if static.bounded:
        at, size = (first % S, 1) if T == 1 else (0, S)
    else:
        at = first // round_ * static.span
        at, size = (at + first % static.span, 1) if T == 1 else (at, min(2 * static.span, S))
    at = jnp.clip(at, 0, S - size)
    local_s = at + jnp.arange(size)
    which_s = (local_s - first) % S if static.bounded else _slot_numbers(static, local_s) - first
    here_s = (which_s >= 0) & (which_s < count)
    heads, rest = K // groups, x_BKS.shape[3:]
    where = (b, g * heads, at, *(0 for _ in rest))
    own_1KT = jax.lax.dynamic_slice(new_BKT, (b, g * heads, 0, *where[3:]), (1, heads, T, *rest)).astype(x_BKS.dtype)
    new_1Ks = jnp.take(own_1KT, jnp.clip(which_s, 0, T - 1), axis=2)
    old_1Ks = jax.lax.dynamic_slice(x_BKS, where, (1, heads, size, *rest))
    here = here_s.reshape(1, 1, -1, *(1 for _ in rest))
    return jax.lax.dynamic_update_slice(x_BKS, jnp.where(here, new_1Ks, old_1Ks), where)


def quantised(x_BKSH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int8 numbers and the float32 step of each token's head: its largest number is 127 steps."""
    step_BKS = jnp.abs(x_BKSH).max(-1).astype(jnp.float32) / 127
    steps = x_BKSH.astype(jnp.float32) / jnp.where(step_BKS > 0, step_BKS, 1.0)[..., None]
    return jnp.round(steps).astype(jnp.int8), step_BKS


def _in_ring(static: Static, split: bool, q_BTNH, layer: Layer, lengths_B, counts_B):
    """(o, lse, segments) of this shard's queries to the ring, which has all keys that they may see."""
    T, R = q_BTNH.shape[1], layer.k_BKSH.shape[2]
    offset = jax.lax.axis_index(AXIS) * T if split else 0
    pos_BT = lengths_B[:, None] + offset + jnp.arange(T)
    seg_BT = (offset + jnp.arange(T) < counts_B[:, None]).astype(jnp.int32)
    end_B1 = (lengths_B + counts_B)[:, None]
    if T == 1:
        newest_B1 = end_B1 - 1
        behind_BR = newest_B1 % R - jnp.arange(R)
        slots_BR = newest_B1 - jnp.where(behind_BR < 0, behind_BR + R, behind_BR)  # positions that stand in slots 0, 1, ...
        keys = layer.k_BKSH, layer.v_BKSH
    else:
        slots_BR = end_B1 - R + jnp.arange(R)
        order = (slots_BR % R)[:, None, :, None]
        keys = tuple(jnp.take_along_axis(x_BKSH, order, axis=2) for x_BKSH in (layer.k_BKSH, layer.v_BKSH))
    k_seg_BR = (slots_BR >= 0).astype(jnp.int32)
    q_seg_BT = seg_BT
    if static.chunk is not None:  # a chunk of positions is a segment, as in `context.attend`
        q_seg_BT = jnp.where(seg_BT > 0, 1 + pos_BT // static.chunk, 0)
        k_seg_BR = jnp.where(slots_BR >= 0, 1 + slots_BR // static.chunk, 0)
    o_BTNH, lse_BTN = _attend(static, q_BTNH, *keys, pos_BT[:, None], slots_BR[:, None], q_seg_BT, k_seg_BR[:, None])
    return o_BTNH, lse_BTN, seg_BT


def _in_slots(static: Static, split: bool, q_BTNH, layer: Layer, lengths_B, counts_B):
    """(o, lse, segments) of this shard's queries to the slots of all shards."""
    if split:
        q_BTNH = jax.lax.all_gather(q_BTNH, AXIS, axis=1, tiled=True)
    T, S = q_BTNH.shape[1], layer.k_BKSH.shape[2]
    seg_BT = (jnp.arange(T) < counts_B[:, None]).astype(jnp.int32)
    at_BKT = (lengths_B[:, None] - layer.dropped_BK)[..., None] + jnp.arange(T)
    end_BK1 = (lengths_B + counts_B)[:, None, None] - layer.dropped_BK[..., None]

    def part(wanted, size: int):
        """The slots [wanted, wanted + size) of this shard, without those past its end."""
        first = jnp.minimum(wanted, S - size)
        k_BKSH, v_BKSH, *steps = (
            None if x is None else jax.lax.dynamic_slice_in_dim(x, first, size, axis=2) for x in layer[:4]
        )
        if steps[0] is not None:
            k_BKSH, v_BKSH = (
                (x.astype(jnp.float32) * step[..., None]).astype(q_BTNH.dtype)
                for x, step in zip((k_BKSH, v_BKSH), steps, strict=True)
            )
        local_S = first + jnp.arange(size)
        slot_S = _slot_numbers(static, local_S)
        k_seg_BKS = ((slot_S < end_BK1) & (local_S >= wanted)).astype(jnp.int32)
        slots_BKS = jnp.broadcast_to(slot_S, k_seg_BKS.shape)
        return _attend(static, q_BTNH, k_BKSH, v_BKSH, at_BKT, slots_BKS, seg_BT, k_seg_BKS)

    if layer.k_step_BKS is None:
        o_BTNH, lse_BTN = part(0, S)
    else:
        o_BTNH, lse_BTN = _merged_over(part, S, jnp.max(end_BK1), q_BTNH.shape)
    if jax.lax.axis_size(AXIS) > 1:
        o_BTNH, lse_BTN = _merged_with_all(o_BTNH, lse_BTN, split)
    return o_BTNH, lse_BTN, _own(seg_BT) if split else seg_BT


def _own(x_BT: jax.Array) -> jax.Array:
    """This shard's part of what all have."""
    mine = x_BT.shape[1] // jax.lax.axis_size(AXIS)
    return jax.lax.dynamic_slice_in_dim(x_BT, jax.lax.axis_index(AXIS) * mine, mine, axis=1)


def _merged_over(part: Callable, S: int, end: jax.Array, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """(o, lse) over the slots before `end`, `QUANTISED_SLOTS` at a time."""
    size = min(S, QUANTISED_SLOTS)

    def merge(j, found):
        return merged(found, part(j * size, size))

    nothing = jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], -jnp.inf)
    return jax.lax.fori_loop(0, jnp.minimum(-(-end // size), -(-S // size)), merge, nothing)


def _merged_with_all(o_BTNH, lse_BTN, split: bool) -> tuple[jax.Array, jax.Array]:
    """What every shard found, merged: all of it on every shard, or where they `split` the queries each its own."""

    def summed(x_BT):
        if not split:
            return jax.lax.psum(x_BT, AXIS)
        return jax.lax.psum_scatter(x_BT, AXIS, scatter_dimension=1, tiled=True)

    top_BTN = jax.lax.pmax(lse_BTN, AXIS)
    share_BTN = jnp.exp(lse_BTN - jnp.where(jnp.isfinite(top_BTN), top_BTN, 0.0))
    total_BTN, o_BTNH = summed(share_BTN), summed(share_BTN[..., None] * o_BTNH.astype(jnp.float32))
    top_BTN = _own(top_BTN) if split else top_BTN
    some_BTN = jnp.where(total_BTN > 0, total_BTN, 1.0)
    return o_BTNH / some_BTN[..., None], jnp.where(total_BTN > 0, top_BTN + jnp.log(some_BTN), -jnp.inf)


def _attend(static: Static, q_BTNH, k_BKSH, v_BKSH, at_BKT, at_BKS, seg_BT, seg_BKS) -> tuple[jax.Array, jax.Array]:
    """(o_BTNH, lse_BTN) where heads may differ in the places of their queries and keys ([B, 1 or K, ...])."""
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    if T == 1:
        return _one_query(static, q_BTNH, k_BKSH, v_BKSH, at_BKT, at_BKS, seg_BT, seg_BKS)

    def rows(x_BKS):  # each key/value head as a row of its own
        return jnp.broadcast_to(x_BKS, (B, K, x_BKS.shape[2])).reshape(B * K, -1)

    q_RTGH = q_BTNH.reshape(B, T, K, N // K, H).swapaxes(1, 2).reshape(B * K, T, N // K, H)
    k_RS1H, v_RS1H = (x.reshape(B * K, S, 1, H) for x in (k_BKSH, v_BKSH))
    o_RTGH, lse_RTG = kernels.attend(
        q_RTGH, k_RS1H, v_RS1H, rows(at_BKT), rows(at_BKS), rows(seg_BT[:, None]), rows(seg_BKS),
        window=static.window, scale=static.scale, softcap=static.softcap, kernel=static.kernel,
    )  # fmt: skip
    o_BTNH = o_RTGH.reshape(B, K, T, N // K, H).swapaxes(1, 2).reshape(B, T, N, H)
    return o_BTNH, lse_RTG.reshape(B, K, T, N // K).swapaxes(1, 2).reshape(B, T, N)


def _one_query(static: Static, q_B1NH, k_BKSH, v_BKSH, at_BK1, at_BKS, seg_B1, seg_BKS) -> tuple[jax.Array, jax.Array]:
    """`_attend` of one query a row, by plain products: the keys pass once through memory, in any order."""
    (B, _, N, H), K = q_B1NH.shape, k_BKSH.shape[1]
    see_BKS = (at_BKS <= at_BK1) & (seg_BKS == seg_B1[:, None]) & (seg_BKS > 0)
    if static.window is not None:
        see_BKS &= at_BKS > at_BK1 - static.window
    q_BKGH = q_B1NH.reshape(B, K, N // K, H)
    s_BKSG = jnp.einsum("BKSH,BKGH->BKSG", k_BKSH, q_BKGH, preferred_element_type=jnp.float32)  # the faster order on a CPU
    s_BKGS = static.scale * s_BKSG.swapaxes(2, 3)
    if static.softcap is not None:
        s_BKGS = static.softcap * jnp.tanh(s_BKGS / static.softcap)
    s_BKGS = jnp.where(see_BKS[:, :, None], s_BKGS, -jnp.inf)
    top_BKG = s_BKGS.max(-1)
    p_BKGS = jnp.exp(s_BKGS - jnp.where(jnp.isfinite(top_BKG), top_BKG, 0.0)[..., None])
    total_BKG = p_BKGS.sum(-1)
    some_BKG = jnp.where(total_BKG > 0, total_BKG, 1.0)
    o_BKGH = jnp.einsum("BKGS,BKSH->BKGH", p_BKGS.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
    o_B1NH = (o_BKGH / some_BKG[..., None]).astype(q_B1NH.dtype).reshape(B, 1, N, H)
    return o_B1NH, jnp.where(total_BKG > 0, top_BKG + jnp.log(some_BKG), -jnp.inf).reshape(B, 1, N)
