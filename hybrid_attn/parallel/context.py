"""A sequence over devices: each shard of the `context` axis holds some of the tokens and asks the others for keys.

A local layer asks for the keys of its window that lie before its own tokens (`halo`). A global one has all keys sent to all
shards (`gather`), passes them round while it computes and merges by the log-sum-exp (`ring`, after "Ring Attention",
arXiv 2310.01889), or trades tokens for heads (`ulysses`, after "DeepSpeed Ulysses", arXiv 2309.14509). All give the same.

The last tokens of a causal sequence cost more than its first, so in zigzag order shard i of c holds two slices of the sequence:
the early one i and the late one 2c - 1 - i of 2c. `to_zigzag` puts [B, T] arrays into this order and `from_zigzag` undoes it;
between them only this file knows in which order the tokens are.

Letters: B batch, T tokens, S keys, N query heads, K key/value heads, H head size; c shards.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from hybrid_attn import kernels
from hybrid_attn.kernels.softmax import merged
from hybrid_attn.parallel.mesh import HEADS_BTNH, TOKENS_BT, spec_of

AXIS = "context"


class Keys(NamedTuple):
    """Keys and values with their places, [B, S, ...] each."""

    k_BSKH: jax.Array
    v_BSKH: jax.Array
    pos_BS: jax.Array
    seg_BS: jax.Array


class Queries(NamedTuple):
    """Queries with their places, [B, T, ...] each."""

    q_BTNH: jax.Array
    pos_BT: jax.Array
    seg_BT: jax.Array


class Static(NamedTuple):
    """What is known while tracing; `slices` is how many a shard has."""

    window: int | None
    scale: float
    softcap: float | None
    kernel: str
    slices: int


def attend(
    q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT, sinks_N=None, *, window, chunk, scale, softcap, kernel, scheme, zigzag
) -> jax.Array:
    """o_BTNH of causal self-attention over a sequence that the mesh splits; the contract of the mask is `kernels.attend`'s.

    `chunk` (tokens) keeps each query to the keys of its own chunk of positions: a chunk is a segment of its document. `scheme`
    is a name in `SCHEMES`; `zigzag` is whether the tokens are in zigzag order (`to_zigzag`).
    """
    if chunk is not None:
        seg_BT = chunk_segments(pos_BT, seg_BT, chunk)
        window = chunk
    static = Static(window, scale, softcap, kernel, 2 if _is_zigzag(zigzag) else 1)

    def shard(q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT, *sinks):
        attend_here = SCHEMES[scheme] if jax.lax.axis_size(AXIS) > 1 else _alone
        queries, keys = Queries(q_BTNH, pos_BT, seg_BT), Keys(k_BTKH, v_BTKH, pos_BT, seg_BT)
        return attend_here(static, queries, keys, sinks[0] if sinks else None)

    sinks, specs = ((), ()) if sinks_N is None else ((sinks_N,), (P("tensor"),))
    in_specs = (HEADS_BTNH, HEADS_BTNH, HEADS_BTNH, TOKENS_BT, TOKENS_BT, *specs)
    return jax.shard_map(shard, in_specs=in_specs, out_specs=HEADS_BTNH, check_vma=False)(
        q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT, *sinks
    )


def chunk_segments(pos_BT: jax.Array, seg_BT: jax.Array, chunk: int) -> jax.Array:
    """A segment for each chunk of positions of each document; they rise along a row as those of `seg_BT` do.

    Each document has as many numbers for its chunks as int32 allows with T documents in a row, and at least enough for T
    tokens. Positions beyond those share the last chunk of their document; other documents they never see.
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
    specs = jax.tree.map(spec_of, arrays)
    return jax.shard_map(lambda x: jax.tree.map(move, x), in_specs=(specs,), out_specs=specs, check_vma=False)(arrays)


def _even_and_odd() -> tuple[list, list]:
    """For the even and for the odd ones of 2c slices: which shard has it in reading order, and which in zigzag order."""
    c = jax.lax.axis_size(AXIS)
    homes = [(slice_ // 2, min(slice_, 2 * c - 1 - slice_)) for slice_ in range(2 * c)]
    return homes[::2], homes[1::2]


def _to_pairs(x_BT: jax.Array) -> jax.Array:
    even, odd = (jax.lax.ppermute(x, AXIS, homes) for x, homes in zip(_parts(x_BT, 2), _even_and_odd(), strict=True))
    first = jax.lax.axis_index(AXIS) % 2 == 0  # an even shard's early slice is even
    return jnp.concatenate([jnp.where(first, even, odd), jnp.where(first, odd, even)], 1)


def _from_pairs(x_BT: jax.Array) -> jax.Array:
    early, late = _parts(x_BT, 2)
    first = jax.lax.axis_index(AXIS) % 2 == 0
    even, odd = jnp.where(first, early, late), jnp.where(first, late, early)
    back = [[(there, here) for here, there in homes] for homes in _even_and_odd()]
    return jnp.concatenate([jax.lax.ppermute(x, AXIS, homes) for x, homes in zip((even, odd), back, strict=True)], 1)


def _parts(tree: Any, count: int) -> list:
    """Trees of the `count` equal parts of every array along axis 1."""
    leaves, form = jax.tree.flatten(tree)
    return [jax.tree.unflatten(form, part) for part in zip(*(jnp.split(x, count, axis=1) for x in leaves), strict=True)]


def _joined(trees: list) -> Any:
    return jax.tree.map(lambda *parts: jnp.concatenate(parts, 1), *trees)


def _kernel(static: Static, queries: Queries, keys: Keys, sinks_N=None) -> tuple[jax.Array, jax.Array]:
    return kernels.attend(
        queries.q_BTNH, keys.k_BSKH, keys.v_BSKH, queries.pos_BT, keys.pos_BS, queries.seg_BT, keys.seg_BS,
        window=static.window, scale=static.scale, softcap=static.softcap, sinks_N=sinks_N, kernel=static.kernel,
    )  # fmt: skip


def _alone(static: Static, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    return _kernel(static, queries, keys, sinks_N)[0]


def _halo(static: Static, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    """Each slice against itself and the `window` keys before it, which are asked of one slice, or of more if it is longer.

    One key fewer would do; a window is a whole number of a TPU's tiles, and its keys but one are not.
    """
    own = _parts(keys, static.slices)
    with jax.named_scope("halo"):
        before = _before(own, static.window)
    found = []
    for queries_here, keys_here, keys_before in zip(_parts(queries, static.slices), own, before, strict=True):
        found.append(_kernel(static, queries_here, _joined([*keys_before, keys_here]), sinks_N)[0])
    return jnp.concatenate(found, 1)


def _before(own: list[Keys], window: int) -> list[list[Keys]]:
    """For each slice of this shard the keys right before it, in reading order; where the row begins later, padding."""
    c, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)
    size, total = own[0].seg_BS.shape[1], c * len(own)
    before: list[list[Keys]] = [[] for _ in own]
    for away in range(1, total):  # slices
        wanted = min(size, window - (away - 1) * size)
        if wanted <= 0:
            break
        tails = [jax.tree.map(lambda x, first=size - wanted: x[:, first:], keys) for keys in own]
        found = [_sent(tails[0], [(shard, shard + away) for shard in range(c - away)])]
        if len(own) == 2:
            # The slice before a late one is a late one of another shard, or past the middle of the row an early one.
            late = _sent(tails[1], [(shard, shard - away) for shard in range(away, c)])
            turn = [(shard, 2 * c - 1 - away - shard) for shard in range(c) if 0 <= 2 * c - 1 - away - shard < c]
            if turn == [(c - 1, c - 1)]:
                early = jax.tree.map(lambda x: jnp.where(i == c - 1, x, 0), tails[0])
            else:
                early = _sent(tails[0], turn)
            found.append(jax.tree.map(jnp.add, late, early))  # zeros where nothing was sent
        for keys_before, new in zip(before, found, strict=True):
            keys_before.insert(0, new)
    return before


def _sent(tree: Any, pairs: list[tuple[int, int]]) -> Any:
    """What shard `b` gets of shard `a` for each (a, b), and zeros where nothing comes."""
    if not pairs:
        return jax.tree.map(jnp.zeros_like, tree)
    return jax.tree.map(lambda x: jax.lax.ppermute(x, AXIS, pairs), tree)


def _gather(static: Static, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    """Each slice against all keys."""
    with jax.named_scope("gather"):
        whole = jax.tree.map(lambda x: _reading_order(jax.lax.all_gather(x, AXIS, axis=1, tiled=True), static), keys)
    return jnp.concatenate([_kernel(static, part, whole, sinks_N)[0] for part in _parts(queries, static.slices)], 1)


def _ulysses(static: Static, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    """All tokens of some heads here, for some tokens of all heads."""
    c, i = jax.lax.axis_size(AXIS), jax.lax.axis_index(AXIS)

    def swap(x_BTNH):
        return _reading_order(jax.lax.all_to_all(x_BTNH, AXIS, split_axis=2, concat_axis=1, tiled=True), static)

    def whole(x_BT):
        return _reading_order(jax.lax.all_gather(x_BT, AXIS, axis=1, tiled=True), static)

    with jax.named_scope("ulysses"):
        q_BTNH, k_BSKH, v_BSKH = swap(queries.q_BTNH), swap(keys.k_BSKH), swap(keys.v_BSKH)
        pos_BS, seg_BS = whole(keys.pos_BS), whole(keys.seg_BS)
    sinks = None if sinks_N is None else jax.lax.dynamic_slice_in_dim(sinks_N, i * (len(sinks_N) // c), len(sinks_N) // c)
    o_BTNH, _ = _kernel(static, Queries(q_BTNH, pos_BS, seg_BS), Keys(k_BSKH, v_BSKH, pos_BS, seg_BS), sinks)
    with jax.named_scope("ulysses"):
        return jax.lax.all_to_all(_shards_order(o_BTNH, static), AXIS, split_axis=1, concat_axis=2, tiled=True)


def _reading_order(x_BS: jax.Array, static: Static) -> jax.Array:
    """What all shards hold, one after the other, in reading order."""
    if static.slices == 1:
        return x_BS
    pairs = x_BS.reshape(x_BS.shape[0], jax.lax.axis_size(AXIS), 2, -1, *x_BS.shape[2:])
    return jnp.concatenate([pairs[:, :, 0], pairs[:, ::-1, 1]], 1).reshape(x_BS.shape)


def _shards_order(x_BS: jax.Array, static: Static) -> jax.Array:
    """The inverse of `_reading_order`."""
    if static.slices == 1:
        return x_BS
    c = jax.lax.axis_size(AXIS)
    slices = x_BS.reshape(x_BS.shape[0], 2 * c, -1, *x_BS.shape[2:])
    return jnp.stack([slices[:, :c], slices[:, c:][:, ::-1]], 2).reshape(x_BS.shape)


def _ring(static: Static, queries: Queries, keys: Keys, sinks_N) -> jax.Array:
    """Keys travel from shard to shard; what each visit gives is merged by its log-sum-exp."""
    if kernels.KERNELS[static.kernel].backward is None:
        raise NotImplementedError(
            f'{static.kernel} computes no gradients of merged results, which a ring needs; use train.context="ulysses"'
        )
    q_BTNH, *places = queries
    o_BTNH, lse_BTN = _ring_attend(static, q_BTNH, keys.k_BSKH, keys.v_BSKH, *places)
    if sinks_N is not None:
        o_BTNH, _ = kernels.with_sinks(o_BTNH, lse_BTN, queries.seg_BT, sinks_N)
    return o_BTNH


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ring_attend(static: Static, q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT):
    return _ring_forward(static, q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT)[0]


def _ring_forward(static: Static, q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT):
    queries = _parts(Queries(q_BTNH, pos_BT, seg_BT), static.slices)
    keys = Keys(k_BTKH, v_BTKH, pos_BT, seg_BT)

    def visit(found: list, keys: Keys) -> list:
        found, parts = list(found), _parts(keys, static.slices)
        for a, b in _visible(static):
            found[a] = merged(found[a], _kernel(static, queries[a], parts[b]))
        return found

    def go_round(carry, _):
        found, keys = carry
        return (visit(found, keys), _passed_on(keys)), None  # the next keys travel meanwhile

    nothing = [(jnp.zeros(x.q_BTNH.shape, jnp.float32), jnp.full(x.q_BTNH.shape[:3], -jnp.inf)) for x in queries]
    (found, keys), _ = jax.lax.scan(go_round, (nothing, keys), None, length=jax.lax.axis_size(AXIS) - 1)
    o_BTNH, lse_BTN = _joined(visit(found, keys))
    o_BTNH, lse_BTN = kernels.name_outputs(o_BTNH.astype(q_BTNH.dtype), lse_BTN)
    return (o_BTNH, lse_BTN), (q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT, o_BTNH, lse_BTN)


def _visible(static: Static) -> list[tuple[int, int]]:
    """Which slices of one shard may see which of another: an early one never sees a late one."""
    return [(0, 0), (1, 0), (1, 1)] if static.slices == 2 else [(0, 0)]


def _passed_on(tree: Any) -> Any:
    c = jax.lax.axis_size(AXIS)
    with jax.named_scope("ring"):
        return _sent(tree, [(shard, (shard + 1) % c) for shard in range(c)])


def _ring_backward(static: Static, kept, grads):
    """Keys travel once more, and the gradients of keys and values with them until they are home."""
    q_BTNH, k_BTKH, v_BTKH, pos_BT, seg_BT, o_BTNH, lse_BTN = kept
    do_BTNH, dlse_BTN = grads
    queries = _parts(Queries(q_BTNH, pos_BT, seg_BT), static.slices)
    results = _parts((o_BTNH, lse_BTN, do_BTNH, dlse_BTN), static.slices)
    keys = Keys(k_BTKH, v_BTKH, pos_BT, seg_BT)

    def visit(dq, keys: Keys, dkv):
        dq, dkv = list(dq), [list(x) for x in _parts(dkv, static.slices)]
        parts = _parts(keys, static.slices)
        for a, b in _visible(static):
            new_dq, *new_dkv = _gradients(static, queries[a], parts[b], *results[a])
            dq[a] += new_dq
            dkv[b] = [x + new for x, new in zip(dkv[b], new_dkv, strict=True)]
        return dq, tuple(_joined(dkv))

    def go_round(carry, _):
        dq, keys, dkv = carry
        dq, dkv = visit(dq, keys, dkv)
        return (dq, _passed_on(keys), _passed_on(dkv)), None

    zeros = [jnp.zeros(x.q_BTNH.shape, jnp.float32) for x in queries]
    dkv = tuple(jnp.zeros(x.shape, jnp.float32) for x in (k_BTKH, v_BTKH))
    carry, _ = jax.lax.scan(go_round, (zeros, keys, dkv), None, length=jax.lax.axis_size(AXIS) - 1)
    dq, dkv = visit(*carry)
    dk_BTKH, dv_BTKH = _passed_on(dkv)
    dq_BTNH = jnp.concatenate(dq, 1)
    return dq_BTNH.astype(q_BTNH.dtype), dk_BTKH.astype(k_BTKH.dtype), dv_BTKH.astype(v_BTKH.dtype), None, None


def _gradients(static: Static, queries: Queries, keys: Keys, o_BTNH, lse_BTN, do_BTNH, dlse_BTN) -> list:
    """The contribution of these keys to the gradients (dq, dk, dv) of the merged result o, lse; in float32."""
    positions, segments = (queries.pos_BT, keys.pos_BS), (queries.seg_BT, keys.seg_BS)
    residuals = kernels.Residuals(queries.q_BTNH, keys.k_BSKH, keys.v_BSKH, positions, segments, o_BTNH, lse_BTN)
    options = kernels.AttentionOptions(static.window, static.scale, static.softcap)
    grads = kernels.KERNELS[static.kernel].backward(residuals, do_BTNH, dlse_BTN, options)
    return [x.astype(jnp.float32) for x in grads]


_ring_attend.defvjp(_ring_forward, _ring_backward)

SCHEMES = {"halo": _halo, "gather": _gather, "ring": _ring, "ulysses": _ulysses}
