"""Compression of the caches of global layers once their prompts are read: which slots each key/value head keeps.

Before a compression, slot s < lengths_B[b] of request b is position s. The kept slots move to the front in reading order: a
token at position p is then in slot p - evicted, where evicted is the request's length less the head's count. Among equal scores
the lowest slot is kept first. Every function but `budgets` is traceable. Requests and heads may be sharded, slots may not.

Letters: B batch, W queries of the observation window, N query heads, K key/value heads, G = N/K, H head size, S slots,
C slots of a block or of the compacted cache, M = K x C.
"""

import dataclasses
import functools
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from hybrid_attn.config import Model
from hybrid_attn.infer.cache.shapes import Cache, LayerCache, Runner, partition_specs, rounded_slots
from hybrid_attn.kernels import AttentionOptions
from hybrid_attn.kernels.softmax import LOWEST, add_scores, finite_or_zero, log_sum_exp, soft_cap
from hybrid_attn.model.attention import attention_options
from hybrid_attn.parallel.context import AXIS
from hybrid_attn.parallel.mesh import BATCH, spec_of
from hybrid_attn.trees import check

VOTING = ("snapkv", "pyramid", "adakv")
METHODS = (*VOTING, "streaming", "random")
POOLING = ("avg", "max")
BLOCK = 1024  # slots whose scores, W x N x BLOCK numbers, exist at a time
SEED = 0  # of the method "random"


@dataclasses.dataclass(frozen=True)
class Compression:
    """How a global layer's cache of a prompt is compressed: to `cap` slots a key/value head; shorter prompts are unchanged.

    snapkv (arXiv 2404.14469): the last `window` tokens, and those they attend to most, pooled over `kernel` neighbours.
    pyramid (PyramidKV, arXiv 2406.02069): snapkv, with more slots in the first layers; `beta` makes it steeper.
    adakv (Ada-KV, arXiv 2407.11550): snapkv, with slots shared among the heads of a layer; each keeps at least `floor` x cap.
    streaming (StreamingLLM, arXiv 2309.17453): the first `sinks` tokens and the last ones.
    random: the last `window` tokens, and others at random.
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
            check(value in choices, f"{name}={value!r} is not one of {', '.join(map(repr, choices))}")
        check(self.window >= 1, f"window={self.window} must be at least 1 token")
        has_middle = self.kernel >= 1 and self.kernel % 2 == 1
        check(has_middle, f"kernel={self.kernel} has no middle; use an odd number, as {max(1, self.kernel + 1)}")
        check(self.sinks >= 0, f"sinks={self.sinks} must not be negative")
        check(self.beta >= 1, f"beta={self.beta} must be at least 1, which gives every layer the same")
        check(0 <= self.floor <= 1, f"floor={self.floor} must be a share from 0 to 1")
        name = "sinks" if self.method == "streaming" else "window"
        least = getattr(self, name)
        check(self.cap > least, f"cap={self.cap} slots leave none beside {name}={least}; use a cap above {least}")


class Scoring(NamedTuple):
    """What the scores of a layer depend on beside queries and keys: `sinks_N` are logits, `k_scales_BKS` those of int8 keys."""

    scale: float
    softcap: float | None = None
    sinks_N: jax.Array | None = None
    k_scales_BKS: jax.Array | None = None


def budgets(compression: Compression, lengths_B, layers: int) -> np.ndarray:
    """Slots that a key/value head keeps of each request in each global layer, [layers, B]: min(cap, length) on average.

    PyramidKV: beside the window, layers keep from 2m - m/beta down to m/beta tokens of the prefix, where m = cap - window. If
    the prefix is shorter than the largest budget, the first layer keeps all of it, and the last layer keeps more.
    """
    c = compression

    def of_request(length: int) -> list[int]:
        mean = Fraction(c.cap - c.window)
        if c.method != "pyramid" or layers == 1 or length <= c.cap:
            return [min(c.cap, length)] * layers
        largest = min(2 * mean - mean / c.beta, Fraction(length - c.window))
        step = 2 * (largest - mean) / (layers - 1)
        return [c.window + round(largest - layer * step) for layer in range(layers)]

    return np.array([of_request(int(length)) for length in lengths_B], np.int32).T


def scores(compression: Compression, key, q_BWNH, k_BKSH, lengths_B, scoring: Scoring) -> jax.Array:
    """The importance of each slot [B, K, S], float32: inf for slots that are always kept, -inf past a request's end.

    `q_BWNH` are the queries of each request's last `window` tokens, for the methods of VOTING; `key` is one of jax.random.
    """
    B, K, S = k_BKSH.shape[:3]
    slot_S, length_B1 = jnp.arange(S), lengths_B[:, None]
    always_BS = slot_S >= length_B1 - compression.window
    if compression.method in VOTING:
        scores_BKS = votes(compression, q_BWNH, k_BKSH, lengths_B, scoring)
    elif compression.method == "random":
        scores_BKS = jax.random.uniform(key, (B, K, S))
    else:
        scores_BKS = jnp.broadcast_to(slot_S.astype(jnp.float32), (B, K, S))
        always_BS = jnp.broadcast_to(slot_S < compression.sinks, (B, S))
    scores_BKS = jnp.where(always_BS[:, None], jnp.inf, scores_BKS)
    return jnp.where((slot_S < length_B1)[:, None], scores_BKS, -jnp.inf)


def votes(compression: Compression, q_BWNH, k_BKSH, lengths_B, scoring: Scoring) -> jax.Array:
    """The share of attention that the window's queries give to each slot before the window, [B, K, S] float32.

    SnapKV's equations 1 to 3: shares of the whole prompt are summed over the window, pooled over neighbouring slots for each
    query head, and averaged over the query heads of a key/value head. Slots past both ends and in the window count as 0.
    """
    (B, W, N), (K, S) = q_BWNH.shape[:3], k_BKSH.shape[1:3]
    assert W == compression.window, f"{W} queries for a window of {compression.window}"
    size = min(BLOCK, S)
    blocks = (jnp.max(lengths_B) + size - 1) // size
    q_BKGWH = jnp.einsum("BWKGH->BKGWH", _by_kv_head(q_BWNH, K))
    position_BW = lengths_B[:, None] - W + jnp.arange(W)

    def block_scores(i):  # the last block is moved back to end with the cache
        return _block_scores(scoring, q_BKGWH, k_BKSH, position_BW, jnp.minimum(i * size, S - size))

    def add_block(i, sums):  # without the slots of the last block that an earlier one had
        at, s_BKGWC = block_scores(i)
        return add_scores(*sums, jnp.where(at + jnp.arange(size) >= i * size, s_BKGWC, -jnp.inf))[:2]

    zero_BKGW = jnp.zeros_like(q_BKGWH[..., 0], jnp.float32)
    _, lse_BKGW = log_sum_exp(*jax.lax.fori_loop(0, blocks, add_block, (zero_BKGW + LOWEST, zero_BKGW)))
    if scoring.sinks_N is not None:
        lse_BKGW = jnp.logaddexp(lse_BKGW, scoring.sinks_N.astype(jnp.float32).reshape(K, N // K, 1))
    shift_BKGW = finite_or_zero(lse_BKGW)

    def add_votes(i, votes_BKGS):
        at, s_BKGWC = block_scores(i)
        return jax.lax.dynamic_update_slice_in_dim(votes_BKGS, jnp.exp(s_BKGWC - shift_BKGW[..., None]).sum(-2), at, 3)

    votes_BKGS = jax.lax.fori_loop(0, blocks, add_votes, jnp.broadcast_to(zero_BKGW[..., :1], (B, K, N // K, S)))
    prefix_BS = jnp.arange(S) < lengths_B[:, None] - W
    return pooled(compression, jnp.where(prefix_BS[:, None, None], votes_BKGS, 0.0)).mean(2)


def _block_scores(scoring: Scoring, q_BKGWH, k_BKSH, position_BW, at: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(at, masked scores s_BKGWC) of the block of slots from `at` on."""
    size = min(BLOCK, k_BKSH.shape[2])
    k_BKCH = jax.lax.dynamic_slice_in_dim(k_BKSH, at, size, 2).astype(q_BKGWH.dtype)
    s_BKGWC = scoring.scale * jnp.einsum("BKGWH,BKCH->BKGWC", q_BKGWH, k_BKCH, preferred_element_type=jnp.float32)
    if scoring.k_scales_BKS is not None:
        k_scales_BKC = jax.lax.dynamic_slice_in_dim(scoring.k_scales_BKS, at, size, 2)
        s_BKGWC *= k_scales_BKC[:, :, None, None].astype(jnp.float32)
    s_BKGWC, _ = soft_cap(s_BKGWC, scoring.softcap)
    visible_BWC = at + jnp.arange(size) <= position_BW[..., None]
    return at, jnp.where(visible_BWC[:, None, None], s_BKGWC, -jnp.inf)


def _by_kv_head(q_BWNH: jax.Array, K: int) -> jax.Array:
    """[B, W, K, G, H], sharded as before; a plain reshape loses the sharding of a dimension of 1."""
    (B, W, N, H), spec = q_BWNH.shape, spec_of(q_BWNH)
    split = P(*spec[:3], None, *spec[3:]) if any(spec) else None
    return jnp.reshape(q_BWNH, (B, W, K, N // K, H), out_sharding=split)


def pooled(compression: Compression, votes_BKGS: jax.Array) -> jax.Array:
    """The mean (always over `kernel` slots) or the maximum of each slot's neighbourhood; beyond both ends there is 0."""
    sides = compression.kernel // 2
    shape, strides, padding = (1, 1, 1, compression.kernel), (1,) * 4, [(0, 0)] * 3 + [(sides, sides)]
    if compression.pooling == "max":
        return jax.lax.reduce_window(votes_BKGS, -jnp.inf, jax.lax.max, shape, strides, padding)
    return jax.lax.reduce_window(votes_BKGS, 0.0, jax.lax.add, shape, strides, padding) / compression.kernel


def counts(compression: Compression, scores_BKS: jax.Array, budget_B) -> jax.Array:
    """Slots that each key/value head keeps [B, K], int32: the request's budget, or with adakv a share of K budgets.

    Ada-KV: every head keeps its own best `floor` x cap slots (at least one); the remaining slots go to the best of all heads.
    """
    B, K, S = scores_BKS.shape
    if compression.method != "adakv":
        return jnp.broadcast_to(jnp.asarray(budget_B, jnp.int32)[:, None], (B, K))
    spec = spec_of(scores_BKS)
    if "tensor" in spec:
        scores_BKS = jax.sharding.reshard(scores_BKS, P(spec[0], None, None))
    floor = max(1, int(compression.floor * compression.cap))
    best_BKC, slot_BKC = jax.lax.top_k(scores_BKS, min(S, K * compression.cap))
    best_BKC = jnp.where(jnp.arange(best_BKC.shape[-1]) < floor, jnp.inf, best_BKC)
    head_BKC = jnp.zeros_like(slot_BKC) + jnp.arange(K, dtype=jnp.int32)[:, None]
    order = [x.reshape(B, -1) for x in (-best_BKC, slot_BKC, head_BKC)]
    head_BM = jax.lax.sort(order, dimension=1, num_keys=3)[-1][:, : K * compression.cap]
    kept_BM = jnp.arange(head_BM.shape[1]) < K * jnp.asarray(budget_B)[:, None]
    return jnp.sum(kept_BM[..., None] & (head_BM[..., None] == jnp.arange(K)), axis=1, dtype=jnp.int32)


def kept_slots(scores_BKS: jax.Array, counts_BK: jax.Array, slots: int) -> jax.Array:
    """The `counts_BK` slots of each head with the highest scores, ascending, then S, which is no slot: [B, K, slots] int32."""
    S = scores_BKS.shape[-1]
    best_BKC = jax.lax.top_k(scores_BKS, min(slots, S))[1]
    index_BKC = jnp.sort(jnp.where(jnp.arange(best_BKC.shape[-1]) < counts_BK[..., None], best_BKC, S))
    return jnp.pad(index_BKC, [(0, 0), (0, 0), (0, slots - best_BKC.shape[-1])], constant_values=S)


def compacted(arrays, index_BKC: jax.Array):
    """Every array of a tree, [B, K, S] or [B, K, S, H], at the slots of `kept_slots`; zeros after them."""

    def take(x):
        index = index_BKC.reshape(index_BKC.shape + (1,) * (x.ndim - 3))
        return jnp.take_along_axis(x, index, axis=2, mode="fill", fill_value=0)

    return jax.tree.map(take, arrays)


def compressed(compression: Compression, model: Model, cache: Cache, queries: Sequence, room: int, run: Runner) -> Cache:
    """The cache with the kept slots alone in every layer without a ring, and slots for `room` more tokens of each request.

    `queries` are each layer's, of the last `window` tokens of each request, with its sinks. Shorter requests are unchanged.
    """
    lengths_B = np.asarray(jax.device_get(cache.lengths_B))
    layers = list(cache.layers)
    global_layers = [i for i, layer in enumerate(layers) if layer.evicted_BK is not None]
    for i, budget_B in zip(global_layers, budgets(compression, lengths_B, len(global_layers)), strict=True):
        layer, (q_BWNH, sinks_N) = layers[i], queries[i]
        budget_B = jax.device_put(budget_B, layer.k_BKSH.sharding.update(spec=P(BATCH)))
        window = q_BWNH, sinks_N, cache.lengths_B, budget_B
        static_args = compression, attention_options(model, model.layers[i])
        scores_BKS, counts_BK = run(_scores_and_counts, static_args, jax.random.key(SEED + i), window, layer)
        slots = rounded_slots(int(jax.device_get(counts_BK).max()) + room)
        layers[i] = run(_compacted_layer, (slots,), layer, scores_BKS, counts_BK, cache.lengths_B)
    return cache._replace(layers=tuple(layers))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _scores_and_counts(compression: Compression, options: AttentionOptions, key, window: tuple, layer: LayerCache):
    q_BWNH, sinks_N, lengths_B, budget_B = window
    q_BWNH, layer = _without_context(q_BWNH), jax.tree.map(_without_context, layer)
    scoring = Scoring(options.scale, options.softcap, sinks_N, layer.k_scales_BKS)
    scores_BKS = scores(compression, key, q_BWNH, layer.k_BKSH, lengths_B, scoring)
    return scores_BKS, counts(compression, scores_BKS, budget_B)


@functools.partial(jax.jit, static_argnums=0)
def _compacted_layer(slots: int, layer: LayerCache, scores_BKS, counts_BK, lengths_B) -> LayerCache:
    index_BKC = kept_slots(scores_BKS, counts_BK, slots)
    arrays = compacted(jax.tree.map(_without_context, layer[:4]), index_BKC)
    new = LayerCache(*arrays, lengths_B[:, None] - counts_BK)
    return jax.tree.map(jax.reshard, new, partition_specs(new))


def _without_context(x: jax.Array) -> jax.Array:
    """The same array, typed as not sharded over `context`, which has one device here."""
    return jax.reshard(x, P(*(None if axis == AXIS else axis for axis in spec_of(x))))
