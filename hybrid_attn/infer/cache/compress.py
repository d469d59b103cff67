"""Compression of the global layers' caches once their prompts are read: which slots each key/value head keeps.

A cache holds rows left-aligned: slot s < lengths_B[b] is position s. `budgets` says how many slots a row may keep in each
layer, `scores` how much each slot is wanted, `counts` how many slots each head keeps, `kept_slots` which ones, and
`compacted` moves them to the front in reading order. A token at position p then stands in slot p - dropped, where dropped is
the row's length less the head's count. Of slots wanted alike the lowest is kept first. Every function but `budgets` is
traceable; rows and heads may be split over devices, slots may not.

Letters: B batch, W queries of the observation window, N query heads, K key/value heads, G = N/K, H head size, S slots,
C slots of a block or of the compacted cache, M = K x C.
"""

import dataclasses
import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model, score_scale
from hybrid_attn.infer.cache.shapes import Cache, Layer, Run, call, power_of_two, specs
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import BATCH, spec_of

VOTING = ("snapkv", "pyramid", "adakv")
METHODS = (*VOTING, "streaming", "random")
POOLING = ("avg", "max")
KEYS = 1024  # slots of a block: its scores are W x N x KEYS


@dataclasses.dataclass(frozen=True)
class Compression:
    """What a global layer keeps of a prompt: `cap` slots for each key/value head, and everything of a prompt no longer.

    snapkv (arXiv 2404.14469): the last `window` tokens, and what they attend to most, smoothed over `kernel` neighbours.
    pyramid (PyramidKV, arXiv 2406.02069): snapkv, with more slots in the first layers; `beta` makes it steeper.
    adakv (Ada-KV, arXiv 2407.11550): snapkv, with slots shared among the heads of a layer; each keeps `floor` x cap at least.
    streaming (StreamingLLM, arXiv 2309.17453): the first `sinks` tokens and the last ones.
    random: the last `window` tokens and any others.
    """

    method: str
    cap: int
    window: int = 64
    kernel: int = 5
    pooling: str = "avg"
    sinks: int = 4
    beta: int = 20
    floor: float = 0.2

    def __post_init__(self):
        for name, choices in (("method", METHODS), ("pooling", POOLING)):
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        if self.window < 1:
            raise ValueError(f"window={self.window} must be at least 1 token")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise ValueError(f"kernel={self.kernel} has no middle; use an odd number, as {max(1, self.kernel + 1)}")
        if self.sinks < 0:
            raise ValueError(f"sinks={self.sinks} must not be negative")
        if self.beta < 1:
            raise ValueError(f"beta={self.beta} must be at least 1, which gives every layer the same")
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor} must be a share from 0 to 1")
        always, what = (self.sinks, "sinks") if self.method == "streaming" else (self.window, "window")
        if self.cap <= always:
            raise ValueError(f"cap={self.cap} slots leave none beside {what}={always}; use a cap above {always}")


def budgets(compression: Compression, lengths_B, layers: int) -> np.ndarray:
    """Slots that a key/value head keeps of each row in each global layer, [layers, B]: min(cap, length) in their mean.

    PyramidKV: beside the window, layers keep from 2m - m/beta down to m/beta of the prefix, where m = cap - window; a prefix
    shorter than the most is kept whole in the first layer, and the last keeps the more.
    """
    c = compression

    def row(length: int) -> list[int]:
        mean = Fraction(c.cap - c.window)
        if c.method != "pyramid" or layers == 1 or length <= c.cap:
            return [min(c.cap, length)] * layers
        most = min(2 * mean - mean / c.beta, Fraction(length - c.window))
        step = 2 * (most - mean) / (layers - 1)
        return [c.window + round(most - layer * step) for layer in range(layers)]

    return np.array([row(int(length)) for length in lengths_B], np.int32).T


def scores(
    compression: Compression, key, q_BWNH, k_BKSH, lengths_B, *, scale, softcap=None, sinks_N=None, k_scales_BKS=None
) -> jax.Array:
    """How much each slot is wanted [B, K, S], float32: inf for those always kept, -inf past a row's end.

    `q_BWNH` are the queries of each row's own last `window` tokens as they enter the scores (None where no method of VOTING
    asks); `key` is of jax.random. `scale`, `softcap` and the logits `sinks_N` are those of the layer's attention; the keys
    are times `k_scales_BKS` where given.
    """
    B, K, S = k_BKSH.shape[:3]
    slot_S, length_B1 = jnp.arange(S), lengths_B[:, None]
    always_BS = slot_S >= length_B1 - compression.window
    if compression.method in VOTING:
        wanted_BKS = votes(
            compression, q_BWNH, k_BKSH, lengths_B, scale=scale, softcap=softcap, sinks_N=sinks_N, k_scales_BKS=k_scales_BKS
        )
    elif compression.method == "random":
        wanted_BKS = jax.random.uniform(key, (B, K, S))
    else:
        wanted_BKS = jnp.broadcast_to(slot_S.astype(jnp.float32), (B, K, S))
        always_BS = jnp.broadcast_to(slot_S < compression.sinks, (B, S))
    wanted_BKS = jnp.where(always_BS[:, None], jnp.inf, wanted_BKS)
    return jnp.where((slot_S < length_B1)[:, None], wanted_BKS, -jnp.inf)


def votes(compression: Compression, q_BWNH, k_BKSH, lengths_B, *, scale, softcap, sinks_N, k_scales_BKS) -> jax.Array:
    """The share of attention that each slot before the window gets from the window's queries, [B, K, S] float32.

    SnapKV's equations 1 to 3: shares of the whole prompt, summed over the window and pooled over neighbouring slots for each
    query head; then the mean over the query heads of a key/value head. Slots before the first and in the window count as 0.
    """
    (B, W, N), (K, S) = q_BWNH.shape[:3], k_BKSH.shape[1:3]
    assert W == compression.window, f"{W} queries for a window of {compression.window}"
    size = min(KEYS, S)
    blocks = (jnp.max(lengths_B) + size - 1) // size
    q_BKGWH = jnp.einsum("BWKGH->BKGWH", _in_groups(q_BWNH, K))
    pos_BW = lengths_B[:, None] - W + jnp.arange(W)

    def block(i):
        """The first slot of the i-th block and its masked scores; the last is moved back to end with the cache."""
        at = jnp.minimum(i * size, S - size)
        k_BKCH = jax.lax.dynamic_slice_in_dim(k_BKSH, at, size, 2).astype(q_BWNH.dtype)
        s_BKGWC = scale * jnp.einsum("BKGWH,BKCH->BKGWC", q_BKGWH, k_BKCH, preferred_element_type=jnp.float32)
        if k_scales_BKS is not None:
            s_BKGWC *= jax.lax.dynamic_slice_in_dim(k_scales_BKS, at, size, 2)[:, :, None, None].astype(jnp.float32)
        if softcap is not None:
            s_BKGWC = softcap * jnp.tanh(s_BKGWC / softcap)
        see_BWC = at + jnp.arange(size) <= pos_BW[..., None]
        return at, jnp.where(see_BWC[:, None, None], s_BKGWC, -jnp.inf)

    zero_BKGW = jnp.zeros_like(q_BKGWH[..., 0], jnp.float32)
    lse_BKGW = _log_sum_exp(block, blocks, size, zero_BKGW)
    if sinks_N is not None:
        lse_BKGW = jnp.logaddexp(lse_BKGW, sinks_N.astype(jnp.float32).reshape(K, N // K, 1))

    def vote(i, votes_BKGS):
        at, s_BKGWC = block(i)
        return jax.lax.dynamic_update_slice_in_dim(votes_BKGS, jnp.exp(s_BKGWC - lse_BKGW[..., None]).sum(-2), at, 3)

    votes_BKGS = jax.lax.fori_loop(0, blocks, vote, jnp.broadcast_to(zero_BKGW[..., :1], (B, K, N // K, S)))
    prefix_BS = jnp.arange(S) < lengths_B[:, None] - W
    return pooled(compression, jnp.where(prefix_BS[:, None, None], votes_BKGS, 0.0)).mean(2)


def _log_sum_exp(block, blocks, size: int, zero_BKGW) -> jax.Array:
    """Of every query's scores, block by block; a slot that the last block shows again is left out."""

    def add(i, carry):
        top_BKGW, total_BKGW = carry
        at, s_BKGWC = block(i)
        s_BKGWC = jnp.where(at + jnp.arange(size) >= i * size, s_BKGWC, -jnp.inf)
        new_BKGW = jnp.maximum(top_BKGW, s_BKGWC.max(-1))
        total_BKGW = total_BKGW * jnp.exp(top_BKGW - new_BKGW) + jnp.exp(s_BKGWC - new_BKGW[..., None]).sum(-1)
        return new_BKGW, total_BKGW

    lowest = jnp.finfo(jnp.float32).min  # finite, so that a query before the row's start gives exp(-inf) = 0 and not NaN
    top_BKGW, total_BKGW = jax.lax.fori_loop(0, blocks, add, (zero_BKGW + lowest, zero_BKGW))
    return top_BKGW + jnp.log(jnp.where(total_BKGW > 0, total_BKGW, 1.0))


def _in_groups(q_BWNH, K: int) -> jax.Array:
    """[B, W, K, G, H], split over devices as before: of a dimension of 1 a plain reshape forgets it."""
    (B, W, N, H), spec = q_BWNH.shape, spec_of(q_BWNH)
    split = P(*spec[:3], None, *spec[3:]) if any(spec) else None
    return jnp.reshape(q_BWNH, (B, W, K, N // K, H), out_sharding=split)


def pooled(compression: Compression, votes_BKGS) -> jax.Array:
    """The mean, always of `kernel` slots, or the largest of each slot's neighbourhood; there is 0 past both ends."""
    sides = compression.kernel // 2
    shape, strides, padding = (1, 1, 1, compression.kernel), (1,) * 4, [(0, 0)] * 3 + [(sides, sides)]
    if compression.pooling == "max":
        return jax.lax.reduce_window(votes_BKGS, -jnp.inf, jax.lax.max, shape, strides, padding)
    return jax.lax.reduce_window(votes_BKGS, 0.0, jax.lax.add, shape, strides, padding) / compression.kernel


def counts(compression: Compression, scores_BKS, budget_B) -> jax.Array:
    """Slots that each key/value head keeps [B, K], int32: a row's budget of the layer, or with adakv K times that together.

    Ada-KV keeps the best of all heads' slots, once each head has its own best `floor` x cap (at least one).
    """
    B, K, S = scores_BKS.shape
    if compression.method != "adakv":
        return jnp.broadcast_to(jnp.asarray(budget_B, jnp.int32)[:, None], (B, K))
    spec = spec_of(scores_BKS)
    if "tensor" in spec:
        scores_BKS = jax.sharding.reshard(scores_BKS, P(spec[0], None, None))
    safe = max(1, int(compression.floor * compression.cap))
    best_BKC, slot_BKC = jax.lax.top_k(scores_BKS, min(S, K * compression.cap))
    best_BKC = jnp.where(jnp.arange(best_BKC.shape[-1]) < safe, jnp.inf, best_BKC)
    head_BKC = jnp.zeros_like(slot_BKC) + jnp.arange(K, dtype=jnp.int32)[:, None]
    order = [x.reshape(B, -1) for x in (-best_BKC, slot_BKC, head_BKC)]
    head_BM = jax.lax.sort(order, dimension=1, num_keys=3)[-1][:, : K * compression.cap]
    taken_BM = jnp.arange(head_BM.shape[1]) < K * jnp.asarray(budget_B)[:, None]
    return jnp.sum(taken_BM[..., None] & (head_BM[..., None] == jnp.arange(K)), axis=1, dtype=jnp.int32)


def kept_slots(scores_BKS, kept_BK, slots: int) -> jax.Array:
    """The slots with the highest scores, kept_BK of each head, ascending [B, K, slots] int32; after them S, which is no slot.

    `slots` is static: the largest of kept_BK, and any room for tokens to come.
    """
    S = scores_BKS.shape[-1]
    best_BKC = jax.lax.top_k(scores_BKS, min(slots, S))[1]
    index_BKC = jnp.sort(jnp.where(jnp.arange(best_BKC.shape[-1]) < kept_BK[..., None], best_BKC, S))
    return jnp.pad(index_BKC, [(0, 0), (0, 0), (0, slots - best_BKC.shape[-1])], constant_values=S)


def compacted(cache, index_BKC):
    """Every array of a tree, [B, K, S] or [B, K, S, H], at the slots of `kept_slots`; zeros after them."""

    def take(x):
        index = index_BKC.reshape(index_BKC.shape + (1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, index, axis=2, mode="fill", fill_value=0)

    return jax.tree.map(take, cache)


def compressed(
    model: Model, compression: Compression, weights: dict, cache: Cache, queries, seed: int, room: int, run: Run = call
) -> Cache:
    """The cache with what is kept of every layer that has no ring, and with slots for `room` more tokens of each row.

    `queries` are those that `extend` gave of each row's last `window` tokens; of a row with fewer everything is kept.
    """
    lengths_B = np.asarray(jax.device_get(cache.lengths_B))
    which = [i for i, layer in enumerate(cache.layers) if layer.dropped_BK is not None]
    layers = list(cache.layers)
    for i, budget_B in zip(which, budgets(compression, lengths_B, len(which)), strict=True):
        kind, layer = model.kinds[model.layers[i]], layers[i]
        budget_B = jax.device_put(budget_B, layer.k_BKSH.sharding.update(spec=P(BATCH)))
        statics = compression, score_scale(model, kind), kind.softcap
        wanted_BKS, kept_BK = run(
            _wanted, statics, jax.random.key(seed + i), queries[i], layer, cache.lengths_B, budget_B,
            weights["layers"][i]["attention"].get("sink"),
        )  # fmt: skip
        slots = power_of_two(int(jax.device_get(kept_BK).max()) + room)
        layers[i] = run(_kept, (slots,), layer, wanted_BKS, kept_BK, cache.lengths_B)
    return cache._replace(layers=tuple(layers))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _wanted(compression: Compression, scale: float, softcap, key, q_BWNH, layer: Layer, lengths_B, budget_B, sinks_N):
    q_BWNH, layer = _whole(q_BWNH), jax.tree.map(_whole, layer)
    wanted_BKS = scores(
        compression, key, q_BWNH, layer.k_BKSH, lengths_B,
        scale=scale, softcap=softcap, sinks_N=sinks_N, k_scales_BKS=layer.k_step_BKS,
    )  # fmt: skip
    return wanted_BKS, counts(compression, wanted_BKS, budget_B)


@functools.partial(jax.jit, static_argnums=0)
def _kept(slots: int, layer: Layer, wanted_BKS, kept_BK, lengths_B) -> Layer:
    index_BKC = kept_slots(wanted_BKS, kept_BK, slots)
    new = Layer(*compacted(jax.tree.map(_whole, layer[:4]), index_BKC), lengths_B[:, None] - kept_BK)
    return jax.tree.map(jax.reshard, new, specs(new))


def _whole(x: jax.Array) -> jax.Array:
    """The same array, not said to be split over an axis that has one device here."""
    return jax.reshard(x, P(*(None if axis == AXIS else axis for axis in spec_of(x))))
