"""Attention over a sequence that is split over devices: each shard of the `context` axis holds some of its tokens.

A local layer gets the keys of its window that lie before its own tokens (`halo`). A global layer all-gathers the keys
(`gather`), passes them round a ring and merges results by the log-sum-exp (`ring`, after "Ring Attention", arXiv 2310.01889),
or exchanges tokens for heads by an all-to-all (`ulysses`, after "DeepSpeed Ulysses", arXiv 2309.14509). All compute the same.

The last tokens of a causal sequence cost more than its first. In zigzag order the sequence is cut into 2c slices, and shard i
of c holds slice i, an early one, and slice 2c - 1 - i, a late one. `to_zigzag` puts [B, T] arrays into this order and
`from_zigzag` undoes it; between them only this file depends on the order of the tokens.

Letters: B batch, T tokens, S keys, N query heads, K key/value heads, H head size; c shards.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn import kernels
from hybrid_attn.kernels.interface import AttentionOptions, Keys, Pair, Queries
from hybrid_attn.kernels.softmax import merged
from hybrid_attn.parallel.mesh import BATCH, HEADS_BTNH, TOKENS_BT, spec_of

AXIS = "context"
SlicePair = tuple[int | jax.Array, int | jax.Array]  # which slice of the queries, and which of the keys


class ContextOptions(NamedTuple):
    """The static arguments: `scheme` is a name in `SCHEMES`, `zigzag` whether the tokens are in zigzag order (`to_zigzag`)."""

    attention: AttentionOptions
    kernel: str
    scheme: str
    zigzag: bool

    @property
    def slices(self) -> int:
        """How many slices of the sequence a shard has."""
        return 2 if self.zigzag else 1


def attend(options: ContextOptions, queries: Queries, keys: Keys, sinks_N: jax.Array | None = None) -> jax.Array:
    """o_BTNH of causal self-attention over a sequence that the mesh splits; its contract is that of `kernels.attend`."""
    options = options._replace(zigzag=_is_zigzag(options.zigzag))
    attend_shard = SCHEMES[options.scheme] if jax.sharding.get_abstract_mesh().shape[AXIS] > 1 else _on_this_shard
    specs = Queries(HEADS_BTNH, TOKENS_BT, TOKENS_BT), Keys(HEADS_BTNH, HEADS_BTNH, TOKENS_BT, TOKENS_BT), P("tensor")
    shard = functools.partial(attend_shard, options)
    return jax.shard_map(shard, in_specs=specs, out_specs=HEADS_BTNH, check_vma=False)(queries, keys, sinks_N)


def chunk_segments(pos_BT: jax.Array, seg_BT: jax.Array, chunk: int) -> jax.Array:
    """A segment for each chunk of positions of each document; like those of `seg_BT` they never decrease along the sequence.

    Each document has as many segments for its chunks as int32 allows with T documents in a sequence, and at least enough for T
    tokens. Positions beyond those share the last chunk of their document; they never see another document.
    """
    T = pos_BT.shape[1]
    chunks = max(T // chunk + 1, jnp.iinfo(jnp.int32).max // (T + 1))
    return jnp.where(seg_BT > 0, seg_BT * chunks + jnp.minimum(pos_BT // chunk, chunks - 1), 0)


def to_zigzag(arrays: Any, zigzag: bool) -> Any:
    """Arrays [B, T, ...] in reading order, put into zigzag order if `zigzag` and the mesh splits the sequence."""
    return _over_context(_to_pairs, arrays) if _is_zigzag(zigzag) else arrays


def from_zigzag(arrays: Any, zigzag: bool) -> Any:
    """The inverse of `to_zigzag` with the same `zigzag`."""
    return _over_context(_from_pairs, arrays) if _is_zigzag(zigzag) else arrays


def _is_zigzag(zigzag: bool) -> bool:
    return zigzag and jax.sharding.get_abstract_mesh().shape[AXIS] > 1


def _over_context(move: Callable, arrays: Any) -> Any:
    out_specs = jax.tree.map(spec_of, arrays)
    return jax.shard_map(lambda x: jax.tree.map(move, x), out_specs=out_specs, check_vma=False)(arrays)


def _even_and_odd() -> tuple[list, list]:
    """For each even and for each odd one of 2c slices: the shard that has it in reading order, and in zigzag order."""
    c = jax.lax.axis_size(AXIS)
    shards = [(slice_ // 2, min(slice_, 2 * c - 1 - slice_)) for slice_ in range(2 * c)]
    return shards[::2], shards[1::2]


def _to_pairs(x_BT: jax.Array) -> jax.Array:
    even, odd = (jax.lax.ppermute(x, AXIS, pairs) for x, pairs in zip(_split(x_BT, 2), _even_and_odd(), strict=True))
    is_even = jax.lax.axis_index(AXIS) % 2 == 0  # an even shard's early slice is even
    return jnp.concatenate([jnp.where(is_even, even, odd), jnp.where(is_even, odd, even)], 1)


def _from_pairs(x_BT: jax.Array) -> jax.Array:
    early, late = _split(x_BT, 2)
    is_even = jax.lax.axis_index(AXIS) % 2 == 0
    even, odd = jnp.where(is_even, early, late), jnp.where(is_even, late, early)
    inverse = [[(zigzag, reading) for reading, zigzag in pairs] for pairs in _even_and_odd()]
    return jnp.concatenate([jax.lax.ppermute(x, AXIS, pairs) for x, pairs in zip((even, odd), inverse, strict=True)], 1)


def _split(tree: Any, count: int) -> list:
    """Trees of the `count` equal parts of every array along axis 1."""
    leaves, treedef = jax.tree.flatten(tree)
    return [jax.tree.unflatten(treedef, part) for part in zip(*(jnp.split(x, count, axis=1) for x in leaves), strict=True)]


def _concatenate(trees: list) -> Any:
    """One tree, of every array concatenated along axis 1."""
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *trees)


def _on_this_shard(options: ContextOptions, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    """Queries and keys that are both on this shard."""
    return kernels.attend(options.kernel, options.attention, queries, keys, sinks_N)[0]


def over_slices(function: Callable, weight: jax.Array, arrays: Any, count: int, zigzag: bool) -> jax.Array:
    """[B, T, ...] of `function(weight, arrays, tokens)`, which computes each slice of a sequence that the mesh may split.

    `function` gets the arrays of up to `count` tokens right before the slice and then those of the slice, which has `tokens`
    tokens. At the beginning of the sequence the earlier ones are missing, or zeros.
    """
    slices = 2 if _is_zigzag(zigzag) else 1

    def shard(weight, arrays):
        own = _split(arrays, slices)
        with jax.named_scope("halo"):
            before = _tokens_before(own, count)
        with_before = [_concatenate([*earlier, of_slice]) for earlier, of_slice in zip(before, own, strict=True)]
        weight = jax.lax.pcast(weight, (*BATCH, AXIS), to="varying")  # its gradient is summed over the shards
        return jnp.concatenate([function(weight, x, _tokens(own[0])) for x in with_before], 1)

    return jax.shard_map(shard, out_specs=spec_of(jax.tree.leaves(arrays)[0]))(weight, arrays)


def _halo(options: ContextOptions, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    """Each slice against itself and the `window` keys before it: one too many, but often a multiple of a TPU's tiles."""
    own = _split(keys, options.slices)
    with jax.named_scope("halo"):
        before = _tokens_before(own, options.attention.window)
    all_keys = [_concatenate([*keys_before, slice_keys]) for keys_before, slice_keys in zip(before, own, strict=True)]
    parts = zip(_split(queries, options.slices), all_keys, strict=True)
    return jnp.concatenate([_on_this_shard(options, *part, sinks_N) for part in parts], 1)


def _tokens_before(own: list, number: int) -> list[list]:
    """For each slice of this shard the arrays of the `number` tokens right before it, in reading order.

    The first slices get fewer tokens, or zeros, which are padding.
    """
    size, num_slices = _tokens(own[0]), jax.lax.axis_size(AXIS) * len(own)
    before: list[list] = [[] for _ in own]
    for distance in range(1, num_slices):  # slices
        count = min(size, number - (distance - 1) * size)
        if count <= 0:
            break
        tails = [jax.tree.map(lambda x, first=size - count: x[:, first:], arrays) for arrays in own]
        for arrays_before, received in zip(before, _slices_before(tails, distance), strict=True):
            arrays_before.insert(0, received)
    return before


def _tokens(tree: Any) -> int:
    """The number of tokens of arrays [B, T, ...]."""
    return jax.tree.leaves(tree)[0].shape[1]


def _slices_before(slices: list, distance: int) -> list:
    """For each slice of this shard the one that lies `distance` slices before it; zeros before the sequence."""
    c, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    before_early = _permute(slices[0], [(shard, shard + distance) for shard in range(c - distance)])
    if len(slices) == 1:
        return [before_early]
    # The slice before a late one is a late one of another shard, or in the first half of the sequence an early one.
    late = _permute(slices[1], [(shard, shard - distance) for shard in range(distance, c)])
    pairs = [(shard, 2 * c - 1 - distance - shard) for shard in range(c) if 0 <= 2 * c - 1 - distance - shard < c]
    if pairs == [(c - 1, c - 1)]:
        early = jax.tree.map(lambda x: jnp.where(i == c - 1, x, 0), slices[0])
    else:
        early = _permute(slices[0], pairs)
    return [before_early, jax.tree.map(jnp.add, late, early)]  # zeros where nothing was sent


def _permute(tree: Any, pairs: list[tuple[int, int]]) -> Any:
    """Shard b gets the arrays of shard a for each pair (a, b), and zeros if it is in no pair."""
    if not pairs:
        return jax.tree.map(jnp.zeros_like, tree)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)


def _gather(options: ContextOptions, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    """Each slice against all keys."""
    with jax.named_scope("gather"):
        all_keys = jax.tree.map(lambda x: _all_gather(x, options), keys)
    outputs = [_on_this_shard(options, part, all_keys, sinks_N) for part in _split(queries, options.slices)]
    return jnp.concatenate(outputs, 1)


def _all_gather(x_BT: jax.Array, options: ContextOptions) -> jax.Array:
    """The tokens of all shards, in reading order."""
    return _reading_order(jax.lax.all_gather(x_BT, AXIS, axis=1, tiled=True), options)


def _ulysses(options: ContextOptions, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    """An all-to-all from some tokens of all heads to all tokens of some heads, and back."""
    c, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)

    def to_heads(x_BTNH):
        return _reading_order(jax.lax.all_to_all(x_BTNH, AXIS, split_axis=2, concat_axis=1, tiled=True), options)

    with jax.named_scope("ulysses"):
        q_BTNH, k_BSKH, v_BSKH = to_heads(queries.q_BTNH), to_heads(keys.k_BSKH), to_heads(keys.v_BSKH)
        pos_BS, seg_BS = _all_gather(keys.pos_BS, options), _all_gather(keys.seg_BS, options)
    sinks = None if sinks_N is None else jax.lax.dynamic_slice_in_dim(sinks_N, i * (len(sinks_N) // c), len(sinks_N) // c)
    o_BTNH = _on_this_shard(options, Queries(q_BTNH, pos_BS, seg_BS), Keys(k_BSKH, v_BSKH, pos_BS, seg_BS), sinks)
    with jax.named_scope("ulysses"):
        return jax.lax.all_to_all(_shards_order(o_BTNH, options), AXIS, split_axis=1, concat_axis=2, tiled=True)


def _reading_order(x_BS: jax.Array, options: ContextOptions) -> jax.Array:
    """The concatenated tokens of all shards, put into reading order."""
    if not options.zigzag:
        return x_BS
    pairs = x_BS.reshape(x_BS.shape[0], jax.lax.axis_size(AXIS), 2, -1, *x_BS.shape[2:])
    return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], 1).reshape(x_BS.shape)


def _shards_order(x_BS: jax.Array, options: ContextOptions) -> jax.Array:
    """The inverse of `_reading_order`."""
    if not options.zigzag:
        return x_BS
    c = jax.lax.axis_size(AXIS)
    slices = x_BS.reshape(x_BS.shape[0], 2 * c, -1, *x_BS.shape[2:])
    return jnp.stack([slices[:, :c], slices[:, c:][:, ::-1]], 2).reshape(x_BS.shape)


def _ring(options: ContextOptions, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    """Keys travel from shard to shard; the results of each step are merged by their log-sum-exp."""
    if kernels.KERNELS[options.kernel].backward is None:
        raise NotImplementedError(
            f'{options.kernel} computes no gradients of merged results, which a ring needs; use train.context="ulysses"'
        )
    o_BTNH, lse_BTN = _ring_attend(options, queries, keys)
    return o_BTNH if sinks_N is None else kernels.with_sinks(o_BTNH, lse_BTN, queries.seg_BT, sinks_N)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attend(options: ContextOptions, queries: Queries, keys: Keys) -> Pair:
    """(o_BTNH, lse_BTN) of the queries of this shard to the keys of all shards."""
    return _ring_forward(options, queries, keys)[0]


def _ring_forward(options: ContextOptions, queries: Queries, keys: Keys):
    kernel = kernels.KERNELS[options.kernel]

    def add_keys(results: Pair, keys: Keys, pairs: list[SlicePair]) -> Pair:
        for a, b in pairs:
            new = kernel.forward(options.attention, _slice(queries, a, options), _slice(keys, b, options))
            results = _with_slice(results, a, merged(_slice(results, a, options), new), options)
        return results

    def step(carry, distance):
        results, keys = carry
        next_keys = _to_next_shard(keys)  # they travel meanwhile
        return (add_keys(results, keys, _visible(options, distance)), next_keys), None

    c, shape = jax.lax.axis_size(AXIS), queries.q_BTNH.shape
    results = jnp.zeros(shape, jnp.float32), jnp.full(shape[:3], -jnp.inf)
    results = add_keys(results, keys, _visible_at_first(options))
    (results, keys_of_last), _ = jax.lax.scan(step, (results, keys), jnp.arange(c - 1))
    o_BTNH, lse_BTN = add_keys(results, keys_of_last, _visible(options, c - 1))
    outputs = kernels.name_outputs(o_BTNH.astype(queries.q_BTNH.dtype), lse_BTN)
    return outputs, (queries, keys, outputs)


def _visible_at_first(options: ContextOptions) -> list[SlicePair]:
    """What `_visible` leaves out of a shard's own keys: its early slice sees itself."""
    return [(0, 0)] if options.zigzag else []


def _visible(options: ContextOptions, distance: int | jax.Array) -> list[SlicePair]:
    """Slices (a, b) of this shard's queries and of the keys of the shard `distance` before it on the ring, where a may see b.

    In zigzag order a late slice sees every early one, and beside it either the early slice sees the early one or the late slice
    the late one, by which of the two shards comes first.
    """
    if not options.zigzag:
        return [(0, 0)]
    is_before = (0 < distance) & (distance <= jax.lax.axis_index(AXIS))
    same = jnp.where(is_before, 0, 1)
    return [(1, 0), (same, same)]


def _slice(tree: Any, i: int | jax.Array, options: ContextOptions) -> Any:
    """Slice i of every array of a shard."""
    return jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, i * _size(x, options), _size(x, options), 1), tree)


def _with_slice(tree: Any, i: int | jax.Array, part: Any, options: ContextOptions) -> Any:
    """Every array of a shard with a new slice i."""
    return jax.tree.map(lambda x, y: jax.lax.dynamic_update_slice_in_dim(x, y, i * _size(x, options), 1), tree, part)


def _size(x_BT: jax.Array, options: ContextOptions) -> int:
    return x_BT.shape[1] // options.slices


def _to_next_shard(tree: Any) -> Any:
    c = jax.lax.axis_size(AXIS)
    with jax.named_scope("ring"):
        return _permute(tree, [(shard, (shard + 1) % c) for shard in range(c)])


def _ring_backward(options: ContextOptions, residuals, grads: Pair):
    """Keys travel round the ring again, and the gradients of keys and values with them back to their own shard."""
    queries, keys, outputs = residuals
    kernel, c = kernels.KERNELS[options.kernel], jax.lax.axis_size(AXIS)

    def add(total: Any, i, term: Any) -> Any:
        terms = jax.tree.map(lambda x, y: x + y.astype(jnp.float32), _slice(total, i, options), term)
        return _with_slice(total, i, terms, options)

    def add_gradients(dq, keys: Keys, dkv, pairs: list[SlicePair]):
        for a, b in pairs:
            of_a = _slice((queries, outputs, grads), a, options)  # the outputs are those of all keys
            new_dq, *new_dkv = kernel.backward(options.attention, of_a[0], _slice(keys, b, options), *of_a[1:])
            dq, dkv = add(dq, a, new_dq), add(dkv, b, tuple(new_dkv))
        return dq, dkv

    def step(carry, distance):
        dq, keys, dkv = carry
        dq, dkv = add_gradients(dq, keys, dkv, _visible(options, distance))
        return (dq, _to_next_shard(keys), _to_next_shard(dkv)), None

    dq, *dkv = (jnp.zeros(x.shape, jnp.float32) for x in (queries.q_BTNH, keys.k_BSKH, keys.v_BSKH))
    dq, dkv = add_gradients(dq, keys, tuple(dkv), _visible_at_first(options))
    (dq, keys_of_last, dkv), _ = jax.lax.scan(step, (dq, keys, dkv), jnp.arange(c - 1))
    dq, dkv = add_gradients(dq, keys_of_last, dkv, _visible(options, c - 1))
    dk_BSKH, dv_BSKH = _to_next_shard(dkv)
    dkeys = Keys(dk_BSKH.astype(keys.k_BSKH.dtype), dv_BSKH.astype(keys.v_BSKH.dtype), None, None)
    return Queries(dq.astype(queries.q_BTNH.dtype), None, None), dkeys


_ring_attend.defvjp(_ring_forward, _ring_backward)

SCHEMES = {"halo": _halo, "gather": _gather, "ring": _ring, "ulysses": _ulysses}
