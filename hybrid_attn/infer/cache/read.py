"""Attention of new queries to the slots of a layer's cache, on one device and over `context` shards."""

import jax
import jax.numpy as jnp

from hybrid_attn import kernels
from hybrid_attn.infer.cache.int8 import merged_over
from hybrid_attn.infer.cache.shapes import Layer, Static, slot_numbers
from hybrid_attn.parallel.context import AXIS


def in_ring(static: Static, split: bool, q_BTNH, layer: Layer, lengths_B, counts_B):
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


def in_slots(static: Static, split: bool, q_BTNH, layer: Layer, lengths_B, counts_B):
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
        slot_S = slot_numbers(static, local_S)
        k_seg_BKS = ((slot_S < end_BK1) & (local_S >= wanted)).astype(jnp.int32)
        slots_BKS = jnp.broadcast_to(slot_S, k_seg_BKS.shape)
        return _attend(static, q_BTNH, k_BKSH, v_BKSH, at_BKT, slots_BKS, seg_BT, k_seg_BKS)

    if layer.k_step_BKS is None:
        o_BTNH, lse_BTN = part(0, S)
    else:
        o_BTNH, lse_BTN = merged_over(part, S, jnp.max(end_BK1), q_BTNH.shape)
    if jax.lax.axis_size(AXIS) > 1:
        o_BTNH, lse_BTN = _merged_with_all(o_BTNH, lse_BTN, split)
    return o_BTNH, lse_BTN, _own(seg_BT) if split else seg_BT


def _own(x_BT: jax.Array) -> jax.Array:
    """This shard's part of what all have."""
    mine = x_BT.shape[1] // jax.lax.axis_size(AXIS)
    return jax.lax.dynamic_slice_in_dim(x_BT, jax.lax.axis_index(AXIS) * mine, mine, axis=1)


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
